"""CMMD against its formula, pair by pair in float64, and where the answer is known."""

import numpy as np
import pytest
import torch

from ratlip.metrics import cmmd
from ratlip.metrics.cmmd import Cmmd
from ratlip.metrics.frechet import Gaussian
from ratlip.metrics.metric import Scored
from ratlip.metrics.reference import Reference

DIM = 12


def reference(features: np.ndarray) -> Reference:
    moments = Gaussian(torch.zeros(DIM).double(), torch.eye(DIM).double())
    return Reference(moments, len(features), torch.from_numpy(features), "here")


def score(real: np.ndarray, drawn: np.ndarray, batch: int = 5, processes: int = 1) -> float:
    """By the metric: of several processes, each with its share, added up."""
    metrics = [Cmmd(reference(real), len(drawn)) for _ in range(processes)]
    for rank, metric in enumerate(metrics):
        for numbers in torch.arange(rank, len(drawn), processes).split(batch):
            metric.update(Scored(numbers, None, None, None, {"clip": torch.from_numpy(drawn[numbers.numpy()])}))
    for metric in metrics[1:]:
        metrics[0].totals[0] += metric.totals[0]
    return metrics[0].compute()["cmmd"]


def plainly(real: np.ndarray, drawn: np.ndarray) -> float:
    """1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)), k = exp(-|x - y|^2 / 200), of unit vectors."""
    x, y = ((a / np.linalg.norm(a, axis=1, keepdims=True)).astype(np.float64) for a in (real, drawn))

    def mean(a, b, same):
        kernels = [np.exp(-np.sum((u - v) ** 2) / 200) for i, u in enumerate(a) for j, v in enumerate(b)
                   if not (same and i == j)]  # fmt: skip
        return sum(kernels) / len(kernels)

    return 1000 * (mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False))


@pytest.fixture(scope="module")
def clouds() -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of 23 real and 31 generated pictures, of any length."""
    rng = np.random.default_rng(0)
    real, drawn = rng.standard_normal((23, DIM)), rng.standard_normal((31, DIM)) + 1
    return (real * 7).astype(np.float32), drawn.astype(np.float32)


@pytest.mark.parametrize("block", [3, 23, 2048])
def test_equals_the_plain_formula_in_any_blocks(clouds, block, monkeypatch):
    monkeypatch.setattr(cmmd, "BLOCK", block)
    expected = plainly(*clouds)
    assert expected > 1
    assert score(*clouds) == pytest.approx(expected, rel=1e-6)


def test_does_not_depend_on_batches_and_processes(clouds):
    found = [score(*clouds, batch, processes) for batch, processes in ((31, 1), (1, 1), (4, 2), (7, 3))]
    assert found == [pytest.approx(found[0], rel=1e-12)] * 4


def test_two_points():
    """All real pictures in one place, all generated ones in another: 2 (1 - k)."""
    one, other = np.eye(DIM, dtype=np.float32)[:2]
    found = score(np.tile(one * 3, (4, 1)), np.tile(other, (5, 1)))
    assert found == pytest.approx(2000 * (1 - np.exp(-2 / 200)), rel=1e-9)
    assert not Cmmd.higher_is_better


def test_halves_of_one_cloud_score_about_0():
    """Unbiased: over many draws the mean is 0 within four standard errors, and some are below 0."""
    rng = np.random.default_rng(1)
    found = [score(*rng.standard_normal((2, 20, DIM)).astype(np.float32)) for _ in range(60)]
    assert abs(np.mean(found)) < 4 * np.std(found) / 60**0.5 and min(found) < 0
