"""Parquet files with pictures in them, as Hugging Face's data sets have them: unpacked once, then read by place."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from easydict import EasyDict

from ratlip import distributed
from ratlip.data.files import OWN, counted, list_files
from ratlip.data.items import Item, Problem, held_out
from ratlip.data.journal import Journal, complete, file_state
from ratlip.data.tables import CAPTIONS, texts_in
from ratlip.disk import cannot_write, replacing
from ratlip.errors import UserError, first_line

IMAGES = ("image", "img", "picture", "jpg", "png")  # columns, the first of them that there is
INDEX = 1  # version of what `unpack` leaves
TOGETHER = 64  # rows at a time
TEST_NAMES = ("test", "validation", "valid", "val", "dev")  # the first of them there is, beside "train"


def read_parquet(data: EasyDict, split: str, cache: Path) -> tuple[list[Item], list[Problem]]:
    """The captioned pictures of a split, in the order of the files and their rows, and what is wrong with others.

    The first use copies the pictures, as they are, to one file for each Parquet file below `cache`; a file that
    changes is unpacked anew. Files are of the split that their names, or folders, begin with; where they tell no
    two splits apart, a tenth of the rows is held out for testing.

    Args:
        data: the config's data group. split: "train" or "test". cache: folder that keeps the pictures and the index.

    Raises:
        UserError: pyarrow is not installed, no such files, or one that cannot be read or has other columns.
    """
    _pyarrow()
    asked = "test_dir" if split == "test" and data.test_dir else "dir"
    files = list_parquet(f"data.{asked}", data[asked])
    names = [os.path.relpath(file, cache.parent) for file in files]
    own = {} if data.test_dir else own_splits(names)
    journal, inputs = Journal(cache / "parquet.jsonl", INDEX), []
    for name, file in zip(names, files, strict=True):
        if own.get(name, split) != split:
            continue
        unpacked = cache / "unpacked" / f"{name.replace('../', '')}.pictures"
        length, _ = journal.earlier(name) or (None, None)
        if not unpacked.is_file() or unpacked.stat().st_size != length:
            journal.known.pop(name, None)
        inputs.append((name, file_state(file), (file, unpacked)))
    found = complete(journal, inputs, unpack, data.num_workers, 1, f"unpacking {split} pictures")
    items, problems = [], []
    for (name, _, (file, unpacked)), (_, rows) in zip(inputs, found, strict=True):
        for row, (span, captions) in enumerate(rows):
            if span is None:
                problems.append(Problem("missing image", f"{file}: row {row} has no picture in it"))
            elif not captions:
                problems.append(Problem("empty captions", f"{file}: row {row} has no caption"))
            else:
                key = f"{name.removesuffix('.parquet')}/{row}"
                items.append(Item(key, unpacked, captions, span=tuple(span)))
    if split == "train":
        outside = [name for name in names if own and own[name] is None]
        note = f"; in neither split: {counted(outside)}" if outside else ""
        distributed.say(f"{data.dir}: pictures and captions in {counted([name for name, *_ in inputs])}{note}")
    if not own and not data.test_dir:
        chosen = set(held_out([item.key for item in items], split))
        items = [item for item in items if item.key in chosen]
        problems = problems if split == "train" else []  # each is told once
    return items, problems


def list_parquet(setting: str, place: str) -> list[Path]:
    """The files of a file, a folder or a pattern with *; `setting` is where it was given."""
    if Path(place).is_dir():
        files = [Path(place, name) for name in list_files(Path(place), OWN).others]
    else:
        files = [Path(name) for name in sorted(glob.glob(place, recursive=True))]
    files = [file for file in files if file.suffix == ".parquet"]
    if not files:
        raise UserError(f"{setting}: no .parquet file in, or of the pattern, {place}")
    return files


def own_splits(names: Sequence[str]) -> dict[str, str | None]:
    """The split of each file, if there are both: "train" or "test", of a file that is of neither None. A file's name
    tells, as train-00000-of-00002.parquet, or else a folder's, as train/0000.parquet."""
    words = {name: _word(name) for name in names}
    test = next((word for word in TEST_NAMES if word in words.values()), None)
    if test is None or "train" not in words.values():
        return {}
    return {name: {"train": "train", test: "test"}.get(word) for name, word in words.items()}


def _word(name: str) -> str | None:
    pattern = rf"({'|'.join(('train', *TEST_NAMES))})(?![a-z])"
    found = (re.match(pattern, part.lower()) for part in reversed(name.split("/")))
    return next((match[1] for match in found if match), None)


def unpack(places: tuple[Path, Path]) -> tuple[int, list]:
    """Copy the pictures of a Parquet file, one behind the other, to another file; a row group is in memory at a time.

    Returns:
        the length of what was written, and for each row [[first byte, length] of its picture or None, its captions].
    """
    file, unpacked = places
    rows, end = [], 0
    try:
        parquet = _pyarrow().ParquetFile(file)
        image, text = (_column(file, parquet.schema_arrow.names, known) for known in (IMAGES, CAPTIONS))
        batches = parquet.iter_batches(TOGETHER, columns=[image, text])
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise UserError(f"{file}: not a Parquet file, or cut short ({first_line(error)}); fetch it again") from None
    try:
        with replacing(unpacked) as sink:
            for batch in _each(file, batches):
                for picture, captions in zip(batch[image].to_pylist(), batch[text].to_pylist(), strict=True):
                    content = picture.get("bytes") if isinstance(picture, dict) else picture
                    length = sink.write(content) if isinstance(content, bytes) else 0
                    rows.append([[end, length] if length else None, texts_in(captions)])
                    end += length
    except OSError as error:
        raise cannot_write(unpacked, error) from None
    return [end, rows]


def _each(file: Path, batches):
    """The batches of rows, of a file that may be broken further on."""
    try:
        yield from batches
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read to its end ({first_line(error)}); fetch it again") from None


def _column(file: Path, there: Sequence[str], known: Sequence[str]) -> str:
    name = next((name for name in known if name in there), None)
    if name is None:
        raise UserError(f"{file}: no column {' or '.join(known[:2])}; it has {', '.join(there)}")
    return name


def _pyarrow():
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("data.layout: pyarrow is not installed; run: python -m pip install pyarrow") from None
    return pyarrow.parquet
