"""Checkpoint files: all or nothing on writing, nothing executed on reading."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from ratlip import checkpoint
from ratlip.errors import UserError


def test_round_trip(tmp_path):
    path = tmp_path / "deep" / "state.pth"
    checkpoint.save({"a": torch.arange(3), "b": None}, path)
    assert torch.equal(checkpoint.read(path)["a"], torch.arange(3))
    assert [p.name for p in path.parent.iterdir()] == ["state.pth"]


def test_safetensors_are_read_with_their_metadata(tmp_path):
    save_file({"a": torch.arange(3), "b": torch.ones(2, dtype=torch.float16)}, tmp_path / "x.safetensors", {"c": "d"})
    found = checkpoint.read(tmp_path / "x.safetensors")
    assert torch.equal(found["a"], torch.arange(3)) and found["b"].dtype == torch.float16
    assert found._metadata == {"": {"c": "d"}}
    whole = (tmp_path / "x.safetensors").read_bytes()
    for name, content in (("cut", whole[:-4]), ("empty", b""), ("text", b"hello, world, this is no such file")):
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}\.safetensors is no checkpoint, or is cut short"):
            checkpoint.read(tmp_path / f"{name}.safetensors")


def test_a_failed_write_leaves_the_older_file(tmp_path):
    path = tmp_path / "state.pth"
    checkpoint.save({"epoch": 1}, path)
    with pytest.raises((UserError, AttributeError, pickle.PicklingError)):
        checkpoint.save({"epoch": 2, "no pickle": lambda: 0}, path)
    assert checkpoint.read(path) == {"epoch": 1}
    (tmp_path / "other.pth.partial").mkdir()  # stands where the new file would be written
    with pytest.raises(UserError, match="could not write"):
        checkpoint.save({}, tmp_path / "other.pth")


class Trap:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_bad_files_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Trap()}, "trap.pth")
    with pytest.raises(UserError, match=r"trap\.pth holds more than tensors.*mkdir"):
        checkpoint.read("trap.pth")
    assert not os.path.exists("executed")
    torch.save({"a": torch.zeros(10000)}, "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:20000])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("hello\n")
    for name in ("cut.pth", "empty.pth", "text.pth"):
        with pytest.raises(UserError, match=name):
            checkpoint.read(name)
    torch.save([1, 2], "list.pth")
    with pytest.raises(UserError, match="holds a list"):
        checkpoint.read("list.pth")
    with pytest.raises(UserError, match=f"no checkpoint {tmp_path}/nowhere.pth"):
        checkpoint.read("nowhere.pth")
