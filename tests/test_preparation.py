"""prepare.sh through its entry point: what it reports and keeps, and what training and a second run make of that."""

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY_RUN, assert_refused
from PIL import Image

from ratlip import checkpoint, config
from ratlip.build import clip_of
from ratlip.data import layouts
from ratlip.data.inventory import usable_items
from ratlip.data.loader import Draw, TrainingImages
from ratlip.evaluation import Evaluator, Scorer

SPLITS = ("train", "test")


def picture(number: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    levels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(levels)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def build(root: Path, train: int = 6, test: int = 4) -> Path:
    """A folder data set of random pictures, two captions each."""
    for split, count in (("train", train), ("test", test)):
        for number in range(count):
            image = encoded(picture(number + 1000 * (split == "test")), "PNG", compress_level=1)
            write(root / "images" / split / f"{number}.png", image)
            write(root / "text" / split / f"{number}.txt", f"{split} picture {number}\nthe same again {number}\n")
        write(root / f"{split}.txt", "".join(f"{split}/{number}\n" for number in range(count)))
    return root


@pytest.fixture
def words(data_words):
    """words(root, *more): a configuration of the folder, and overrides."""
    return lambda root, *more: data_words(root, "eval.metrics=[clip_score]", *more)


def kept(root: Path) -> dict[str, tuple[bytes, int]]:
    """Every file of the cache, with its content and time."""
    files = (path for path in (root / "cache").rglob("*") if path.is_file())
    return {str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def row(printed: str, name: str) -> list[str]:
    """The cells of a line of the table."""
    (line,) = (line for line in printed.splitlines() if line.startswith(f"{name}  "))
    return line.removeprefix(name).split()


def test_the_table_and_the_cache(tmp_path, words, call):
    root = build(tmp_path / "data")
    write(root / "images/train/0.png", encoded(picture(0, (16, 50)), "PNG"))
    write(root / "text/train/0.txt", "one\ntwo\nthree\n")
    result = call("prepare.py", *words(root))
    assert result.returncode == 0, result.stderr
    assert row(result.stdout, "images") == ["6", "4"]
    assert row(result.stdout, "captions") == ["13", "8"]
    assert row(result.stdout, "captions per image") == "2 to 3 2 to 2".split()
    assert row(result.stdout, "smallest image") == "16 x 50 40 x 30".split()
    assert row(result.stdout, "largest image") == "40 x 30 40 x 30".split()
    assert row(result.stdout, "problems") == ["0", "0"]
    assert {Path(name).suffix for name in kept(root)} == {".jsonl", ".pt"} and len(kept(root)) == 4


def test_captions_that_are_cut_are_counted_and_named(tmp_path, words, call):
    """16 tokens, of which two mark the ends: 14 words are read whole, 15 are not. Also of caches made before."""
    root = build(tmp_path / "data")
    write(root / "text/train/3.txt", f"one\n{'a ' * 14}\n{'b ' * 15}\n")
    write(root / "text/test/1.txt", f"{'c' * 500}\n")
    older = None
    for _ in range(3):
        result = call("prepare.py", *words(root))
        assert result.returncode == 0, result.stderr
        named = [line for line in result.stdout.splitlines() if line.startswith("cut caption  ")]
        assert named[0] == f"cut caption  train/3: {('b ' * 15).strip()!r}" and len(named) == 2
        assert named[1].startswith("cut caption  test/1: 'ccc")
        assert "1 of 13 (train), 1 of 7 (test): longer than the 16 tokens" in result.stdout
        if older is None:
            older = [path for path in (root / "cache").glob("captions_*.pt")]
            for path in older:
                content = checkpoint.read(path)
                del content["cut"]
                checkpoint.save(content, path)
    trained = call("train.py", *words(root))
    assert trained.returncode == 0, trained.stderr
    assert "1 of 13 training captions are longer than the 16 tokens" in trained.stdout and "'b b b" in trained.stdout
    assert "1 of 7 test captions are longer" in trained.stdout


def test_a_second_run_does_nothing_and_training_reads_what_it_left(tmp_path, words, call):
    root = build(tmp_path / "data")
    assert call("prepare.py", *words(root), "--resize").returncode == 0
    first = kept(root)
    assert len(first) == 4 + 6 + 1  # two journals, two sets of embeddings; the copies and their journal
    assert call("prepare.py", *words(root), "--resize").returncode == 0
    assert kept(root) == first
    assert call("train.py", *words(root)).returncode == 0
    assert kept(root) == first


def test_pictures_and_captions_met_in_the_wild_train(tmp_path, words, call):
    root = build(tmp_path / "data", train=8)
    turned = Image.Exif()
    turned[0x0112] = 6
    levels = np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50
    for number, content in enumerate((
        encoded(picture(0).convert("L"), "JPEG"),
        encoded(picture(1).convert("P"), "PNG"),
        encoded(picture(2).convert("CMYK"), "JPEG"),
        encoded(Image.new("RGBA", (40, 30), (0, 0, 0, 0)), "PNG"),
        encoded(Image.fromarray(levels), "PNG"),
        encoded(picture(5), "PNG", exif=turned),
        encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"),
        encoded(picture(7), "WEBP"),
    )):  # fmt: skip
        write(root / f"images/train/{number}.png", content)
    texts = [b"\xef\xbb\xbfa bird\r\n\r\nanother\r\n", b"caf\xe9 au lait", "a \U0001f426".encode(), b"word " * 500]
    for number, text in enumerate(texts):
        write(root / f"text/train/{number}.txt", text)
    result = call("prepare.py", *words(root), "--resize")
    assert result.returncode == 0, result.stderr
    assert row(result.stdout, "images") == ["8", "4"] and row(result.stdout, "problems") == ["0", "0"]
    captions = [item.captions for item in usable_items(loaded(words(root)), "train")]
    assert captions[:3] == [["a bird", "another"], ["caf\xe9 au lait"], ["a \U0001f426"]]
    expected = {  # at 19 pixels, by Pillow alone
        0: Image.open(root / "images/train/0.png"),
        2: Image.open(root / "images/train/2.png"),
        3: Image.new("RGB", (25, 19), "white"),
        4: Image.fromarray((levels / 257).round().astype(np.uint8)),
        5: picture(5).transpose(Image.Transpose.ROTATE_270),
        6: Image.new("RGB", (19, 19), (1, 2, 3)),
    }
    for number, image in expected.items():
        found = np.asarray(Image.open(root / f"cache/resized_19/train/{number}.bmp"), int)
        resized = image.convert("RGB").resize(found.shape[1::-1], Image.Resampling.BILINEAR)
        assert min(found.shape[:2]) == 19 and np.array_equal(found, np.asarray(resized))
    assert call("train.py", *words(root)).returncode == 0


def test_other_captions_and_changed_images_are_noticed(tmp_path, words, call):
    root = build(tmp_path / "data")
    assert call("prepare.py", *words(root), "--resize").returncode == 0
    before = set(kept(root))
    write(root / "text/train/3.txt", "something else\n")
    write(root / "images/train/4.png", encoded(picture(77, (22, 22)), "PNG"))
    result = call("prepare.py", *words(root), "--resize")
    assert row(result.stdout, "smallest image")[:3] == ["22", "x", "22"]
    assert len(set(kept(root)) - before) == 1  # embeddings of the other captions; images are done over in place
    copy = Image.open(root / "cache" / "resized_19" / "train" / "4.bmp")
    assert np.array_equal(copy, picture(77, (22, 22)).resize((19, 19), Image.Resampling.BILINEAR))


def test_copies_are_the_pixels_that_training_would_read(tmp_path, words, call):
    root = build(tmp_path / "data")
    settings = loaded(words(root))

    def seen() -> tuple[list, list]:
        items = usable_items(settings, "train")
        images = TrainingImages(items, 16, settings.data.enlarge, True, seed=0)
        return [item.image.suffix for item in items], [images[Draw(5, i, 0, 0)][0] for i in range(len(items))]

    originals = seen()
    assert call("prepare.py", *words(root), "--resize").returncode == 0
    copies = seen()
    assert set(originals[0]) == {".png"} and set(copies[0]) == {".bmp"}
    assert all(torch.equal(*pair) for pair in zip(originals[1], copies[1], strict=True))
    (root / "cache/resized_19/train/2.bmp").unlink()
    os.utime(root / "images/train/3.png", ns=(1, 1))  # the same picture all the same
    write(root / "images/train/4.png", encoded(picture(4), "PNG", compress_level=2))
    assert seen()[0] == [".bmp", ".bmp", ".png", ".bmp", ".png", ".bmp"]
    assert call("prepare.py", *words(root), "--resize").returncode == 0
    assert seen()[0] == [".bmp"] * 6


def test_padded_pictures_have_copies_and_statistics_of_their_own(tmp_path, words, call):
    root = build(tmp_path / "data")
    for number in range(3):  # where the middle is not the whole
        write(root / f"images/test/{number}.png", encoded(picture(number, (40, 20)), "PNG"))
    asked, padded = ("--resize", "eval.metrics=[fd_clip]"), "data.fit=pad"
    assert call("prepare.py", *words(root), *asked).returncode == 0
    before = set(kept(root))
    result = call("prepare.py", *words(root), *asked, padded)
    assert result.returncode == 0 and "anew" not in result.stdout
    made = {path.parent.name if path.suffix == ".bmp" else path.name for path in map(Path, set(kept(root)) - before)}
    statistics = [path.name for path in (root / "stats").iterdir()]
    assert sorted("_16_pad_" in name for name in statistics) == [False, True]
    assert len({bytes(dict(np.load(root / "stats" / name))["mu"]) for name in statistics}) == 2
    assert Image.open(root / "cache/resized_19_pad/train/2.bmp").size == (19, 19), made
    again = call("prepare.py", *words(root), *asked)
    assert "anew" not in again.stdout and len(list((root / "stats").iterdir())) == 2

    settings = loaded([*words(root), padded])
    items = usable_items(settings, "train")
    images = TrainingImages(items, 16, settings.data.enlarge, True, 0, settings.data.fit)
    with_copies = [images[Draw(5, number, 0, 0)][0] for number in range(len(items))]
    assert {item.image.parts[-3] for item in items} == {"resized_19_pad"}
    shutil.rmtree(root / "cache/resized_19_pad")
    images = TrainingImages(usable_items(settings, "train"), 16, settings.data.enlarge, True, 0, settings.data.fit)
    assert all(torch.equal(image, images[Draw(5, number, 0, 0)][0]) for number, image in enumerate(with_copies))


def test_statistics_and_captions_by_a_judge(tmp_path, words, judge_file, call):
    root = build(tmp_path / "data")
    judge = (f"eval.clip_weights={judge_file}", "eval.clip_activation=gelu", "eval.metrics=[fd_clip,clip_score]")
    prepared = call("prepare.py", *words(root), *judge)
    assert prepared.returncode == 0 and f"by {judge_file}" in prepared.stdout
    assert len(list((root / "cache").glob("captions_*.pt"))) == 3  # of both splits; of the test split by the judge
    before = kept(root)
    settings = loaded([*words(root), *judge])
    items = usable_items(settings, "test")
    Evaluator(Scorer(settings, clip_of(settings), items), items)
    assert kept(root) == before
    own = call("prepare.py", *words(root), "eval.metrics=[fd_clip,clip_score]")
    assert own.returncode == 0 and len(list((root / "stats").iterdir())) == 2


def score(result: subprocess.CompletedProcess) -> float:
    """The fd_clip in a printed table."""
    assert result.returncode == 0, result.stderr
    return float(next(line.split()[1] for line in result.stdout.splitlines() if line.startswith("fd_clip ")))


def swap_channels(root: Path) -> None:
    """Other pictures in place of all test pictures: uncompressed, so of the same size; and the same times."""
    for path in sorted((root / "images/test").iterdir()):
        before = path.stat()
        pixels = np.asarray(Image.open(path))
        Image.fromarray(np.ascontiguousarray(pixels[..., ::-1]) // 2).save(path, "BMP")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.fixture
def bitmaps(tmp_path) -> Path:
    """A folder data set whose pictures are uncompressed."""
    root = build(tmp_path / "data", test=8)
    for path in (root / "images").rglob("*.png"):
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    return root


@pytest.mark.parametrize("script", ["prepare.py", "train.py", "test.py"])
def test_statistics_follow_pictures_of_the_same_size_and_time(script, bitmaps, tmp_path, words, call):
    metric = ("eval.metrics=[fd_clip]",)
    shutil.copytree(bitmaps / "images/train", tmp_path / "some")
    scored = (*words(bitmaps, *metric), "--images", tmp_path / "some")
    first = score(call("test.py", *scored))
    assert score(call("test.py", *scored)) == first
    swap_channels(bitmaps)
    result = call(script, *(scored if script == "test.py" else words(bitmaps, *metric)))
    assert result.returncode == 0, result.stderr
    (path,) = (bitmaps / "stats").iterdir()
    assert f"{path}: of other pictures; measured anew" in result.stdout.splitlines()
    again = call("test.py", *scored)
    assert "measured anew" not in again.stdout
    path.unlink()
    fresh = score(call("test.py", *scored))
    assert score(again) == fresh and abs(fresh - first) > 0.1 * first


@pytest.fixture
def decoded(monkeypatch) -> list:
    """A list that grows with every picture that is decoded in this process."""
    found, decode = [], layouts.decode
    monkeypatch.setattr(layouts, "decode", lambda file: (found.append(file), decode(file))[1])
    return found


def test_touched_and_copied_pictures_are_hashed_and_not_decoded(tmp_path, words, call, decoded):
    root = build(tmp_path / "data")
    metric = ("eval.metrics=[fd_clip]",)
    assert call("prepare.py", *words(root, *metric), "--resize").returncode == 0
    assert len(decoded) == 10 + 6 + 4  # checked; resized; measured
    for path in (root / "images").rglob("*.png"):
        os.utime(path, ns=(5, 5))
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(root, elsewhere)
    for place in (root, elsewhere):
        result = call("prepare.py", *words(place, *metric), "--resize")
        assert result.returncode == 0 and "anew" not in result.stdout
        assert "checking train images: 6 in" in result.stdout and "resizing" not in result.stdout
        assert [item.image.suffix for item in usable_items(loaded(words(place)), "train")] == [".bmp"] * 6
    assert len(decoded) == 20


def test_copies_follow_pictures_of_the_same_size_and_time(tmp_path, words, call, bitmaps):
    assert call("prepare.py", *words(bitmaps), "--resize").returncode == 0
    write(bitmaps / "train.txt", "".join(f"test/{number}\n" for number in range(8)))
    assert call("prepare.py", *words(bitmaps), "--resize").returncode == 0
    swap_channels(bitmaps)
    result = call("train.py", *words(bitmaps))
    folder = bitmaps / "cache/resized_19"
    assert f"{folder}: 8 copies are of other pictures" in result.stdout
    assert {item.image.parent for item in usable_items(loaded(words(bitmaps)), "train")} == {bitmaps / "images/test"}
    assert call("prepare.py", *words(bitmaps), "--resize").returncode == 0
    for item in usable_items(loaded(words(bitmaps)), "train"):
        expected = Image.open(bitmaps / f"images/{item.key}.bmp").resize((25, 19), Image.Resampling.BILINEAR)
        assert item.image.parent == folder / "test" and np.array_equal(Image.open(item.image), expected)


def test_what_an_earlier_version_left_is_made_anew_by_name(tmp_path, words, call):
    root = build(tmp_path / "data")
    metric = ("eval.metrics=[fd_clip]",)
    assert call("prepare.py", *words(root, *metric), "--resize").returncode == 0
    (statistics,) = (root / "stats").iterdir()
    made = dict(np.load(statistics))
    np.savez(statistics, **{**made, "pictures": "0123456789abcdef", "mu": made["mu"] + 1})
    for split in SPLITS:  # as they were: key, [size, time], [width, height]
        paths = [root / f"images/{split}/{number}.png" for number in range({"train": 6, "test": 4}[split])]
        states = [[path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
        old = [[f"{split}/{path.stem}", state, [1, 1]] for path, state in zip(paths, states, strict=True)]
        write(root / f"cache/images_{split}.jsonl", "".join(json.dumps(line) + "\n" for line in old))
        if split == "train":
            done = "".join(json.dumps([*line[:2], True]) + "\n" for line in old)
            write(root / "cache/resized_19/done.jsonl", done)
    copies = root / "cache/resized_19"
    for number in range(6):
        Image.new("RGB", (25, 19)).save(copies / f"train/{number}.bmp")
    training = call("train.py", *words(root, *metric))
    assert training.returncode == 0, training.stderr
    said = training.stdout.splitlines()
    for split, count in (("train", 6), ("test", 4)):
        line = (
            f"{root}/cache/images_{split}.jsonl: {count} entries are of an earlier version of this program; made anew"
        )
        assert said.count(line) == 1
    assert f"{statistics}: of an earlier version, which went by the pictures' sizes; measured anew" in said
    assert any(line.startswith(f"{copies}: 6 copies are of other pictures, or of an earlier version") for line in said)
    assert np.array_equal(np.load(statistics)["mu"], made["mu"])
    result = call("prepare.py", *words(root, *metric), "--resize")
    assert f"{copies}/done.jsonl: 6 entries are of an earlier version of this program; made anew" in result.stdout
    assert row(result.stdout, "smallest image") == "40 x 30 40 x 30".split()
    expected = picture(3).resize((25, 19), Image.Resampling.BILINEAR)
    assert np.array_equal(Image.open(copies / "train/3.bmp"), expected)
    again = call("prepare.py", *words(root, *metric), "--resize")
    assert "anew" not in again.stdout and "checking" not in again.stdout and "resizing" not in again.stdout


def test_what_could_not_be_read_is_tried_again(tmp_path, words, call, monkeypatch):
    """A drive that was away, or a Pillow that could not decode the format then: the files have not changed."""
    root = build(tmp_path / "data")
    decode = layouts.decode

    def fails(file):
        raise OSError("no decoder")

    monkeypatch.setattr(layouts, "decode", fails)
    assert_refused(call("prepare.py", *words(root)), "6 of 6 train items cannot be used", "no decoder")
    monkeypatch.setattr(layouts, "decode", decode)
    result = call("prepare.py", *words(root))
    assert result.returncode == 0 and row(result.stdout, "problems") == ["0", "0"], result.stderr


def test_a_profile_of_no_use_is_told(tmp_path, words, call):
    root = build(tmp_path / "data")
    write(root / "images/train/2.png", encoded(picture(2), "PNG", icc_profile=b"no profile"))
    for script in ("prepare.py", "train.py"):
        result = call(script, *words(root))
        assert result.returncode == 0, result.stderr
        assert f"{root}/images/train/2.png: its colour profile cannot be used" in result.stdout


# Key -> what stands in its place, and the problem that this is.
BROKEN = {
    "cut": (lambda path: path.write_bytes(encoded(picture(0), "JPEG")[:500]), "undecodable image"),
    "text": (lambda path: path.write_text("<html>404</html>"), "undecodable image"),
    "zero": (lambda path: path.write_bytes(b""), "undecodable image"),
    "huge": (lambda path: Image.new("1", (12000, 12000)).save(path, "PNG"), "undecodable image"),
    "strip": (lambda path: Image.new("1", (1, 2000)).save(path, "PNG"), "undecodable image"),
    "gone": (Path.unlink, "missing image"),
}


def test_every_problem_is_listed_and_few_are_left_out(tmp_path, words, call):
    root = build(tmp_path / "data", train=700)
    keys = [f"train/{number}" for number in range(700)]
    for (damage, _), key in zip(BROKEN.values(), keys, strict=False):
        damage(root / "images" / f"{key}.png")
    write(root / "text/train/10.txt", "\ufeff\r\n \n")
    write(root / "train.txt", "\n".join([*keys, "train/20", "test/1"]))
    lonely = write(root / "text/train/lonely.txt", "a caption\n")
    result = call("prepare.py", *words(root))
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert f"captions without image  {lonely}: there is no image images/train/lonely.*" in lines
    for (_, kind), key in zip(BROKEN.values(), keys, strict=False):
        (line,) = (line for line in lines if f"images/{key}." in line)
        assert line.startswith(kind), line
    assert f"empty captions  {root}/text/train/10.txt: holds no caption" in lines
    assert sum(line.startswith("key twice") and "train/20" in line for line in lines) == 1
    assert sum(line.startswith("key in both splits") and "test/1" in line for line in lines) == 1
    assert row(result.stdout, "images") == ["694", "4"]
    assert row(result.stdout, "problems") == ["9", "1"]
    assert row(result.stdout, "  undecodable image") == ["5", "0"]


@pytest.mark.parametrize("script", ["prepare.py", "train.py"])
def test_more_than_one_in_a_hundred_stops(script, tmp_path, words, call):
    root = build(tmp_path / "data", train=150)
    for number in (3, 7):
        write(root / f"images/train/{number}.png", "no picture")
    result = call(script, *words(root))
    assert_refused(result, "2 of 150 train items cannot be used, more than 1%")
    for number in (3, 7):
        assert f"{root}/images/train/{number}.png: cannot be decoded" in result.stdout
    write(root / "images/train/7.png", encoded(picture(7), "PNG"))
    result = call(script, *words(root, "train.batch_size=74"))
    assert result.returncode == 0, result.stderr
    if script == "train.py":
        (warning,) = (line for line in result.stdout.splitlines() if line.startswith("warning"))
        assert "1 of 150 train items cannot be used and left out" in warning and f"{root}/images/train/3.png" in warning
        assert "149 training images, 2 steps an epoch" in result.stdout


def test_runs_are_the_same_whether_images_were_checked_before(tmp_path, words, call):
    """One undecodable image of 120; checked by training itself, by two workers, and known already."""
    root = build(tmp_path / "data", train=120)
    write(root / "images/train/50.png", b"")
    weights = []
    for more in ("data.num_workers=2", "data.num_workers=0"):
        result = call("train.py", *words(root, "train.batch_size=40", more, f"log.save_dir={tmp_path}/{more}"))
        assert result.returncode == 0 and "1 of 120 train items" in result.stdout, result.stderr
        (path,) = (tmp_path / more).rglob("state_epoch_001.pth")
        weights.append(checkpoint.read(path)["generator"])
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_interrupted_and_half_written(tmp_path, words, call):
    """What is known is not done again; a line or a row that a kill cut off is; half a copy is never read."""
    root = build(tmp_path / "data")
    assert call("prepare.py", *words(root), "--resize").returncode == 0
    whole = kept(root)
    journal = root / "cache/images_train.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 6
    journal.write_text("".join(lines[:3]) + lines[3][:20])
    copies = root / "cache/resized_19"
    (copies / "done.jsonl").write_text("".join((copies / "done.jsonl").read_text().splitlines(keepends=True)[:5]))
    (copies / "train/5.bmp").rename(copies / "train/5.bmp.1-ab.partial")
    (copies / "train/5.bmp.1-ab.partial").write_bytes(b"half")
    assert [item.image.suffix for item in usable_items(loaded(words(root)), "train")] == [".bmp"] * 5 + [".png"]
    for path in (root / "cache").glob("captions_*.pt"):
        sentences = checkpoint.read(path)["sentences"]
        path.with_suffix(".rows").write_bytes(sentences.numpy().tobytes()[:-7])
        path.unlink()
    assert call("prepare.py", *words(root), "--resize").returncode == 0
    again = kept(root)
    assert set(again) == {*whole, "cache/resized_19/train/5.bmp.1-ab.partial"}
    assert all(json.loads(line) for line in again["cache/images_train.jsonl"][0].splitlines()[-3:])
    for name, (content, _) in whole.items():
        if not name.endswith("images_train.jsonl"):
            assert again[name][0] == content, name


def loaded(words: list[str]) -> config.EasyDict:
    return config.load(words[0], words[1:])


def test_ctrl_c_loses_nothing(tmp_path, words):
    root = build(tmp_path / "data", train=800)
    command = [sys.executable, ROOT / "code" / "prepare.py", *words(root, "data.num_workers=1")]
    journal = root / "cache/images_train.jsonl"
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # jobs in the background ignore it
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **heard)
    while not journal.exists() or journal.stat().st_size < 5000:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and printed.strip().splitlines()[-1] == "interrupted"
    lines = journal.read_text().splitlines()
    assert len(lines) > 20 and all(json.loads(line)[2][2] == [40, 30] for line in lines)


def test_a_folder_that_cannot_be_written(tmp_path, words, call):
    root = build(tmp_path / "data")
    (root / "cache").write_text("in the way")
    assert_refused(call("prepare.py", *words(root)), str(root / "cache"), "cannot be written", "move away")


def test_keys_that_leave_the_folder_are_not_followed(tmp_path, words, call):
    root = build(tmp_path / "data")
    write(tmp_path / "out.png", encoded(picture(0), "PNG"))
    for split in SPLITS:
        keys = ["../../out", *(f"images/{split}/{number}" for number in range(4))]
        write(root / split / "filenames.pickle", pickle.dumps(keys))
    result = call("prepare.py", *words(root, "data.layout=flower"))
    assert "key outside" in result.stdout and "../../out" in result.stdout


class Trap:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_key_list_that_would_run_code_is_refused(tmp_path, words, call):
    root = build(tmp_path / "data")
    path = write(root / "train/filenames.pickle", pickle.dumps(["0", Trap()]))
    for script in ("prepare.py", "train.py"):
        assert_refused(call(script, *words(root, "data.layout=face")), str(path), "mkdir", "refused")
    assert not (ROOT / "executed").exists()


@pytest.mark.parametrize("layout", ["bird", "flower", "face", "coco", "folder"])
def test_pixels_and_captions_of_every_layout(layout, tmp_path, words, call):
    """What training reads of a key, against a few lines of Pillow on files laid out by hand."""
    root = tmp_path / "data"
    places = {
        "bird": ("CUB_200_2011/images/a.b/{}.jpg", "text/a.b/{}.txt", "a.b/{}"),
        "flower": ("images/{}.jpg", "text/{}.txt", "{}.jpg"),
        "face": ("images/{}.jpg", "text/{}.txt", "{}"),
        "coco": ("images/{subset}2014/jpg/{}.jpg", "text/{}.txt", "{}"),
        "folder": ("images/deep/{}.jpg", "text/deep/{}.txt", "deep/{}"),
    }
    boxes = [(0.0, 0.0, 15.0, 9.0), (30.5, 21.5, 9.5, 8.5), (35.0, 25.0, 12.0, 11.0), (12.0, 10.0, 10.0, 8.0)]
    image, text, key = places[layout]
    names, lines = [], []
    for number in range(8):
        split = "train" if number < 4 else "test"
        write(
            root / image.format(number, subset={"train": "train", "test": "val"}[split]),
            encoded(picture(number), "JPEG", quality=90),
        )
        write(root / text.format(number), f"caption {number}\n\nanother of {number}\n")
        names.append((split, key.format(number)))
        lines.append((f"{number} a.b/{number}.jpg", f"{number} {' '.join(map(str, boxes[number % 4]))}"))
    for split in SPLITS:
        keys = [name for own, name in names if own == split]
        write(root / f"{split}.txt", "\n".join(keys))
        write(root / split / "filenames.pickle", pickle.dumps([f" {name}\n" for name in keys]))
    for name, column in (("images.txt", 0), ("bounding_boxes.txt", 1)):
        write(root / "CUB_200_2011" / name, "\n".join(line[column] for line in lines))

    more = (f"data.layout={layout}", "data.enlarge=1.25")
    result = call("prepare.py", *words(root, *more), "--resize")
    assert result.returncode == 0, result.stderr
    assert row(result.stdout, "captions") == ["8", "8"] and row(result.stdout, "problems") == ["0", "0"]
    items = usable_items(loaded(words(root, *more)), "train")
    for number, item in enumerate(items):
        assert item.key == key.format(number)
        assert item.captions == [f"caption {number}", f"another of {number}"]
        original = Image.open(root / image.format(number, subset="train")).convert("RGB")
        if layout == "bird":
            x, y, w, h = map(int, boxes[number])
            r, cx, cy = int(0.75 * max(w, h)), int(x + w / 2), int(y + h / 2)
            original = original.crop((max(0, cx - r), max(0, cy - r), min(40, cx + r), min(30, cy + r)))
        scale = 20 / min(original.size)
        size = tuple(max(20, int(side * scale)) for side in original.size)
        expected = original.resize(size, Image.Resampling.BILINEAR)
        assert np.array_equal(Image.open(item.image), expected), item.key


def test_a_released_flat_configuration_trains(tmp_path, clip_file, call):
    """A birds.yml as published, at a size that the test can afford, with the folder where its program looked."""
    root = build(tmp_path / "data")
    flat = tmp_path / "birds.yml"
    flat.write_text(
        f"CONFIG_NAME: 'GALIP'\ndataset_name: 'folder'\ndata_dir: '{root}'\nimsize: 16\nz_dim: 100\ncond_dim: 512\n"
        "manual_seed: 100\ncuda: True\nclip4evl: {src: clip, type: ViT-B/32}\nclip4trn: {src: clip, type: ViT-B/32}\n"
        "clip4text: {src: clip, type: ViT-B/32}\nstamp: normal\nstate_epoch: 1\nmax_epoch: 1\nbatch_size: 4\n"
        "gpu_id: 0\nnf: 16\nch_size: 3\nscaler_min: 64\ngrowth_interval: 2000\nlr_g: 0.0001\nlr_d: 0.0004\nsim_w: 4.0\n"
        "gen_interval: 1\ntest_interval: 1\nsave_interval: 1\nsample_times: 1\nnpz_path: x.npz\nlog_dir: 'new'\n"
    )
    places = (f"log.dir={tmp_path}/logs", f"log.save_dir={tmp_path}/saved", f"clip.weights={clip_file}")
    result = call("train.py", flat, *places, "data.num_workers=0", "train.device=cpu", "model.d_channels=16",
                  "eval.metrics=[clip_score]")  # fmt: skip
    assert result.returncode == 0, result.stderr
    (line,) = (line for line in result.stdout.splitlines() if "released GALIP configuration" in line)
    for name in ("clip4evl", "stamp", "state_epoch", "gpu_id", "ch_size", "scaler_min", "log_dir"):
        assert name in line
    assert list((tmp_path / "saved" / "birds").glob("*/state_epoch_001.pth"))


SMALL = {
    "one picture": (1, {}, (), "the train split is empty; have 15 pictures or more"),
    "two pictures": (2, {}, (), "a step needs 2 training images or more, not 1"),
    "one to test with": (14, {}, (), "evaluation needs at least 2 test images", "have 15 pictures or more"),
    "one sample": (20, {}, ("eval.samples=1",), "eval.samples: 1"),
    "a batch that somebody set": (20, {}, ("train.batch_size=19",), "train.batch_size: 19 is larger than the 18"),
    "one caption for all": (20, dict.fromkeys(range(20), "a bird"), (), "no mismatch exists", "/images/0.png"),
    "a picture of every caption": (20, {4: "\n".join(f"picture {n}" for n in range(20))}, (), "images/4.png: no mism"),
}


@pytest.fixture
def few(tmp_path, clip_file):
    """few(count, captions, *more): the words for a set of so many pictures without lists; nobody sets a batch size."""

    def few(count: int, captions: dict[int, str], *more: str) -> list[str]:
        for number in range(count):
            write(tmp_path / f"data/images/{number}.png", encoded(picture(number), "PNG"))
            write(tmp_path / f"data/text/{number}.txt", captions.get(number, f"picture {number}"))
        mine = write(tmp_path / "mine.yml", f"data: {{layout: folder, dir: {tmp_path}/data}}\nmodel: {{imsize: 16}}\n")
        tiny = [word for word in TINY_RUN if "batch_size" not in word]
        places = (f"log.dir={tmp_path}/logs", f"log.save_dir={tmp_path}/saved", f"clip.weights={clip_file}")
        return [str(mine), *tiny, *places, "train.device=cpu", "eval.metrics=[fd_clip]", *more]

    return few


@pytest.mark.parametrize("what", SMALL)
def test_what_training_refuses_is_refused_before_it_in_the_same_words(what, few, call, tmp_path):
    count, captions, more, *parts = SMALL[what]
    words = few(count, captions, *more)
    for script in ("prepare.py", "train.py"):
        assert_refused(call(script, *words, "clip.weights=never-read.pt"), *parts)
        assert not list(tmp_path.rglob("captions_*"))  # nothing that takes long was begun
    assert call("prepare.py", *words).stderr == call("train.py", *words).stderr


def test_a_small_set_is_prepared_trained_sampled_and_scored_as_it_is(few, call, tmp_path):
    words = few(20, {})
    said = "train.batch_size: 18, of 18 training images; nobody set it"
    for script in ("prepare.py", "train.py"):
        result = call(script, *words)
        assert result.returncode == 0 and said in result.stdout.splitlines(), result.stderr
    (own,) = (tmp_path / "saved").rglob("config.yml")
    assert config.load(own).train.batch_size == 18  # and goes on with that, however many pictures there are then
    (state,) = own.parent.glob("state_epoch_001.pth")
    assert checkpoint.read(state)["config"]["train.batch_size"] == 18
    assert call("test.py", *words).returncode == 0
    drawn = call("sample.py", *words[:1], "a picture", *words[-5:-2], "--n", 1, "--out", tmp_path / "drawn")
    assert drawn.returncode == 0, drawn.stderr
    assert said not in call("train.py", *words, "train.batch_size=6").stdout
