"""Which items of a data set can be used, and its images resized: found out once, kept beside the data."""

import os
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from easydict import EasyDict

from ratlip import distributed
from ratlip.data import shards
from ratlip.data.journal import Journal, complete
from ratlip.data.layouts import Item, Problem, open_image, read_items
from ratlip.data.loader import resize_shorter
from ratlip.errors import UserError
from ratlip.paths import command

MAX_LOST = 0.01  # share of a split's items; where more cannot be used, something is wrong with the whole
NAMED = 3  # of the items that are left out, in the warning
LISTED = 100  # of them, in the list that comes with stopping
TOGETHER = 16  # images that a worker looks at before they are noted


class Stock(NamedTuple):
    """A split of a data set: its usable items, and all that is wrong."""

    split: str
    items: list[Item]
    sizes: list[tuple[int, int]]  # (width, height) of each item's image in pixels; birds: of the crop
    problems: list[Problem]

    @property
    def lost(self) -> list[Problem]:
        """The problems that cost an item."""
        return [problem for problem in self.problems if problem.lost]


def cache_folder(data: EasyDict) -> Path:
    """Where what is found out about a data set is kept: `cache` in its folder, or in its shards' folder."""
    return (shards.folder(data.dir) if data.layout == "webdataset" else Path(data.dir)) / "cache"


def take_stock(data: EasyDict, split: str) -> Stock:
    """Read a split and decode each image that has not been decoded before, or has changed since.

    Args:
        data: the config's data group. split: "train" or "test".

    Raises:
        UserError: a missing folder, key list or shard, or an empty split.
    """
    cache = cache_folder(data)
    if data.layout == "webdataset":
        items, problems = shards.read_shards(data, split, cache)
    else:
        items, problems = read_items(data.layout, Path(data.dir), split)
    if not items and not problems:
        raise UserError(f"{data.dir}: the {split} split is empty; have 15 pictures or more, or lists that name some")
    journal = Journal(cache / f"images_{split}.jsonl")
    inputs = [(item.key, _state(item), item) for item in items]
    found = complete(journal, inputs, _size_or_reason, data.num_workers, TOGETHER, f"checking {split} images")
    broken = [(item, reason) for item, reason in zip(items, found, strict=True) if isinstance(reason, str)]
    problems += [Problem("undecodable image", f"{item.place}: {reason}") for item, reason in broken]
    usable = [(item, tuple(size)) for item, size in zip(items, found, strict=True) if not isinstance(size, str)]
    return Stock(split, [item for item, _ in usable], [size for _, size in usable], problems)


def usable_items(config: EasyDict, split: str) -> list[Item]:
    """The items of a split that training or evaluation reads; what is left out is counted and the first named.

    Which they are is settled before the first step, by the files alone: batches stay whole, and runs repeat,
    whatever the number of workers and processes. Training reads the resized copies that `prepare.sh --resize` made.

    Raises:
        UserError: more than MAX_LOST of them cannot be used; the list is printed.
    """
    stock = take_stock(config.data, split)
    lost = [problem.message for problem in stock.lost]
    more = f"{command('prepare.sh')} {shlex.quote(config.file)} lists all"
    if too_many_lost(stock):
        for message in lost[:LISTED]:
            distributed.say(message)
        if len(lost) > LISTED:
            distributed.say(f"and {len(lost) - LISTED} more; {more}")
        raise UserError(f"{config.data.dir}: {loss(stock)}, more than {MAX_LOST:.0%}; the first: {lost[0]}; {more}")
    if lost:
        named = "; ".join(lost[:NAMED])
        distributed.say(f"warning: {loss(stock)} and left out: {named}{'; ' + more if len(lost) > NAMED else ''}")
    return _with_copies(config, stock.items) if split == "train" else stock.items


def loss(stock: Stock) -> str:
    """How many of a split's items cannot be used, in words."""
    total = len(stock.items) + len(stock.lost)
    return f"{len(stock.lost):,} of {total:,} {stock.split} items cannot be used"


def too_many_lost(stock: Stock) -> bool:
    """Whether so many items cannot be used that a run should not begin."""
    return len(stock.lost) > MAX_LOST * (len(stock.items) + len(stock.lost))


def write_copies(config: EasyDict, items: list[Item]) -> Path:
    """Copies of training images, cropped and resized as training would; those that are there already stay.

    They are uncompressed: training then reads the same pixels as from the originals, only faster.
    """
    folder, size = _copies(config)
    inputs = [(item.key, _state(item), item) for item in items]
    work = partial(_write_copy, folder=folder, size=size)
    complete(Journal(folder / "done.jsonl"), inputs, work, config.data.num_workers, TOGETHER, "resizing images")
    return folder


def _copies(config: EasyDict) -> tuple[Path, int]:
    """Folder of the resized copies, and their shorter side in pixels."""
    size = int(config.model.imsize * config.data.enlarge)
    return cache_folder(config.data) / f"resized_{size}", size


def _with_copies(config: EasyDict, items: list[Item]) -> list[Item]:
    """Items that point to their resized copies, where there are any of the image as it is now."""
    folder, _ = _copies(config)
    journal = Journal(folder / "done.jsonl")
    if not journal.known:
        return items
    copied = []
    for item in items:
        copy = _copy_of(item, folder)
        there = journal.find(item.key, _state(item)) and copy.is_file()
        copied.append(replace(item, image=copy, box=None, span=None) if there else item)
    return copied


def _copy_of(item: Item, folder: Path) -> Path:
    return folder / f"{item.key}.bmp"


def _write_copy(item: Item, folder: Path, size: int) -> bool:
    path = _copy_of(item, folder)
    partial_path = path.with_name(path.name + ".partial")
    picture = resize_shorter(open_image(item), size)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(partial_path, "BMP")
        os.replace(partial_path, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    return True


def _size_or_reason(item: Item) -> tuple[int, int] | str:
    """An image's size, or why it cannot be used."""
    try:
        return open_image(item).size
    except UserError as error:
        return str(error).removeprefix(f"{item.place}: ")


def _state(item: Item) -> list:
    """What changes when an item's image does."""
    status = item.image.stat()
    return [status.st_size, status.st_mtime_ns, *(item.span or ()), *(item.box or ())]
