"""Files that are written beside and renamed, whoever else writes the same, and what is said where that fails."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ratlip.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """An open file that takes the place of `path` when the block ends, and is gone when it fails.

    Its name belongs to this call alone: two programs that make the same file at once both make a whole one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def cannot_write(path: Path, error: OSError) -> UserError:
    """What to say, and do, about a file of a data set's cache that could not be written."""
    line = f"{path}: cannot be written ({error.strerror}), and there is kept what was found out about the data"
    if error.errno in FULL:
        line = f"{path}: cannot be written, the disk or its quota is full; what was written before is kept"
    elif error.errno in READ_ONLY:
        line += "; where that is read-only, set data.dir to a folder of links to it"
    elif error.errno in IN_THE_WAY:
        line += "; move away what stands there"
    return UserError(line)
