"""The batch that every metric sees: images with captions, and features of them computed at most once."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ratlip.clip_towers import FrozenClip


class Scored:
    """Images (B, 3, H, W) in [-1, 1], their captions, and the captions' sentence embeddings (B, E)."""

    def __init__(self, images: Tensor, captions: Sequence[str], sentences: Tensor, clip: FrozenClip):
        self.images, self.captions, self.sentences = images, captions, sentences
        self._clip = clip

    @cached_property
    def image_embedding(self) -> Tensor:
        """CLIP's embedding of the images (B, E), not normalised."""
        with torch.no_grad():
            return self._clip.image(self.images)[1]
