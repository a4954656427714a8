"""The forms in which people keep the captions of a folder of pictures: which of them are there, and what they say."""

import posixpath
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ratlip.data.files import Listing, stem
from ratlip.data.items import Problem
from ratlip.data.tables import READERS, TABLE, Malformed, form_of, read_table
from ratlip.text import canonical, read_captions, readable, why_none

LISTS = {"train": "train.txt", "test": "test.txt"}  # of keys
TEXTS = (".txt", ".caption")
IN_TEXT, BESIDE = "captions in text/", "captions beside them"  # the forms that are no tables
COCO = re.compile(r"captions_(train|val)(.*)\.json")


def caption_forms(root: Path, listing: Listing, top: str, pictures: Sequence[str]) -> dict[str, list[str]]:
    """The forms in which there are captions, the one that is read first, and the files of each.

    Args:
        root: the data set's folder. top: the folder below it that all pictures are in, "images/" or "".
        pictures: their paths below `root`.
    """
    texts = [name for name in listing.others if name.lower().endswith(TEXTS) and name not in LISTS.values()]
    found: dict[str, list[str]] = {form: [] for form in (IN_TEXT, *READERS, BESIDE)}
    found[IN_TEXT] = [name for name in texts if top and name.startswith("text/")]
    for name in listing.others:
        if TABLE.fullmatch(posixpath.basename(name).lower()) and (form := form_of(root / name)):
            found[form].append(name)
    tables = {name for names in found.values() for name in names}
    named = {canonical(spelling) for name in pictures for spelling in (stem(name), name)}
    texts = [name for name in texts if name.startswith(top) and name not in tables]
    if any(canonical(stem(name)) in named for name in texts):  # then the others are meant to be captions too
        found[BESIDE] = texts
    below = {name[len(top) :] for name in named}
    if not any(canonical(stem(name).removeprefix("text/")) in below for name in found[IN_TEXT]):
        found[IN_TEXT] = found.pop(IN_TEXT)  # these belong to no picture: whatever else there is comes first
    return {form: names for form, names in found.items() if names}


class TextFiles:
    """A text file for each picture, of the same path below text/, or beside it."""

    splits: dict[str, str] = {}

    def __init__(self, root: Path, form: str, top: str, names: Sequence[str]):
        self.words, self.root, self.top = form, root, top
        self.folder = "text/" if form == IN_TEXT else top
        self.files = {canonical(stem(name)[len(self.folder) :]): name for name in names}

    def of(self, picture: str) -> list[str] | Problem:
        """The captions of a picture, by its path below the data set's folder."""
        own = picture[len(self.top) :]
        path = next((self.files[name] for name in map(canonical, (stem(own), own)) if name in self.files), None)
        if path is None:
            return Problem("missing captions", f"{self.root / self.folder / stem(own)}.txt: no such caption file")
        with open(f"{self.root}/{path}", "rb") as file:
            content = file.read()
        if captions := read_captions(content):
            return captions
        return Problem("empty captions", f"{self.root / path}: {why_none(content)}")

    def problems(self, split: str, pictures: Sequence[str], listed: set[str]) -> list[Problem]:
        """Texts without a picture, but for those whose keys are `listed`: these are told of elsewhere."""
        if split == "test":
            return []
        own = {canonical(name) for path in pictures for name in (stem(path)[len(self.top) :], path[len(self.top) :])}
        return [
            Problem("captions without image", f"{self.root / path}: there is no image {self.top}{key}.*", lost=False)
            for key, path in sorted(self.files.items())
            if key not in own and key not in listed
        ]


class Tables:
    """The captions of all pictures in one file, or in one for each split or folder."""

    def __init__(self, root: Path, form: str, pictures: Sequence[str], names: Sequence[str]):
        names, subsets = _coco_splits(names)
        self.words = f"captions in {', '.join(names[:4])}{' …' if len(names) > 4 else ''}"
        self.root = root
        self.captions: dict[str, list[str]] = {}  # of a picture, by its path below `root`
        self.first: dict[str, str] = {}  # the same -> the first line that names it
        self.splits: dict[str, str] = {}  # the same -> its split, where the tables are those of splits
        self.wrong: dict[str, list[Problem]] = {"train": [], "test": []}
        find = _finder(pictures)
        for name in names:
            self._read(name, subsets.get(name), find)

    def _read(self, name: str, split: str | None, find: Callable[[str, str], str | None]) -> None:
        path, folder, missing = self.root / name, posixpath.dirname(name), set()
        wrong = self.wrong[split or "train"]
        for row in read_table(path):
            where = f"{path}, line {row.line}" if path.suffix != ".json" else str(path)
            if isinstance(row, Malformed):
                wrong.append(Problem("malformed row", f"{where}: {row.reason}", lost=False))
            elif picture := find(folder, row.name):
                self.captions.setdefault(picture, []).extend(row.captions)
                self.first.setdefault(picture, where)
                if split:
                    self.splits[picture] = split
            elif row.name not in missing:
                missing.add(row.name)
                wrong.append(Problem("missing image", f"{where}: there is no picture {row.name}"))

    def of(self, picture: str) -> list[str] | Problem:
        """The captions of a picture, by its path below the data set's folder."""
        if picture not in self.captions:
            return Problem("missing captions", f"{self.root / picture}: no {self.words}")
        empty = Problem("empty captions", f"{self.first.get(picture)}: no caption of {readable(picture)}")
        return self.captions[picture] or empty

    def problems(self, split: str, pictures: Sequence[str], listed: set[str]) -> list[Problem]:
        """Lines that cannot be used, and those of pictures that are not there."""
        return self.wrong[split]


def _coco_splits(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Of COCO's captions_train2017.json and captions_val2017.json, in whichever folder, the split of each; of several
    years the last. All else has no splits of its own, and is read whole."""
    years: dict[str, dict[str, str]] = {}
    for name in names:
        if match := COCO.fullmatch(posixpath.basename(name)):
            years.setdefault(match[2], {})[match[1]] = name
    whole = [pair for _, pair in sorted(years.items()) if len(pair) == 2]
    if not whole:
        return list(names), {}
    return list(whole[-1].values()), {whole[-1]["train"]: "train", whole[-1]["val"]: "test"}


def _finder(pictures: Sequence[str]) -> Callable[[str, str], str | None]:
    """find(folder of a table, name in it) -> the picture that is meant: relative to the table, to the data set's
    folder or to images/; a bare name wherever it is, if there is one such picture only."""
    paths = {canonical(path): path for path in pictures}
    bare: dict[str, list[str]] = {}
    for path in pictures:
        bare.setdefault(canonical(posixpath.basename(path)), []).append(path)

    def find(folder: str, name: str) -> str | None:
        name = canonical(name.replace("\\", "/"))
        for base in (canonical(folder), "", "images"):
            if found := paths.get(posixpath.normpath(posixpath.join(base, name))):
                return found
        same = bare.get(name, ())
        return same[0] if len(same) == 1 else None

    return find
