"""Diversity: how many different pictures a caption gets under different noise."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ratlip import device as devices
from ratlip.metrics.metric import Metric, Scored
from ratlip.metrics.reference import Reference

PICTURES = 8  # of a caption
CAPTIONS = 64  # at most


class Diversity(Metric):
    """`diversity`: Vendi score of the pictures of one caption, mean over captions: 1 where they are all alike, 8 where
    none resembles another (Friedman and Dieng 2022, arXiv 2210.02410)."""

    names = ("diversity",)
    higher_is_better = True
    space = "clip"
    of_repeats = True

    def __init__(self, reference: Reference | None, count: int):
        # The cosines of each caption's pictures; zero where another process has them, so that sums join them.
        self.totals = [torch.zeros(count // PICTURES, PICTURES, PICTURES, dtype=torch.float64)]

    def update(self, scored: Scored) -> None:
        units = F.normalize(scored.features[self.space].double(), dim=1).unflatten(0, (-1, PICTURES))  # (G, 8, D)
        captions = torch.from_numpy(scored.numbers.numpy()[::PICTURES] // PICTURES)  # by numpy: on the host
        self.totals[0] = devices.send(self.totals[0], units.device)
        self.totals[0][devices.send(captions, units.device)] = units @ units.transpose(1, 2)

    def compute(self) -> dict[str, float]:
        """{"diversity": mean, 1 to 8, "diversity/standard_error": of the mean, captions taken as independent}."""
        values = vendi(self.totals[0].cpu())
        error = values.std(correction=min(1, len(values) - 1)) / len(values) ** 0.5
        return {"diversity": float(values.mean()), "diversity/standard_error": float(error)}

    @classmethod
    def caveat(cls, reference: Reference | None, count: int) -> str:
        return f"{PICTURES} pictures of each of {count // PICTURES:,} captions"


def vendi(similarities: Tensor) -> Tensor:
    """exp(-sum w log w), w the eigenvalues of K / n, of similarities K (..., n, n) with ones on the diagonal."""
    weights = torch.linalg.eigvalsh(similarities / similarities.shape[-1]).clamp(min=0)  # rounding, below zero
    return torch.special.entr(weights).sum(-1).exp()
