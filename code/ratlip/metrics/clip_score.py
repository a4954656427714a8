"""CLIP score: how well images and captions agree in CLIP's embedding space (Hessel et al. 2021, arXiv 2104.08718)."""

import torch
import torch.nn.functional as F

from ratlip import device as devices
from ratlip.metrics.metric import Metric, Scored
from ratlip.metrics.reference import Reference


class ClipScore(Metric):
    """`clip_score`: mean of 100 * cos(image embedding, sentence embedding), -100 to 100."""

    names = ("clip_score",)
    higher_is_better = True
    space = "clip"
    needs_captions = True

    def __init__(self, reference: Reference | None, count: int):
        # Count, sum and sum of squares of the cosines.
        self.totals = [torch.zeros(3, dtype=torch.float64)]

    def update(self, scored: Scored) -> None:
        cosine = F.cosine_similarity(scored.features[self.space].double(), scored.sentences.double(), dim=1)
        sums = torch.stack([torch.ones_like(cosine), cosine, cosine.square()]).sum(1)
        self.totals[0] = devices.send(self.totals[0], sums.device) + sums

    def compute(self) -> dict[str, float]:
        """{"clip_score": mean, "clip_score/standard_error": of the mean, pictures taken as independent}."""
        count, total, squares = self.totals[0].tolist()
        mean = total / count
        variance = max(squares - count * mean**2, 0) / max(count - 1, 1)
        return {"clip_score": 100 * mean, "clip_score/standard_error": 100 * (variance / count) ** 0.5}
