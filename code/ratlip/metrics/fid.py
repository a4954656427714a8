"""The Fréchet distances: standard FID, the papers' FID, and the distance in CLIP's space."""

import numpy as np
import torch

from ratlip import device as devices
from ratlip.metrics.frechet import Moments, frechet_distance
from ratlip.metrics.metric import Metric, Scored
from ratlip.metrics.reference import Reference


class FrechetMetric(Metric):
    """Distance of all pictures, and of every second one alone ("<name>/half"): falling numbers show the bias that
    a finite number of pictures brings."""

    higher_is_better = False
    against_real = True

    def __init__(self, reference: Reference, count: int):
        gaussian = reference.gaussian
        self.reference = gaussian
        self.even, self.odd = (Moments(len(gaussian.mean), gaussian.mean.device) for _ in range(2))
        self.totals = [*self.even.totals, *self.odd.totals]

    def update(self, scored: Scored) -> None:
        features, odd = scored.features[self.space], scored.numbers.numpy() % 2
        for moments, of_half in ((self.even, odd == 0), (self.odd, odd == 1)):
            rows = torch.from_numpy(np.flatnonzero(of_half))  # by numpy: their number is known to the host at once
            moments.update(features[devices.send(rows, features.device)])

    def compute(self) -> dict[str, float]:
        """{name: distance, "name/half": distance of every second picture, where these are two at least}."""
        every = Moments(len(self.reference.mean), self.reference.mean.device)
        for total, even, odd in zip(every.totals, self.even.totals, self.odd.totals, strict=True):
            total.copy_(even + odd)
        (name,) = self.names
        scores = {name: frechet_distance(every.gaussian(), self.reference)}
        if self.even.count > 1:
            scores[f"{name}/half"] = frechet_distance(self.even.gaussian(), self.reference)
        return scores

    @classmethod
    def caveat(cls, reference: Reference, count: int) -> str:
        fewest, dim = min(count, reference.count or count), len(reference.gaussian.mean)
        if fewest > dim:
            return ""
        return f"unreliable: {fewest:,} pictures in {dim:,} dimensions; compare only with the same numbers of pictures"


class Fid(FrechetMetric):
    """`fid`: the standard one, as torch-fidelity computes it (Heusel et al. 2017, arXiv 1706.08500)."""

    names = ("fid",)
    space = "inception"


class ReleasedFid(FrechetMetric):
    """`fid_released`: as GALIP's and RATLIP's code computes it, to compare with their tables and nothing else."""

    names = ("fid_released",)
    space = "inception_released"


class FrechetClip(FrechetMetric):
    """`fd_clip`: in the space of CLIP's image embeddings; needs no download."""

    names = ("fd_clip",)
    space = "clip"
