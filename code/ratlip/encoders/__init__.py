"""What reads captions and pictures, frozen; and what a generator's reader of captions is."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor


class TextEncoder(Protocol):
    """From captions to the sentences that a generator reads: a `FrozenClip` or a `DamsmText`.

    Scores compare with CLIP's sentences whatever the generator reads.
    """

    embedding_dim: int  # E, of a sentence
    limit: str  # how long a caption it reads: "77 tokens that CLIP reads"

    def tokenize(self, captions: Sequence[str], whole: bool = False) -> Tensor:
        """Captions -> token ids (B, L), int64 on the CPU. `whole`: as much of each as can be read at all."""

    def encode(self, tokens: Tensor) -> Tensor:
        """Token ids of `tokenize` -> sentences (B, E), on the encoder's device."""

    def cut(self, captions: Sequence[str], whole: bool = False) -> list[int]:
        """Numbers of the captions of which `tokenize` leaves something out for their length."""

    def check(self, captions: Sequence[str], place: Callable[[int], str]) -> None:
        """Raise a UserError where there is nothing in a caption that can be read; `place` says where caption n is."""

    def add_to(self, digest) -> None:
        """Add all that its sentences depend on, besides the captions, to a hash of hashlib."""
