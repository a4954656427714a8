"""Files that several programs write at once, and what is said where a file cannot be written."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ratlip.disk import cannot_write, replacing


def test_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "deep" / "file"
    with replacing(path) as first, replacing(path) as second:
        second.write(b"second")
        first.write(b"first, and longer")
        assert not path.exists() and len(list(path.parent.iterdir())) == 2
    assert path.read_bytes() == b"first, and longer"  # whose block ended last
    assert list(path.parent.iterdir()) == [path]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask  # as any file; others of a group read it too

    def write(number: int) -> None:
        with replacing(path) as file:
            for _ in range(50):
                file.write(bytes([number]) * 100)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    content = path.read_bytes()
    assert len(content) == 5000 and len(set(content)) == 1 and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_earlier_file(tmp_path, kind):
    path = tmp_path / "file"
    path.write_bytes(b"earlier")
    with pytest.raises(kind), replacing(path) as file:
        file.write(b"half")
        raise kind
    assert path.read_bytes() == b"earlier" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "said", "unsaid"),
    [
        (errno.ENOSPC, "the disk or its quota is full", "read-only"),
        (errno.EDQUOT, "the disk or its quota is full", "read-only"),
        (errno.EROFS, "where that is read-only, set data.dir to a folder of links", "full"),
        (errno.EACCES, "where that is read-only, set data.dir to a folder of links", "full"),
        (errno.ENOTDIR, "move away what stands there", "read-only"),
        (errno.EIO, "Input/output error", "read-only"),
        (errno.ENOLCK, "No locks available", "read-only"),
    ],
)
def test_what_is_said_of_a_file_that_cannot_be_written(number, said, unsaid):
    message = str(cannot_write(Path("data/cache/x"), OSError(number, os.strerror(number))))
    assert message.startswith("data/cache/x: cannot be written") and said in message and unsaid not in message
