"""The captions of a split as one table: which belong to which image, and their sentence embeddings."""

import fcntl
import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ratlip import checkpoint, distributed
from ratlip.clip_towers import FrozenClip
from ratlip.disk import cannot_write, replacing
from ratlip.errors import UserError, first_line

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

    def without_mismatch(self) -> int | None:
        """The first image that every caption of the table is a caption of, if there is any."""
        distinct = len(set(self.texts))
        enough = np.flatnonzero(np.diff(self.starts) >= distinct).tolist()  # of captions; seldom any
        return next((image for image in enough if len(set(self.own(image))) == distinct), None)

    def draw(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A random caption row for each of `images`."""
        return rng.integers(self.starts[images], self.starts[images + 1])

    def mismatched(self, images: np.ndarray, rows: np.ndarray, preferred: np.ndarray | None = None) -> np.ndarray:
        """For each image of a batch the caption row of another one: the first whose text is not also a caption of
        this image among its `preferred` rows (B, K), then the batch's own `rows` from the next on, then all rows.
        There must be one: see `without_mismatch`."""
        result = []
        for i, image in enumerate(images):
            own = set(self.own(image))
            first = () if preferred is None else preferred[i]
            others = (rows[(i + shift) % len(rows)] for shift in range(1, len(rows)))
            anywhere = (int(rows[i] + shift) % len(self.texts) for shift in range(1, len(self.texts)))
            result.append(next(row for row in chain(first, others, anywhere) if self.texts[row] not in own))
        return np.array(result)


def embed(table: CaptionTable, clip: FrozenClip, cache: Path | None = None) -> Tensor:
    """Sentence embeddings of every caption row (R, E), float32 on the CPU; each distinct text is encoded once.

    Args:
        cache: folder that keeps them. A file is named by a hash of the CLIP weights and the captions, so that
            one made by another CLIP or from other captions is never used. An interruption costs one batch. Of
            several runs at once one encodes and the others wait; on a file system without locks all encode.
    """
    distinct = sorted(set(table.texts))
    place = {text: i for i, text in enumerate(distinct)}
    order = [place[text] for text in table.texts]
    if cache is None:
        return _encode(distinct, clip, None)[order]
    path = cache / f"captions_{_fingerprint(table.texts, clip)}.pt"
    rows = path.with_suffix(".rows")  # those encoded so far
    if (sentences := _read(path, len(order))) is not None:
        return sentences
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(os.open(rows, os.O_RDWR | os.O_CREAT, 0o666), "rb+") as file:
            with suppress(OSError):  # without locks: each then writes the same rows to the same places
                fcntl.flock(file, fcntl.LOCK_EX)  # another run may be at it, and is then waited for
            if (sentences := _read(path, len(order))) is None:
                sentences = _encode(distinct, clip, file)[order]
                _write(sentences, path)
            rows.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(rows, error) from None
    return sentences


def _read(path: Path, count: int) -> Tensor | None:
    """The embeddings in a cache file; None where there is none, or a damaged one."""
    try:
        sentences = checkpoint.read(path)["sentences"]
    except (UserError, KeyError):
        return None
    return sentences if len(sentences) == count else None


def _write(sentences: Tensor, path: Path) -> None:
    try:
        with replacing(path) as file:
            torch.save({"sentences": sentences}, file)
    except RuntimeError as error:  # how torch reports a full disk
        raise UserError(f"{path}: cannot be written; is the disk full? ({first_line(error)})") from None


@torch.no_grad()
def _encode(texts: Sequence[str], clip: FrozenClip, rows: BinaryIO | None) -> Tensor:
    """Sentence embeddings (R, E) of texts; those that the file `rows` holds are taken from it, new ones go there."""
    embedded = torch.empty(len(texts), clip.embedding_dim)
    done = 0
    if rows:
        found = _encoded(rows, clip.embedding_dim)[: len(texts)]
        done = len(found)
        embedded[:done] = torch.from_numpy(found)
        rows.seek(found.nbytes)
    quiet = distributed.rank() > 0 or None  # None: no bar where there is no terminal
    bar = tqdm(total=len(texts), initial=done, desc="caption embeddings", unit="caption", leave=False, disable=quiet)
    with bar:
        for i in range(done, len(texts), EMBED_BATCH):
            batch = texts[i : i + EMBED_BATCH]
            embedded[i : i + len(batch)] = clip.text(clip.tokenize(batch).to(clip.mean.device))[0]
            if rows:
                rows.write(embedded[i : i + len(batch)].numpy().tobytes())
                rows.flush()
            bar.update(len(batch))
    return embedded


def _encoded(rows: BinaryIO, dim: int) -> np.ndarray:
    """The whole batches of embeddings (R, dim) that a file begins with, as far as they were written.

    Rows of zeros were not: another run writes them, or the machine went down before they reached the disk.
    """
    found = np.fromfile(rows, np.float32)
    found = found[: len(found) // dim * dim].reshape(-1, dim)
    written = np.append(found.any(axis=1), False).argmin()  # up to the first that is all zero
    return found[: written // EMBED_BATCH * EMBED_BATCH]


def _fingerprint(texts: Sequence[str], clip: FrozenClip) -> str:
    digest = hashlib.sha256("\n".join(texts).encode())
    for name, weight in clip.clip.state_dict().items():
        if not name.startswith("visual."):
            digest.update(weight.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
