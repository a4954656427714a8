"""One captioned image of a data set, something wrong with one, and the split of a set that has none of its own."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

SPLIT_SEED = 0  # of the 90/10 split of a data set that has no lists, or no test shards
LEFT_OUT = "left out"  # the kind of Problem that is a file nobody reads


@dataclass(frozen=True, slots=True)
class Item:
    """One captioned image. `box` is a bounding box (x, y, width, height) in pixels, for birds."""

    key: str
    image: Path
    captions: list[str]
    box: tuple[float, float, float, float] | None = None
    span: tuple[int, int] | None = None  # the image's first byte and length, where `image` holds many
    content: str | None = None  # hash of the image's bytes, once they have been read

    @property
    def place(self) -> str:
        """Where the image lies, for messages."""
        return str(self.image) if self.span is None else f"{self.image}: {Path(self.key).name}"


class Problem(NamedTuple):
    """Something wrong with one item of a data set."""

    kind: str
    message: str  # begins with the file
    lost: bool = True  # whether the item cannot be used


def held_out(keys: list[str], split: str) -> list[str]:
    """A tenth of `keys` for the test split, the others for training: drawn, always the same."""
    drawn = np.random.default_rng(SPLIT_SEED).permutation(sorted(keys)).tolist()
    tests = max(1, round(len(drawn) / 10))
    return sorted(drawn[:tests] if split == "test" else drawn[tests:])
