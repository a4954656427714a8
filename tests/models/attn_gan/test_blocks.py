"""Convolutions with BatchNorm of our own against PyTorch's layers in turn."""

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from torch import nn

from ratlip.models.attn_gan.blocks import ConvNorm, Gated, Leaky
from ratlip.models.attn_gan.generator import FirstStage


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kernel", "stride", "doubling"), [(3, 1, False), (4, 2, False), (3, 1, True)])
def test_conv_norm_equals_the_layers_in_turn(kernel, stride, doubling, training):
    """Values, gradients and running statistics."""
    torch.manual_seed(0)
    ours, norm = ConvNorm(3, 6, kernel, stride, doubling).double(), nn.BatchNorm2d(6).double()
    with torch.no_grad():
        for tensor in (ours.bn.weight, ours.bn.bias, ours.bn.running_mean, ours.bn.running_var):
            tensor.uniform_(0.5, 1.5)
    norm.load_state_dict(ours.bn.state_dict())
    ours.train(training), norm.train(training)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    found = ours(x)
    resized = F.interpolate(x, scale_factor=2) if doubling else x
    expected = norm(F.conv2d(resized, ours.conv.weight, stride=stride, padding=1))
    assert relative_error(found, expected) < 1e-12
    weights = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad((found * weights).sum(), [x, *ours.parameters()]),
        torch.autograd.grad((expected * weights).sum(), [x, ours.conv.weight, *norm.parameters()]),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-10
    for name, value in norm.named_buffers():
        assert torch.allclose(dict(ours.bn.named_buffers())[name], value, rtol=1e-12), name


def test_gates_and_slopes():
    x = torch.randn(2, 3, 4, 4)
    gated, leaky = Gated(3, 2).eval(), Leaky(3, 2, halving=True).eval()
    plain = ConvNorm.forward(gated, x)
    assert torch.equal(gated(x), plain[:, :2] * plain[:, 2:].sigmoid())
    assert torch.equal(leaky(x), F.leaky_relu(ConvNorm.forward(leaky, x), 0.2)) and leaky(x).shape == (2, 2, 2, 2)


def test_the_first_layers_norm_is_batch_norm_1d():
    stage, norm = FirstStage(5, 2, 4).double(), nn.BatchNorm1d(64).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    expected = F.glu(norm(stage.fc(x)), dim=1).unflatten(1, (-1, 4, 4))
    assert relative_error(stage(x), expected) < 1e-12
    for name, value in norm.named_buffers():
        assert torch.allclose(dict(stage.bn.named_buffers())[name], value, rtol=1e-12), name
    assert relative_error(stage.eval()(x), F.glu(norm.eval()(stage.fc(x)), dim=1).unflatten(1, (-1, 4, 4))) < 1e-12
