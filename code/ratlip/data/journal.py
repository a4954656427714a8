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
from ratlip.errors import UserError
from ratlip.stopping import begin_worker

READ_ONLY = (
    "{}: cannot be written ({}), and there is kept what was found out about the data; "
    "where that is read-only, set data.dir to a folder of links to it"
)


class Journal:
    """What was found about files, a line of JSON each, written as soon as it is known.

    An entry holds for the state (size, time of change and so on) that its file was in. An interruption costs at
    most the line being written, which reading then passes over.
    """

    def __init__(self, path: Path):
        self.path = path
        self.known: dict[str, tuple[list, Any]] = {}
        for line in path.read_bytes().splitlines() if path.is_file() else ():
            try:
                name, state, result = json.loads(line)
                self.known[name] = (state, result)
            except (ValueError, TypeError):
                continue

    def find(self, name: str, state: list) -> Any:
        """What is known of a file in this state; None if nothing is."""
        known_state, result = self.known.get(name, (None, None))
        return result if known_state == state else None

    def add(self, entries: Sequence[tuple[str, list, Any]]) -> None:
        """Remember (name, state, result) of some files."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab+") as file:
                if file.tell() and self._ends_broken(file):
                    file.write(b"\n")
                file.write("".join(json.dumps(entry) + "\n" for entry in entries).encode())
        except OSError as error:
            raise UserError(READ_ONLY.format(self.path, error.strerror)) from None
        self.known.update({name: (state, result) for name, state, result in entries})

    @staticmethod
    def _ends_broken(file) -> bool:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


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
            the same order.
        num_workers: processes to spread the work over; 0: this one.
        together: inputs that a process takes at a time, and that an interruption costs it.
        desc: title of the progress bar, and of the line that says how long it took.
    """
    missing = [entry for entry in inputs if journal.find(*entry[:2]) is None]
    loader = DataLoader(
        _Work([argument for *_, argument in missing], work),
        together,
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=begin_worker,
        generator=torch.Generator(),  # of its own: whether there is work must not change what a run draws later
    )
    done, started = 0, time.perf_counter()
    with tqdm(total=len(missing), desc=desc, unit="file", leave=False, disable=distributed.rank() > 0 or None) as bar:
        for results in loader if missing else ():
            entries = missing[done : done + len(results)]
            journal.add([(name, state, result) for (name, state, _), result in zip(entries, results, strict=True)])
            done += len(results)
            bar.update(len(results))
    if missing:
        seconds = time.perf_counter() - started
        distributed.say(f"{desc}: {done:,} in {seconds:.1f} s, {done / seconds:,.0f} a second")
    return [journal.find(name, state) for name, state, _ in inputs]


class _Work(Dataset):
    def __init__(self, arguments: Sequence[Any], work: Callable[[Any], Any]):
        self.arguments, self.work = arguments, work

    def __len__(self) -> int:
        return len(self.arguments)

    def __getitem__(self, index: int) -> Any:
        return self.work(self.arguments[index])
