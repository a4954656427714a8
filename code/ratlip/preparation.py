"""What `prepare.sh` does to a data set before training: checks it, then computes what training and scoring need."""

from collections import Counter
from pathlib import Path

import numpy as np
from easydict import EasyDict

from ratlip import build, device, distributed
from ratlip.data import captions
from ratlip.data.folder import write_folder_captions
from ratlip.data.inventory import LISTED, Stock, cache_folder, refusal, take_stock, too_many_lost, write_copies
from ratlip.data.layouts import Item, Problem
from ratlip.data.loader import BATCH_SIZE, batch_size_for
from ratlip.encoders.clip_towers import FrozenClip
from ratlip.errors import UserError
from ratlip.evaluation import Scorer, check_counts
from ratlip.sampling import choose_products

SPLITS = ("train", "test")


def check(config: EasyDict) -> dict[str, list[Item]]:
    """Read both splits and decode every image; print a table of them, and every problem on a line of its own.

    Returns:
        the usable items of each split.

    Raises:
        UserError: nothing to read, more problems than a run would begin with, or too little for one.
    """
    stocks = {split: take_stock(config.data, split) for split in SPLITS}
    keys = {split: {item.key for item in stock.items} for split, stock in stocks.items()}
    for key in sorted(keys["train"] & keys["test"]):
        problem = Problem("key in both splits", f"{config.data.dir}: train and test both list {key!r}", lost=False)
        stocks["test"].problems.append(problem)
    for problem in dict.fromkeys(problem for stock in stocks.values() for problem in stock.problems):
        print(f"{problem.kind}  {problem.message}")
    print(table(list(stocks.values())))
    for stock in stocks.values():
        if too_many_lost(stock) or not stock.items:
            raise refusal(config.data, stock)
    items = {split: stock.items for split, stock in stocks.items()}
    check_size(config, items)
    return items


def check_size(config: EasyDict, items: dict[str, list[Item]], processes: int = 1) -> None:
    """Refuse what training cannot begin with although every image is fine, before anything that takes long; settle
    `train.batch_size` where nobody set it.

    Args:
        items: the usable ones of each split.

    Raises:
        UserError: too few images for a batch or for scores, or captions of which none is wrong for some image.
    """
    settings, images = config.train, len(items["train"])
    asked, settings.batch_size = settings.batch_size, batch_size_for(images, settings.batch_size, processes)
    if asked is None and settings.batch_size != BATCH_SIZE:
        over = f" on {processes} processes" if processes > 1 else ""
        distributed.say(f"train.batch_size: {settings.batch_size}, of {images} training images{over}; nobody set it")
    alone = captions.CaptionTable([item.captions for item in items["train"]]).without_mismatch()
    if alone is not None:
        raise UserError(
            f"{config.data.dir}: every training caption is also one of {items['train'][alone].place}: no mismatch "
            "exists, by which a discriminator learns what captions mean; give the images captions of their own"
        )
    check_counts(config.eval, len(items["test"]))


def caption_by_folders(config: EasyDict, template: str) -> None:
    """Write captions for pictures that have none: the name of each one's folder, in the place of {} in `template`."""
    if config.data.layout != "folder":
        raise UserError(f"--captions-from-folders: data.layout is {config.data.layout}; it is for folder")
    print(f"captions            {write_folder_captions(Path(config.data.dir), template)}")


def table(stocks: list[Stock]) -> str:
    """Lines of text, a column for each split."""
    columns = []
    for stock in stocks:
        counts = [len(item.captions) for item in stock.items] or [0]
        sizes = sorted(stock.sizes, key=lambda size: size[0] * size[1]) or [(0, 0)]
        sizes = [f"{width} x {height}" for width, height in (sizes[0], sizes[len(sizes) // 2], sizes[-1])]
        kinds = Counter(problem.kind for problem in stock.problems)
        cells = {
            "images": f"{len(stock.items):,}",
            "captions": f"{sum(counts):,}",
            "captions per image": f"{min(counts)} to {max(counts)}",
            **dict(zip(("smallest image", "median image", "largest image"), sizes, strict=True)),
            "problems": f"{len(stock.problems):,}",
            **{f"  {kind}": f"{kinds[kind]:,}" for kind in sorted(kinds)},
        }
        columns.append(cells)
    names = list(dict.fromkeys(name for cells in columns for name in cells))
    width = max(map(len, names)) + 2
    lines = [" " * width + "".join(f"{stock.split:>14}" for stock in stocks)]
    return "\n".join(
        lines + [name.ljust(width) + "".join(f"{cells.get(name, '0'):>14}" for cells in columns) for name in names]
    )


def resize(config: EasyDict, items: list[Item]) -> None:
    """Write the resized copies of the training images."""
    print(f"resized copies      {write_copies(config, items)}")


def embed_captions(config: EasyDict, items: dict[str, list[Item]]) -> FrozenClip:
    """Fill the cache of caption embeddings for each split's items, and name the captions that are not read to their
    end; gives the CLIP that scores will compare with."""
    clip = build.clip_of(config).to(device.choose(config.train.device))
    encoder = build.text_encoder_of(config, clip)
    choose_products(clip, config)
    counts = []
    for split, own in items.items():
        table = captions.CaptionTable([item.captions for item in own])
        if split == "test" and encoder is not clip:
            captions.embed(table, clip, cache_folder(config.data))  # for scores
        captions.embed(table, encoder, cache_folder(config.data), own)
        for row in table.cut[:LISTED]:
            item = own[np.searchsorted(table.starts, row, side="right") - 1]
            print(f"cut caption  {item.key}: {table.texts[row]!r}")
        if len(table.cut) > LISTED:
            print(f"cut caption  and {len(table.cut) - LISTED:,} more of the {split} split")
        counts.append(f"{len(table.cut):,} of {len(table.texts):,} ({split})")
    print(f"caption embeddings  {cache_folder(config.data)}")
    print(f"cut captions        {', '.join(counts)}: longer than the {encoder.limit}")
    return clip


def write_statistics(config: EasyDict, clip: FrozenClip, items: list[Item]) -> None:
    """Measure the real test pictures for each metric of `eval.metrics` that compares with them, unless it is there; and
    let the judge, where it is another CLIP, encode their captions."""
    scorer = Scorer(config, clip, items)
    for reference in scorer.references.values():
        print(f"statistics          {reference.source}")
    if scorer.judge is not clip:
        captions.embed(
            captions.CaptionTable([item.captions for item in items]), scorer.judge, cache_folder(config.data)
        )
        print(f"judge's captions    {cache_folder(config.data)}, by {scorer.judge.name}")
