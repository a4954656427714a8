"""Output that nobody reads, or that cannot be written, ends nothing and leaves nothing half written."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from ratlip import output

PRINTS = """
import sys
from pathlib import Path
from ratlip import errors

def main():
    for number in range(3000):
        print("a line that fills the buffer of a pipe", number)
        print("so does this", number, file=sys.stderr)
    Path(sys.argv[1]).touch()
    {end}

errors.run(main)
"""


def printing(place: Path, end: str = "", **streams) -> subprocess.CompletedProcess:
    """A program of ours that prints much, then notes that it came to its end, with these streams."""
    command = [sys.executable, "-c", PRINTS.format(end=end), place / "end"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "code")}
    return subprocess.run(command, env=environment, timeout=60, text=True, **streams)


@pytest.fixture
def nobody():
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize("end", ["", "raise errors.UserError('wrong')"])
def test_a_reader_that_has_gone(tmp_path, nobody, end):
    found = printing(tmp_path, end, stdout=nobody, stderr=subprocess.PIPE)
    assert (tmp_path / "end").exists() and found.returncode == (2 if end else 0)
    told = [line for line in found.stderr.splitlines() if not line.startswith("so does this")]
    assert told == ["stdout cannot be written (Broken pipe); the work goes on without", *["error: wrong"] * bool(end)]


def test_errors_that_nobody_reads(tmp_path, nobody):
    found = printing(tmp_path, "raise errors.UserError('wrong')", stdout=subprocess.PIPE, stderr=nobody)
    assert (tmp_path / "end").exists() and found.returncode == 2
    assert found.stdout.count("stderr cannot be written") == 1
    found = printing(tmp_path, stdout=nobody, stderr=nobody)
    assert found.returncode == 0


def test_a_full_disk_and_closed_streams(tmp_path):
    def limit() -> None:  # of the size of a file, beyond which nothing can be written to it
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    with open(tmp_path / "printed", "w") as full:
        assert printing(tmp_path, stdout=full, stderr=full, preexec_fn=limit).returncode == 0
    assert (tmp_path / "end").exists() and (tmp_path / "printed").stat().st_size == 2000
    closed = f"import os; os.close(1); os.close(2); os.execv({sys.executable!r}, __import__('sys').argv[1:])"
    command = [sys.executable, "-c", closed, sys.executable, "-c", PRINTS.format(end=""), tmp_path / "closed"]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT / "code")}, timeout=60).returncode == 0
    assert (tmp_path / "closed").exists()


def test_a_terminal_that_lacks_a_letter(tmp_path):
    command = "from ratlip import errors; errors.run(lambda: print('caf\\xe9 \\udcff'))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "code"), "PYTHONIOENCODING": "ascii"}
    found = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "caf\\xe9 \\udcff\n")


def test_appending_is_all_or_nothing(tmp_path):
    path = tmp_path / "new" / "log"
    output.append(path, b"x" * 100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, limits[1]))  # as on a disk that fills up
    try:
        with pytest.raises(OSError) as found:
            output.append(path, b"y" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert found.value.filename == str(path) and path.read_bytes() == b"x" * 100
    output.append(path, b"z")
    assert path.read_bytes() == b"x" * 100 + b"z"
