"""LAFITE's discriminator: released numbers of smaller batches, its two readings of the logit, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from released_lafite import answers, inputs, networks

from ratlip.encoders.clip_towers import FrozenClip
from ratlip.errors import UserError
from ratlip.models.lafite.discriminator import Discriminator, with_deviation

TINY = {"condition_dim": 24, "base": 256, "most": 16}


@torch.no_grad()
def test_released_logits_of_smaller_batches(vitb32):
    """Groups of the minibatch's deviation: of four, and of a sample alone."""
    d = networks("lafite64", FrozenClip(vitb32.clip)).discriminator
    images = inputs("lafite64", 8, 64)[0].images
    assert relative_error(d.judge(images[:4])[0], answers()["64.D.base4"]) < 1e-5
    assert relative_error(d.judge(images[:1])[0], answers()["64.D.base1"]) < 1e-5


@torch.no_grad()
def test_readings_of_the_logit():
    d = Discriminator(imsize=16, **TINY)
    images, condition = torch.randn(4, 3, 16, 16), F.normalize(torch.randn(4, 24), dim=1)
    alone, features = d.judge(images)
    own = (features * condition).sum(1, keepdim=True)
    released, found = d(images, condition)
    d.logits = "per_sample"
    per_sample, _ = d(images, condition)
    assert torch.equal(found, features)
    assert torch.allclose(released, alone + own.sum(), atol=1e-5) and torch.allclose(per_sample, alone + own, atol=1e-5)
    unit = Discriminator(imsize=16, normalize=True, **TINY).judge(images)[1]
    assert torch.allclose(unit.norm(dim=1), torch.ones(4))


def test_deviation_of_groups():
    """Samples n, n + N / 4, ... together, against numpy's standard deviation."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 2, 2, dtype=torch.float64)
    out = with_deviation(x)
    assert torch.equal(out[:, :3], x)
    for n in range(8):
        expected = x[n % 2 :: 2].numpy().std(0).mean()
        assert out[n, 3].flatten().tolist() == pytest.approx([expected] * 4, rel=1e-6)
    with pytest.raises(UserError, match="multiples of 4, not 6"):
        with_deviation(x[:6])
    assert with_deviation(x[:3]).shape == (3, 4, 2, 2)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_low_precision(low):
    torch.manual_seed(0)
    d = Discriminator(imsize=64, **TINY)
    images, condition = torch.randn(4, 3, 64, 64), F.normalize(torch.randn(4, 24), dim=1)
    types = []
    for block in d.blocks:
        block.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    exact = d(images, condition)[0]
    with torch.autocast("cpu", low):
        logits, features = d(images.requires_grad_(), condition)
    assert types == [torch.float32] * 4 + [low] * 4
    assert logits.dtype == features.dtype == torch.float32
    assert relative_error(logits, exact) < 0.05
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)  # R1's, twice
    gradient.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in d.parameters() if p.grad is not None)


def test_second_derivatives():
    """What R1 is made of, by PyTorch's finite differences."""
    torch.manual_seed(0)
    d = Discriminator(condition_dim=4, imsize=8, base=32, most=4).double()
    condition = F.normalize(torch.randn(2, 4).double(), dim=1)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: d(x, condition)[0], images, atol=1e-6, fast_mode=True)
