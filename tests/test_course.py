"""What ends a run between two steps saves first; what fails within a step saves nothing; logs that fail end nothing."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY_RUN, assert_refused, run
from PIL import Image

from ratlip import checkpoint, course, stopping, trainer
from ratlip.data import loader
from ratlip.evaluation import Evaluator

EPOCHS = 2  # of three steps each


@pytest.fixture(scope="module")
def data(demo_folder, tmp_path_factory) -> Path:
    """The few pictures, to be broken and mended."""
    return shutil.copytree(demo_folder, tmp_path_factory.mktemp("own") / "few")


@pytest.fixture(scope="module")
def words(data, clip_file):
    """words(folder, *more) -> the command line of a small run that leaves its files below `folder`."""

    def words(folder: Path, *more: str) -> list[str]:
        places = (f"log.dir={folder}/logs", f"log.save_dir={folder}/saved", f"data.dir={data}")
        small = ("data.layout=folder", "model.imsize=16", "eval.metrics=[clip_score]", f"clip.weights={clip_file}")
        often = ("log.save_interval=1", "log.test_interval=1", "log.gen_interval=1", f"train.max_epoch={EPOCHS}")
        return ["cfg/demo.yml", *TINY_RUN, *places, *small, *often, *more]

    return words


@pytest.fixture(scope="module")
def undisturbed(words, tmp_path_factory):
    """undisturbed(folder): asserts that the run's weights are those of a run to which nothing happened."""
    whole = tmp_path_factory.mktemp("whole")
    result = run("train.py", *words(whole))
    assert result.returncode == 0, result.stderr
    expected = networks(whole)

    def undisturbed(folder: Path) -> None:
        found = networks(folder)
        assert all(torch.equal(found[name], value) for name, value in expected.items())

    return undisturbed


@pytest.fixture
def after(monkeypatch):
    """after(step, happen): calls `happen()` when the networks have made so many steps."""

    def after(number: int, happen) -> None:
        real = trainer.train_step

        def step(t, batch):
            values = real(t, batch)
            if t.step == number:
                happen()
            return values

        monkeypatch.setattr(trainer, "train_step", step)

    return after


def states(folder: Path) -> list[str]:
    """Names of the checkpoints of the one run below a folder."""
    return sorted(path.name for path in folder.glob("saved/demo/*/state*"))


def networks(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight at the end of the run."""
    (path,) = folder.glob(f"saved/demo/*/state_epoch_{EPOCHS:03}.pth")
    state = checkpoint.read(path)
    return {f"{n}.{k}": v for n in ("generator", "discriminator", "ema") for k, v in state[n].items()}


def test_a_hangup_saves_and_the_run_goes_on(call, words, after, undisturbed, tmp_path):
    after(4, lambda: os.kill(os.getpid(), signal.SIGHUP))
    result = call("train.py", *words(tmp_path))
    assert result.returncode == 0 and "stopped by SIGHUP and saved" in result.stdout
    assert states(tmp_path) == ["state_epoch_001.pth", "state_epoch_001_step_00000004.pth"]
    assert call("train.py", *words(tmp_path), "train.resume=auto").returncode == 0
    undisturbed(tmp_path)


def test_an_ignored_hangup_ends_nothing(call, words, after, tmp_path):
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        after(1, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert call("train.py", *words(tmp_path, "train.max_epoch=1")).returncode == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)
    assert states(tmp_path) == ["state_epoch_001.pth"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_has_gone_ends_the_run_saved(
    call, words, after, data, undisturbed, tmp_path, monkeypatch, workers
):
    monkeypatch.setattr(loader, "PAUSES", (0.01, 0.01))
    images = data / "images"
    after(3, lambda: images.rename(data / "away"))
    result = call("train.py", *words(tmp_path), f"data.num_workers={workers}", "log.gen_interval=9")
    (data / "away").rename(images)
    assert_refused(result, "cannot be decoded", "saved as", "_step_00000003.pth", "go on with: bash scripts/resume.sh")
    assert call("train.py", *words(tmp_path), "train.resume=auto").returncode == 0
    undisturbed(tmp_path)


def test_a_drive_that_comes_back_changes_nothing(call, words, after, data, undisturbed, tmp_path):
    images = data / "images"

    def away() -> None:
        images.rename(data / "away")
        threading.Timer(0.2, (data / "away").rename, [images]).start()

    after(4, away)
    assert call("train.py", *words(tmp_path)).returncode == 0
    assert images.is_dir()
    undisturbed(tmp_path)


def test_a_loader_process_that_is_killed_ends_the_run_saved(call, words, after, tmp_path):
    after(1, lambda: multiprocessing.active_children()[0].kill())
    result = call("train.py", *words(tmp_path, "data.num_workers=1", "train.max_epoch=9"))
    assert_refused(result, "a process that loads images was killed", "lower data.num_workers", "saved as")
    assert len(states(tmp_path)) >= 1 and not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_ends_the_wait_for_a_picture(call, words, after, data, tmp_path, workers):
    """A pipe in the place of each picture, which blocks whoever opens it."""
    images, pictures = data / "images", sorted(path.relative_to(data) for path in data.glob("images/train/*.png"))

    def block() -> None:
        images.rename(data / "away")
        for path in pictures:
            (data / path).parent.mkdir(parents=True, exist_ok=True)
            os.mkfifo(data / path)
        threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGTERM]).start()

    after(3, block)
    result = call("train.py", *words(tmp_path), f"data.num_workers={workers}", "log.gen_interval=9")
    shutil.rmtree(images)
    (data / "away").rename(images)
    assert result.returncode == 0 and "stopped by SIGTERM and saved" in result.stdout
    assert states(tmp_path)[-1].startswith("state_epoch_001_step_0000000")
    assert not multiprocessing.active_children()


def test_the_wait_for_a_picture_has_an_end(monkeypatch):
    monkeypatch.setattr(stopping, "LONGEST", 1)
    stop = stopping.Stop()

    def never():
        yield 1
        time.sleep(60)

    try:
        with pytest.raises(stopping.UserError, match="no picture came"):
            list(stop.arriving(never()))
    finally:
        stop.close()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "lower eval.batch_size, then"),
        (ValueError("of a metric"), None),
    ],
)
def test_an_evaluation_that_fails_ends_the_run_saved(
    call, words, undisturbed, tmp_path, monkeypatch, capfd, error, said
):
    real, calls = Evaluator.__call__, []

    def evaluate(self, generator):
        calls.append(generator)
        if len(calls) == 2:
            raise error
        return real(self, generator)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "__call__", evaluate)
        if said:
            assert_refused(call("train.py", *words(tmp_path)), said, "saved as", "_step_00000003.pth")
        else:
            with pytest.raises(ValueError, match="of a metric"):
                call("train.py", *words(tmp_path))
            assert "_step_00000003.pth; go on with: bash scripts/resume.sh" in capfd.readouterr().out
    assert call("train.py", *words(tmp_path), "train.resume=auto").returncode == 0
    undisturbed(tmp_path)


def test_a_grid_that_fails_ends_the_run_saved(call, words, tmp_path, monkeypatch):
    real = course.sample_grid

    def grid(t, evaluator):
        if t.step:
            raise MemoryError
        return real(t, evaluator)

    monkeypatch.setattr(course, "sample_grid", grid)
    assert_refused(call("train.py", *words(tmp_path)), "the memory is full", "saved as", "_step_00000003.pth")


def test_a_step_that_fails_saves_nothing(call, words, undisturbed, tmp_path, monkeypatch):
    """Out of memory when the generator has moved, and its average has not."""
    real, calls = trainer.update_ema, itertools.count(1)

    def fail(*arguments):
        if next(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "update_ema", fail)
        result = call("train.py", *words(tmp_path))
    assert_refused(result, "lower train.batch_size, then", "newest checkpoint is", "state_epoch_001.pth", "go on with:")
    assert states(tmp_path) == ["state_epoch_001.pth"]
    assert call("train.py", *words(tmp_path), "train.resume=auto").returncode == 0
    undisturbed(tmp_path)


def test_a_checkpoint_that_cannot_be_written_is_tried_again(call, words, after, undisturbed, tmp_path):
    """Not at the interval, and only the next epoch's: what stands in the way is the file's own name."""

    def block() -> None:
        (folder,) = tmp_path.glob("saved/demo/*")
        (folder / "state_epoch_002.pth.partial").mkdir()

    after(2, block)
    more = ("train.max_epoch=4", "log.save_interval=2", "train.keep=9")
    result = call("train.py", *words(tmp_path), *more)
    assert result.returncode == 0 and result.stdout.count("warning: could not write") == 1
    assert states(tmp_path) == ["state_epoch_002.pth.partial", "state_epoch_003.pth", "state_epoch_004.pth"]


def folder_gone(logs: Path) -> None:
    shutil.rmtree(logs)


def file_in_place(logs: Path) -> None:
    shutil.rmtree(logs)
    logs.write_text("no folder")


def folders_in_place(logs: Path) -> None:
    for path in [*logs.glob("events*"), *logs.glob("*.jsonl")]:
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("happen", [folder_gone, file_in_place, folders_in_place])
def test_logs_that_cannot_be_written_end_nothing(call, words, after, undisturbed, tmp_path, happen):
    after(2, lambda: happen(*tmp_path.glob("logs/demo/*")))
    result = call("train.py", *words(tmp_path))
    assert result.returncode == 0, result.stderr
    undisturbed(tmp_path)
    (logs,) = tmp_path.glob("logs/demo/*")
    if happen is folder_gone:  # what comes after is logged again
        assert not result.stderr and Image.open(logs / "grids/epoch_0002.png").width
        assert [json.loads(line)["epoch"] for line in open(logs / "metrics.jsonl")] == [1, 2]
    else:
        assert result.stderr.count("cannot be written") == 1 and str(logs) in result.stderr


def test_a_run_whose_output_nobody_reads_comes_to_its_end(words, tmp_path):
    command = [sys.executable, str(ROOT / "code/train.py"), *words(tmp_path, "train.max_epoch=1")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()  # as `| head` does
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0 and "Traceback" not in errors and "stdout cannot be written" in errors
    assert states(tmp_path) == ["state_epoch_001.pth"]
