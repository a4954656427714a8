"""WebDataset shards: tar files of pictures and captions, indexed once so that each sample is read by its place."""

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from easydict import EasyDict

from ratlip.data.items import Item, Problem, held_out
from ratlip.data.journal import Journal, complete
from ratlip.errors import UserError, first_line
from ratlip.text import read_captions

SUFFIXES = ("jpg", "jpeg", "png", "webp")


def folder(pattern: str) -> Path:
    """The folder that all shards of a brace pattern lie in or below: what stands before the first brace."""
    return Path(re.split(r"[{*?]", pattern)[0] + "x").parent


def read_shards(data: EasyDict, split: str, cache: Path) -> tuple[list[Item], list[Problem]]:
    """The captioned images of a split, in the order of the shards, and what is wrong with those that cannot be used.

    Without `data.test_dir` a tenth of the samples is held out for testing.

    Args:
        data: the config's data group. split: "train" or "test". cache: folder that keeps the index.

    Raises:
        UserError: webdataset is not installed, a pattern without shards, or a shard that is missing or broken.
    """
    shards = list_shards("data.test_dir", data.test_dir) if split == "test" and data.test_dir else None
    shards = shards or list_shards("data.dir", data.dir)
    inputs = []
    for shard in shards:
        status = shard.stat()
        inputs.append((os.path.relpath(shard, cache.parent), [status.st_size, status.st_mtime_ns], shard))
    samples = complete(Journal(cache / "shards.jsonl"), inputs, index, data.num_workers, 1, "indexing shards")
    items, problems, seen = [], [], set()
    for (name, _, shard), entries in zip(inputs, samples, strict=True):
        for own, span, captions in entries:
            key = f"{name.removesuffix('.tar')}/{own}"
            if key in seen:
                problems.append(Problem("key twice", f"{shard}: {own} comes twice; used once", lost=False))
            elif span is None:
                problems.append(Problem("missing image", f"{shard}: {own} has no {', '.join(SUFFIXES)}"))
            elif captions is None:
                problems.append(Problem("missing captions", f"{shard}: {own} has no txt"))
            elif not captions:
                problems.append(Problem("empty captions", f"{shard}: {own}.txt holds no caption"))
            else:
                items.append(Item(key, shard, captions, span=tuple(span)))
            seen.add(key)
    if not data.test_dir:
        chosen = set(held_out([item.key for item in items], split))
        items = [item for item in items if item.key in chosen]
        problems = problems if split == "train" else []  # each is told once
    return items, problems


def list_shards(setting: str, pattern: str) -> list[Path]:
    """The shards of a brace pattern such as data/cc3m/{00000..00331}.tar; `setting` is where it was given."""
    webdataset = _webdataset()
    if "://" in pattern or pattern.startswith("pipe:"):
        raise UserError(f"{setting}: {pattern} is no file; shards are read by place, so copy them to a disk first")
    shards = [Path(name) for name in webdataset.shardlists.expand_urls(pattern)]
    for shard in shards:
        if shard.suffix != ".tar":
            raise UserError(f"{setting}: expected a pattern of .tar files such as data/cc3m/{{00000..00331}}.tar, "
                            f"not {pattern}")  # fmt: skip
        if not shard.is_file():
            raise UserError(f"{setting}: {pattern} names {shard}, which is not there")
    return shards


def index(shard: Path) -> list[list]:
    """The samples of a shard, in its order: [key, [first byte, length] of the image or None, captions or None].

    A key is a file's path up to its name's first dot. A sample is files of one key that stand together.
    """
    group_by_keys = _webdataset().tariterators.group_by_keys
    samples = []
    try:
        with tarfile.open(shard, "r:") as tar, open(shard, "rb") as file:
            for sample in group_by_keys(_members(tar, shard), handler=lambda error: True):
                span = next((sample[suffix] for suffix in SUFFIXES if suffix in sample), None)
                captions = None
                if "txt" in sample:
                    start, length = sample["txt"]
                    file.seek(start)
                    captions = read_captions(file.read(length))
                samples.append([sample["__key__"], span, captions])
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{shard}: not a plain tar file, or cut short ({first_line(error)}); fetch it again") from None
    return samples


def _members(tar: tarfile.TarFile, shard: Path) -> Iterator[dict]:
    """What webdataset's grouping reads, with places in the shard for contents."""
    for member in tar:
        tar.members = []  # or it keeps them all
        if member.isreg():
            yield {"fname": member.name, "data": [member.offset_data, member.size], "__url__": str(shard)}


def _webdataset():
    try:
        import webdataset
    except ImportError:
        raise UserError("data.layout: webdataset is not installed; run: python -m pip install webdataset") from None
    return webdataset
