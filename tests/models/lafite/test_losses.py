"""LAFITE's contrasts and penalties."""

import math

import pytest
import torch
from helpers import fixture_input, relative_error
from released_lafite import answers

from ratlip.models.lafite import losses


@pytest.mark.parametrize(
    "key, temperature, share", [("t0.5.l0", 0.5, 0.0), ("t0.5.l1", 0.5, 1.0), ("t0.7.l0.3", 0.7, 0.3), ("t0", 0.0, 0.0)]
)
def test_released_contrast(key, temperature, share):
    a, b = fixture_input("lafite64.ca", 5, 512), fixture_input("lafite64.cb", 5, 512)
    found = losses.contrast(a, a + b, temperature, share)
    assert relative_error(found, answers()[f"contra.{key}"]) < 1e-5


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_plain_contrast(share):
    """The paper's: temperature * log softmax(S / temperature), against PyTorch's cross entropy."""
    torch.manual_seed(0)
    a, b, temperature = torch.randn(6, 9), torch.randn(6, 9), 0.3
    similarities = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2) / temperature
    own = torch.arange(6)
    rows = -torch.nn.functional.cross_entropy(similarities, own, reduction="none")
    columns = -torch.nn.functional.cross_entropy(similarities.t(), own, reduction="none")
    expected = temperature * (share * rows + (1 - share) * columns)
    assert relative_error(losses.contrast(a, b, temperature, share, "plain"), expected) < 1e-5


def test_penalties_do_not_depend_on_the_loss_scale():
    torch.manual_seed(0)
    images = torch.randn(3, 3, 4, 4, requires_grad=True)
    weight = torch.randn(3, 4, 4, requires_grad=True)
    plain, scaled = (
        losses.gradient_penalty((images.square() * weight).sum((1, 2, 3))[:, None], images, scale) for scale in (1, 1e3)
    )
    expected = (2 * images * weight).square().sum((1, 2, 3))
    assert relative_error(plain, expected) < 1e-5 and relative_error(scaled, expected) < 1e-5
    rows, direction = torch.randn(2, 5, 512, requires_grad=True), torch.randn(2, 3, 4, 4)
    drawn = rows.square().sum((1, 2))[:, None, None, None].expand(-1, 3, 4, 4)
    plain, scaled = (losses.path_lengths(drawn, rows, direction, scale) for scale in (1, 1e3))
    slope = direction.sum((1, 2, 3)) / 4
    expected = (2 * rows * slope[:, None, None]).square().sum(2).mean(1).sqrt()
    assert relative_error(plain, expected) < 1e-5 and relative_error(scaled, expected) < 1e-5


def test_path_penalty_moves_the_mean_by_a_hundredth():
    lengths = torch.tensor([1.0, 3.0], requires_grad=True)
    penalty, mean = losses.path_penalty(lengths, torch.tensor(1.0))
    assert mean.item() == pytest.approx(1.01)
    assert penalty.tolist() == pytest.approx([0.01**2, 1.99**2], abs=1e-5)
    (gradient,) = torch.autograd.grad(penalty.sum(), lengths)
    inner = -0.02 + 3.98  # sum of 2 (length - a), through which the gradient by a goes
    assert gradient.tolist() == pytest.approx([-0.02 - inner * 0.005, 3.98 - inner * 0.005], abs=1e-4)


def test_logistic_losses():
    logits = torch.tensor([[0.0], [2.0]])
    assert losses.logistic_real(logits).tolist() == pytest.approx([math.log(2), math.log1p(math.exp(-2))])
    assert losses.logistic_fake(logits).tolist() == pytest.approx([math.log(2), math.log1p(math.exp(2))])


def test_autocast_does_not_touch_contrasts_and_gradients():
    """Around the losses, as the step has it: products stay in the precision that they were made in."""
    torch.manual_seed(0)
    a, b = torch.randn(6, 64), torch.randn(6, 64)
    weight, rows, direction = (
        torch.randn(48, 512) / 8,
        torch.randn(2, 5, 512, requires_grad=True),
        torch.randn(2, 3, 4, 4),
    )

    def penalties() -> list[torch.Tensor]:
        with torch.autocast("cpu", enabled=False):
            drawn = (rows.mean(1) @ weight.t()).unflatten(1, (3, 4, 4))
        return [losses.contrast(a, b, share=0.5), losses.path_lengths(drawn, rows, direction)]

    with torch.autocast("cpu", torch.bfloat16):
        low = penalties()
    for found, expected in zip(low, penalties(), strict=True):
        assert relative_error(found, expected) < 1e-6
