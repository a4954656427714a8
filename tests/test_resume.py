"""Runs that are interrupted and go on: the same bits, scores and curves as a run that was not."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY_RUN, assert_refused, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ratlip import checkpoint

EPOCHS = 4  # of three steps each


@pytest.fixture
def words(demo_folder, clip_file):
    """words(folder, *more) -> the command line of a small run that leaves its files below `folder`."""

    def words(folder: Path, *more: str) -> list[str]:
        places = (f"log.dir={folder}/logs", f"log.save_dir={folder}/saved", f"data.dir={demo_folder}")
        small = ("data.layout=folder", "model.imsize=16", "eval.metrics=[clip_score]", f"clip.weights={clip_file}")
        often = ("log.save_interval=1", "log.test_interval=1", f"train.max_epoch={EPOCHS}", "train.keep=9")
        return ["cfg/demo.yml", *TINY_RUN, *places, *small, *often, *more]

    return words


@pytest.fixture(scope="module")
def whole(tmp_path_factory, demo_folder, clip_file):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    places = (f"log.dir={folder}/logs", f"log.save_dir={folder}/saved", f"data.dir={demo_folder}")
    small = ("data.layout=folder", "model.imsize=16", "eval.metrics=[clip_score]", f"clip.weights={clip_file}")
    often = ("log.save_interval=1", "log.test_interval=1", f"train.max_epoch={EPOCHS}", "train.keep=9")
    result = run("train.py", "cfg/demo.yml", *TINY_RUN, *places, *small, *often)
    assert result.returncode == 0, result.stderr
    return folder


def only(folder: Path, kind: str) -> Path:
    """The one run's folder below logs or saved."""
    (found,) = (folder / kind / "demo").iterdir()
    return found


def last_state(folder: Path) -> dict:
    return checkpoint.read(only(folder, "saved") / f"state_epoch_{EPOCHS:03}.pth")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's curves as it shows them, without those of time and memory."""
    events = EventAccumulator(str(only(folder, "logs")), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if "second" not in tag and "memory" not in tag]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (only(folder, "logs") / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def assert_same(one: object, other: object, place: str = "") -> None:
    """Equal to the last bit, tensors included; not the settings that say how often, times, and whose it is."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            if "second" not in str(key) and key not in ("config", "run", "saved"):
                assert_same(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), place
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{place}.{i}")
    else:
        assert one == other, place


def assert_undisturbed(folder: Path, whole: Path) -> None:
    assert_same(last_state(folder), last_state(whole))
    assert metrics(folder) == metrics(whole)
    assert scalars(folder) == scalars(whole)
    assert not list(folder.rglob("*.partial"))


def test_two_epochs_and_two_more_equal_four(words, whole, tmp_path):
    # As if the run had been killed after two, with the logs of more already there.
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    saved = only(tmp_path, "saved")
    for epoch in (3, 4):
        (saved / f"state_epoch_{epoch:03}.pth").unlink()
    result = run("train.py", *words(tmp_path), "train.resume=auto")
    assert result.returncode == 0, result.stderr
    assert "going on from" in result.stdout and "(epoch 2, step 6)" in result.stdout
    assert_undisturbed(tmp_path, whole)
    # Another time there is nothing left to do.
    again = run("train.py", *words(tmp_path), "train.resume=auto")
    assert again.returncode == 0 and f"nothing left to train: {EPOCHS} epochs are done" in again.stdout
    assert_undisturbed(tmp_path, whole)


def start(words: list[str], **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "code")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "code/train.py"), *words], cwd=ROOT, env=environment, **pipes, **options
    )


def wait_for(folder: Path, pattern: str, process: subprocess.Popen) -> None:
    """Until a file is there; fails when the process has ended without it."""
    for _ in range(3000):
        if list(folder.glob(pattern)):
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    raise AssertionError(f"no {pattern} after a minute")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_save_and_leave(words, whole, tmp_path, number):
    process = start(words(tmp_path))
    wait_for(tmp_path, "saved/demo/*/state_epoch_001.pth", process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert f"stopped by {number.name} and saved" in output
    printed = re.search(r"bash scripts/resume.sh (.+)\n", output)[1]
    assert printed == str(only(tmp_path, "saved"))  # needs no word of the first command
    result = run("train.py", printed, "train.resume=auto")
    assert result.returncode == 0, result.stderr
    assert_same(last_state(tmp_path), last_state(whole))
    assert metrics(tmp_path) == metrics(whole)


def test_the_time_limit_stops_in_the_middle_of_an_epoch(words, whole, tmp_path):
    limited = run("train.py", *words(tmp_path), "train.max_hours=1e-9")
    assert limited.returncode == 0, limited.stderr
    assert "stopped by train.max_hours" in limited.stdout
    assert [path.name for path in only(tmp_path, "saved").glob("state*")] == ["state_epoch_000_step_00000001.pth"]
    assert run("train.py", *words(tmp_path), "train.resume=auto").returncode == 0
    assert_undisturbed(tmp_path, whole)


def test_kills_at_any_moment(words, whole, tmp_path):
    """Killed twenty times, also in the midst of saving; each time all that was saved can be loaded, and a run that
    comes to its end is as if nothing had happened. Then another begins."""
    rng = random.Random(0)
    kills, runs, reached = 0, 0, -1
    while kills < 20:
        folder = tmp_path / str(runs)
        process = start([*words(folder), "train.resume=auto"])
        time.sleep(rng.uniform(1, 7))
        done = process.poll() is not None
        process.kill()
        _, errors = process.communicate()
        if done:
            assert process.returncode == 0, errors
            assert_same(last_state(folder), last_state(whole))
            assert metrics(folder) == metrics(whole)
            runs, reached = runs + 1, -1
            continue
        kills += 1
        states = [checkpoint.read(path) for path in (folder / "saved").rglob("*.pth")]
        best = max((state["step"] for state in states), default=-1)
        assert best >= reached
        reached = best
    folder = tmp_path / str(runs)
    result = run("train.py", *words(folder), "train.resume=auto")
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert_same(last_state(folder), last_state(whole))
    assert metrics(folder) == metrics(whole)


def test_unreadable_newest_checkpoint_is_named_and_skipped(words, whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    saved = only(tmp_path, "saved")
    newest = saved / f"state_epoch_{EPOCHS:03}.pth"
    broken = newest.read_bytes()[:5000]
    newest.write_bytes(broken)
    others = sorted(saved.glob("state*"))[:-1]
    result = run("train.py", *words(tmp_path), "train.resume=auto", f"train.max_epoch={EPOCHS}")
    assert result.returncode == 0, result.stderr
    assert f"{newest.name} is no checkpoint, or is cut short" in result.stdout and "epoch 3, step 9" in result.stdout
    assert_undisturbed(tmp_path, whole)
    for path in [newest, *others]:
        path.write_bytes(b"")
    assert_refused(run("train.py", *words(tmp_path), "train.resume=auto"), "none of the 4 checkpoints in")


def test_resuming_picks_an_epoch_and_checks_the_configuration(words, whole, tmp_path):
    kept = [word for word in words(whole) if "max_epoch" not in word]
    saved = only(whole, "saved")
    assert_refused(run("train.py", *kept, "state_epoch=7"), "no checkpoint of epoch 7", "[1, 2, 3, 4]")
    for word in ("model.nf=32", "model.z_dim=8", "clip.preprocess=released"):
        key, value = word.split("=")
        assert_refused(run("train.py", *kept, "train.resume=auto", word), f"{key} is {value}", "begin a new run")
    assert_refused(run("train.py", *kept, "train.resume=auto", "train.batch_size=6"), "2 steps now", "had 3")
    # From a file: a new run. Harmless changes are shown.
    path = saved / "state_epoch_002.pth"
    result = run("train.py", *words(tmp_path), f"train.resume={path}", "train.lr_g=0", "train.max_epoch=1")
    assert result.returncode == 0, result.stderr
    assert "train.lr_g: 0.0001 -> 0.0" in result.stdout and "train.max_epoch: 4 -> 1" in result.stdout
    state = checkpoint.read(only(tmp_path, "saved") / "state_epoch_001.pth")
    assert state["step"] == 3
    assert_same(
        {"to_rgb": state["generator"]["to_rgb.weight"]}, {"to_rgb": checkpoint.read(path)["generator"]["to_rgb.weight"]}
    )
    path = tmp_path / "other.pth"
    torch.save({"model": {}}, path)
    assert_refused(run("train.py", *words(tmp_path), f"train.resume={path}"), "other.pth is not a checkpoint of this")


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_path_and_an_earlier_epoch_begin_new_runs_and_touch_nothing_of_the_old(words, whole, tmp_path, call):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    old, before = only(tmp_path, "saved"), content(tmp_path)
    result = call("train.py", *words(tmp_path), f"train.resume={old}/state_epoch_003.pth", "train.max_hours=1e-9")
    assert result.returncode == 0, result.stderr
    (other,) = set(old.parent.iterdir()) - {old}
    (state,) = other.glob("state*.pth")
    assert checkpoint.read(state)["step"] == 1
    for kind in ("saved", "logs"):
        shutil.rmtree(tmp_path / kind / "demo" / other.name)
    # Back to an epoch: what follows is what the old run had, in a folder of its own.
    result = call("train.py", *words(tmp_path), "state_epoch=2", "train.max_hours=1e-9")
    assert result.returncode == 0, result.stderr
    assert f"{old} has gone further than epoch 2 and stays as it is: a new run begins there" in result.stdout
    (new,) = set(old.parent.iterdir()) - {old}
    record = json.loads((new / "run.json").read_text())
    assert (record["origin"]["epoch"], record["origin"]["run"]) == (2, json.loads(before_record(before))["id"])
    result = call("train.py", new, "train.resume=auto")
    assert result.returncode == 0 and "(epoch 2, step 7)" in result.stdout, result.stderr
    assert_same(checkpoint.read(new / f"state_epoch_{EPOCHS:03}.pth"), last_state(whole))
    lines = (tmp_path / "logs" / "demo" / new.name / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [3, 4]
    after = content(tmp_path)
    assert {name: after[name] for name in before} == before
    # The furthest goes on in its own run.
    result = call("train.py", old, f"state_epoch={EPOCHS}", f"train.max_epoch={EPOCHS + 1}")
    assert result.returncode == 0 and (old / f"state_epoch_{EPOCHS + 1:03}.pth").is_file(), result.stderr
    assert len(list(old.parent.iterdir())) == 2


def before_record(files: dict[str, bytes]) -> bytes:
    """run.json of the one run among these files."""
    return next(text for name, text in files.items() if name.startswith("saved") and name.endswith("run.json"))


def test_a_process_that_torchrun_starts_again_goes_on(words, whole, tmp_path):
    """With the run that it began, whatever the command line began that with, and no other."""
    start_of = {"TORCHELASTIC_RUN_ID": "mine", "TORCHELASTIC_RESTART_COUNT": "0"}
    path = only(whole, "saved") / "state_epoch_001.pth"
    begun = [*words(tmp_path), f"train.resume={path}"]
    assert run("train.py", *begun, "train.max_hours=1e-9", environment=start_of).returncode == 0
    mine = only(tmp_path, "saved")
    shutil.copytree(only(whole, "saved"), mine.with_name("newer"))  # saved later, by another start
    record = json.loads((mine.with_name("newer") / "run.json").read_text()) | {"launched": time.time()}
    (mine.with_name("newer") / "run.json").write_text(json.dumps(record))
    again = {**start_of, "TORCHELASTIC_RESTART_COUNT": "1"}
    for start, what in ((again, f"going on from {mine}"), ({**again, "TORCHELASTIC_RUN_ID": "b"}, f"from {path}")):
        result = run("train.py", *begun, "train.max_hours=1e-9", environment=start)
        assert result.returncode == 0 and what in result.stdout, result.stdout + result.stderr
    assert checkpoint.newest_first(mine)[0].name == "state_epoch_000_step_00000002.pth"


def test_precision_and_momentum_may_change(words, whole, tmp_path):
    """The fp16 scaler begins anew where there was none; Adam's betas are those of the configuration."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (only(tmp_path, "saved") / f"state_epoch_{EPOCHS:03}.pth").unlink()
    changes = ("train.precision=fp16", "train.beta1=0.25", "train.beta2=0.95")
    result = run("train.py", *words(tmp_path), "train.resume=auto", *changes)
    assert result.returncode == 0, result.stderr
    assert "train.precision: fp32 -> fp16" in result.stdout and "train.beta1: 0.0 -> 0.25" in result.stdout
    state = last_state(tmp_path)
    assert state["step"] == 12 and state["scaler"]
    for optimizer in state["optimizers"].values():
        assert optimizer["param_groups"][0]["betas"] == (0.25, 0.95)


def test_only_the_newest_checkpoints_are_kept(words, tmp_path):
    assert run("train.py", *words(tmp_path), "train.keep=2").returncode == 0
    names = {path.name for path in only(tmp_path, "saved").iterdir()}
    assert names - {"best.pth"} == {"config.yml", "run.json", "state_epoch_003.pth", "state_epoch_004.pth"}


def test_full_disk(words, whole, tmp_path):
    """No file may grow beyond a limit, which a checkpoint passes: as on a full disk, the write fails half way."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    saved = only(tmp_path, "saved")
    (saved / f"state_epoch_{EPOCHS:03}.pth").unlink()
    before = {path.name: path.read_bytes() for path in saved.glob("*.pth")}
    process = start([*words(tmp_path), "train.resume=auto"], preexec_fn=limit)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "could not write" in errors and "earlier files are untouched" in errors
    assert {path.name: path.read_bytes() for path in saved.glob("*.pth*")} == before
