"""The files below a folder, linked folders included, and which of them are pictures."""

import os
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from ratlip import distributed
from ratlip.errors import UserError
from ratlip.text import readable

# Formats that Pillow knows by their first bytes but cannot decode, or by another program (Ghostscript) only.
NOT_DECODED = {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"}
HIDDEN = {"__macosx", "@eadir", "thumbs.db", "desktop.ini"}  # beside names that begin with a dot
OWN = ("cache", "stats")  # folders of a data set that this program makes
NAMED = 3  # files of a kind in a line


class Listing(NamedTuple):
    """What lies below a folder. Paths are relative to it, with "/", in the order of their parts."""

    pictures: list[str]
    others: list[str]
    hidden: int  # files and folders that were passed over
    broken: dict[str, str]  # what could not be followed or read, and why
    loops: list[str]  # links to a folder that they lie in, which are not followed


def list_files(folder: Path, without: Sequence[str] = ()) -> Listing:
    """All files below a folder, through links; hidden ones, and the folders `without`, are passed over."""
    pictures, others, hidden, broken, loops = [], [], 0, {}, []
    left = [("", os.path.realpath(folder), ())]  # path below `folder`, where it really is, and the folders around it
    quiet = distributed.rank() > 0 or None  # None: no bar where there is no terminal
    with tqdm(desc=f"listing {readable(str(folder))}", unit="file", leave=False, disable=quiet) as bar:
        while left:
            prefix, real, above = left.pop()
            if real in above:
                loops.append(prefix.rstrip("/"))
                continue
            try:
                with os.scandir(os.path.join(folder, prefix)) as scan:
                    entries = list(scan)
            except OSError as error:
                broken[prefix.rstrip("/")] = error.strerror
                continue
            for entry in entries:
                path = prefix + entry.name
                if entry.name.startswith(".") or entry.name.lower() in HIDDEN:
                    hidden += 1
                elif path in without:
                    continue
                elif _is(entry.is_dir):  # of plain files and folders nothing is asked: scandir has told
                    place = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                    left.append((path + "/", place, (*above, real)))
                elif _is(entry.is_file):
                    (pictures if is_picture(path) else others).append(path)
                else:
                    broken[path] = "the link leads nowhere" if entry.is_symlink() else "no file"
            bar.update(len(entries))
    for files in (pictures, others):
        files.sort(key=lambda path: path.replace("/", "\0"))  # as a list of its parts would be, only sooner
    return Listing(pictures, others, hidden, dict(sorted(broken.items())), sorted(loops))


def _is(question) -> bool:
    try:
        return question()
    except OSError:  # a link to itself, a drive that is away
        return False


@cache
def picture_suffixes() -> frozenset[str]:
    """Suffixes of the files that Pillow, as it is installed here, decodes by itself; of several frames the first."""
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in known.items() if kind in Image.OPEN and kind not in NOT_DECODED)


def is_picture(name: str) -> bool:
    """Whether a file's suffix is that of a picture."""
    return name[name.rfind(".") :].lower() in picture_suffixes()


def stem(path: str) -> str:
    """The path of a picture or text without its suffix."""
    return path[: path.rfind(".")]


def counted(names: Sequence[str], noun: str = "file") -> str:
    """Files in words: how many of each suffix, and the first by name. "3 files (2 .mp4, 1 .mov): a.mp4, b.mp4, …"."""
    suffixes = Counter(os.path.splitext(name)[1].lower() or "without suffix" for name in names)
    kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in suffixes.most_common())
    first = ", ".join(map(readable, names[:NAMED])) + (", …" if len(names) > NAMED else "")
    return f"{len(names):,} {noun}{'s' if len(names) > 1 else ''} ({kinds}): {first}"


def find_pictures(folder: Path) -> list[Path]:
    """The picture files below a folder, in the order of their paths' parts; says what else there is.

    Captions, in a text file of a picture's name, are not counted as left out.

    Raises:
        UserError: there are none.
    """
    listing = list_files(folder)
    stems = {stem(name) for name in listing.pictures}
    others = [name for name in listing.others if not (name.lower().endswith(".txt") and stem(name) in stems)]
    notes = [f"left out: {counted(others)}"] if others else []
    notes += [f"{name}: {reason}" for name, reason in listing.broken.items()]
    notes += [f"{listing.hidden:,} hidden files or folders passed over"] if listing.hidden else []
    if not listing.pictures:
        more = f"; {'; '.join(notes)}" if notes else ""
        raise UserError(f"{folder}: no pictures below it, of a kind that Pillow decodes{more}")
    if notes:
        distributed.say(f"{folder}: {len(listing.pictures):,} pictures; {'; '.join(notes)}")
    return [folder / name for name in listing.pictures]
