"""Checkpoint files: written beside and renamed, read without ever running what is inside."""

import os
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ratlip import distributed
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


def read(path: str | Path) -> dict:
    """The content of a checkpoint file, tensors on the CPU.

    Only tensors and plain containers are ever built from it (`weights_only`).

    Raises:
        UserError: no such file, not a checkpoint, cut short, or one that asks to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint {full(path)}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
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


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints that can be resumed below saved_models/<config>/ or in one of its runs, the newest first."""
    paths = [*folder.glob("state_epoch_*.pth"), *folder.glob("*/state_epoch_*.pth")]
    return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def keep_newest(folder: Path, count: int) -> None:
    """Delete all checkpoints of a run but the newest `count`, on the first process; best.pth stays."""
    if distributed.rank() == 0:
        for path in newest_first(folder)[count:]:
            path.unlink(missing_ok=True)
