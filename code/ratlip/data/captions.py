"""The captions of a split as one table: which belong to which image, and their sentence embeddings."""

import fcntl
import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ratlip import checkpoint, distributed
from ratlip.clip_towers import FrozenClip
from ratlip.data.journal import READ_ONLY
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
        self.cut: list[int] = []  # rows of captions that are longer than CLIP reads; `embed` finds them

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
    `table.cut` then has the rows whose end CLIP does not read.

    Args:
        cache: folder that keeps them. A file is named by a hash of the CLIP weights and the captions, so that
            one made by another CLIP or from other captions is never used. An interruption costs one batch.
    """
    distinct = sorted(set(table.texts))
    place = {text: i for i, text in enumerate(distinct)}
    order = [place[text] for text in table.texts]
    if cache is None:
        table.cut = find_cut(table.texts, clip)
        return _encode(distinct, clip, None)[order]
    path = cache / f"captions_{_fingerprint(table.texts, clip)}.pt"
    rows = path.with_suffix(".rows")  # those encoded so far
    if (kept := _read(path, len(order))) is not None:
        return _take(kept, table, clip)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(rows, "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be at it, and is then waited for
            if (kept := _read(path, len(order))) is None:
                kept = {"sentences": _encode(distinct, clip, rows)[order], "cut": find_cut(table.texts, clip)}
                checkpoint.save(kept, path)
            rows.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(READ_ONLY.format(rows, error.strerror)) from None
    return _take(kept, table, clip)


def say_cut(table: CaptionTable, clip: FrozenClip, what: str) -> None:
    """One line where captions of an embedded table are cut, with the first. `what`: such as "training captions"."""
    if table.cut:
        count, first = f"{len(table.cut):,} of {len(table.texts):,} {what}", table.texts[table.cut[0]]
        longer = f"are longer than the {clip.context_length} tokens that CLIP reads, and are cut"
        distributed.say(f"{count} {longer}; the first: {first!r}")


def find_cut(texts: Sequence[str], clip: FrozenClip) -> list[int]:
    """Numbers of the texts that `clip.tokenize` cuts."""
    # A token is a byte or more, and two mark the ends: most captions are too short for the tokenizer to be asked.
    longer = [number for number, text in enumerate(texts) if len(text.encode()) > clip.context_length - 2]
    found = []
    for batch in (longer[i : i + EMBED_BATCH] for i in range(0, len(longer), EMBED_BATCH)):
        cut = clip.cuts([texts[number] for number in batch])
        found += [number for number, own in zip(batch, cut, strict=True) if own]
    return found


def _read(path: Path, count: int) -> dict | None:
    """What a cache file holds; None where there is none, or a damaged one."""
    try:
        kept = checkpoint.read(path)
        return kept if len(kept["sentences"]) == count else None
    except (UserError, KeyError):
        return None


def _take(kept: dict, table: CaptionTable, clip: FrozenClip) -> Tensor:
    """The embeddings of a cache file; files of earlier versions do not say which captions are cut."""
    table.cut = kept["cut"] if "cut" in kept else find_cut(table.texts, clip)
    return kept["sentences"]


@torch.no_grad()
def _encode(texts: Sequence[str], clip: FrozenClip, rows: Path | None) -> Tensor:
    """Sentence embeddings (R, E) of texts; those that the file `rows` holds are taken from it, new ones go there."""
    embedded = torch.empty(len(texts), clip.embedding_dim)
    done = 0
    if rows and rows.is_file():
        found = np.fromfile(rows, np.float32)
        done = len(found) // clip.embedding_dim // EMBED_BATCH * EMBED_BATCH
        embedded[:done] = torch.from_numpy(found[: done * clip.embedding_dim]).view(done, clip.embedding_dim)
    quiet = distributed.rank() > 0 or None  # None: no bar where there is no terminal
    bar = tqdm(total=len(texts), initial=done, desc="caption embeddings", unit="caption", leave=False, disable=quiet)
    with bar, open(rows, "ab") if rows else nullcontext() as file:
        if file:
            file.truncate(done * clip.embedding_dim * 4)
        for i in range(done, len(texts), EMBED_BATCH):
            batch = texts[i : i + EMBED_BATCH]
            embedded[i : i + len(batch)] = clip.text(clip.tokenize(batch).to(clip.mean.device))[0]
            if file:
                file.write(embedded[i : i + len(batch)].numpy().tobytes())
                file.flush()
            bar.update(len(batch))
    return embedded


def _fingerprint(texts: Sequence[str], clip: FrozenClip) -> str:
    digest = hashlib.sha256("\n".join(texts).encode())
    for name, weight in clip.clip.state_dict().items():
        if not name.startswith("visual."):
            digest.update(weight.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
