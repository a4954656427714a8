"""The captions of a split as one table: which belong to which image, and their sentence embeddings."""

import hashlib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ratlip import checkpoint
from ratlip.clip_towers import FrozenClip
from ratlip.errors import UserError

EMBED_BATCH = 256


class CaptionTable:
    """All captions of a split, a row each; the rows of image i are `starts[i]` to `starts[i + 1] - 1`.

    Args:
        captions: for each image its captions, at least one.
    """

    def __init__(self, captions: Sequence[Sequence[str]]):
        self.texts = [text for own in captions for text in own]
        self.starts = np.cumsum([0] + [len(own) for own in captions])

    def own(self, image: int) -> list[str]:
        """The captions of an image."""
        return self.texts[self.starts[image] : self.starts[image + 1]]

    def draw(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A random caption row for each of `images`."""
        return rng.integers(self.starts[images], self.starts[images + 1])

    def mismatched(self, images: np.ndarray, rows: np.ndarray, preferred: np.ndarray | None = None) -> np.ndarray:
        """For each image of a batch the caption row of another one: the first whose text is not also a caption of
        this image among its `preferred` rows (B, K), then the batch's own `rows` from the next on, then all rows."""
        result = []
        for i, image in enumerate(images):
            own = set(self.own(image))
            first = () if preferred is None else preferred[i]
            others = (rows[(i + shift) % len(rows)] for shift in range(1, len(rows)))
            anywhere = (int(rows[i] + shift) % len(self.texts) for shift in range(1, len(self.texts)))
            other = next((row for row in chain(first, others, anywhere) if self.texts[row] not in own), None)
            if other is None:
                raise UserError(
                    f"every caption of the data set is a caption of image number {image}: no mismatch exists"
                )
            result.append(other)
        return np.array(result)


def embed(table: CaptionTable, clip: FrozenClip, cache: Path | None = None) -> Tensor:
    """Sentence embeddings of every caption row (R, E), float32 on the CPU; each distinct text is encoded once.

    Args:
        cache: folder that keeps them. A file is named by a hash of the CLIP weights and the captions, so that
            one made by another CLIP or from other captions is never used.
    """
    path = cache / f"captions_{_fingerprint(table.texts, clip)}.pt" if cache else None
    if path and path.is_file():
        return checkpoint.read(path)["sentences"]
    distinct = sorted(set(table.texts))
    device = clip.mean.device
    batches = range(0, len(distinct), EMBED_BATCH)
    with torch.no_grad():
        embedded = torch.cat(
            [
                clip.text(clip.tokenize(distinct[i : i + EMBED_BATCH]).to(device))[0].float().cpu()
                for i in tqdm(batches, desc="caption embeddings", leave=False, disable=None)
            ]
        )
    place = {text: i for i, text in enumerate(distinct)}
    sentences = embedded[[place[text] for text in table.texts]]
    if path:
        checkpoint.save({"sentences": sentences}, path)
    return sentences


def _fingerprint(texts: Sequence[str], clip: FrozenClip) -> str:
    digest = hashlib.sha256("\n".join(texts).encode())
    for name, weight in clip.clip.state_dict().items():
        if not name.startswith("visual."):
            digest.update(weight.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
