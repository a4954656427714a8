"""Fréchet distance between two sets of features (Heusel et al. 2017, arXiv 1706.08500), in float64."""

import numpy as np
import torch
from torch import Tensor

from ratlip.metrics.scored import Scored


class Moments:
    """Count, sum and sum of outer products of features: exact in any order, batch size and number of processes."""

    def __init__(self, dim: int):
        self.count = torch.zeros((), dtype=torch.float64)
        self.sum = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    @property
    def totals(self) -> list[Tensor]:
        """What to add up over processes."""
        return [self.count, self.sum, self.outer]

    def update(self, features: Tensor) -> None:
        """Add features (B, D)."""
        features = features.double().cpu()
        self.count += len(features)
        self.sum += features.sum(0)
        self.outer += features.T @ features

    def mean_and_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (D,) and unbiased covariance (D, D); at least two features are needed."""
        mean = self.sum / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return mean.numpy(), covariance.numpy()


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two Gaussians.

    The root's trace is the sum of the singular values of S1^(1/2) S2^(1/2), which stays finite and real when a
    covariance is singular, as it is with fewer images than dimensions.
    """
    overlap = np.linalg.svd(_root(sigma1) @ _root(sigma2), compute_uv=False).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap)


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(values.clip(0)) @ vectors.T


class FrechetClip:
    """`fd_clip`: Fréchet distance to the real test images in the space of CLIP's image embeddings."""

    name = "fd_clip"
    higher_is_better = False

    def __init__(self, reference: Moments):
        self.reference = reference
        self.generated = Moments(len(reference.sum))

    @property
    def totals(self) -> list[Tensor]:
        return self.generated.totals

    def update(self, scored: Scored) -> None:
        """Add a batch of generated images."""
        self.generated.update(scored.image_embedding)

    def compute(self) -> dict[str, float]:
        """{"fd_clip": distance}, 0 at best."""
        generated, reference = self.generated.mean_and_covariance(), self.reference.mean_and_covariance()
        return {"fd_clip": frechet_distance(*generated, *reference)}
