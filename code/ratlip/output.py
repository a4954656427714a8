"""What a program prints and logs beside its work: where nobody reads it or it cannot be written, the work goes on."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_said: set[str] = set()  # what has been said to be given up, each once


class Tolerant:
    """A text stream that does not raise when it is closed, its reader has gone or its disk is full."""

    def __init__(self, stream: TextIO, name: str):
        self._stream, self._name = stream, name
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # what the terminal's encoding does not have

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As a stream's; what cannot be written is dropped, and that is said once on the other stream."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: it has been closed
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        """As a stream's."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        other = sys.stdout if self._name == "stderr" else sys.stderr
        _say_once(f"{self._name} cannot be written", error, other)

    def finish(self) -> None:
        """Write what is buffered; what cannot be written goes to nowhere, or Python would complain of it at its end."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
                self._stream.flush()
            except (OSError, ValueError):
                pass


@contextmanager
def tolerant() -> Iterator[None]:
    """Inside, whatever becomes of stdout and stderr ends nothing."""
    former = sys.stdout, sys.stderr
    # A stream that was closed from the start is None.
    sys.stdout, sys.stderr = (
        Tolerant(stream or open(os.devnull, "w"), name)  # noqa: SIM115, it stays open
        for stream, name in zip(former, ("stdout", "stderr"), strict=True)
    )
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, Tolerant):
                stream.finish()
        sys.stdout, sys.stderr = former


@contextmanager
def optional(folder: Path) -> Iterator[None]:
    """Around writing logs below `folder`: where they cannot be written that is said once, and the work goes on."""
    try:
        yield
    except OSError as error:
        _say_once(f"warning: {folder} cannot be written", error, sys.stderr)


def append(path: Path, content: bytes) -> None:
    """Add to a file's end, all or nothing; its folder is made where it is missing. Raises OSError with its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab") as file:
            file.write(content)
    except OSError as error:
        if path.is_file():
            os.truncate(path, size)
        raise OSError(error.errno, error.strerror, str(path)) from None


def _say_once(what: str, error: Exception, stream: TextIO) -> None:
    if what not in _said:
        _said.add(what)
        reason = getattr(error, "strerror", None) or error
        print(f"{what} ({reason}); the work goes on without", file=stream, flush=True)
