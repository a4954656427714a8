"""Means and variances, and their gradients, against PyTorch's own."""

import torch

from ratlip.models.moments import moments


def test_moments_and_their_gradients():
    torch.manual_seed(0)
    x = (torch.randn(3, 4, 5, 6, dtype=torch.float64) + 2).requires_grad_()
    expected = x.mean((2, 3)), x.var((2, 3), unbiased=False)
    for a, b in zip(moments(x), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    assert torch.autograd.gradcheck(moments, x)


def test_no_digit_is_lost_where_the_mean_is_large():
    x = torch.randn(2, 3, 16, 16) * 0.01 + 100
    assert torch.allclose(moments(x)[1], x.double().var((2, 3), unbiased=False).float(), rtol=1e-3)
    assert moments(x.bfloat16())[1].dtype == torch.float32
