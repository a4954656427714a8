"""CLIP score: how well images and captions agree in CLIP's embedding space (Hessel et al. 2021, arXiv 2104.08718)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ratlip.metrics.frechet import Moments
from ratlip.metrics.scored import Scored


class ClipScore:
    """`clip_score`: mean of 100 * cos(image embedding, sentence embedding), -100 to 100."""

    name = "clip_score"
    higher_is_better = True

    def __init__(self, reference: Moments):  # real images play no part
        self.totals: list[Tensor] = [torch.zeros(2, dtype=torch.float64)]  # sum of cosines, count

    def update(self, scored: Scored) -> None:
        """Add a batch of generated images."""
        cosine = F.cosine_similarity(scored.image_embedding.double(), scored.sentences.double(), dim=1)
        self.totals[0] += torch.tensor([cosine.sum(), len(cosine)], dtype=torch.float64)

    def compute(self) -> dict[str, float]:
        """{"clip_score": mean}."""
        total, count = self.totals[0].tolist()
        return {"clip_score": 100 * total / count}
