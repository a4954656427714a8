"""Pickles of other programs: nothing in them is imported or run, and what is broken is told."""

import io
import os
import pickle
from collections import OrderedDict

import pytest
import torch

from ratlip import inert
from ratlip.errors import UserError


class Calls:
    """Pickled as a call of `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def load(content: object, **stand_ins) -> object:
    return inert.load(io.BytesIO(pickle.dumps(content, protocol=4)), stand_ins)


@pytest.mark.parametrize(
    "call, name",
    [
        (Calls(os.system, "touch ran"), r"posix\.system|nt\.system"),
        (Calls(eval, "open('ran', 'w')"), r"builtins\.eval"),
        (Calls(__import__, "this"), r"builtins\.__import__"),
        (Calls(getattr, Calls(OrderedDict), "update"), r"builtins\.getattr"),
    ],
)
def test_other_globals_are_refused_by_name(call, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"refused: it asks for ({name})"):
        load({"a": [call]}, **{"collections.OrderedDict": OrderedDict})
    assert not list(tmp_path.iterdir())


def test_stand_ins_are_called_in_their_place():
    calls = []
    assert load({"a": (1, Calls(os.getcwd))}, **{"posix.getcwd": lambda: calls.append(1) or "here"}) == {
        "a": (1, "here")
    }
    assert calls == [1]


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps(list(range(1000)))[:-20], b"\x80\x04."])
def test_broken_files_are_told(content):
    with pytest.raises(UserError, match="no pickle that can be read, or cut short"):
        inert.load(io.BytesIO(content), {})


def test_what_lies_outside_is_refused():
    file = io.BytesIO()
    pickler = pickle.Pickler(file)
    pickler.persistent_id = lambda thing: "outside" if thing == "x" else None
    pickler.dump(["x"])
    file.seek(0)
    with pytest.raises(UserError, match="points to something outside"):
        inert.load(file, {})


def tensors(content: object) -> object:
    """What a pickle of tensors gives back. Written as torch does outside of torch.save: each storage on its own."""
    return load(content, **inert.calls_for_tensors(), **{"collections.OrderedDict": OrderedDict})


@pytest.mark.parametrize("dtype", list(inert.TYPES.values()), ids=str)
def test_tensors_are_those_that_were_saved(dtype):
    base = (torch.rand(4, 6) * 50).to(dtype)
    views = [base, base.t(), base[1:3, ::2], base[2, 3], base[:0], base.view(1, 4, 6, 1)]
    for found, expected in zip(tensors(views), views, strict=True):
        assert found.dtype == dtype and torch.equal(found, expected) and found.is_contiguous()
    parameter = torch.nn.Parameter(torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
    found = tensors({"p": parameter})["p"]
    assert torch.equal(found, parameter) and type(found) is torch.Tensor and not found.requires_grad


@pytest.mark.parametrize(
    "offset, size, stride", [(1, (4,), (1,)), (0, (3,), (2,)), (-1, (1,), (1,)), (3, (2,), (-1,)), (0, (2, 3), (3, 1))]
)
def test_tensors_beyond_their_storage_are_refused(offset, size, stride):
    storage = torch.storage.TypedStorage(
        wrap_storage=torch.arange(4.0).untyped_storage(), dtype=torch.float32, _internal=True
    )
    call = Calls(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())
    with pytest.raises(UserError, match="reaches beyond its storage"):
        tensors(call)


def test_storages_that_are_cut_short():
    content = io.BytesIO()
    storage = torch.storage.TypedStorage(
        wrap_storage=torch.arange(9.0).untyped_storage(), dtype=torch.float32, _internal=True
    )
    torch.save(storage, content, _use_new_zipfile_serialization=False)
    read = inert.calls_for_tensors()["torch.storage._load_from_bytes"]
    for cut in (5, 40, -1):
        with pytest.raises(UserError, match="cut short"):
            read(content.getvalue()[:cut])
