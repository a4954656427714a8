"""Shuffle attention against its definition, written out channel by channel."""

import torch
import torch.nn.functional as F
from helpers import relative_error

from ratlip.models.attention import ShuffleAttention, shuffle, unshuffle


def test_definition():
    torch.manual_seed(0)
    channels, groups = 32, 8
    attention = ShuffleAttention(channels, groups).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_()
    x = torch.randn(3, channels, 5, 5, dtype=torch.float64)

    gated = []
    for group in x.chunk(groups, dim=1):
        first, second = group.chunk(2, dim=1)
        cw, cb, sw, sb = (
            getattr(attention, name).view(1, -1, 1, 1) for name in ("cweight", "cbias", "sweight", "sbias")
        )
        gated.append(first * torch.sigmoid(cw * first.mean((2, 3), keepdim=True) + cb))
        normed = F.group_norm(second, second.shape[1], attention.norm_weight, attention.norm_bias, 1e-5)
        gated.append(second * torch.sigmoid(sw * normed + sb))
    gated = torch.cat(gated, dim=1)
    expected = torch.empty_like(gated)
    for j in range(channels // 2):
        for g in range(2):
            expected[:, 2 * j + g] = gated[:, g * channels // 2 + j]
    shuffled = shuffle(x.transpose(0, 1)).transpose(0, 1)
    assert relative_error(attention(shuffled), expected) < 1e-12
    assert torch.equal(unshuffle(shuffle(x[0])), x[0])
