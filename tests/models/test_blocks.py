"""The generator's and discriminator's blocks against the order of operations in which the papers write them."""

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error

from ratlip.models.blocks import DiscriminatorBlock, GeneratorBlock, fuse, resize_and_convolve


@pytest.mark.parametrize(("side", "size"), [(4, 8), (7, 8), (8, 8), (16, 28), (5, 10)])
def test_resize_and_convolve_equals_the_two_in_turn(side, size):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(6, 5, 3, padding=1).double()
    x = torch.randn(2, 6, side, side, dtype=torch.float64, requires_grad=True)
    ours, plain = resize_and_convolve(x, conv, size), conv(F.interpolate(x, (size, size), mode="nearest"))
    assert relative_error(ours, plain) < 1e-12
    weights = torch.randn_like(plain)
    wanted = (x, conv.weight, conv.bias)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), wanted) for y in (ours, plain)), strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("style", ["galip", "ratlip"])
@pytest.mark.parametrize(("side", "size"), [(8, 16), (7, 8), (16, 28)])
def test_generator_block_equals_resizing_first(style, side, size):
    torch.manual_seed(1)
    block = GeneratorBlock(32, 16, style, attention=True).double().eval()
    affines = [
        (torch.randn(2, c, 1, 1, dtype=torch.float64), torch.randn(2, c, 1, 1, dtype=torch.float64))
        for c in block.affine_channels
    ]
    x = torch.randn(2, 32, side, side, dtype=torch.float64)
    resized = F.interpolate(x, (size, size), mode="nearest")
    residual = block.conv1(fuse(resized, affines[:2]))
    expected = block.shortcut(resized) + block.conv2(fuse(residual, affines[2:]))
    assert relative_error(block(x, size, affines), expected) < 1e-10


def test_fuse_is_affine_then_leaky_relu():
    x = torch.tensor([[[[1.0, -2.0]]]])
    one = (torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), 1.0))
    assert fuse(x, [one]).flatten().tolist() == pytest.approx([4.0, -1.0])


def test_discriminator_block_starts_as_its_shortcut():
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(DiscriminatorBlock(8, 8)(x), x)
