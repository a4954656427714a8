"""The captions of a split as one table: which belong to which image, and their sentence embeddings."""

import fcntl
import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ratlip import checkpoint, distributed
from ratlip.data.items import Item
from ratlip.disk import cannot_write, replacing
from ratlip.encoders import TextEncoder
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
        self.cut: list[int] = []  # rows of captions that are longer than their encoder reads; `embed` finds them

    @cached_property
    def numbers(self) -> dict[str, int]:
        """A number for each distinct text."""
        return {text: number for number, text in enumerate(dict.fromkeys(self.texts))}

    @cached_property
    def text_numbers(self) -> np.ndarray:
        """The number of each row's text (R,)."""
        return np.array([self.numbers[text] for text in self.texts])

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
            other = next((row for row in chain(first, others) if self.texts[row] not in own), None)
            result.append(self._next_other(int(rows[i]), own) if other is None else other)
        return np.array(result)

    def _next_other(self, row: int, own: set[str]) -> int | None:
        """The first row after `row`, from the last on to the first, whose text is none of `own`. Where captions are
        names of classes it can be far away: rows are looked at in blocks, each twice as long."""
        unwanted, count, start, length = [self.numbers[text] for text in own], len(self.texts), row + 1, 64
        while start < row + count:
            block = np.arange(start, min(start + length, row + count)) % count
            found = block[~np.isin(self.text_numbers[block], unwanted)]
            if len(found):
                return int(found[0])
            start, length = start + length, 2 * length
        return None


def embed(table: CaptionTable, encoder: TextEncoder, cache: Path | None = None, items: Sequence[Item] = ()) -> Tensor:
    """Sentence embeddings of every caption row (R, E), float32 on the CPU; each distinct text is encoded once.
    `table.cut` then has the rows that the encoder does not read to the end.

    Args:
        cache: folder that keeps them. A file is named by a hash of the encoder and the captions, so that
            one made by another encoder or from other captions is never used. An interruption costs one batch. Of
            several runs at once one encodes and the others wait; on a file system without locks all encode.
        items: whose captions they are, to name one in which there is nothing that the encoder reads.

    Raises:
        UserError: such a caption, or a file that cannot be written.
    """
    distinct = sorted(set(table.texts))
    place = {text: i for i, text in enumerate(distinct)}
    order = [place[text] for text in table.texts]
    if cache is None:
        encoder.check(table.texts, partial(caption_place, table, items))
        table.cut = encoder.cut(table.texts)
        return _encode(distinct, encoder, None)[order]
    path = cache / f"captions_{_fingerprint(table.texts, encoder)}.pt"
    rows = path.with_suffix(".rows")  # those encoded so far
    if (kept := _read(path, len(order))) is not None:
        return _take(kept, table, encoder)
    encoder.check(table.texts, partial(caption_place, table, items))
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(os.open(rows, os.O_RDWR | os.O_CREAT, 0o666), "rb+") as file:
            with suppress(OSError):  # without locks: each then writes the same rows to the same places
                fcntl.flock(file, fcntl.LOCK_EX)  # another run may be at it, and is then waited for
            if (kept := _read(path, len(order))) is None:
                kept = {"sentences": _encode(distinct, encoder, file)[order], "cut": encoder.cut(table.texts)}
                _write(kept, path)
            rows.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(rows, error) from None
    return _take(kept, table, encoder)


def say_cut(table: CaptionTable, encoder: TextEncoder, what: str) -> None:
    """One line where captions of an embedded table are cut, with the first. `what`: such as "training captions"."""
    if table.cut:
        count, first = f"{len(table.cut):,} of {len(table.texts):,} {what}", table.texts[table.cut[0]]
        longer = f"are longer than the {encoder.limit}, and are cut"
        distributed.say(f"{count} {longer}; the first: {first!r}")


def caption_place(table: CaptionTable, items: Sequence[Item], row: int) -> str:
    """Where a caption row is from, for messages."""
    image = int(np.searchsorted(table.starts, row, side="right")) - 1
    return f"{items[image].place if items else f'image {image + 1}'}, caption {row - table.starts[image] + 1}"


def _read(path: Path, count: int) -> dict | None:
    """What a cache file holds; None where there is none, or a damaged one."""
    try:
        kept = checkpoint.read(path)
        return kept if len(kept["sentences"]) == count else None
    except (UserError, KeyError):
        return None


def _take(kept: dict, table: CaptionTable, encoder: TextEncoder) -> Tensor:
    """The embeddings of a cache file; files of earlier versions do not say which captions are cut."""
    table.cut = kept["cut"] if "cut" in kept else encoder.cut(table.texts)
    return kept["sentences"]


def _write(kept: dict, path: Path) -> None:
    try:
        with replacing(path) as file:
            torch.save(kept, file)
    except RuntimeError as error:  # how torch reports a full disk
        raise UserError(f"{path}: cannot be written; is the disk full? ({first_line(error)})") from None


@torch.no_grad()
def _encode(texts: Sequence[str], encoder: TextEncoder, rows: BinaryIO | None) -> Tensor:
    """Sentence embeddings (R, E) of texts; those that the file `rows` holds are taken from it, new ones go there."""
    embedded = torch.empty(len(texts), encoder.embedding_dim)
    done = 0
    if rows:
        found = _encoded(rows, encoder.embedding_dim)[: len(texts)]
        done = len(found)
        embedded[:done] = torch.from_numpy(found)
        rows.seek(found.nbytes)
    quiet = distributed.rank() > 0 or None  # None: no bar where there is no terminal
    bar = tqdm(total=len(texts), initial=done, desc="caption embeddings", unit="caption", leave=False, disable=quiet)
    with bar:
        for i in range(done, len(texts), EMBED_BATCH):
            batch = texts[i : i + EMBED_BATCH]
            embedded[i : i + len(batch)] = encoder.encode(encoder.tokenize(batch))
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


def _fingerprint(texts: Sequence[str], encoder: TextEncoder) -> str:
    digest = hashlib.sha256("\n".join(texts).encode(errors="surrogateescape"))
    encoder.add_to(digest)
    return digest.hexdigest()[:16]
