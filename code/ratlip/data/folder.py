"""The folder layout: how a folder of pictures and captions is written is found out, in the forms that people have."""

import json
import os
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ratlip import distributed
from ratlip.data.files import OWN, Listing, counted, list_files, stem
from ratlip.data.forms import BESIDE, IN_TEXT, LISTS, Tables, TextFiles, caption_forms
from ratlip.data.items import LEFT_OUT, Item, Problem, held_out
from ratlip.data.tables import TABLE, read_table
from ratlip.disk import replacing
from ratlip.errors import UserError
from ratlip.text import canonical, lines_of, read_text, readable

TEST_FOLDERS = ("test", "validation", "valid", "val")  # the first of them there is, beside one for training
COMMON = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}  # of two pictures of one name these are preferred
LIKELY = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".caption", ".token", ".xlsx")  # what may hold captions


class Pictures(NamedTuple):
    """The pictures of a data set by their keys: the path below `top`, without suffix where that tells them apart."""

    top: str  # "images/", or "" where there is no such folder
    files: dict[str, str]  # key -> path below the data set's folder
    problems: list[Problem]


def read_folder(root: Path, split: str) -> tuple[list[Item], list[Problem]]:
    """The captioned pictures of a split, and what is wrong with those that cannot be used; no picture is opened.

    Says in one line how the folder is read; once, with the training split.

    Raises:
        UserError: no pictures, no captions in any form, or a list or table that cannot be read.
    """
    listing = list_files(root, OWN)
    top, files = _pictures_in(root, listing)
    forms = caption_forms(root, listing, top, files)
    if not forms:
        raise UserError(_no_captions(root, listing, files))
    form, *unread = forms
    in_texts = form in (IN_TEXT, BESIDE)
    source = TextFiles(root, form, top, forms[form]) if in_texts else Tables(root, form, files, forms[form])
    pictures = _by_key(root, top, files, apart=not in_texts)
    lists = _key_lists(root)
    own = {} if form == IN_TEXT else _own_splits(pictures, source.splits)  # the split of each key
    problems = []
    if lists:
        found = {name: _listed_keys(root, name, names, pictures) for name, names in lists.items()}
        keys, problems = found[split]
        own = {key: name for name, (listed, _) in found.items() for key in listed}
    elif own:
        keys = [key for key in pictures.files if own.get(key) == split]
    else:
        keys = held_out(list(pictures.files), split)
    items = []
    for key in tqdm(keys, f"{split} captions", unit="file", leave=False, disable=distributed.rank() > 0 or None):
        captions = source.of(pictures.files[key])
        if isinstance(captions, Problem):
            problems.append(captions)
        else:
            items.append(Item(key, root / pictures.files[key], captions))
    listed = {canonical(name) for names in lists.values() for name in names}
    problems += source.problems(split, files, listed)
    if split == "train":
        problems += pictures.problems + _left_out(root, listing, top, forms)
        outside = [file for key, file in pictures.files.items() if (lists or own) and key not in own]
        distributed.say(f"{root}: {_how_it_is_read(listing, top, files, [source.words, *unread], outside)}")
    return items, problems


def _how_it_is_read(
    listing: Listing, top: str, files: Sequence[str], forms: Sequence[str], outside: Sequence[str]
) -> str:
    """In a line: how many pictures, where their captions are, and what else there is that nobody reads."""
    elsewhere = [name for name in listing.pictures if not name.startswith(top)]
    notes = [f"{len(files):,} pictures, {forms[0]}"]
    notes += [f"not read: {', '.join(forms[1:])}"] if forms[1:] else []
    notes += [f"in neither split: {counted(outside, 'picture')}"] if outside else []
    notes += [f"not in {top}: {counted(elsewhere, 'picture')}"] if elsewhere else []
    notes += [f"{listing.hidden:,} hidden files or folders passed over"] if listing.hidden else []
    return "; ".join(notes)


def write_folder_captions(root: Path, template: str) -> Path:
    """Caption each picture by the name of the folder it is in, which takes the place of {} in the template, in a new
    metadata.jsonl. "002.Laysan_Albatross" becomes "Laysan Albatross"; "a owl" in the whole becomes "an owl".

    Raises:
        UserError: a template without {}, captions that are there already, or pictures that are in no folder.
    """
    option = "--captions-from-folders"
    if "{}" not in template:
        raise UserError(f"{option}: {template!r} has no {{}}, where the folder's name goes")
    listing = list_files(root, OWN)
    top, files = _pictures_in(root, listing)
    if forms := caption_forms(root, listing, top, files):
        raise UserError(f"{option}: {root} has captions already, such as {root / next(iter(forms.values()))[0]}")
    if loose := [file for file in files if "/" not in file[len(top) :]]:
        raise UserError(f"{option}: in no folder that could name them: {counted(loose, 'picture')}")
    rows = []
    for file in files:
        name = readable(posixpath.basename(posixpath.dirname(file)))
        name = " ".join(re.sub(r"^\d+\W", "", name).replace("_", " ").split())
        caption = re.sub(r"\b(a) (?=[aeiou])", r"\1n ", template.replace("{}", name), flags=re.IGNORECASE)
        rows.append(json.dumps({"file_name": readable(file), "text": caption}) + "\n")
    path = root / "metadata.jsonl"
    try:
        with replacing(path) as file:
            file.write("".join(rows).encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    return path


def _pictures_in(root: Path, listing: Listing) -> tuple[str, list[str]]:
    """The folder that all pictures are taken from ("images/", or "": the whole), and their paths."""
    files = listing.pictures
    if not files:
        others = {"parquet": ".parquet", "webdataset": ".tar"}
        hints = [layout for layout, suffix in others.items() if any(name.endswith(suffix) for name in listing.others)]
        more = f"; its {others[hints[0]]} files are for data.layout={hints[0]}" if hints else ""
        more += "".join(f"; {name}: {reason}" for name, reason in [*listing.broken.items()][:1])
        raise UserError(f"{root / 'images'}: no pictures there, nor elsewhere in {root}{more}")
    inside = [name for name in files if name.startswith("images/")]
    return ("images/", inside) if inside else ("", files)


def _no_captions(root: Path, listing: Listing, files: Sequence[str]) -> str:
    """What to say of pictures alone."""
    likely = [name for name in listing.others if name.lower().endswith(LIKELY) and name not in LISTS.values()]
    for name in likely:
        if TABLE.fullmatch(posixpath.basename(name).lower()):
            next(read_table(root / name), None)  # raises what keeps it from being one
    there = f" (there is {counted(likely)})" if likely else ""
    return (
        f"{root}: {len(files):,} pictures and no captions in a form that README.md names{there}; "
        "to make them of the names of the pictures' folders: "
        'bash scripts/prepare.sh CONFIG.yml --captions-from-folders "a photo of a {}"'
    )


def _by_key(root: Path, top: str, files: Sequence[str], apart: bool) -> Pictures:
    """Args: apart: a.jpg and a.png are two pictures, as a table can tell them apart; else one of them is used."""
    groups: dict[str, list[str]] = {}
    for file in files:
        groups.setdefault(canonical(stem(file)), []).append(file)
    if apart and len(groups) < len(files):
        several = [file for group in groups.values() for file in group if len(group) > 1]
        groups = {name: group for name, group in groups.items() if len(group) == 1}
        for file in several:
            groups.setdefault(canonical(file), []).append(file)
    chosen, problems = {}, []
    for name, group in groups.items():
        first, *others = group
        if others:
            first, *others = sorted(group, key=lambda file: os.path.splitext(file)[1].lower() not in COMMON)
        suffixed = name == canonical(first)
        chosen[readable((first if suffixed else stem(first))[len(top) :])] = first
        problems += [Problem("key twice", f"{root / other}: the key of {root / first}, which is used", lost=False)
                     for other in others]  # fmt: skip
    return Pictures(top, chosen, problems)


def _key_lists(root: Path) -> dict[str, list[str]]:
    """The keys that train.txt and test.txt list; {} where there are none."""
    paths = {split: root / name for split, name in LISTS.items()}
    missing = [path for path in paths.values() if not path.is_file()]
    if len(missing) == 1:
        raise UserError(f"{missing[0]}: missing; give key lists for both splits, or for neither")
    return {} if missing else {split: lines_of(read_text(path)) for split, path in paths.items()}


def _listed_keys(root: Path, split: str, names: Sequence[str], pictures: Pictures) -> tuple[list[str], list[Problem]]:
    """The keys that a list means, in its order: with a suffix or without, below images/ or with it."""
    meant = {canonical(key): key for key in pictures.files}
    for key, file in pictures.files.items():
        for name in (file[len(pictures.top) :], file, stem(file)):
            meant.setdefault(canonical(name), key)
    keys, problems = {}, []
    for name in names:
        spellings = (name, posixpath.normpath(name.replace("\\", "/")))
        key = next((meant[spelling] for spelling in map(canonical, spellings) if spelling in meant), None)
        if key is None:
            path = root / f"{pictures.top}{name}.*"
            problems.append(Problem("missing image", f"{path}: missing, but {split} lists {name!r}"))
        elif key in keys:
            problems.append(Problem("key twice", f"{root}: {split} lists {name!r} twice; used once", lost=False))
        else:
            keys[key] = True
    return list(keys), problems


def _own_splits(pictures: Pictures, of_files: dict[str, str]) -> dict[str, str]:
    """The split of each key that has one: by its table, or by folders train/ and test/ (or validation/) around all
    pictures; {} where a tenth is to be held out."""
    if of_files:
        return {key: of_files[file] for key, file in pictures.files.items() if file in of_files}
    tops = {key: file[len(pictures.top) :].partition("/")[0].lower() for key, file in pictures.files.items()}
    there = set(tops.values())
    test = next((name for name in TEST_FOLDERS if name in there), None)
    if "train" not in there or test is None:
        return {}
    split_of = {"train": "train", test: "test"}
    return {key: split_of[name] for key, name in tops.items() if name in split_of}


def _left_out(root: Path, listing: Listing, top: str, forms: dict[str, list[str]]) -> list[Problem]:
    """Every file among the pictures that is neither picture nor caption, and links that were not followed."""
    read = {name for names in forms.values() for name in names}.union(LISTS.values())
    others = [name for name in listing.others if name.startswith(top) and name not in read]
    problems = [Problem(LEFT_OUT, f"{root / name}: no picture that Pillow decodes", lost=False) for name in others]
    problems += [
        Problem(LEFT_OUT, f"{root / name}: a link to a folder that it lies in itself", lost=False)
        for name in listing.loops
    ]
    return problems + [
        Problem("broken link", f"{root / name}: {reason}")
        for name, reason in listing.broken.items()
        if name.startswith(top) or name == top.rstrip("/")
    ]
