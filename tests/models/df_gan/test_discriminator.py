"""DF-GAN's and RAT-GAN's discriminators against the order of operations in which their papers write them."""

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error

from ratlip.errors import UserError
from ratlip.models.df_gan.discriminator import Discriminator

VARIANTS = [("dfgan", False), ("ratgan", False), ("ratgan", True)]


def plain_block(block, x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(block.shortcut(x), 2) + block.gamma * block.residual(x)


@pytest.mark.parametrize(("name", "attention"), VARIANTS)
@pytest.mark.parametrize("imsize", [32, 64])
def test_equals_the_plain_order(name, attention, imsize):
    torch.manual_seed(0)
    made = Discriminator(imsize, 4, 6, name, start=0.7, attention=attention).double()
    images = torch.randn(3, 3, imsize, imsize).double()
    sentence = torch.randn(3, 6).double()
    x = made.conv_img(images)
    for block in made.blocks:
        x = plain_block(block, x)
    side = 8 if attention else 4
    assert x.shape[2:] == (side, side)
    assert relative_error(made.features(images), x) < 1e-12
    if attention:
        tiled = sentence[:, :, None, None].repeat(1, 1, 8, 8)
        scores = made.attention(torch.cat([x, tiled], 1)).sigmoid()
        weights = scores.exp() / scores.exp().sum((2, 3), keepdim=True)
        assert relative_error(made.attend(x, sentence), weights) < 1e-12
        assert 0.37 / 64 < weights.min() and weights.max() < 2.72 / 64  # of a softmax of numbers between 0 and 1
        x = plain_block(made.joint, torch.cat([x, weights * tiled], 1))
    logits = made.judge(torch.cat([x, sentence[:, :, None, None].repeat(1, 1, 4, 4)], 1))
    assert logits.shape == (3, 1, 1, 1)
    assert relative_error(made(images, sentence), logits[:, :, 0, 0]) < 1e-12


@pytest.mark.parametrize(("name", "attention"), VARIANTS)
def test_every_parameter_is_used(name, attention):
    made = Discriminator(32, 4, 6, name, start=0.5, attention=attention)
    made(torch.randn(2, 3, 32, 32), torch.randn(2, 6)).sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in made.parameters())


@pytest.mark.parametrize("attention", [False, True])
def test_starts_as_its_shortcuts(attention):
    gammas = [value for key, value in Discriminator(32, 4, attention=attention).state_dict().items() if "gamma" in key]
    assert len(gammas) == 3 and not any(gammas)


def test_parameter_counts():
    """As published, without the shortcuts of blocks that keep their width and, with attention, the block in place of
    which there is another."""

    def count(*arguments, **settings) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in Discriminator(*arguments, **settings).parameters())

    def shortcut(width: int) -> int:
        return width**2 + width

    assert count(256, 32) == 6_619_206 + 295_936 - 3 * shortcut(256)
    assert count(64, 32) == 3_210_820 + 295_936 - shortcut(256)
    assert count(256, 32, name="ratgan") == 20_170_566 - 2 * shortcut(512)
    assert count(256, 64, name="ratgan") == 80_379_526 - 2 * shortcut(1024)


def test_sizes_that_are_none():
    with pytest.raises(UserError, match="pixels, not 224"):
        Discriminator(224, 4)
