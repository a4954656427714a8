"""Shuffle attention: channel and spatial gates on groups of channels (SA-Net, arXiv 2102.00240)."""

import torch
from torch import Tensor, nn

from ratlip.models.moments import moments

EPS = 1e-5


def shuffle(x: Tensor) -> Tensor:
    """Channel shuffle of the first dimension (C, ...) -> (C, ...): channel 2 j + g was channel g * C / 2 + j."""
    return x.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


def unshuffle(x: Tensor) -> Tensor:
    """What `shuffle` undoes, (C, ...) -> (C, ...)."""
    return x.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)


class ShuffleAttention(nn.Module):
    """Gate every channel by a sigmoid of its statistics or of its normalised self, then shuffle channels.

    Gates and shuffle may change places: here channels come in shuffled, as the filters before can have them.

    The channels are cut into `groups` contiguous groups, each into halves. The first half of each group is
    gated by sigmoid(w * mean + b), the second by sigmoid(w * GroupNorm(x) + b) with one channel a norm group.
    Both are x * sigmoid(slope * x + offset) with a slope and an offset for each sample and channel, slope 0 in
    the first half, so one expression over all channels does it.

    Args:
        channels: a multiple of 2 * groups. groups: of SA-Net; 8 in the released weights.
    """

    def __init__(self, channels: int, groups: int = 8):
        super().__init__()
        self.groups = groups
        half = channels // (2 * groups)
        # One value for each channel of a half group, shared by all groups; c gates by channel, s by position.
        self.cweight = nn.Parameter(torch.zeros(half))
        self.cbias = nn.Parameter(torch.ones(half))
        self.sweight = nn.Parameter(torch.zeros(half))
        self.sbias = nn.Parameter(torch.ones(half))
        self.norm_weight = nn.Parameter(torch.ones(half))
        self.norm_bias = nn.Parameter(torch.zeros(half))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W), its channels shuffled -> (B, C, H, W)."""
        mean, variance = moments(x)  # (B, C)
        mean, variance = (unshuffle(v.T).T.unflatten(1, (self.groups, 2, -1)) for v in (mean, variance))
        mean_c, mean_s = mean.unbind(2)  # (B, groups, C / 16) each

        offset_c = self.cweight * mean_c + self.cbias
        slope_s = self.sweight * self.norm_weight * torch.rsqrt(variance[:, :, 1] + EPS)
        offset_s = self.sweight * self.norm_bias + self.sbias - slope_s * mean_s
        slope, offset = (
            shuffle(torch.stack(halves, dim=2).flatten(1).T).T[:, :, None, None].to(x.dtype)  # (B, C, 1, 1)
            for halves in ((torch.zeros_like(slope_s), slope_s), (offset_c, offset_s))
        )
        return x * torch.addcmul(offset, slope, x).sigmoid_()
