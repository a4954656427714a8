"""Fréchet distance between two sets of features (Heusel et al. 2017, arXiv 1706.08500), in float64."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution: mean (D,) and covariance (D, D), float64."""

    mean: Tensor
    covariance: Tensor

    @cached_property
    def root(self) -> Tensor:
        """The covariance's symmetric square root (D, D); rounding below zero counts as zero."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T


class Moments:
    """Count, sum and sum of outer products of features: exact in any order, batch size and number of processes."""

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        options = {"dtype": torch.float64, "device": device}
        self.count = torch.zeros((), **options)
        self.sum = torch.zeros(dim, **options)
        self.outer = torch.zeros(dim, dim, **options)

    @property
    def totals(self) -> list[Tensor]:
        """What to add up over processes."""
        return [self.count, self.sum, self.outer]

    def update(self, features: Tensor) -> None:
        """Add features (B, D)."""
        features = features.to(self.sum)
        self.count += len(features)
        self.sum += features.sum(0)
        self.outer.addmm_(features.T, features)

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance; at least two features are needed."""
        mean = self.sum / self.count
        return Gaussian(mean, (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1))


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    The root's trace is the sum of the singular values of S1^(1/2) S2^(1/2), which stays finite and real when a
    covariance is singular, as it is with fewer images than dimensions.
    """
    overlap = torch.linalg.svdvals(one.root @ other.root).sum()
    distance = (one.mean - other.mean).square().sum() + one.covariance.trace() + other.covariance.trace() - 2 * overlap
    return float(distance)
