"""Reads pickles of other programs without importing or running anything that they name: stand-ins take its place."""

import codecs
import io
import pickle
import struct
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ratlip.errors import UserError, first_line

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # with which torch.save's files of the older layout begin
# The number type of each kind of storage, by the name it has in torch.
TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

# For arrays of numbers; they are NumPy's own functions, which build nothing else.
ARRAYS = {
    **{
        f"{module}.{name}": function
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name, function in (
            ("_reconstruct", np.zeros(0).__reduce__()[0]),
            ("scalar", np.float64(0).__reduce__()[0]),
        )
    },
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "_codecs.encode": codecs.encode,  # of an array's bytes, where Python 3 writes for Python 2
}


class Nothing:
    """What is left of an object whose content nobody needs."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def load(file: BinaryIO, stand_ins: Mapping[str, Any], encoding: str = "ASCII") -> Any:
    """The content of a pickle in which only plain values, and calls of the named globals, may be.

    Args:
        stand_ins: what is called in place of each global, by its full name. `calls_for_tensors()` has torch's,
            `ARRAYS` NumPy's.
        encoding: of Python 2's byte strings.

    Raises:
        UserError: another global, which is named, or no pickle that can be read.
    """
    return _load(file, stand_ins, encoding=encoding)


def _load(
    file: BinaryIO, stand_ins: Mapping[str, Any], storage: Callable[[Any], Any] | None = None, encoding: str = "ASCII"
) -> Any:
    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if f"{module}.{name}" not in stand_ins:
                raise UserError(f"refused: it asks for {module}.{name}, which no such file needs")
            return stand_ins[f"{module}.{name}"]

        def persistent_load(self, identity: Any) -> Any:
            if storage is None:
                raise UserError("refused: it points to something outside of it")
            return storage(identity)

    try:
        return Unpickler(file, encoding=encoding).load()
    except UserError:
        raise
    except Exception as error:  # a broken pickle can fail in any way
        raise UserError(f"no pickle that can be read, or cut short ({first_line(error)})") from None


def calls_for_tensors() -> dict[str, Callable]:
    """Stand-ins for the globals that a pickled tensor or parameter asks for; they give plain tensors on the CPU."""
    return {
        "torch.storage._load_from_bytes": _storage_of,
        "torch._utils._rebuild_tensor_v2": _tensor_of,
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    }


def _storage_of(content: bytes) -> Tensor:
    """The elements (N,) of a storage that torch.save wrote: five pickles, a count, and the elements as they are."""
    file = io.BytesIO(content)

    def identify(identity: Any) -> tuple:
        kind, dtype, key, _, count, view = identity
        if kind != "storage" or view is not None:
            raise UserError(f"refused: a storage of an unknown form ({kind!r})")
        return dtype, key, count

    kinds = {f"torch.{name}": dtype for name, dtype in TYPES.items()}
    magic, protocol, system = (_load(file, {}) for _ in range(3))
    if magic != MAGIC or protocol != PROTOCOL or not system.get("little_endian", True):
        raise UserError("refused: a storage that torch.save did not write on a machine of today's kind")
    (dtype, key, count), keys = _load(file, kinds, identify), _load(file, {})
    (length,) = struct.unpack("<q", file.read(8))
    elements = file.read()
    if keys != [key] or length != count or len(elements) != count * dtype.itemsize:
        raise UserError(f"a storage of {count} numbers is cut short")
    return torch.frombuffer(bytearray(elements), dtype=dtype) if count else torch.empty(0, dtype=dtype)


def _tensor_of(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    """A tensor of its own, of the numbers of a storage that begin at `offset` and are `stride` apart."""
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if offset < 0 or any(step < 0 for step in stride) or (0 not in size and last >= len(storage)):
        raise UserError(f"a tensor of {tuple(size)} reaches beyond its storage")
    return storage.as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)
