"""The generator's and discriminator's blocks against the order of operations in which the papers write them."""

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error

from ratlip.models import blocks
from ratlip.models.attention import shuffle
from ratlip.models.blocks import Conv, DiscriminatorBlock, GeneratorBlock, doubling_kernel, fuse, resize_and_convolve


@pytest.mark.parametrize(("side", "size"), [(4, 8), (7, 8), (8, 8), (16, 28), (5, 10)])
def test_resize_and_convolve_equals_the_two_in_turn(side, size):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(6, 5, 3, padding=1).double()
    x = torch.randn(2, 6, side, side, dtype=torch.float64, requires_grad=True)
    kernel = doubling_kernel(conv.weight) if size == 2 * side else conv.weight
    ours = resize_and_convolve(x, kernel, conv.bias, size)
    plain = conv(F.interpolate(x, (size, size), mode="nearest"))
    assert relative_error(ours, plain) < 1e-12
    weights = torch.randn_like(plain)
    wanted = (x, conv.weight, conv.bias)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), wanted) for y in (ours, plain)), strict=True):
        assert relative_error(a, b) < 1e-12


def plain_conv(conv: Conv, x: torch.Tensor) -> torch.Tensor:
    """Conv's parts in the order in which its description has them."""
    x = conv.conv(x)
    if conv.bn is None:
        return x
    bn = conv.bn
    x = F.batch_norm(x, bn.running_mean.clone(), bn.running_var.clone(), bn.weight, bn.bias, conv.training)
    x = shuffle(F.leaky_relu(x, 0.01).transpose(0, 1)).transpose(0, 1)
    return conv.attention(x)  # tests/models/test_attention.py has the order of gates and shuffle


@pytest.mark.parametrize("large", [1, 10**9])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("style", ["galip", "ratlip"])
@pytest.mark.parametrize(("side", "size"), [(8, 16), (7, 8), (16, 28)])
def test_generator_block_equals_the_plain_order(style, side, size, training, large, monkeypatch):
    """Resizing first, BatchNorm after the convolution, the whole batch at once, nothing computed again."""
    monkeypatch.setattr(blocks, "LARGE", large)
    torch.manual_seed(1)
    block = GeneratorBlock(32, 16, style, attention=True).double().train(training)
    with torch.no_grad():
        for tensor in (*block.parameters(), *block.buffers()):
            if tensor.is_floating_point() and tensor.ndim < 2:
                tensor.uniform_(0.5, 1.5)
    affines = [
        tuple(torch.randn(2, c, 1, 1, dtype=torch.float64, requires_grad=True) for _ in range(2))
        for c in block.affine_channels
    ]
    x = torch.randn(2, 32, side, side, dtype=torch.float64, requires_grad=True)
    resized = F.interpolate(x, (size, size), mode="nearest")
    first, second = (fuse_plainly(pairs) for pairs in (affines[:2], affines[2:]))
    expected = block.shortcut(resized) + plain_conv(block.conv2, second(plain_conv(block.conv1, first(resized))))
    found = torch.cat(block([x], size, affines))
    assert relative_error(found, expected) < 1e-10
    wanted = [x, *block.parameters(), *(tensor for pair in affines for tensor in pair)]
    weights = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), wanted) for y in (found, expected)), strict=True):
        assert (a - b).abs().max() <= 1e-8 * b.abs().max() + 1e-10


def fuse_plainly(pairs):
    def fused(x):
        for gamma, beta in pairs:
            x = F.leaky_relu(gamma * x + beta, 0.2)
        return x

    return fused


def test_running_statistics_are_batch_norms():
    """Although the channels are shuffled before they are normalised."""
    torch.manual_seed(2)
    conv = Conv(4, 32, "ratlip", attention=True)
    norm = torch.nn.BatchNorm2d(32)
    x = torch.randn(3, 4, 6, 6)
    for _ in range(2):
        conv(lambda x: x, [[x]], 6)
        norm(conv.conv(x))
    for name, expected in norm.named_buffers():
        assert torch.allclose(dict(conv.bn.named_buffers())[name], expected, atol=1e-6), name


@torch.no_grad()
@pytest.mark.parametrize(("side", "size"), [(8, 16), (8, 8)])
def test_filters_that_are_kept_follow_the_weights(side, size):
    """And the mode, the doubling and the precision."""
    torch.manual_seed(3)
    conv, x = Conv(4, 32, "ratlip", attention=True).eval(), torch.randn(2, 4, side, side)

    def check(tolerance=1e-5, size=size):
        found = conv.finish(*conv(lambda x: x, [[x]], size)[0])
        assert relative_error(found.float(), plain_conv(conv, F.interpolate(x, (size, size)))) < tolerance

    check()
    for change in (conv.conv.weight, conv.bn.running_mean, conv.bn.weight):
        change.add_(torch.rand_like(change))
        check()
    conv.load_state_dict(Conv(4, 32, "ratlip", attention=True).state_dict())
    check()
    check(size=2 * size)
    with torch.autocast("cpu", torch.bfloat16):
        check(0.03)
    check()
    conv.train()
    conv(lambda x: x, [[x]], size)  # moves the running statistics
    conv.eval()
    check()


def test_fuse_is_affine_then_leaky_relu():
    x = torch.tensor([[[[1.0, -2.0]]]])
    gamma, beta = torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), 1.0)
    assert fuse(x, gamma, beta).flatten().tolist() == pytest.approx([4.0, -1.0])


def test_discriminator_block_starts_as_its_shortcut():
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(DiscriminatorBlock(8, 8)(x), x)
    assert torch.equal(DiscriminatorBlock(8, 8, halving=True)(x), F.avg_pool2d(x, 2))
