"""Which items of a data set can be used, and its images resized: found out once, kept beside the data."""

import hashlib
import shlex
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from easydict import EasyDict

from ratlip import distributed
from ratlip.data import lafite, parquet, shards
from ratlip.data.files import counted
from ratlip.data.items import LEFT_OUT
from ratlip.data.journal import Journal, complete, file_state
from ratlip.data.layouts import DECODING, Item, Problem, open_image, read_bytes, read_items
from ratlip.data.loader import fitted
from ratlip.disk import cannot_write, replacing
from ratlip.errors import UserError, first_line
from ratlip.paths import command

MAX_LOST = 0.01  # share of a split's items; where more cannot be used, something is wrong with the whole
NAMED = 3  # of the items that are left out, in the warning
LISTED = 100  # of them, in the list that comes with stopping
TOGETHER = 16  # images that a worker looks at before they are noted
CHECK = 2  # version of what `_look` finds


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
    """Where what is found out about a data set is kept: `cache` in its folder, or in that of its shards or files."""
    files = data.layout in ("webdataset", "parquet", "lafite") and not Path(data.dir).is_dir()
    return (shards.folder(data.dir) if files else Path(data.dir)) / "cache"


def take_stock(data: EasyDict, split: str) -> Stock:
    """Read a split and decode each image whose content has not been decoded before.

    An image is the one that was decoded where its bytes have the same hash; they are read and hashed again where
    its file's size, times or number (inode) are others than before.

    Args:
        data: the config's data group. split: "train" or "test".

    Raises:
        UserError: a missing folder, key list or shard.
    """
    cache = cache_folder(data)
    if data.layout == "webdataset":
        items, problems = shards.read_shards(data, split, cache)
    elif data.layout == "parquet":
        items, problems = parquet.read_parquet(data, split, cache)
    elif data.layout == "lafite":
        items, problems = lafite.read_lafite(data, split)
    else:
        items, problems = read_items(data.layout, Path(data.dir), split)
    journal = Journal(cache / f"images_{split}.jsonl", CHECK)
    files: dict[Path, list[int]] = {}
    inputs = [(item.key, _state(item, files), (item, journal.earlier(item.key))) for item in items]
    found = complete(journal, inputs, _look, data.num_workers, TOGETHER, f"checking {split} images")
    usable, sizes = [], []
    for item, result in zip(items, found, strict=True):
        if isinstance(result, str):
            problems.append(Problem("undecodable image", f"{item.place}: {result}"))
            continue
        content, _, size, useless_profile = result
        if useless_profile:
            line = f"{item.place}: its colour profile cannot be used; its colours are taken as sRGB's"
            problems.append(Problem("useless profile", line, lost=False))
        usable.append(replace(item, content=content))
        sizes.append(tuple(size))
    return Stock(split, usable, sizes, problems)


def usable_items(config: EasyDict, split: str) -> list[Item]:
    """The items of a split that training or evaluation reads; what is left out is counted and the first named.

    Which they are is settled before the first step, by the files alone: batches stay whole, and runs repeat,
    whatever the number of workers and processes. Training reads the resized copies that `prepare.sh --resize` made.

    Raises:
        UserError: none, or more than MAX_LOST of them cannot be used; the list is printed.
    """
    stock = take_stock(config.data, split)
    lost = [problem.message for problem in stock.lost]
    more = f"{command('prepare.sh')} {shlex.quote(config.file)} lists all"
    if too_many_lost(stock) or not stock.items:
        for problem in sorted(stock.problems, key=lambda problem: not problem.lost)[:LISTED]:
            distributed.say(problem.message)
        if len(stock.problems) > LISTED:
            distributed.say(f"and {len(stock.problems) - LISTED} more; {more}")
        raise refusal(config.data, stock)
    if left_out := [problem.message for problem in stock.problems if problem.kind == LEFT_OUT]:
        distributed.say(f"left out: {counted([message.partition(': ')[0] for message in left_out])}; {more}")
    if lost:
        named = "; ".join(lost[:NAMED])
        distributed.say(f"warning: {loss(stock)} and left out: {named}{'; ' + more if len(lost) > NAMED else ''}")
    kinds = Counter(problem.kind for problem in stock.problems if not problem.lost and problem.kind != LEFT_OUT)
    for kind, count in kinds.items():
        first = next(problem.message for problem in stock.problems if problem.kind == kind)
        distributed.say(f"{split}: {kind} ({count:,}): {first}{'; ' + more if count > 1 else ''}")
    return _with_copies(config, stock.items) if split == "train" else stock.items


def refusal(data: EasyDict, stock: Stock) -> UserError:
    """Why nothing begins with a split that has lost too many items, or has none."""
    if not stock.lost:
        return UserError(
            f"{data.dir}: the {stock.split} split is empty; have 15 pictures or more, or lists that name some"
        )
    first = f"the first: {stock.lost[0].message}; mend or remove them, prepare.sh lists all"
    return UserError(f"{data.dir}: {loss(stock)}, more than {MAX_LOST:.0%}; {first}")


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
    journal = Journal(folder / "done.jsonl", DECODING)
    for item in items:
        if not _copy_of(item, folder).is_file():
            journal.known.pop(item.key, None)
    inputs = [(item.key, _source(item), item) for item in items]
    work = partial(_write_copy, folder=folder, size=size, fit=config.data.fit)
    complete(journal, inputs, work, config.data.num_workers, TOGETHER, "resizing images")
    return folder


def _copies(config: EasyDict) -> tuple[Path, int]:
    """Folder of the resized copies, and their shorter side in pixels; padded ones have one of their own."""
    size = int(config.model.imsize * config.data.enlarge)
    padded = "" if config.data.fit == "crop" else f"_{config.data.fit}"
    return cache_folder(config.data) / f"resized_{size}{padded}", size


def _with_copies(config: EasyDict, items: list[Item]) -> list[Item]:
    """Items that point to their resized copies, where there are any of the image as it is now."""
    folder, _ = _copies(config)
    journal = Journal(folder / "done.jsonl", DECODING)
    copied, stale = [], 0
    for item in items:
        copy, done = _copy_of(item, folder), journal.find(item.key, _source(item))
        stale += not done and (item.key in journal.known or item.key in journal.outdated)
        copied.append(replace(item, image=copy, box=None, span=None) if done and copy.is_file() else item)
    if stale:
        distributed.say(f"{folder}: {stale:,} copies are of other pictures, or of an earlier version of this program, "
                        "and are not used; prepare.sh --resize makes them anew")  # fmt: skip
    return copied


def _copy_of(item: Item, folder: Path) -> Path:
    return folder / f"{item.key}.bmp"


def _write_copy(item: Item, folder: Path, size: int, fit: str) -> bool:
    path = _copy_of(item, folder)
    picture = fitted(open_image(item), size, fit)
    try:
        with replacing(path) as file:
            picture.save(file, "BMP")
    except OSError as error:
        raise cannot_write(path, error) from None
    return True


def _look(what: tuple[Item, list | None]) -> list | str:
    """[hash of an image's bytes, its box, its size, whether it has a profile of no use], or why it cannot be used.

    `what` is an item, and what was found of it earlier, which holds where the hash and the box are the same.
    """
    item, earlier = what
    try:
        content = read_bytes(item)
    except OSError as error:
        return f"cannot be read ({first_line(error)})"
    source = _source(replace(item, content=hashlib.blake2b(content, digest_size=16).hexdigest()))
    if earlier and earlier[:2] == source:
        return earlier
    try:
        image = open_image(item, content)
    except UserError as error:
        return str(error).removeprefix(f"{item.place}: ")
    return [*source, list(image.size), "icc_profile" in image.info]


def _source(item: Item) -> list:
    """What an item's pixels are made from."""
    return [item.content, item.box and list(item.box)]


def _state(item: Item, files: dict[Path, list[int]]) -> list:
    """What changes when an item's image may have, besides itself; `files` keeps what is known of each file."""
    if item.image not in files:
        files[item.image] = file_state(item.image)
    return [*files[item.image], *(item.span or ()), *(item.box or ())]
