"""R-precision: how often a picture's own caption is the nearest of a hundred (AttnGAN, arXiv 1711.10485)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ratlip import distributed
from ratlip.metrics.metric import Metric, Scored
from ratlip.metrics.reference import Reference

CANDIDATES = 100  # captions that a picture is compared with, its own among them
PARTS = 10  # whose mean and spread are the score
FARTHEST = 10 * CANDIDATES  # how far other captions are looked for, where many are the same
SEED = 0  # which captions are compared with which pictures


class RPrecision(Metric):
    """`r_precision`: share of the pictures, 0 to 1, whose own caption has a larger cosine with them than 99 random ones
    of other pictures, in the space of the CLIP that judges; R is 1.

    Pictures and captions of the whole evaluation are needed at once: they are kept where they come and joined at the
    end, so that `totals` has nothing to add.
    """

    names = ("r_precision",)
    higher_is_better = True
    space = "clip"
    needs_captions = True

    def __init__(self, reference: Reference | None, count: int):
        self.totals = []
        self.seen: list[tuple] = []  # of each batch: numbers, items, captions, features, sentences

    def update(self, scored: Scored) -> None:
        items = scored.numbers if scored.items is None else scored.items
        images, sentences = self.compared(scored)
        self.seen.append((scored.numbers, items, scored.captions, images, sentences))

    def compared(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """Pictures and their captions (B, D) in the space."""
        return scored.features[self.space], scored.sentences

    def compute(self) -> dict[str, float]:
        """{"r_precision": mean of ten parts, "r_precision/std": their spread, "r_precision/candidates": captions that
        the picture with the fewest was compared with}; where a picture has no other caption, the score is NaN."""
        (name,) = self.names
        own = [tuple(part.cpu() if isinstance(part, Tensor) else part for part in batch) for batch in self.seen]
        batches = [batch for others in distributed.gather(own) for batch in others]
        numbers, items, texts, images, sentences = zip(*batches, strict=True)
        order = torch.cat(numbers).argsort()
        order = order[torch.from_numpy(np.random.default_rng(SEED).permutation(len(order)))]
        ids: dict[str, int] = {}
        captions = torch.tensor([ids.setdefault(text, len(ids)) for batch in texts for text in batch])
        hits, candidates = first_of(
            *(part[order] for part in (torch.cat(images), torch.cat(sentences), captions, torch.cat(items)))
        )
        parts = np.array([part.mean() for part in np.array_split(hits.numpy(), min(PARTS, len(hits)))])
        fewest = int(candidates.min())
        return {
            name: float(parts.mean()) if fewest > 1 else float("nan"),
            f"{name}/std": float(parts.std()),
            f"{name}/candidates": fewest,
        }

    @classmethod
    def caveat(cls, reference: Reference | None, count: int) -> str:
        few = f", of which {count:,} pictures have fewer" if count < CANDIDATES else ""
        return f"first of {CANDIDATES} captions{few}; mean and spread of {PARTS} parts"


class DamsmRPrecision(RPrecision):
    """`r_precision_damsm`: the same in the space of DAMSM, in which the papers have it."""

    names = ("r_precision_damsm",)
    space = "damsm"

    def compared(self, scored: Scored) -> tuple[Tensor, Tensor]:
        return scored.features["damsm"], scored.features["damsm_sentences"]


def first_of(images: Tensor, sentences: Tensor, captions: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each picture's own caption is nearest to it, (N,) 1 or 0 in float64, and among how many captions (N,).

    Pictures and their captions come in random order: the others of a picture are those that follow it, from the last on
    the first, but for captions of the same words or the same item.

    Args:
        images, sentences: (N, D) of each picture and of its own caption.
        captions, items: (N,) a number for each distinct caption, and for what the picture was drawn after.
    """
    images, sentences = (F.normalize(vectors.float(), dim=1) for vectors in (images, sentences))
    own = (images * sentences).sum(1)
    best, candidates = torch.full_like(own, -2), torch.ones_like(captions)
    for shift in range(1, min(len(own), FARTHEST)):
        other = torch.arange(shift, len(own) + shift) % len(own)
        wanted = (captions != captions[other]) & (items != items[other]) & (candidates < CANDIDATES)
        cosine = (images * sentences[other]).sum(1)
        best = torch.where(wanted, torch.maximum(best, cosine), best)
        candidates += wanted
        if candidates.min() == CANDIDATES:
            break
    return (own >= best).double(), candidates
