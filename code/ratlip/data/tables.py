"""Captions of many pictures in one file, in the forms that people have: what each line of it says."""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ratlip.errors import UserError
from ratlip.text import lines_of, read_text, whole

NAMES = ("file_name", "image", "image_name", "filename", "file")  # columns, the first of them that there is
CAPTIONS = ("text", "caption", "captions", "comment")
DELIMITERS = (",", "|", "\t", ";")
LARGEST_CELL = 2**24  # characters; Python's csv takes 131,072 otherwise


class Row(NamedTuple):
    """What a table says of one picture."""

    line: int  # in the table
    name: str  # of the picture, as it is written there
    captions: list[str]


class Malformed(NamedTuple):
    """A line of a table that cannot be used."""

    line: int
    reason: str


def form_of(path: Path) -> str | None:
    """The form, a key of READERS, of a file whose name TABLE matches; None: by its first line it is no table."""
    form = _form_by_name(path)
    return form if READERS[form][1] is not _read_csv or _columns(_header(path)) else None


def read_table(path: Path) -> Iterator[Row | Malformed]:
    """The rows of a file whose name TABLE matches, in its order.

    Raises:
        UserError: it cannot be read as a table; named with its path, and the line where there is one.
    """
    return READERS[_form_by_name(path)][1](path)


def _form_by_name(path: Path) -> str:
    return next(form for form, (pattern, _) in READERS.items() if re.fullmatch(pattern, path.name.lower()))


def texts_in(value: object) -> list[str]:
    """The captions in a value of a table: a text, or a list of texts; empty ones left out, each on one line."""
    values = value if isinstance(value, list | tuple) else [value]
    texts = (" ".join(whole(text).split()) for text in values if isinstance(text, str))
    return [text for text in texts if text]


def _read_jsonl(path: Path) -> Iterator[Row | Malformed]:
    for number, line in enumerate(re.split(r"\r\n|\r|\n", read_text(path)), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            yield Malformed(number, f"no JSON ({error})")
            continue
        if not isinstance(entry, dict):
            yield Malformed(number, "no JSON object")
            continue
        name, caption = (next((key for key in keys if key in entry), None) for keys in (NAMES, CAPTIONS))
        if name is None or not isinstance(entry[name], str):
            yield Malformed(number, f"no {NAMES[0]}; it has {', '.join(entry) or 'nothing'}")
        elif caption is None:
            yield Malformed(number, f"no {' or '.join(CAPTIONS[:2])}; it has {', '.join(entry)}")
        else:
            yield Row(number, entry[name], texts_in(entry[caption]))


def _header(path: Path) -> str:
    """The first line, of a file that need not be text."""
    try:
        return (lines_of(read_text(path)) or [""])[0]
    except UserError:
        return ""


def _columns(header: str) -> tuple[str, int, int, int] | None:
    """Of a header: delimiter, number of columns, place of the picture's name and of its caption."""
    for delimiter in DELIMITERS:
        columns = [cell.strip().strip('"').lower() for cell in header.split(delimiter)]
        name, caption = (next((key for key in keys if key in columns), None) for keys in (NAMES, CAPTIONS))
        if name and caption:
            return delimiter, len(columns), columns.index(name), columns.index(caption)
    return None


def _read_csv(path: Path) -> Iterator[Row | Malformed]:
    text = read_text(path)
    header = _header(path)
    if not (found := _columns(header)):
        raise UserError(
            f"{path}, line 1: a table of captions begins with the names of its columns, such as "
            f"{NAMES[0]},{CAPTIONS[0]} or image,caption, not {header[:80]!r}"
        )
    delimiter, width, name, caption = found
    quoting = csv.QUOTE_NONE if delimiter == "|" else csv.QUOTE_MINIMAL  # as Flickr30k's, whose captions have quotes
    space = " " if f"{delimiter} " in header else ""  # after each delimiter
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, skipinitialspace=bool(space))
    csv.field_size_limit(LARGEST_CELL)
    try:
        begun = False  # empty lines may stand before the header
        for cells in rows:
            if not any(cell.strip() for cell in cells) or not begun:
                begun = begun or any(cell.strip() for cell in cells)
                continue
            if len(cells) > width and caption == width - 1:  # a caption with commas that nobody put in quotes
                cells = [*cells[: width - 1], (delimiter + space).join(cells[width - 1 :])]
            if len(cells) != width or not cells[name].strip():
                yield Malformed(rows.line_num, f"{len(cells)} cells, where the header has {width}"
                                if len(cells) != width else "no name of a picture")  # fmt: skip
                continue
            yield Row(rows.line_num, cells[name].strip(), _texts_in_cell(cells[caption]))
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: not the table it begins as ({error})") from None


def _texts_in_cell(cell: str) -> list[str]:
    if cell.lstrip().startswith("["):  # a list, as JSON writes it
        try:
            return texts_in(json.loads(cell))
        except ValueError:
            pass
    return texts_in(cell)


def _read_token(path: Path) -> Iterator[Row | Malformed]:
    for number, line in enumerate(re.split(r"\r\n|\r|\n", read_text(path)), 1):
        if line.strip():
            name, tab, caption = line.partition("\t")
            name, mark, count = name.strip().rpartition("#")
            if tab and mark and count.isdigit():
                yield Row(number, name, texts_in(caption))
            else:
                yield Malformed(number, "expected name#number, a tab, a caption")


def _read_coco(path: Path) -> Iterator[Row | Malformed]:
    """COCO's has no lines worth naming: `line` is the number of the annotation."""
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: no JSON ({error})") from None
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        notes = content.get("annotations", [])  # of the test pictures there are none
        known = set()
        for number, note in enumerate(notes, 1):
            if note["image_id"] in names:
                known.add(note["image_id"])
                yield Row(number, names[note["image_id"]], texts_in(note.get("caption")))
            else:
                yield Malformed(number, f"its image_id {note['image_id']} is not among the images")
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not as COCO's captions are ({type(error).__name__}: {error})") from None
    for number, name in names.items():
        if number not in known:
            yield Row(0, name, [])


READERS = {  # in the order in which the first that is there is taken
    "metadata.jsonl": (r"metadata\.jsonl", _read_jsonl),
    "metadata.csv": (r"metadata\.csv", _read_csv),
    "COCO's captions_*.json": (r"captions_\w+\.json", _read_coco),
    "captions.csv": (r"captions\.(csv|txt)|results\.csv", _read_csv),
    "Flickr's tokens": (r"(?!.*lemma).*\.token(\.txt)?", _read_token),
}
TABLE = re.compile("|".join(f"(?:{pattern})" for pattern, _ in READERS.values()))  # of names in lower case
