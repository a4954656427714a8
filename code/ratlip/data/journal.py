"""Work on many files, spread over processes and remembered on disk as it is done."""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ratlip import distributed
from ratlip.disk import cannot_write
from ratlip.stopping import begin_worker


class Journal:
    """What was found about files, a line of JSON each, written as soon as it is known.

    An entry holds for the state (size, time of change and so on) that its file was in. An interruption costs at
    most the line being written, which reading then passes over.

    Args:
        version: of what is found out and how; entries of other versions are not used, and counted in `outdated`.
    """

    def __init__(self, path: Path, version: int):
        self.path, self.version = path, version
        self.known: dict[str, tuple[list, Any]] = {}
        self.outdated: set[str] = set()
        for line in path.read_bytes().splitlines() if path.is_file() else ():
            try:
                name, state, result, *version = json.loads(line)
            except (ValueError, TypeError):
                continue
            if version == [self.version]:
                self.known[name] = (state, result)
            else:
                self.outdated.add(name)
        self.outdated.difference_update(self.known)

    def find(self, name: str, state: list) -> Any:
        """What is known of a file in this state; None if nothing is."""
        known_state, result = self.known.get(name, (None, None))
        return result if known_state == state else None

    def earlier(self, name: str) -> Any:
        """What was found last of a file, in whatever state it was; None if nothing is known."""
        return self.known.get(name, (None, None))[1]

    def add(self, entries: Sequence[tuple[str, list, Any]]) -> None:
        """Remember (name, state, result) of some files."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab+") as file:
                if file.tell() and self._ends_broken(file):
                    file.write(b"\n")
                file.write("".join(json.dumps([*entry, self.version]) + "\n" for entry in entries).encode())
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self.known.update({name: (state, result) for name, state, result in entries})

    @staticmethod
    def _ends_broken(file) -> bool:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def file_state(path: Path) -> list[int]:
    """What changes when a file's content may have: it tells when to read it again, not what it holds.

    Size and time of change are not enough: copying and unpacking set times.
    """
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def complete(
    journal: Journal,
    inputs: Sequence[tuple[str, list, Any]],
    work: Callable[[Any], Any],
    num_workers: int,
    together: int,
    desc: str,
) -> list[Any]:
    """The results of `work` for every input: those of the journal, and the others made now and added to it.

    Args:
        inputs: (name, state, argument of `work`) each; the results, plain JSON values that are not None, come in
            the same order. One that is text says why the work failed: it is tried again the next time.
        num_workers: processes to spread the work over; 0: this one.
        together: inputs that a process takes at a time, and that an interruption costs it.
        desc: title of the progress bar, and of the line that says how long it took.
    """
    found = [journal.find(name, state) for name, state, _ in inputs]
    missing = [place for place, result in enumerate(found) if result is None]
    if remade := sum(inputs[place][0] in journal.outdated for place in missing):
        distributed.say(f"{journal.path}: {remade:,} entries are of an earlier version of this program; made anew")
    loader = DataLoader(
        _Work([inputs[place][2] for place in missing], work),
        together,
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=begin_worker,
        generator=torch.Generator(),  # of its own: whether there is work must not change what a run draws later
    )
    done, started = 0, time.perf_counter()
    with tqdm(total=len(missing), desc=desc, unit="file", leave=False, disable=distributed.rank() > 0 or None) as bar:
        for results in loader if missing else ():
            entries = []
            for place, result in zip(missing[done : done + len(results)], results, strict=True):
                found[place] = result
                if not isinstance(result, str):
                    entries.append((*inputs[place][:2], result))
            if entries:
                journal.add(entries)
            done += len(results)
            bar.update(len(results))
    if missing:
        seconds = time.perf_counter() - started
        distributed.say(f"{desc}: {done:,} in {seconds:.1f} s, {done / seconds:,.0f} a second")
    return found


class _Work(Dataset):
    def __init__(self, arguments: Sequence[Any], work: Callable[[Any], Any]):
        self.arguments, self.work = arguments, work

    def __len__(self) -> int:
        return len(self.arguments)

    def __getitem__(self, index: int) -> Any:
        return self.work(self.arguments[index])
