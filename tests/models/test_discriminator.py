"""The discriminator on feature maps of any grid and number."""

import pytest
import torch
from helpers import small_clip_model

from ratlip.clip_towers import FrozenClip
from ratlip.models.discriminator import Discriminator


@pytest.mark.parametrize(("resolution", "patch"), [(32, 32), (32, 16), (48, 16), (64, 16), (56, 8), (64, 8), (112, 8)])
@pytest.mark.parametrize("blocks", [[0], [0, 2], [0, 1, 2, 3]])
def test_any_grid_and_number_of_maps(resolution, patch, blocks):
    clip = FrozenClip(small_clip_model(resolution, patch), feature_blocks=blocks)
    discriminator = Discriminator(clip, 16)
    maps = clip.feature_maps(torch.rand(2, 3, resolution, resolution))
    logits = discriminator(maps, torch.randn(2, 64))
    assert logits.shape == (2, 1)
    with torch.no_grad():  # every position of the grid counts
        discriminator.betas.fill_(1)
        discriminator.main.gamma.fill_(1)
    maps = maps.clone().requires_grad_()
    discriminator(maps, torch.randn(2, 64)).sum().backward()
    assert (maps.grad.abs().sum((0, 1, 2)) > 0).all()


def test_released_kernels():
    clip = FrozenClip(small_clip_model(224, 32))
    kernels = [layer.kernel_size for layer in Discriminator(clip).judge if isinstance(layer, torch.nn.Conv2d)]
    assert kernels == [(4, 4), (4, 4)]
