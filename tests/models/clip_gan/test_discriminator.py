"""The discriminator on feature maps of any grid and number."""

import pytest
import torch
from helpers import relative_error, small_clip_model

from ratlip.encoders.clip_towers import FrozenClip
from ratlip.models.clip_gan.discriminator import FLOOR, Discriminator


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


def test_whitened_maps_have_the_stated_covariance():
    """V / (V + floor) in each direction of variance V, and no mean at any position, of the maps it was fitted to."""
    torch.manual_seed(0)
    clip = FrozenClip(small_clip_model(64, 16), feature_blocks=[0, 2])
    maps = torch.randn(40, 2, 64, 4, 4) * torch.logspace(-2, 1, 64)[:, None, None] + torch.randn(2, 64, 4, 4)
    discriminator = Discriminator(clip, 16, whiten=True)
    discriminator.fit_whitening(maps)
    with torch.autocast("cpu", torch.bfloat16):  # is not to touch it
        prepared = discriminator.prepare(maps).double()
    assert prepared.mean(0).abs().max() < 1e-5
    for number in range(2):
        before, after = (x[:, number].movedim(1, 3).flatten(0, 2) for x in (maps.double(), prepared))
        before = before - maps[:, number].double().mean(0).movedim(0, 2).flatten(0, 1).repeat(40, 1)
        covariance = before.T @ before / len(before)
        variances = torch.linalg.eigvalsh(covariance)
        expected = variances / (variances + FLOOR * variances.mean())
        found = torch.linalg.eigvalsh(after.T @ after / len(after))
        assert relative_error(found, expected) < 1e-4


def test_whitening_is_saved_and_left_out_where_not_asked_for():
    clip = FrozenClip(small_clip_model(64, 16))
    one, other = (Discriminator(clip, 16, whiten=True) for _ in range(2))
    maps, sentence = torch.randn(5, 3, 64, 4, 4), torch.randn(5, 64)
    one.fit_whitening(maps)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(maps, sentence), other(maps, sentence))
    plain = Discriminator(clip, 16)
    assert plain.prepare(maps) is maps and not dict(plain.named_buffers())
