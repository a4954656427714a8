"""What a metric is, and the batch that it sees."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ratlip.metrics.reference import Reference


@dataclass(frozen=True)
class Scored:
    """A batch of pictures to score."""

    numbers: Tensor  # (B,) int64 on the CPU: each picture's place among all, whatever process and batch it comes in
    images: Tensor  # (B, 3, H, W) in [-1, 1]
    captions: Sequence[str] | None  # B texts; None where pictures came without
    sentences: Tensor | None  # (B, E) the captions' embeddings by the evaluation's CLIP
    features: dict[str, Tensor] = field(default_factory=dict)  # (B, D) float32 by space (metrics/features.py)
    items: Tensor | None = None  # (B,) int64 on the CPU: whose captions they are, of the test split; None: each its own


class Metric(ABC):
    """Made for one evaluation; takes `update` for each batch, adds up in `totals`, answers `compute`.

    Args:
        reference: the real pictures in the metric's space; None unless `against_real`.
        count: pictures that it will see, over all processes.
    """

    names: tuple[str, ...]  # in eval.metrics; each is also the name of a score
    higher_is_better: bool
    space: str | None = None  # the features it reads
    against_real = False  # whether it compares with real pictures
    needs_captions = False
    of_repeats = False  # whether it reads, in place of single pictures, all those of a caption, one after the other
    totals: list[Tensor]  # their sums over processes are what one process would have

    @abstractmethod
    def __init__(self, reference: Reference | None, count: int): ...

    @abstractmethod
    def update(self, scored: Scored) -> None:
        """Add a batch."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Scores by name; "<name>/..." are their parts and uncertainties."""

    @classmethod
    def caveat(cls, reference: Reference | None, count: int) -> str:
        """Why the score of so many pictures should not be relied on, or nothing."""
        return ""
