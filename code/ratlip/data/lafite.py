"""Data sets made for LAFITE: a folder or zip of pictures, and dataset.json, which holds CLIP's features of them."""

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from easydict import EasyDict
from torch import Tensor
from tqdm import tqdm

from ratlip import checkpoint, distributed
from ratlip.data.files import OWN, is_picture, list_files, stem
from ratlip.data.items import Item, Problem, held_out
from ratlip.data.journal import file_state
from ratlip.data.layouts import open_image
from ratlip.data.loader import crop, resize_shorter, to_bytes, to_floats
from ratlip.disk import cannot_write, replacing
from ratlip.encoders.clip_towers import FrozenClip
from ratlip.errors import UserError, first_line
from ratlip.text import read_captions

TABLE = "dataset.json"
IMAGE, TEXT = "clip_img_features", "clip_txt_features"
CHUNK = 2**20  # characters of the table at a time: COCO's has gigabytes
VERSION = 1  # of what `read_features` keeps
COMPARED, ALIKE = 8, 0.8  # pictures whose features are made again, and the cosine that they reach with the same CLIP


class Features(NamedTuple):
    """CLIP's features of a data set's pictures and captions, not normalised, in the order of `keys`."""

    keys: list[str]
    image: Tensor | None  # (N, E)
    text: Tensor | None  # (R, E); those of picture i are rows starts[i] to starts[i + 1] - 1
    starts: Tensor  # (N + 1,)


def read_lafite(data: EasyDict, split: str) -> tuple[list[Item], list[Problem]]:
    """The pictures of a split, in the order of their names, and what is wrong with those that cannot be used.

    Captions are those in text files of the pictures' names, beside them; where there are none at all, items have no
    captions, and the features in the table (`read_features`) stand for them. Without `data.test_dir` a tenth of the
    pictures is held out for testing.

    Args:
        data: the config's data group. split: "train" or "test".

    Raises:
        UserError: no such folder or zip, no table, or no pictures.
    """
    asked = "test_dir" if split == "test" and data.test_dir else "dir"
    place = Path(data[asked])
    spans, texts, problems = _in_zip(place) if place.is_file() else _in_folder(f"data.{asked}", place)
    items = []
    for name in sorted(spans):
        key, captions = stem(name), read_captions(texts(stem(name)) or b"")
        image, span = (place, spans[name]) if spans[name] else (place / name, None)
        if not captions and texts.any:
            problems.append(Problem("missing captions", f"{place}: {key}.txt: missing or empty, but others have one"))
        else:
            items.append(Item(key, image, captions, span=span))
    if split == "train":
        source = "text files beside them" if texts.any else f"none, but their features in {TABLE}"
        distributed.say(f"{place}: {len(spans):,} pictures of a data set made for LAFITE; captions: {source}")
    if not data.test_dir:
        chosen = set(held_out([item.key for item in items], split))
        items = [item for item in items if item.key in chosen]
        problems = problems if split == "train" else []  # each is told once
    return items, problems


class _Texts:
    """The bytes of the text files by the keys of their pictures; None where there is none."""

    def __init__(self, names: Sequence[str], read: Any):
        self.names, self.read = {stem(name): name for name in names if name.endswith(".txt")}, read
        self.any = bool(self.names)

    def __call__(self, key: str) -> bytes | None:
        return self.read(self.names[key]) if key in self.names else None


def _in_folder(setting: str, folder: Path) -> tuple[dict[str, None], _Texts, list[Problem]]:
    if not (folder / TABLE).is_file():
        raise UserError(f"{setting}: {folder} is no folder or zip made for LAFITE: it has no {TABLE}")
    listing = list_files(folder, OWN)
    problems = [Problem("broken link", f"{folder / name}: {reason}") for name, reason in listing.broken.items()]
    texts = _Texts(listing.others, lambda name: (folder / name).read_bytes())
    return dict.fromkeys(listing.pictures), texts, problems


def _in_zip(path: Path) -> tuple[dict[str, tuple[int, int]], _Texts, list[Problem]]:
    """Of a zip's pictures the first byte and length; they are stored as they are."""
    spans, problems = {}, []
    with _zip(path) as archive, open(path, "rb") as file:
        names = archive.namelist()
        if TABLE not in names:
            raise UserError(f"{path}: no zip made for LAFITE: it has no {TABLE}")
        for entry in archive.infolist():
            if not is_picture(entry.filename):
                continue
            if entry.compress_type != zipfile.ZIP_STORED:
                line = (
                    f"{path}: {entry.filename} is compressed within the zip; unpack it, and set data.dir to the folder"
                )
                problems.append(Problem("compressed image", line))
                continue
            file.seek(entry.header_offset + 26)  # where the lengths of the name and of more stand, 2 bytes each
            lengths = file.read(4)
            start = entry.header_offset + 30 + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
            spans[entry.filename] = (start, entry.file_size)

    def read(name: str) -> bytes:
        with _zip(path) as archive:
            return archive.read(name)

    return spans, _Texts(names, read), problems


@contextmanager
def _zip(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise UserError(f"{path}: not a zip, or cut short ({first_line(error)})") from None


def read_features(place: Path, cache: Path) -> Features:
    """The features in a data set's table; read once, then from a file below `cache`, which is as large.

    Raises:
        UserError: a table that cannot be read, that has none, or whose features differ in length.
    """
    table = place if place.is_file() else place / TABLE
    try:
        state = json.dumps([VERSION, place.name, *file_state(table)])
    except OSError as error:
        raise UserError(f"{table}: cannot be read ({error.strerror})") from None
    kept = cache / f"lafite_{hashlib.sha256(state.encode()).hexdigest()[:16]}.pt"
    if kept.is_file():
        content = checkpoint.read(kept, mmap=True)
        return Features(*(content[name] for name in Features._fields))
    if place.is_file():
        with _zip(place) as archive, archive.open(TABLE) as file:
            found = _collect(file, f"{place}: {TABLE}", archive.getinfo(TABLE).file_size)
    else:
        with open(table, "rb") as file:
            found = _collect(file, str(table), os.path.getsize(table))
    try:
        with replacing(kept) as file:
            torch.save(found._asdict(), file)
    except OSError as error:
        raise cannot_write(kept, error) from None
    return found


def _collect(file: BinaryIO, name: str, size: int) -> Features:
    found: dict[str, dict[str, np.ndarray]] = {IMAGE: {}, TEXT: {}}
    quiet = distributed.rank() > 0 or None  # None: no bar where there is no terminal
    with tqdm(desc=f"reading {TABLE}", total=size, unit="B", unit_scale=True, leave=False, disable=quiet) as bar:
        for section, entry in _entries(file, name, bar):
            if section not in found:
                continue
            try:
                picture, values = entry
                array = np.asarray(values, dtype=np.float32)
                if array.ndim != (1 if section == IMAGE else 2) or not array.size or not np.isfinite(array).all():
                    raise ValueError
                found[section][stem(picture)] = np.atleast_2d(array)
            except (TypeError, ValueError, AttributeError):
                raise UserError(f"{name}: {section}: expected [name, numbers], not {str(entry)[:60]}") from None
    lengths = {array.shape[1] for section in found.values() for array in section.values()}
    if len(lengths) != 1:
        what = f"features of {len(lengths)} lengths" if lengths else "no features"
        raise UserError(f"{name}: it holds {what}; CLIP's, of one length, were expected")
    keys = sorted(found[IMAGE].keys() & found[TEXT].keys() if all(found.values()) else {**found[IMAGE], **found[TEXT]})
    image, text = (
        torch.from_numpy(np.concatenate([section[key] for key in keys])) if section else None
        for section in found.values()
    )
    counts = [len(found[TEXT][key]) if found[TEXT] else 0 for key in keys]
    return Features(keys, image, text, torch.tensor([0, *counts]).cumsum(0))


def _entries(file: BinaryIO, name: str, bar: tqdm) -> Iterator[tuple[str, Any]]:
    """(section, entry) of each list in a JSON object of lists, one entry in memory at a time."""
    reader = _Reader(file, name, bar)
    reader.expect("{")
    while not reader.follows("}"):
        section = reader.value()
        reader.expect(":")
        if reader.follows("["):
            while not reader.follows("]"):
                yield section, reader.value()
                reader.follows(",")
        else:
            reader.value()
        reader.follows(",")


class _Reader:
    """Values of a JSON text that is read piece by piece."""

    def __init__(self, file: BinaryIO, name: str, bar: tqdm):
        self.file, self.name, self.bar = file, name, bar
        self.text, self.place, self.decoder = "", 0, json.JSONDecoder()

    def more(self, size: int = CHUNK) -> bool:
        piece = self.file.read(size)
        self.bar.update(len(piece))
        # Such tables are ASCII: what writes them escapes all else.
        self.text, self.place = self.text[self.place :] + piece.decode("utf-8", "replace"), 0
        return bool(piece)

    def follows(self, character: str) -> bool:
        """Whether this comes next, which is then passed."""
        while True:
            while self.place < len(self.text) and self.text[self.place].isspace():
                self.place += 1
            if self.place < len(self.text) or not self.more():
                break
        found = self.text[self.place : self.place + 1] == character
        self.place += found
        return found

    def expect(self, character: str) -> None:
        if not self.follows(character):
            raise UserError(f"{self.name}: not such a table, or cut short ({character!r} was expected)")

    def value(self) -> Any:
        """The next value: null, a text, a list."""
        self.follows("")  # white space; fills up where nothing is left
        size = CHUNK
        while True:
            try:
                found, self.place = self.decoder.raw_decode(self.text, self.place)
                return found
            except json.JSONDecodeError as error:
                if not self.more(size):
                    raise UserError(f"{self.name}: not valid JSON, or cut short ({error.msg})") from None
                size *= 2  # a long value is not decoded again and again


def of_items(features: Features, items: Sequence[Item], place: Path) -> Features:
    """The features of these items, in their order.

    Raises:
        UserError: an item without any, by its name.
    """
    number = {key: i for i, key in enumerate(features.keys)}
    for item in items:
        if item.key not in number:
            raise UserError(f"{place}: {TABLE} has no features of {item.key}; leave the picture out, or make it anew")
    rows = torch.tensor([number[item.key] for item in items], dtype=torch.int64)
    counts = features.starts.diff()[rows]
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    text = None
    if features.text is not None:
        # Row j of an item is j after its first row there.
        own = torch.arange(int(starts[-1])) + (features.starts[rows] - starts[:-1]).repeat_interleave(counts)
        text = features.text[own]
    image = None if features.image is None else features.image[rows]
    return Features([item.key for item in items], image, text, starts)


@torch.no_grad()
def require_same_clip(features: Features, items: Sequence[Item], clip: FrozenClip, place: Path) -> None:
    """See that stored features are of this CLIP: features of some pictures are made again, and compared.

    Args:
        features: those of `items`, as `of_items` gives them.

    Raises:
        UserError: they are of another CLIP, or there are none of pictures, by which that could be told.
    """
    if features.image is None:
        raise UserError(f"{place}: {TABLE} has no {IMAGE}, by which it could be told which CLIP its features are of")
    length = features.image.shape[1]
    if length != clip.embedding_dim:
        raise UserError(f"{place}: {TABLE} holds features {length} long, clip.weights makes {clip.embedding_dim}")
    numbers = np.linspace(0, len(items) - 1, min(COMPARED, len(items))).astype(int).tolist()
    pictures = [
        to_bytes(crop(resize_shorter(open_image(items[n]), clip.resolution), clip.resolution, 0.5, 0.5))
        for n in numbers
    ]
    found = clip.image(to_floats(torch.stack(pictures)).to(clip.mean.device))[1].cpu()
    cosine = float(F.cosine_similarity(found, features.image[numbers], dim=1).mean())
    if not cosine > ALIKE:
        raise UserError(
            f"{place}: the features in {TABLE} are of another CLIP than clip.weights (mean cosine {cosine:.2f}); the "
            "released data sets were made with OpenAI's ViT-B/32; set clip.weights to the one it was made with"
        )
