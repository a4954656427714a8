"""The losses against hand-worked numbers and finite differences in float64."""

import math

import pytest
import torch

from ratlip.losses import clip_similarity, hinge_fake, hinge_real, matching_aware_gradient_penalty


def test_hinge_by_hand():
    logits = torch.tensor([[2.0], [0.5], [-1.0], [-3.0]])
    assert float(hinge_real(logits)) == pytest.approx((0 + 0.5 + 2 + 4) / 4)
    assert float(hinge_fake(logits)) == pytest.approx((3 + 1.5 + 0 + 0) / 4)


def test_clip_similarity_by_hand():
    images = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    sentences = torch.tensor([[4.0, 3.0], [0.0, 7.0]])
    assert float(clip_similarity(images, sentences)) == pytest.approx((24 / 25 + 0) / 2)


def test_gradient_penalty_by_hand():
    """D = a x + b y has gradient norm sqrt(a^2 + b^2), whatever the input."""
    x, y = torch.randn(3, 1, requires_grad=True), torch.randn(3, 1, requires_grad=True)
    penalty = matching_aware_gradient_penalty(0.6 * x + 1.1 * y, (x, y))
    assert float(penalty) == pytest.approx(2 * math.hypot(0.6, 1.1) ** 6, rel=1e-5)


def test_gradient_penalty_does_not_depend_on_the_scale():
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 2, 2, requires_grad=True), torch.randn(4, 5, requires_grad=True)

    def penalty(scale: float) -> float:
        logits = x.tanh().sum((1, 2, 3))[:, None] + y.sin().sum(1, keepdim=True)
        return float(matching_aware_gradient_penalty(logits, (x, y), scale))

    assert penalty(65536.0) == pytest.approx(penalty(1.0), rel=1e-5)


def test_gradient_penalty_and_its_weight_gradient_by_finite_differences():
    torch.manual_seed(0)
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    last = torch.randn(4, dtype=torch.float64)
    maps, sentence = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)

    def logit(maps, sentence, weight):
        return (torch.cat([maps, sentence], dim=1) @ weight).tanh() @ last

    def penalty_by_differences(weight, step=1e-5):
        inputs = torch.cat([maps, sentence], dim=1)
        total = 0.0
        for row in inputs:
            squares = 0.0
            for j in range(6):
                nudge = torch.zeros(6, dtype=torch.float64)
                nudge[j] = step
                high, low = ((row + sign * nudge)[None].split([4, 2], dim=1) for sign in (1, -1))
                squares += float((logit(*high, weight) - logit(*low, weight)).sum() / (2 * step)) ** 2
            total += squares**3
        return 2 * total / len(inputs)

    inputs = maps.clone().requires_grad_(), sentence.clone().requires_grad_()
    penalty = matching_aware_gradient_penalty(logit(*inputs, weight)[:, None], inputs)
    assert penalty.item() == pytest.approx(penalty_by_differences(weight.detach()), rel=1e-6)

    (gradient,) = torch.autograd.grad(penalty, weight)
    for place in ((0, 0), (3, 2), (5, 3)):
        nudge = torch.zeros_like(weight)
        nudge[place] = 1e-4
        high, low = (penalty_by_differences(weight.detach() + sign * nudge) for sign in (1, -1))
        assert float(gradient[place]) == pytest.approx((high - low) / 2e-4, rel=1e-4)
