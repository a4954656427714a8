"""WebDataset shards: tar files of pictures and captions, indexed once so that each sample is read by its place."""

import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from easydict import EasyDict

from ratlip.data.files import is_picture
from ratlip.data.items import Item, Problem, held_out
from ratlip.data.journal import Journal, complete, file_state
from ratlip.errors import UserError, first_line
from ratlip.text import read_captions

INDEX = 2  # version of what `index` finds
TEXTS = ("txt", "text", "caption", "transcript")  # suffixes of caption files; json is read where there is none
CAPTION_KEYS = ("caption", "captions", "text")  # of a json file; the first that is there
NAMED = 3  # files, or suffixes, in a message


class File(NamedTuple):
    """A file in a shard."""

    number: int  # in the shard's order
    suffix: str  # what follows the key and a dot, in lower case: jpg, or input.jpg
    start: int  # its first byte in the shard
    length: int

    @property
    def is_image(self) -> bool:
        return is_picture(f".{self.suffix}")

    @property
    def is_text(self) -> bool:
        return self.suffix.rpartition(".")[2] in TEXTS

    @property
    def is_json(self) -> bool:
        return self.suffix.rpartition(".")[2] == "json"


def folder(pattern: str) -> Path:
    """The folder that all shards of a brace pattern lie in or below: what stands before the first brace."""
    return Path(re.split(r"[{*?]", pattern)[0] + "x").parent


def read_shards(data: EasyDict, split: str, cache: Path) -> tuple[list[Item], list[Problem]]:
    """The captioned images of a split, in the order of the shards, and what is wrong with those that cannot be used.

    Without `data.test_dir` a tenth of the samples is held out for testing.

    Args:
        data: the config's data group. split: "train" or "test". cache: folder that keeps the index.

    Raises:
        UserError: webdataset is not installed, a pattern without shards, or a shard that is missing or broken.
    """
    shards = list_shards("data.test_dir", data.test_dir) if split == "test" and data.test_dir else None
    shards = shards or list_shards("data.dir", data.dir)
    inputs = [(os.path.relpath(shard, cache.parent), file_state(shard), shard) for shard in shards]
    found = complete(Journal(cache / "shards.jsonl", INDEX), inputs, index, data.num_workers, 1, "indexing shards")
    items, problems = [], []
    for (name, _, shard), (samples, wrong) in zip(inputs, found, strict=True):
        below = name.removesuffix(".tar")
        items += [Item(f"{below}/{own}", shard, captions, span=tuple(span)) for own, span, captions in samples]
        for kind, message, lost in wrong:
            legible = message.encode(errors="surrogateescape").decode(errors="replace")  # of names that are not UTF-8
            problems.append(Problem(kind, f"{shard}: {legible}", lost))
    if not data.test_dir:
        chosen = set(held_out([item.key for item in items], split))
        problems = problems if split == "train" or not items else []  # each is told once
        items = [item for item in items if item.key in chosen]
    return items, problems


def list_shards(setting: str, pattern: str) -> list[Path]:
    """The shards of a brace pattern such as data/cc3m/{00000..00331}.tar; `setting` is where it was given."""
    try:
        import webdataset
    except ImportError:
        raise UserError("data.layout: webdataset is not installed; run: python -m pip install webdataset") from None
    if "://" in pattern or pattern.startswith("pipe:"):
        raise UserError(f"{setting}: {pattern} is no file; shards are read by place, so copy them to a disk first")
    shards = [Path(name) for name in webdataset.shardlists.expand_urls(pattern)]
    for shard in shards:
        if shard.suffix != ".tar":
            raise UserError(f"{setting}: expected a pattern of .tar files such as data/cc3m/{{00000..00331}}.tar, "
                            f"not {pattern}")  # fmt: skip
        if not shard.is_file():
            raise UserError(f"{setting}: {pattern} names {shard}, which is not there")
    return shards


def index(shard: Path) -> list[list]:
    """[samples, problems] of a shard, in its order. Samples are [key, [first byte, length] of the image, captions],
    problems [kind, message, whether a sample is lost].

    A sample is the files of one key, whether or not they stand together. A key is a file's path without its suffix,
    which is what follows the name's first dot (WebDataset's rule: 1.input.jpg and 1.output.txt belong together) or
    its last ones (photo.1.jpg and photo.1.txt do): whichever gives the most samples an image and captions.
    """
    samples, problems = [], []
    try:
        with tarfile.open(shard, "r:", encoding="utf-8") as tar, open(shard, "rb") as content:
            members = list(_members(tar, problems))
            _check_end(tar, content)
            groups = max((_grouped(members, parts) for parts in (None, 1, 2)), key=_value)  # the first of the best
            for key, files in groups.items():
                files = _without_repeats(key, files, problems)
                image, captions = _image(key, files, problems), _captions(content, files)
                there = ", ".join([file.suffix or "no suffix" for file in files][:NAMED])
                if image and captions:
                    samples.append([key, [image.start, image.length], captions])
                elif image and captions is None:
                    problems.append(
                        ["missing captions", f"{key} has no txt or json with captions (only {there})", True]
                    )
                elif image:
                    problems.append(
                        ["empty captions", f"{key}.{_caption_files(files)[0].suffix} holds no caption", True]
                    )
                elif captions is not None:
                    problems.append(["missing image", f"{key} has no jpg, png or other image (only {there})", True])
                else:
                    problems.append(["no sample", f"{key} has neither an image nor captions (only {there})", False])
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{shard}: not a plain tar file, or cut short ({first_line(error)}); fetch it again") from None
    return [samples, problems]


def _members(tar: tarfile.TarFile, problems: list) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and length of every file; `problems` counts what is hidden, and links to no file before them."""
    places: dict[str, tuple[int, int]] = {}
    left_out: dict[str, list[str]] = {"hidden files": [], "links": []}
    for member in tar:
        tar.members = []  # or it keeps them all
        name = PurePosixPath(member.name.lstrip("/")).as_posix()  # without ./
        linked = places.get(member.linkname) if member.islnk() else None
        if any(part.startswith(".") for part in name.split("/")):  # macOS's ._ files; and .., which leaves the folder
            left_out["hidden files"] += [] if member.isdir() else [name]
        elif member.isreg() or linked:
            places[member.name] = linked or (member.offset_data, member.size)
            yield name, *places[member.name]
        elif not member.isdir():
            left_out["links"].append(name)
    for kind, names in left_out.items():
        if names:
            more = ", ..." if len(names) > NAMED else ""
            problems.append([kind, f"{len(names):,} left out: {', '.join(names[:NAMED])}{more}", False])


def _check_end(tar: tarfile.TarFile, content: BinaryIO) -> None:
    """Of files that were joined by `cat`, only the first would be read."""
    content.seek(tar.offset)
    while block := content.read(1 << 16):
        if block.strip(b"\0"):
            raise tarfile.TarError("more follows after its end, as in shards joined by cat; tar -A joins them")


def _grouped(members: list[tuple[str, int, int]], parts: int | None) -> dict[str, list[File]]:
    """The files of each key, which ends before the last `parts` dots of a name; None: before its first."""
    groups: dict[str, list[File]] = {}
    for number, (name, start, length) in enumerate(members):
        path, slash, base = name.rpartition("/")
        pieces = base.split(".", 1) if parts is None else base.rsplit(".", parts)
        suffix = ".".join(pieces[1:]).lower()
        groups.setdefault(path + slash + pieces[0], []).append(File(number, suffix, start, length))
    return groups


def _value(groups: dict[str, list[File]]) -> tuple[int, int]:
    """How many groups may be samples; where none may, how many have an image."""
    images = [any(file.is_image for file in files) for files in groups.values()]
    texts = [any(file.is_text or file.is_json for file in files) for files in groups.values()]
    samples = sum(map(all, zip(images, texts, strict=True)))
    return samples, 0 if samples else sum(images)


def _without_repeats(key: str, files: list[File], problems: list) -> list[File]:
    """The files of a key up to where it begins again: a suffix comes again, or other files of it that stand apart
    from a whole sample."""
    used: dict[str, File] = {}
    last, image, text = None, False, False
    for file in files:
        apart = image and text and (file.is_image or file.is_text) and file.number > last + 1
        if file.suffix in used or apart:
            problems.append(["key twice", f"{key} comes twice; used once", False])
            break
        used[file.suffix], last = file, file.number
        image, text = image or file.is_image, text or file.is_text
    return list(used.values())


def _image(key: str, files: list[File], problems: list) -> File | None:
    """The image of a sample: jpg before input.jpg."""
    images = [file for file in files if file.is_image]
    images = [file for file in images if "." not in file.suffix] or images
    if len(images) > 1:
        names = ", ".join(file.suffix for file in images[:NAMED])
        problems.append(["several images", f"{key} has {names}; the first is used", False])
    return images[0] if images else None


def _caption_files(files: list[File]) -> list[File]:
    """What may hold captions, in the order in which it is asked: txt before output.txt, and json last."""
    texts = [file for file in files if file.is_text]
    texts = [file for file in texts if "." not in file.suffix] or texts
    return texts + [file for file in files if file.is_json]


def _captions(content: BinaryIO, files: list[File]) -> list[str] | None:
    """The captions of a sample; none that a text or json file holds none, None where there is no such file."""
    asked = None
    for file in _caption_files(files):
        content.seek(file.start)
        found = content.read(file.length)
        found = _json_captions(found) if file.is_json else read_captions(found)
        if found:
            return found
        asked = found if asked is None else asked
    return asked


def _json_captions(content: bytes) -> list[str] | None:
    """The captions in img2dataset's json, or in others of its kind; None where it has none of CAPTION_KEYS."""
    try:
        found = json.loads(content)
    except ValueError:
        return None
    if isinstance(found, dict):
        found = next((found[key] for key in CAPTION_KEYS if found.get(key) is not None), None)
    if found is None:
        return None
    texts = [
        " ".join(text.split()) for text in (found if isinstance(found, list) else [found]) if isinstance(text, str)
    ]
    return [text for text in texts if text]
