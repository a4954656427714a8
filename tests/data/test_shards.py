"""WebDataset shards: every sample once an epoch, on any number of processes, and shards that are broken."""

import cProfile
import gzip
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from helpers import ROOT, TINY_RUN, assert_refused
from PIL import Image

from ratlip import config
from ratlip.data import layouts, shards
from ratlip.data.captions import CaptionTable
from ratlip.data.inventory import usable_items
from ratlip.data.layouts import open_image
from ratlip.data.loader import OPEN_SHARDS, EpochBatches

# Runs the real train.py, and notes the images and captions of every step of this process.
RECORDER = """
import json, os, runpy, sys
from pathlib import Path
from ratlip import trainer
from ratlip.data.loader import to_floats

steps, step = [], trainer.train_step


def recorded(t, batch):
    means = to_floats(batch.images).mean((2, 3))  # (B, 3), flat pictures
    steps.append([[row, mean] for row, mean in zip(batch.rows.tolist(), means.tolist())])
    return step(t, batch)


trainer.train_step = recorded
folder = sys.argv.pop(1)
runpy.run_path("code/train.py", run_name="__main__")
Path(folder, os.environ.get("RANK", "0") + ".json").write_text(json.dumps(steps))
"""


def encoded(colour: tuple[int, int, int], kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 24), colour).save(buffer, kind)
    return buffer.getvalue()


def colour_of(number: int) -> tuple[int, int, int]:
    return 8 * number, 255 - 8 * number, 100


def write(path: Path, numbers: range) -> Path:
    """A shard as img2dataset writes it: jpg, txt and json of nine-digit keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as sink:
        for i in numbers:
            meta = {"caption": f"picture {i}", "key": f"{i:09}", "status": "success"}
            sink.write({"__key__": f"{i:09}", "jpg": encoded(colour_of(i % 32)), "txt": f"picture {i}", "json": meta})
    return path


@pytest.fixture
def pattern(tmp_path) -> str:
    """32 training pairs in three shards of unequal length, and 6 for testing."""
    for shard, numbers in enumerate((range(0, 17), range(17, 20), range(20, 32))):
        write(tmp_path / "cc12m" / f"{shard:05}.tar", numbers)
    write(tmp_path / "held" / "00000.tar", range(100, 106))
    return f"{tmp_path}/cc12m/{{00000..00002}}.tar"


@pytest.fixture
def words(clip_file, tmp_path, pattern):
    """words(*more): a configuration of the shards, and overrides."""

    def words(*more: str) -> list[str]:
        mine = tmp_path / "shards.yml"
        held = f"{tmp_path}/held/00000.tar"
        mine.write_text(f"data: {{layout: webdataset, dir: '{pattern}', test_dir: '{held}'}}\nmodel: {{imsize: 16}}\n")
        places = (f"log.dir={tmp_path}/logs", f"log.save_dir={tmp_path}/saved", f"clip.weights={clip_file}")
        tiny = ("train.device=cpu", "train.batch_size=16", "eval.metrics=[clip_score]")
        return [str(mine), *TINY_RUN, *places, *tiny, *more]

    return words


def items_of(words: list[str], split: str = "train"):
    return usable_items(config.load(words[0], words[1:]), split)


def test_every_sample_is_seen_once_an_epoch_on_one_and_two_processes(words, tmp_path):
    (tmp_path / "recorder.py").write_text(RECORDER)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/code", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    epochs = {}
    for processes in (2, 1):  # the two find nothing indexed yet
        folder = tmp_path / str(processes)
        folder.mkdir()
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes == 2 else []
        more = ("train.max_epoch=2", f"data.num_workers={processes}", "log.test_interval=2")
        result = subprocess.run(
            [sys.executable, *start, tmp_path / "recorder.py", folder, *words(*more)],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert "32 training images, 2 steps an epoch, epochs: 2" in result.stdout
        ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
        for rank in ranks:
            assert [len(step) for step in rank] == [16 // processes] * 4
            for row, mean in (sample for step in rank for sample in step):  # row i is the caption of sample i
                expected = np.array(colour_of(row)) / 127.5 - 1
                assert np.abs(np.array(mean) - expected).max() < 0.03
        epochs[processes] = [sorted(row for rank in ranks for row, _ in rank[number]) for number in range(4)]
    assert epochs[1] == epochs[2]  # the number of processes does not change the batches
    for first, second in (epochs[1][:2], epochs[1][2:]):
        assert sorted(first + second) == list(range(32))
    assert epochs[1][0] != epochs[1][2]  # another order in the second epoch


def test_prepare_and_then_train(words, tmp_path, call):
    result = call("prepare.py", *words())
    assert result.returncode == 0, result.stderr
    assert "images                          32             6" in result.stdout
    cache = tmp_path / "cc12m" / "cache"
    kept = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert {path.name for path in kept} > {"shards.jsonl", "images_train.jsonl", "images_test.jsonl"}
    result = call("train.py", *words())
    assert result.returncode == 0 and "2 steps an epoch" in result.stdout, result.stderr
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == kept
    # A shard that was replaced is read anew.
    write(tmp_path / "cc12m" / "00001.tar", range(17, 19))
    assert len(items_of(words())) == 31


def test_samples_are_read_by_their_place(words):
    items = items_of(words())
    assert [item.key for item in items[16:18]] == ["00000/000000016", "00001/000000017"]
    assert [item.captions for item in items] == [[f"picture {i}"] for i in range(32)]
    for i in (0, 16, 17, 31):
        assert np.abs(np.asarray(open_image(items[i]), int) - colour_of(i)).max() <= 3
    assert [item.captions for item in items_of(words(), "test")] == [[f"picture {i}"] for i in range(100, 106)]


def test_without_test_shards_a_tenth_is_held_out(words):
    keys = {split: [item.key for item in items_of(words("data.test_dir=null"), split)] for split in ("train", "test")}
    assert len(keys["test"]) == 3 and len(keys["train"]) == 29
    assert not set(keys["test"]) & set(keys["train"])


def test_shards_are_swept_in_random_order():
    """An epoch draws from about OPEN_SHARDS shards at a time, and from each whole."""
    shards = np.repeat(np.arange(200), 10)
    table = CaptionTable([[str(i)] for i in range(2000)])
    batches = EpochBatches(table, 50, 0, shards=shards)
    orders = []
    for epoch in range(2):
        batches.epoch = epoch
        orders.append(np.array([draw.image for batch in batches for draw in batch]))
        assert sorted(orders[-1]) == list(range(2000))
        places = np.argsort(orders[-1]).reshape(200, 10)  # of each shard's samples in the epoch
        spread = places.max(1) - places.min(1)
        assert spread.max() <= (OPEN_SHARDS + 2) * 10 * 1.2 and np.median(spread) > OPEN_SHARDS * 5
        assert abs(np.corrcoef(places.mean(1), np.arange(200))[0, 1]) < 0.3
    assert not np.array_equal(*orders)


def test_what_is_wrong_with_samples_is_told(words, tmp_path, call):
    sound = [("a", {"png": encoded((1, 2, 3), "PNG"), "txt": "\ufeffone\r\n\r\ntwo".encode()})]
    sound += [(f"deep/{i}", {"webp": encoded((i, 0, 0), "WEBP"), "txt": b"caf\xe9"}) for i in range(5)]
    wrong = [
        ("no_text", {"jpg": encoded((0, 0, 0))}),
        ("no_image", {"txt": b"a caption"}),
        ("blank", {"jpg": encoded((0, 0, 0)), "txt": b" \n"}),
        ("broken", {"jpg": encoded((0, 0, 0))[:300], "txt": b"cut short"}),
        ("a", {"jpg": encoded((9, 9, 9)), "txt": b"the key again"}),
    ]
    with webdataset.TarWriter(str(tmp_path / "wild.tar"), encoder=False) as sink:
        for key, files in sound + wrong:
            sink.write({"__key__": key, **files})
    result = call("prepare.py", *words(f"data.dir={tmp_path}/wild.tar"))
    shard, lines = f"{tmp_path}/wild.tar", result.stdout.splitlines()
    for line in (
        f"missing captions  {shard}: no_text has no txt or json with captions (only jpg)",
        f"missing image  {shard}: no_image has no jpg",
        f"empty captions  {shard}: blank.txt",
        f"undecodable image  {shard}: broken: cannot be decoded",
        f"key twice  {shard}: a comes twice",
    ):
        assert sum(found.startswith(line) for found in lines) == 1, line
    assert_refused(result, "4 of 10 train items cannot be used, more than 1%")


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A shard of these files in this order."""
    with tarfile.open(path, "w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def by_kind(names: list[str], pictures: str, texts: str) -> list[str]:
    return [f"{name}.{pictures}" for name in names] + [f"{name}.{texts}" for name in names]


def in_turn(names: list[str], *suffixes: str) -> list[str]:
    return [f"{name}.{suffix}" for name in names for suffix in suffixes]


NUMBERS = [f"{i:05}" for i in range(30)]
# How files are called and in which order they stand; the keys that come of it, and what is said besides.
ARRANGEMENTS = {
    "in turn": (in_turn(NUMBERS, "jpg", "txt"), NUMBERS, ()),
    "texts first": (in_turn(NUMBERS, "txt", "jpg"), NUMBERS, ()),
    "by kind": (by_kind(NUMBERS, "jpg", "txt"), NUMBERS, ()),
    "by kind, json": (by_kind(NUMBERS, "jpg", "json"), NUMBERS, ()),
    "by kind, more": ([*by_kind(NUMBERS, "jpg", "txt"), *(f"{n}.json" for n in NUMBERS)], NUMBERS, ()),
    "backwards": ([*(f"{n}.jpg" for n in NUMBERS), *(f"{n}.txt" for n in NUMBERS[::-1])], NUMBERS, ()),
    "json": (in_turn(NUMBERS, "jpg", "json"), NUMBERS, ()),
    "json and txt": (in_turn(NUMBERS, "jpg", "json", "txt"), NUMBERS, ()),
    "upper case": (in_turn(NUMBERS, "JPG", "TXT"), NUMBERS, ()),
    "other suffixes": (in_turn(NUMBERS, "jfif", "caption"), NUMBERS, ()),
    "two parts": (in_turn(NUMBERS, "input.jpg", "outputs.txt"), NUMBERS, ()),
    "two parts by kind": (by_kind(NUMBERS, "input.jpg", "outputs.txt"), NUMBERS, ()),
    "a mask besides": (in_turn(NUMBERS, "jpg", "seg.png", "txt"), NUMBERS, ()),
    "other files besides": (in_turn(NUMBERS, "cls", "jpg", "npy", "txt"), NUMBERS, ()),
    "several parts": (in_turn(NUMBERS, "jpg", "0.txt", "1.txt"), NUMBERS, ()),
    "dots in keys": (in_turn([f"photo.{n}" for n in NUMBERS], "jpg", "txt"), [f"photo.{n}" for n in NUMBERS], ()),
    "dots, by kind": (by_kind([f"a.b.{n}" for n in NUMBERS], "jpg", "json"), [f"a.b.{n}" for n in NUMBERS], ()),
    "dots and parts": (in_turn([f"p.{n}" for n in NUMBERS], "in.jpg", "out.txt"), [f"p.{n}" for n in NUMBERS], ()),
    "folders": (in_turn([f"a.b/c/{n}" for n in NUMBERS], "jpg", "txt"), [f"a.b/c/{n}" for n in NUMBERS], ()),
    "from here": (in_turn([f"./{n}" for n in NUMBERS], "jpg", "txt"), NUMBERS, ()),
    "hidden": (
        [name for n in NUMBERS for name in (f"./._{n}.jpg", f"./{n}.jpg", f"./._{n}.txt", f"./{n}.txt")],
        NUMBERS,
        ("hidden files", "60 left out: ._00000.jpg, ._00000.txt, ._00001.jpg, ..."),
    ),
    "notes": (["README.md", *in_turn(NUMBERS, "jpg", "txt")], NUMBERS, ("no sample", "README has neither an image")),
    "two images": (
        in_turn(NUMBERS, "jpg", "png", "txt"), NUMBERS, ("several images", "00000 has jpg, png; the first is used"),
    ),
    "twice": (in_turn([*NUMBERS, *NUMBERS], "jpg", "txt"), NUMBERS, ("key twice", "00000 comes twice; used once")),
    "leaves": (["../out.jpg", *in_turn(NUMBERS, "jpg", "txt")], NUMBERS, ("hidden files", "1 left out: ../out.jpg")),
}  # fmt: skip


@pytest.mark.parametrize("kind", ARRANGEMENTS)
def test_arrangements_of_samples(kind, words, tmp_path, call):
    names, keys, besides = ARRANGEMENTS[kind]
    members, seen = [], set()
    for name in names:
        number = int((re.findall(r"\d{5}", name) or ["0"])[0])
        suffix = "" if name in seen else name.lower().rpartition(".")[2]  # of the second of two files: anything
        caption = f"the caption of {number}\n".encode()
        contents = {"jpg": encoded(colour_of(number)), "jfif": encoded(colour_of(number)), "txt": caption}
        contents |= {
            "caption": caption,
            "json": json.dumps({"url": "x", "caption": f"the caption  of {number}"}).encode(),
        }
        members.append((name, contents.get(suffix, b"anything")))
        seen.add(name)
    tar(tmp_path / "some.tar", members)
    more = words(f"data.dir={tmp_path}/some.tar")
    result = call("prepare.py", *more)
    assert result.returncode == 0, result.stdout + result.stderr
    items = items_of(more)
    assert [item.key for item in items] == [f"some/{key}" for key in keys]
    for number, item in enumerate(items):
        assert item.captions == [f"the caption of {number}"]
        assert np.abs(np.asarray(open_image(item), int) - colour_of(number)).max() <= 3
    said = [line for line in result.stdout.splitlines() if f"{tmp_path}/some.tar: " in line]
    if besides:
        assert said[0].startswith(f"{besides[0]}  {tmp_path}/some.tar: {besides[1]}")
    else:
        assert not said


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"caption": "one"}, ["one"]),
        ({"caption": ["one", "two\nlines"], "text": "other"}, ["one", "two lines"]),
        ({"caption": None, "text": "one"}, ["one"]),
        ({"captions": ["one", 3, " "]}, ["one"]),
        ({"caption": " "}, "empty captions"),
        ({"url": "x"}, "missing captions"),
        (["one", "two"], ["one", "two"]),
        (7, "empty captions"),
        (b"{cut", "missing captions"),
        (b"\xff\xfe", "missing captions"),
    ],
)
def test_captions_in_json(found, expected, tmp_path):
    content = found if isinstance(found, bytes) else json.dumps(found).encode()
    samples, problems = shards.index(tar(tmp_path / "x.tar", [("a.jpg", b"x"), ("a.json", content)]))
    if isinstance(expected, list):
        assert samples == [["a", [512, 1], expected]] and not problems
    else:
        assert not samples and [(kind, lost) for kind, _, lost in problems] == [(expected, True)]


def test_an_empty_txt_leaves_the_word_to_json(tmp_path):
    members = [("a.jpg", b"x"), ("a.txt", b"\n"), ("a.json", b'{"caption": "one"}')]
    assert shards.index(tar(tmp_path / "x.tar", members))[0][0][2] == ["one"]


def test_names_that_are_not_utf8(words, tmp_path, call):
    """As unpacked on an old Windows, and packed again."""
    names = [f"caf\udce9_{n}" for n in NUMBERS]
    files = [("caf\udce9.cls", b"x")]
    files += [
        file
        for name in names
        for file in ((f"{name}.jpg", encoded((9, 8, 7))), (f"{name}.txt", f"caption {name[-5:]}".encode()))
    ]
    with tarfile.open(tmp_path / "old.tar", "w", format=tarfile.GNU_FORMAT) as file:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    more = words(f"data.dir={tmp_path}/old.tar", "data.test_dir=null")
    result = call("prepare.py", *more, "--resize")
    assert result.returncode == 0, result.stderr
    assert f"no sample  {tmp_path}/old.tar: caf\ufffd has neither an image" in result.stdout
    assert [item.image.suffix for item in items_of(more)] == [".bmp"] * 27


def test_linked_files_in_a_shard(tmp_path):
    """As tar stores a file that lies twice on the disk under one number."""
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        for name in ("a.jpg", "a.txt", "b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1
            file.addfile(info, io.BytesIO(b"x"))
        for name, target, kind in (("b.jpg", "a.jpg", tarfile.LNKTYPE), ("c.jpg", "a.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            file.addfile(info)
    samples, problems = shards.index(tmp_path / "x.tar")
    assert [(key, span) for key, span, _ in samples] == [("a", [512, 1]), ("b", [512, 1])]
    assert problems == [["links", "1 left out: c.jpg", False]]


@pytest.mark.parametrize("script", ["prepare.py", "train.py", "test.py"])
@pytest.mark.parametrize(
    ("suffixes", "parts"),
    [
        (["jpg"], ["missing captions", "00000 has no txt or json with captions (only jpg)"]),
        (["jpg", "cls"], ["missing captions", "00000 has no txt or json with captions (only jpg, cls)"]),
        (["mp4", "txt"], ["missing image", "00000 has no jpg, png or other image (only mp4, txt)"]),
        (["cls"], ["no sample", "00000 has neither an image nor captions (only cls)"]),
    ],
)
def test_shards_without_any_sample_say_what_is_wrong(script, suffixes, parts, words, tmp_path, call):
    tar(tmp_path / "bare.tar", [(name, encoded((1, 2, 3))) for name in in_turn(NUMBERS, *suffixes)])
    (tmp_path / "scored").mkdir()
    scored = ("--images", tmp_path / "scored") if script == "test.py" else ()
    result = call(script, *words(f"data.dir={tmp_path}/bare.tar", "data.test_dir=null"), *scored)
    if suffixes == ["cls"]:
        assert_refused(result, "split is empty")
    else:
        assert_refused(result, "30 of 30 t", f"bare.tar: {parts[1]}")
    lines = [line for line in result.stdout.splitlines() if f"bare.tar: {parts[1]}" in line]
    assert len(lines) == 1 and (script != "prepare.py" or lines[0].startswith(parts[0]))


def test_a_rebuilt_shard_of_the_same_size_and_time(words, tmp_path, call):
    """Its pictures change places and captions; nothing else tells."""
    shard = tmp_path / "one.tar"

    def build(order: range) -> None:
        files = {f"{i:05}": encoded(colour_of(i), "BMP") for i in range(20)}
        names = [f"{i:05}" for i in order]
        tar(shard, [file for i, name in enumerate(names) for file in
                    ((f"{name}.bmp", files[f"{i:05}"]), (f"{name}.txt", f"square {i:05}".encode()))])  # fmt: skip
        os.utime(shard, ns=(7, 7))

    build(range(20))
    size = shard.stat().st_size
    more = words(f"data.dir={shard}", "data.test_dir=null", "eval.metrics=[fd_clip]")
    assert call("prepare.py", *more, "--resize").returncode == 0
    (statistics,) = (tmp_path / "stats").iterdir()
    before = dict(np.load(statistics))
    build(range(19, -1, -1))
    assert (shard.stat().st_size, shard.stat().st_mtime_ns) == (size, 7)
    result = call("prepare.py", *more)
    assert result.returncode == 0 and f"{statistics}: of other pictures; measured anew" in result.stdout
    assert not np.allclose(dict(np.load(statistics))["mu"], before["mu"])
    for item in items_of(more):  # none is read from its copy
        assert np.array_equal(np.asarray(open_image(item))[0, 0], colour_of(int(item.captions[0].split()[1])))
        assert int(item.key.split("/")[1]) + int(item.captions[0].split()[1]) == 19


def test_a_rebuilt_shard_of_the_same_pictures_is_not_decoded_again(words, tmp_path, call, monkeypatch):
    decoded, decode = [], layouts.decode
    monkeypatch.setattr(layouts, "decode", lambda file: (decoded.append(file), decode(file))[1])
    more = words()
    assert call("prepare.py", *more).returncode == 0
    assert len(decoded) == 38
    write(tmp_path / "cc12m" / "00000.tar", range(0, 17))
    result = call("prepare.py", *more)
    assert result.returncode == 0 and "checking train images: 17 in" in result.stdout and len(decoded) == 38


def test_an_index_of_an_earlier_version_is_made_anew_by_name(words, tmp_path, call):
    journal = tmp_path / "cc12m" / "cache" / "shards.jsonl"
    journal.parent.mkdir()
    status = (tmp_path / "cc12m" / "00000.tar").stat()
    old = ["00000.tar", [status.st_size, status.st_mtime_ns], [["x", [0, 1], ["old"]]]]
    journal.write_text(json.dumps(old) + "\n")
    result = call("prepare.py", *words())
    assert f"{journal}: 1 entries are of an earlier version of this program; made anew" in result.stdout
    assert row_of(result.stdout, "images") == ["32", "6"]
    assert "anew" not in call("prepare.py", *words()).stdout


def row_of(printed: str, name: str) -> list[str]:
    return next(line.split()[1:] for line in printed.splitlines() if line.startswith(f"{name}  "))


def test_large_shards_are_no_more_work_for_each_file(tmp_path):
    """Counted in calls of functions; without captions all keys may be taken for one."""

    def calls(count: int, *suffixes: str) -> int:
        names = in_turn([f"p.{i}" for i in range(count)], *suffixes)
        shard = tar(tmp_path / f"{count}.tar", [(name, b"x") for name in names])
        profile = cProfile.Profile()
        profile.runcall(shards.index, shard)
        return sum(entry.callcount for entry in profile.getstats())

    calls(1, "jpg")  # imports
    for suffixes in (("jpg", "txt"), ("jpg",), ("cls",)):
        assert calls(1200, *suffixes) < 4.5 * calls(300, *suffixes)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:15_000])


@pytest.mark.parametrize(
    ("damage", "more", "parts"),
    [
        (cut, [], ["00002.tar", "cut short"]),
        (lambda path: path.write_bytes(gzip.compress(path.read_bytes())), [], ["00002.tar", "not a plain tar"]),
        (lambda path: path.write_bytes(2 * path.read_bytes()), [], ["00002.tar", "joined by cat"]),
        (lambda path: path.write_text("404"), [], ["00002.tar", "not a plain tar"]),
        (Path.unlink, [], ["data.dir", "00002.tar", "not there"]),
        (None, ["data.test_dir=nowhere/{0..3}.tar"], ["data.test_dir", "nowhere/0.tar", "not there"]),
        (None, ["data.dir=data/mine"], ["data.dir", "expected a pattern of .tar files", "data/mine"]),
        (None, ["data.dir=https://host/{0..3}.tar"], ["data.dir", "https://host/{0..3}.tar", "no file"]),
    ],
    ids=["cut", "gz", "joined", "text", "gone", "test", "folder", "url"],
)
def test_shards_that_cannot_be_read_are_named(damage, more, parts, words, tmp_path, call):
    if damage:
        damage(tmp_path / "cc12m" / "00002.tar")
    assert_refused(call("prepare.py", *words(*more)), *parts)


def test_a_worker_that_fails_says_so_in_one_line(words, tmp_path, call):
    cut(tmp_path / "cc12m" / "00002.tar")
    assert_refused(call("prepare.py", *words("data.num_workers=1")), "00002.tar", "cut short")


def test_without_the_library(words, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    assert_refused(call("train.py", *words()), "webdataset is not installed", "pip install webdataset")
