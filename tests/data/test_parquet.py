"""Parquet files with pictures in them, through prepare.sh and train.sh."""

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import assert_refused
from PIL import Image

from ratlip import config
from ratlip.data.inventory import usable_items
from ratlip.data.layouts import open_image

COUNT = 24


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (8 * number, 255 - 8 * number, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def table(numbers, form: str = "hugging face") -> pa.Table:
    """Rows as Hugging Face's `push_to_hub` writes them, or others do."""
    if form == "plain":
        return pa.table({"id": list(numbers), "image": [picture(n) for n in numbers],
                         "caption": [[f"picture {n}", f"the same {n}"] for n in numbers]})  # fmt: skip
    images = pa.array([{"bytes": picture(n), "path": f"{n}.png"} for n in numbers])
    return pa.table({"image": images, "text": [f"picture {n}" for n in numbers]})


def write(path: Path, rows: pa.Table) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, path, row_group_size=5)
    return path


@pytest.fixture
def words(data_words):
    """words(root, *more): a configuration of the files, and overrides."""
    return lambda root, *more: data_words(root, "eval.metrics=[fd_clip]", *more, layout="parquet")


def items_of(words: list[str]) -> dict[str, list]:
    loaded = config.load(words[0], words[1:])
    return {split: usable_items(loaded, split) for split in ("train", "test")}


@pytest.mark.parametrize("form", ["hugging face", "plain"])
def test_pictures_and_captions_are_those_of_the_rows(form, tmp_path, words, call):
    """Prepared and trained; nothing is unpacked again; a file that changed is."""
    for part, numbers in (("train-00000-of-00002", range(12)), ("train-00001-of-00002", range(12, 20)),
                          ("test-00000-of-00001", range(20, 24))):  # fmt: skip
        write(tmp_path / f"set/data/{part}.parquet", table(numbers, form))
    arguments = words(tmp_path / "set", "data.num_workers=1")
    result = call("prepare.py", *arguments, "--resize")
    assert result.returncode == 0, result.stderr
    assert "images                          20             4" in result.stdout
    items = items_of(words(tmp_path / "set", "data.enlarge=1.0"))
    for split, numbers in (("train", range(20)), ("test", range(20, 24))):
        for item, number in zip(items[split], numbers, strict=True):
            assert item.captions == [f"picture {number}", f"the same {number}"][: 2 if form == "plain" else 1]
            assert np.asarray(open_image(item))[0, 0].tolist() == [8 * number, 255 - 8 * number, 90]
    assert items["train"][13].key == "data/train-00001-of-00002/1"
    cache = tmp_path / "set/cache"
    made = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    assert call("train.py", *arguments).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made
    write(tmp_path / "set/data/train-00001-of-00002.parquet", table(range(24, 27), form))
    changed = items_of(words(tmp_path / "set"))["train"]
    assert len(changed) == 15 and changed[-1].captions[0] == "picture 26"
    assert np.asarray(open_image(changed[-1]))[0, 0].tolist() == [8 * 26, 255 - 8 * 26, 90]
    (cache / "unpacked/data/train-00000-of-00002.parquet.pictures").unlink()
    assert len(items_of(words(tmp_path / "set"))["train"]) == 15


@pytest.mark.parametrize("place", ["{root}", "{root}/all.parquet", "{root}/*.parquet"])
def test_without_a_split_a_tenth_is_held_out(place, tmp_path, words):
    write(tmp_path / "set/all.parquet", table(range(COUNT)))
    items = items_of(words(place.format(root=tmp_path / "set")))
    keys = {split: [item.key for item in own] for split, own in items.items()}
    assert len(keys["test"]) == 2 and not set(keys["train"]) & set(keys["test"])
    assert sorted(int(key.split("/")[1]) for own in keys.values() for key in own) == list(range(COUNT))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train/0000", "validation/0000"),
        ("default/train/0", "default/test/0"),
        ("train", "valid"),
        ("x_y/train.2", "x_y/val-1"),
    ],
)
def test_names_tell_the_splits(train, test, tmp_path, words, capsys):
    write(tmp_path / "set/other.parquet", table(range(30, 31)))
    write(tmp_path / f"set/{train}.parquet", table(range(20)))
    write(tmp_path / f"set/{test}.parquet", table(range(20, 24)))
    items = items_of(words(tmp_path / "set"))
    assert [len(items[split]) for split in ("train", "test")] == [20, 4]
    assert "in neither split: 1 file (1 .parquet): other.parquet" in capsys.readouterr().out


def test_a_folder_of_its_own_for_testing(tmp_path, words):
    write(tmp_path / "set/a.parquet", table(range(20)))
    write(tmp_path / "other/b.parquet", table(range(20, 24)))
    items = items_of(words(tmp_path / "set", f"data.test_dir={tmp_path}/other"))
    assert [item.captions for item in items["test"]] == [[f"picture {n}"] for n in range(20, 24)]
    assert len(items["train"]) == 20


def test_bad_rows_are_named(tmp_path, words, call):
    rows = table(range(COUNT)).to_pylist()
    rows[3]["image"]["bytes"] = None
    rows[4]["text"] = " "
    rows[5]["text"] = None
    rows[6]["image"]["bytes"] = b"no picture"
    path = write(tmp_path / "set/train.parquet", pa.Table.from_pylist(rows))
    write(tmp_path / "set/test.parquet", table(range(4)))
    result = call("prepare.py", *words(tmp_path / "set"))
    assert_refused(result, "4 of 24 train items cannot be used")
    for line in (f"missing image  {path}: row 3 has no picture", f"empty captions  {path}: row 4 has no caption",
                 f"empty captions  {path}: row 5", "undecodable image  "):  # fmt: skip
        assert sum(found.startswith(line) for found in result.stdout.splitlines()) == 1, line


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:500]), ["a.parquet", "not a Parquet file"]),
        (lambda path: path.write_text("404"), ["a.parquet", "not a Parquet file"]),
        (Path.unlink, ["data.dir", "no .parquet file"]),
        (lambda path: write(path, pa.table({"image": [b"1"], "label": [3]})), ["no column text or caption", "label"]),
        (lambda path: write(path, pa.table({"url": ["x"], "text": ["x"]})), ["no column image", "url, text"]),
    ],
    ids=["cut", "text", "gone", "no captions", "no pictures"],
)
def test_files_that_cannot_be_read_are_named(damage, parts, tmp_path, words, call):
    damage(write(tmp_path / "set/a.parquet", table(range(COUNT))))
    assert_refused(call("prepare.py", *words(tmp_path / "set")), *parts)


def test_a_file_that_is_broken_further_on(tmp_path, words, call):
    path = write(tmp_path / "set/a.parquet", table(range(COUNT)))
    content = bytearray(path.read_bytes())
    content[200:1200] = b"\xff" * 1000
    path.write_bytes(content)
    assert_refused(call("prepare.py", *words(tmp_path / "set")), str(path))


def test_the_folder_layout_says_which_layout_reads_them(tmp_path, words, call):
    write(tmp_path / "set/a.parquet", table(range(COUNT)))
    refused = call("prepare.py", *words(tmp_path / "set", "data.layout=folder"))
    assert_refused(refused, "no pictures", "data.layout=parquet")


def test_without_the_library(tmp_path, words, call, monkeypatch):
    write(tmp_path / "set/a.parquet", table(range(COUNT)))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert_refused(call("train.py", *words(tmp_path / "set")), "pyarrow is not installed", "pip install pyarrow")
