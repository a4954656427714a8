"""Captions to a folder of pictures, each with its caption beside it: in batches, and continued where it was stopped."""

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ratlip.encoders import TextEncoder
from ratlip.encoders.clip_towers import FrozenClip
from ratlip.errors import UserError
from ratlip.metrics.features import LEAST, padded
from ratlip.pictures import captioned_grid, save_picture, to_pictures
from ratlip.sampling import generate, noise_of
from ratlip.stopping import Stop, Stopped
from ratlip.text import read_text

RECORD = ".drawn.json"  # in a folder of pictures: what was asked for, so that the same can go on and nothing else mixes
EARLIER = "convolution"  # form of CLIP's products of programs that did not note it
OVERVIEW = 64  # pictures; more of them in one nobody would look at
NAMED = 3  # captions that are cut, in the line that says so
NAME_LETTERS, NAME_BYTES = 60, 120  # of a caption, in the names of its pictures


class Caption(NamedTuple):
    """A caption to draw. `number` is its place on the command line or its line in the file, from 1."""

    number: int
    text: str


class Order(NamedTuple):
    """What is asked for: `count` pictures of each caption.

    With captions from a file, picture k of line l has the noise of (seed, l, k), so that no two pictures share theirs;
    else that of (seed, k), so that captions can be compared. Neither depends on what else is asked for.
    """

    captions: list[Caption]
    file: Path | None  # where the captions are from; None: from the command line
    count: int
    seed: int

    @property
    def pictures(self) -> int:
        """How many pictures there are in all."""
        return len(self.captions) * self.count

    def place(self, caption: Caption) -> str:
        """Where a caption stands, for messages."""
        return f"caption {caption.number}" if self.file is None else f"{self.file}, line {caption.number}"

    def names(self) -> list[tuple[str, Caption, int]]:
        """For each picture its file's name, its caption and its number among those of the caption, in order."""
        digits, last = max(2, len(str(self.captions[-1].number))), len(str(self.count - 1))
        found = []
        for caption in self.captions:
            parts = (f"{caption.number:0{digits}}", _in_a_name(caption.text), f"seed{self.seed}")
            stem = "_".join(filter(None, parts))
            found += [(f"{stem}_{number:0{last}}.png", caption, number) for number in range(self.count)]
        return found


def given(words: Sequence[str], count: int, seed: int) -> Order:
    """The order for captions of the command line. Raises UserError for one that is empty."""
    order = Order([Caption(number, " ".join(word.split())) for number, word in enumerate(words, 1)], None, count, seed)
    for caption in order.captions:
        _check(order, caption)
    return order


def read(file: Path, count: int, seed: int) -> Order:
    """The order for a text file with a caption a line; empty lines are left out, and count as lines.

    Raises:
        UserError: no such file, one without captions, or a line that is no text.
    """
    lines = re.split(r"\r\n|\r|\n", read_text(file))
    captions = [Caption(number, " ".join(line.strip("\ufeff\x1a").split())) for number, line in enumerate(lines, 1)]
    order = Order([caption for caption in captions if caption.text], file, count, seed)
    if not order.captions:
        raise UserError(f"{file}: holds no caption; give one a line")
    for caption in order.captions:
        _check(order, caption)
    return order


def check_captions(order: Order, encoder: TextEncoder) -> None:
    """Name the captions that the encoder does not read to their end; UserError where it can read nothing of one."""
    texts = [caption.text for caption in order.captions]
    encoder.check(texts, lambda number: order.place(order.captions[number]))
    cut = [order.captions[number] for number in encoder.cut(texts, whole=True)]
    for caption in cut[:NAMED]:
        print(f"{order.place(caption)} is cut at the {encoder.limit}: {caption.text!r}")
    if len(cut) > NAMED:
        print(f"and so are {len(cut) - NAMED:,} more captions, of {len(order.captions):,}")


def record_of(
    order: Order, generator: nn.Module, clip: FrozenClip, encoder: TextEncoder, precision: str
) -> dict[str, object]:
    """What makes an order the same as another: then its pictures are. The networks are on the CPU."""
    weights, captions = hashlib.sha256(), hashlib.sha256()
    for value in generator.state_dict().values():
        weights.update(value.contiguous().numpy().tobytes())
    for number, text in order.captions:
        captions.update(f"{number} {text}\n".encode())
    return {
        "weights": weights.hexdigest(),
        "clip": repr(clip.identity),
        **({} if encoder is clip else {"text": repr(encoder.identity)}),
        "captions": captions.hexdigest(),
        "from_file": order.file is not None,
        "pictures_of_each": order.count,
        "seed": order.seed,
        "precision": precision,
        "products": clip.products,
    }


def claim(asked: Path, record: dict[str, object]) -> tuple[Path, str]:
    """The folder for an order's pictures: `asked`, or where that has pictures of another order, the next name that has
    none (`asked_2`, ...). One that has some of the same order's is gone on with, in the form of CLIP's products that
    these were drawn with, to the last bit; gives that too."""
    asked = asked if asked.name not in ("", "..") else asked.resolve()
    if not asked.name:
        raise UserError(f"--out {asked}: give a folder below it")
    if asked.exists() and not asked.is_dir():
        raise UserError(f"--out: {asked} exists and is no folder")
    number, folder = 1, asked
    while not _take(folder, record):
        number += 1
        folder = asked.with_name(f"{asked.name}_{number}")
    if folder != asked:
        print(f"{asked} has files of something else, which stay as they are; the pictures go to {folder}")
    return folder, (_read_record(folder / RECORD) or record).get("products", EARLIER)


def draw_into(
    folder: Path, order: Order, generator: nn.Module, encoder: TextEncoder, precision: str, batch_size: int
) -> str | None:
    """Draw the pictures of an order that `folder` does not have yet, at most `batch_size` at a time.

    The networks are on the device that computes. What is drawn is written whatever happens meanwhile.

    Returns:
        what stopped it, such as "SIGINT"; None where all are there.
    """
    missing = _missing(folder, order)
    if (there := order.pictures - len(missing)) > 0:
        follow = "; the others follow" if missing else " already"
        print(f"{folder} has {there:,} of these {order.pictures:,} pictures{follow}")
    # Matrix libraries add in another order for other sizes of a batch: the last one is filled up, so that a picture
    # does not depend on how many are drawn with it to the last bit.
    least = batch_size if order.pictures > batch_size else order.pictures
    least = max(least, LEAST) if order.file else least
    bar = tqdm(total=order.pictures, initial=there, unit="picture", leave=False, disable=None)
    stop, writing = Stop(), []
    try:
        with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # which ends when all is written
            for first in range(0, len(missing), batch_size):
                batch = missing[first : first + batch_size]
                with stop.at_once():
                    images = _draw(batch, order, generator, encoder, precision, least)
                _finish(writing, bar)  # those of the batch before, so that never more than two are held
                writing = [
                    pool.submit(save_picture, picture, folder / name, caption.text)
                    for picture, (name, caption, _) in zip(to_pictures(images), batch, strict=True)
                ]
            _finish(writing, bar)
    except Stopped:
        return stop.cause
    except UserError as error:
        raise UserError(f"{error}; there are {done(folder, order)}, and the same command draws the others") from None
    finally:
        stop.close()
    return None


def done(folder: Path, order: Order) -> str:
    """How many pictures of an order there are, in words."""
    count = order.pictures - len(_missing(folder, order))
    whole = f"{order.pictures:,} picture{'s' if order.pictures > 1 else ''}"
    share = whole if count == order.pictures else f"{count:,} of {whole}"
    return f"{share} in {folder}"


def write_overview(folder: Path, order: Order) -> Path:
    """The pictures of an order in one, beside their folder: <folder>_overview.png."""
    pictures, labels = [], []
    for name, caption, _ in order.names():
        with Image.open(folder / name) as picture:
            pictures.append(picture.convert("RGB"))
        labels.append(caption.text)
    path = folder.with_name(f"{folder.name}_overview.png")
    save_picture(captioned_grid(pictures, labels, order.count), path)
    return path


def _missing(folder: Path, order: Order) -> list[tuple[str, Caption, int]]:
    there = set(os.listdir(folder))
    return [picture for picture in order.names() if picture[0] not in there]


def _draw(
    batch: Sequence[tuple[str, Caption, int]],
    order: Order,
    generator: nn.Module,
    encoder: TextEncoder,
    precision: str,
    least: int,
) -> Tensor:
    """Images (B, 3, S, S) in [-1, 1] of a batch, computed among `least` or more."""
    texts = [caption.text for _, caption, _ in batch]
    distinct = list(dict.fromkeys(texts))
    with torch.no_grad():
        sentences = encoder.encode(padded(encoder.tokenize(distinct, whole=True), least))  # (least, E)
    sentences = sentences[[distinct.index(text) for text in texts]]  # (B, E)
    numbers = [(caption.number, number) if order.file else (number,) for _, caption, number in batch]
    noise = noise_of(generator, order.seed, numbers).to(sentences.device)
    return generate(generator, padded(noise, least), padded(sentences, least), precision)[: len(batch)]


def _finish(writing: Sequence[Future], bar: tqdm) -> None:
    for picture in writing:
        picture.result()
        bar.update()


def _take(folder: Path, record: dict[str, object]) -> bool:
    """Take a folder for an order if it is new or empty, but for hidden files, or is the order's already."""
    if folder.exists() and not folder.is_dir():
        return False
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RECORD
    if not path.is_file() and any(not name.startswith(".") for name in os.listdir(folder)):
        return False
    try:
        file = open(path, "x")  # of two commands that begin together one makes it
    except FileExistsError:
        there = _read_record(path)
        return isinstance(there, dict) and {**there, "products": record["products"]} == record
    try:
        with file:
            json.dump(record, file, indent=1)
    except OSError as error:
        path.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    return True


def _read_record(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _check(order: Order, caption: Caption) -> None:
    """Raises UserError where a caption cannot be drawn or written."""
    if not caption.text:
        raise UserError(f"{order.place(caption)} is empty; give a description such as 'a small red star'")
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in caption.text):
        raise UserError(f"{order.place(caption)} holds characters that are no text: {ascii(caption.text)[:100]}")


def _in_a_name(text: str) -> str:
    """The letters and digits of a caption, of any script, as part of a file's name."""
    text = unicodedata.normalize("NFC", text.lower())
    kept = "".join(letter if unicodedata.category(letter)[0] in "LMN" else " " for letter in text)
    return "-".join(kept.split())[:NAME_LETTERS].encode()[:NAME_BYTES].decode(errors="ignore").strip("-")
