"""Checkpoint files: written beside and renamed, read without ever running what is inside."""

import functools
import os
import pickle
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ratlip import distributed, inert
from ratlip.errors import UserError, first_line
from ratlip.paths import full

FORMAT = "ratlip-1"  # stands under "format" in every checkpoint that this program writes
UNKNOWN = "{} is a checkpoint of another program: neither RATLIP's nor a released GALIP or RATLIP file"


def save(content: Any, path: Path) -> None:
    """torch.save to `path`, complete or not at all: a kill or a full disk leaves the older file as it was."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with suppress(OSError):
            partial.unlink()
        raise UserError(f"could not write {path} ({error}); earlier files are untouched") from None


def read(path: str | Path, mmap: bool = False) -> dict:
    """The content of a checkpoint file, tensors on the CPU; with `mmap` they are read when they are used.

    Only tensors and plain containers are ever built from it (`weights_only`). A safetensors file gives its tensors by
    name, with its metadata where a state dict has its own: `_metadata[""]`.

    Raises:
        UserError: no such file, not a checkpoint, cut short, or one that asks to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint {full(path)}")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        asked = next((line for line in str(error).splitlines() if "GLOBAL" in line), None)
        if asked is None:
            raise UserError(f"{path} is no checkpoint, or holds more than tensors and plain values; refused") from None
        raise UserError(f"{path} holds more than tensors and plain values; refused unread. {asked}".strip()) from None
    except (EOFError, ValueError, KeyError):  # torch's reader of old files met bytes of something else
        raise UserError(f"{path} is no checkpoint, or is cut short") from None
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path} is no checkpoint, or is cut short ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def read_pickle(path: Path) -> Any:
    """The plain containers, texts, numbers and arrays of them in a pickle, as data sets have them; Python 2's byte
    strings as Latin-1.

    Raises:
        FileNotFoundError: no such file.
        UserError: a broken one, or one that asks to run code.
    """
    try:
        with open(path, "rb") as file:
            return inert.load(file, inert.ARRAYS, encoding="latin-1")
    except UserError as error:
        raise UserError(f"{path}: no pickle of plain lists and texts: {error}") from None


def _read_safetensors(path: Path) -> OrderedDict:
    from safetensors import SafetensorError, safe_open  # not needed by programs that meet no such file

    try:
        with safe_open(path, framework="pt") as file:
            content = OrderedDict((key, file.get_tensor(key)) for key in file.keys())
            content._metadata = {"": file.metadata() or {}}
    except SafetensorError as error:
        raise RuntimeError(str(error)) from None
    return content


@dataclass(frozen=True)
class Head:
    """What a checkpoint says of itself; no tensor is read for it."""

    path: Path
    epoch: int  # finished epochs
    step: int
    epoch_steps: int
    saved: float | None  # time.time(); None: by a program that did not note it, as is `run`
    run: str | None  # the run that it belongs to


def heads(folder: Path, run: str | None = None) -> list[Head]:
    """The checkpoints of a run that can be resumed, the furthest (by the epoch and step inside) first.

    One that cannot be read, or belongs to another run than the one named, is told of once and passed over.
    """
    found = []
    for path in sorted(folder.glob("state_epoch_*.pth")):
        state = path.stat()
        try:
            head = _head(path, state.st_size, state.st_mtime_ns)
        except UserError as error:
            _pass_over(str(error))
            continue
        if run and head.run not in (None, run):
            _pass_over(f"{path} belongs to another run")
        else:
            found.append(head)
    return sorted(found, key=lambda head: (head.epoch, head.step), reverse=True)


def newest_first(folder: Path, run: str | None = None) -> list[Path]:
    """The files of `heads`."""
    return [head.path for head in heads(folder, run)]


def keep_newest(folder: Path, count: int, run: str | None = None) -> None:
    """Delete all checkpoints of a run but the `count` furthest, on the first process; others and best.pth stay."""
    if distributed.rank() == 0:
        for path in newest_first(folder, run)[count:]:
            path.unlink(missing_ok=True)


@functools.lru_cache(maxsize=4096)
def _head(path: Path, size: int, changed: int) -> Head:
    """Read anew where the file's size or time of change is another."""
    content = read(path, mmap=True)
    if content.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this program")
    return Head(
        path, content["epoch"], content["step"], content["epoch_steps"], content.get("saved"), content.get("run")
    )


@functools.cache
def _pass_over(why: str) -> None:
    distributed.say(f"warning: {why}; left alone, looking at the others")
