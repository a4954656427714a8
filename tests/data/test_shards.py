"""WebDataset shards: every sample once an epoch, on any number of processes, and shards that are broken."""

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from helpers import ROOT, TINY_RUN, assert_refused
from PIL import Image

from ratlip import config
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
        f"missing captions  {shard}: no_text has no txt",
        f"missing image  {shard}: no_image has no jpg",
        f"empty captions  {shard}: blank.txt",
        f"undecodable image  {shard}: broken: cannot be decoded",
        f"key twice  {shard}: a comes twice",
    ):
        assert sum(found.startswith(line) for found in lines) == 1, line
    assert_refused(result, "4 of 10 train items cannot be used, more than 1%")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:15_000])


@pytest.mark.parametrize(
    ("damage", "more", "parts"),
    [
        (cut, [], ["00002.tar", "cut short"]),
        (lambda path: path.write_bytes(gzip.compress(path.read_bytes())), [], ["00002.tar", "not a plain tar"]),
        (lambda path: path.write_text("404"), [], ["00002.tar", "not a plain tar"]),
        (Path.unlink, [], ["data.dir", "00002.tar", "not there"]),
        (None, ["data.test_dir=nowhere/{0..3}.tar"], ["data.test_dir", "nowhere/0.tar", "not there"]),
        (None, ["data.dir=data/mine"], ["data.dir", "expected a pattern of .tar files", "data/mine"]),
        (None, ["data.dir=https://host/{0..3}.tar"], ["data.dir", "https://host/{0..3}.tar", "no file"]),
    ],
    ids=["cut", "gz", "text", "gone", "test", "folder", "url"],
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
