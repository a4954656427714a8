"""Diversity against its formula in float64, and where the answer is known."""

import numpy as np
import pytest
import torch

from ratlip.metrics.diversity import PICTURES, Diversity, vendi
from ratlip.metrics.metric import Scored

DIM = 16


def score(features: np.ndarray, captions_together: int = 2, processes: int = 1) -> dict[str, float]:
    """By the metric: features (captions, 8, D), some captions in a batch; the sum of several processes."""
    count = len(features)
    metrics = [Diversity(None, count * PICTURES) for _ in range(processes)]
    for rank, metric in enumerate(metrics):
        for captions in torch.from_numpy(np.arange(rank, count, processes)).split(captions_together):
            if not len(captions):
                continue  # more processes than captions
            numbers = (captions[:, None] * PICTURES + torch.arange(PICTURES)).flatten()
            rows = torch.from_numpy(features.reshape(-1, DIM)[numbers.numpy()].astype(np.float32))
            metric.update(Scored(numbers, None, None, None, {"clip": rows}))
    for metric in metrics[1:]:
        metrics[0].totals[0] += metric.totals[0]
    return metrics[0].compute()


def plainly(features: np.ndarray) -> np.ndarray:
    """For each caption exp(-sum w log w), w the eigenvalues of the cosines over 8."""
    found = []
    for own in features.astype(np.float32).astype(np.float64):
        cosines = np.array([[u @ v / np.linalg.norm(u) / np.linalg.norm(v) for v in own] for u in own])
        weights = np.linalg.eigvals(cosines / PICTURES).real
        found.append(np.exp(-sum(w * np.log(w) for w in weights if w > 1e-15)))
    return np.array(found)


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    """Of 8 pictures of each of 5 captions: a direction for each caption, and more and more about it."""
    rng = np.random.default_rng(0)
    spread = np.array([0, 0.1, 0.5, 1, 5])[:, None, None]
    return 3 * rng.standard_normal((5, 1, DIM)) + spread * rng.standard_normal((5, PICTURES, DIM))


def test_equals_the_plain_formula(features):
    expected = plainly(features)
    assert expected[0] == pytest.approx(1) and 1.5 < expected[-1] < PICTURES
    assert score(features) == {
        "diversity": pytest.approx(expected.mean(), rel=1e-9),
        "diversity/standard_error": pytest.approx(expected.std(ddof=1) / 5**0.5, rel=1e-9),
    }


def test_does_not_depend_on_batches_and_processes(features):
    found = [score(features, together, processes) for together, processes in ((5, 1), (1, 1), (2, 2), (1, 7))]
    assert all(other == found[0] for other in found[1:])


def test_alike_and_unlike():
    alike, unlike = np.ones((1, PICTURES, DIM)), np.eye(PICTURES, DIM)[None]
    assert score(alike) == {"diversity": pytest.approx(1), "diversity/standard_error": 0}
    assert score(unlike)["diversity"] == pytest.approx(PICTURES)
    two_kinds = np.concatenate([unlike[:, :1]] * 4 + [unlike[:, 1:2]] * 4, axis=1)
    assert score(two_kinds)["diversity"] == pytest.approx(2)
    assert Diversity.higher_is_better and Diversity.caveat(None, 40) == "8 pictures of each of 5 captions"


def test_eigenvalues_that_rounding_makes_negative_count_as_zero():
    cosines = torch.ones(2, 8, 8, dtype=torch.float64) - 1e-13 * torch.eye(8)
    assert vendi(cosines).tolist() == [pytest.approx(1)] * 2
