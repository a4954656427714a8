"""Whose a checkpoint is: what is newest, unique names, experiments by their file, named runs, one writer at a time."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from helpers import TINY_RUN, assert_refused

from ratlip import checkpoint, config, runs, sampling
from ratlip import lease as leases
from ratlip.errors import UserError
from ratlip.lease import Lease


@pytest.fixture(scope="session")
def settings(demo_folder, clip_file) -> dict:
    """The file of a small experiment, but for its places."""
    words = dict(word.split("=") for word in TINY_RUN)
    words |= {"data.layout": "folder", "data.dir": str(demo_folder), "data.flip": "false", "model.imsize": "16"}
    words |= {"model.z_dim": "16", "eval.metrics": "[clip_score]", "clip.weights": str(clip_file)}
    words |= {"train.max_epoch": "3", "log.save_interval": "1", "log.test_interval": "1"}
    return {key: yaml.safe_load(value) for key, value in words.items()}


@pytest.fixture
def write(settings, tmp_path):
    """write(name, **changes) -> an experiment's file below tmp_path, which leaves its runs below tmp_path too."""

    def write(name: str, **changes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        places = {"log.dir": f"{tmp_path}/logs", "log.save_dir": f"{tmp_path}/saved"}
        path.write_text(yaml.safe_dump(config.unflatten({**settings, **places, **changes})))
        return path

    return write


@pytest.fixture
def train(call):
    """train(*words) -> what it printed; and the run's folder, where it is one that this call began or went on with."""

    def train(*words) -> tuple[str, Path]:
        result = call("train.py", *words)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout, Path(re.search(r"^checkpoints +(.+)$", result.stdout, re.MULTILINE)[1])

    return train


STOP = "train.max_hours=1e-9"  # after a step


def copy_in_wrong_order(source: Path, target: Path) -> Path:
    """A copy whose file times say the contrary of what was."""
    shutil.copytree(source, target)
    files = sorted((path for path in target.rglob("*") if path.is_file()), reverse=True)
    for number, path in enumerate(files):
        os.utime(path, (1_000_000_000 + number, 1_000_000_000 + number))
    return target


def test_copies_with_new_times_change_nothing_of_what_is_newest(write, train, call, tmp_path):
    """In a run by epoch and step, among runs by when they last saved: sampling, testing, resuming and keeping."""
    cfg = write("x.yml")
    _, first = train(cfg)
    _, second = train(cfg, "train.seed=2", STOP)
    time.sleep(0.01)
    train(first, "train.resume=auto", "train.max_epoch=4")  # begun before the second, saved after it
    saved = copy_in_wrong_order(tmp_path / "saved", tmp_path / "copy" / "saved")
    words = (cfg, f"log.save_dir={saved}", f"log.dir={tmp_path}/copy/logs")
    newest = saved / "x" / first.name / "state_epoch_004.pth"
    sampled = call("sample.py", *words, "a red bird", "--n", 1, "--out", tmp_path / "out")
    assert f"{newest}: ratlip, epoch 4" in sampled.stdout, sampled.stderr
    assert f"{newest}: ratlip, epoch 4" in call("test.py", *words).stdout
    output, folder = train(*words, "train.resume=auto", "train.max_epoch=5", "train.keep=2")
    assert f"going on from {newest} (epoch 4, step 12)" in output and folder == newest.parent
    assert sorted(path.name for path in folder.glob("state*")) == ["state_epoch_004.pth", "state_epoch_005.pth"]
    # A word that is true of the other run means that.
    again = call("sample.py", *words, "train.seed=2", "a red bird", "--n", 1, "--out", tmp_path / "out")
    assert f"{saved}/x/{second.name}/state_epoch_000_step_00000001.pth" in again.stdout


def test_broken_and_foreign_checkpoints_are_passed_over_and_never_deleted(write, train, call, tmp_path):
    cfg = write("x.yml")
    _, folder = train(cfg, "train.max_epoch=2")
    _, other = train(write("y.yml", **{"train.seed": 5}))
    (folder / "state_epoch_007.pth").write_bytes((folder / "state_epoch_002.pth").read_bytes()[:9000])
    shutil.copy(other / "state_epoch_003.pth", folder / "state_epoch_009.pth")
    sampled = call("sample.py", cfg, "a red bird", "--n", 1, "--out", tmp_path / "out")
    assert f"{folder}/state_epoch_002.pth" in sampled.stdout, sampled.stderr
    assert f"{folder}/state_epoch_009.pth belongs to another run; left alone" in sampled.stdout
    assert "state_epoch_007.pth is no checkpoint, or is cut short" in sampled.stdout
    output, _ = train(folder, "train.resume=auto", "train.max_epoch=3", "train.keep=1")
    assert f"going on from {folder}/state_epoch_002.pth" in output
    names = {path.name for path in folder.glob("state*")}
    assert names == {"state_epoch_003.pth", "state_epoch_007.pth", "state_epoch_009.pth"}


def test_runs_of_one_second_have_names_of_their_own(write, train, monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "TIME", "2026-01-02_03-04-05")  # the same for all
    cfg = write("x.yml")
    folders = [train(cfg, f"train.seed={seed}", STOP)[1] for seed in (1, 2)]
    (tmp_path / "logs/x/2026-01-02_03-04-05_3").mkdir()  # logs whose run was deleted: that name is not free
    folders.append(train(cfg, "train.seed=3", STOP)[1])
    assert [folder.name.removeprefix("2026-01-02_03-04-05") for folder in folders] == ["", "_2", "_4"]
    for seed, folder in enumerate(folders, 1):
        assert config.load(folder).train.seed == seed
        assert len((tmp_path / "logs/x" / folder.name / "metrics.jsonl").read_text().splitlines()) == 1
    with ThreadPoolExecutor(8) as pool:  # test.sh's folders, made at once
        made = list(pool.map(lambda _: runs.new_folder(tmp_path / "tests", "test_now"), range(8)))
    assert len({*made}) == 8 == len(list((tmp_path / "tests").iterdir()))


def test_an_experiment_is_its_file(write, train, call, tmp_path):
    """Two files of one stem are two experiments; and each is found again when it is edited, moved, renamed, copied."""
    cats, dogs = write("cats/config.yml"), write("dogs/config.yml", **{"data.enlarge": 1.5})
    _, folder = train(cats, "train.seed=7", STOP)
    sample = ("a red bird", "--n", 1, "--out", tmp_path / "out")
    nothing = call("sample.py", dogs, *sample)
    assert_refused(nothing, f"nothing has been trained with {dogs}", f"bash scripts/train.sh {dogs}")
    assert f"{folder} is of {cats} (to use it all the same: bash scripts/sample.sh {folder})" in nothing.stderr
    assert_refused(call("test.py", dogs), "nothing has been trained")
    output, of_dogs = train(dogs, "train.resume=auto", STOP)
    assert "beginning a run" in output and of_dogs != folder
    found = f"{folder}/state_epoch_000_step_00000001.pth"
    assert found in call("sample.py", cats, *sample).stdout
    moved = tmp_path / "elsewhere" / "felines.yml"
    moved.parent.mkdir()
    shutil.copy(cats, moved)
    assert found in call("sample.py", moved, *sample).stdout  # copied
    cats.unlink()
    assert found in call("sample.py", moved, *sample).stdout  # moved and renamed
    # Going on by the moved file; then an edit has its effect, what was never said again stays, and it is found still.
    train(moved, "train.resume=auto", STOP)
    moved.write_text(moved.read_text().replace("max_epoch: 3", "max_epoch: 1"))
    output, same = train(moved, "train.resume=auto")
    assert same == folder and "train.max_epoch: 3 -> 1" in output and "train.seed" not in output
    assert checkpoint.read(folder / "state_epoch_001.pth")["config"]["train.seed"] == 7
    assert f"{folder}/state_epoch_001.pth" in call("sample.py", moved, *sample).stdout


def test_a_run_is_named_by_a_word_or_its_folder(write, train, call, tmp_path):
    cfg = write("x.yml")
    _, first = train(cfg, "run=first", "train.seed=3", STOP)
    _, second = train(cfg, "train.seed=4", STOP)
    assert first == tmp_path / "saved/x/first" and (tmp_path / "logs/x/first").is_dir()
    assert_refused(call("train.py", cfg, "run=first"), f"{first} is there already", "resume.sh goes on with it")
    assert_refused(call("train.py", cfg, "run=a/b"), "run=a/b")
    assert_refused(call("train.py", cfg, "run="), "expected the name of a run")
    sample = ("a red bird", "--n", 1, "--out", tmp_path / "out")
    for words in ((cfg, "run=first"), (first,), (first / "config.yml",), (cfg, f"run={first}")):
        assert f"{first}/state_epoch_00" in call("sample.py", *words, *sample).stdout, words
        assert f"{first}/state_epoch_00" in call("test.py", *words).stdout, words
        output, folder = train(*words, "train.resume=auto", STOP)
        assert folder == first and f"going on from {first}/" in output and "warning" not in output
    assert checkpoint.heads(first)[0].step == 5 and checkpoint.heads(second)[0].step == 1
    unknown = call("sample.py", cfg, "run=third", *sample)
    assert_refused(unknown, "run=third: no such run", "first", second.name)
    assert_refused(call("train.py", cfg, "run=third", "train.resume=auto"), "run=third: no such run")
    assert_refused(call("sample.py", cfg, f"run={tmp_path}/out", *sample), "no run's folder")
    assert_refused(call("train.py", cfg, f"train.resume={first}"), f"bash scripts/resume.sh {first}")


def test_words_that_named_the_clip_need_no_repeating(write, train, call, settings, tmp_path):
    cfg = write("x.yml")
    stated = config.flatten(yaml.safe_load(cfg.read_text()))
    weights = stated.pop("clip.weights")
    cfg.write_text(yaml.safe_dump(config.unflatten({key: v for key, v in stated.items() if key != "clip.activation"})))
    train(cfg, f"clip.weights={weights}", "run=first", STOP)
    for number, words in enumerate(((cfg,), (cfg, "run=first"))):
        result = call("sample.py", *words, "a red bird", "--n", 1, "--out", tmp_path / f"out{number}")
        assert result.returncode == 0, result.stderr
    elsewhere = call("sample.py", cfg, "clip.weights=nowhere.pt", "a red bird")
    assert_refused(elsewhere, "nowhere.pt")


def test_the_printed_command_goes_on_with_that_run_and_its_seed(write, train):
    cfg = write("x.yml")
    output, first = train(cfg, "train.seed=3", STOP)
    _, second = train(cfg, "train.seed=4", STOP)
    printed = re.search(r"bash scripts/resume.sh (.+)$", output, re.MULTILINE)[1]
    assert printed == str(first)
    output, folder = train(printed, "train.resume=auto", STOP)
    assert folder == first and "warning" not in output and config.load(first).train.seed == 3
    train(second, "train.resume=auto", STOP)
    output, folder = train(cfg, "train.resume=auto", STOP)  # by the file: the one that saved last, with its own seed
    assert folder == second and "warning" not in output and config.load(second).train.seed == 4


def test_a_runs_own_settings_begin_another_run_of_the_experiment(write, train, call):
    cfg = write("x.yml", **{"train.resume": "auto"})
    _, first = train(cfg, "train.seed=3", STOP)
    text = (first / "config.yml").read_text()
    assert "resume" not in text and "max_hours: 0.0" in text  # what was meant for that start only
    _, second = train(first / "config.yml", STOP)
    assert second.parent == first.parent != second and config.load(second).train.seed == 3
    assert config.load(second).name == "x"
    _, folder = train(cfg, STOP)
    assert folder == second  # the newest of the experiment


def test_runs_of_earlier_programs_go_on(write, train, call, tmp_path):
    """Without records: known by the file's stem and data, their times by their names, whatever the files' times."""
    cfg = write("x.yml")
    _, new = train(cfg, "train.max_epoch=1", "train.seed=3")
    for name in ("2024-01-01_00-00-00", "2023-01-01_00-00-00"):
        old = new.with_name(name)
        shutil.copytree(new, old)
        (old / "run.json").unlink()
        content = checkpoint.read(new / "state_epoch_001.pth")
        torch.save({key: content[key] for key in content if key not in ("run", "saved")}, old / "state_epoch_001.pth")
    shutil.rmtree(new)
    newest = tmp_path / "saved/x/2024-01-01_00-00-00"
    output, folder = train(cfg, "train.resume=auto", STOP)
    assert folder == newest and "(epoch 1, step 3)" in output
    assert "train.max_epoch: 1 -> 3" in output  # of the file, as ever
    assert config.load(newest).train.seed == 3
    assert json.loads((newest / "run.json").read_text())["file"] == str(cfg)
    other = write("other/x.yml", **{"data.dir": str(tmp_path)})
    refused = call("sample.py", other, "a red bird")
    assert_refused(refused, "nothing has been trained", f"{newest} is of {cfg}")


def test_two_copies_of_a_run_have_logs_of_their_own(write, train, tmp_path):
    _, first = train(write("x.yml"), STOP)
    lines = tmp_path / "logs/x" / first.name / "metrics.jsonl"
    shutil.copytree(tmp_path / "saved", tmp_path / "copy")
    before = lines.read_text()
    train(tmp_path / "copy/x" / first.name, "train.resume=auto", "train.max_epoch=1")
    assert lines.read_text() == before and len(list((tmp_path / "logs/x").iterdir())) == 2


def test_a_requeued_job_goes_on_with_its_own_run(write, train, monkeypatch):
    cfg = write("x.yml")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    _, mine = train(cfg, "run=slurm-7", STOP)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    _, other = train(cfg, "run=slurm-8", STOP)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    output, folder = train(cfg, "run=slurm-7", "train.resume=auto", STOP)
    assert folder == mine and f"going on from {mine}" in output
    monkeypatch.setenv("SLURM_JOB_ID", "9")  # preempted before its run was begun
    output, folder = train(cfg, "run=slurm-9", "train.resume=auto", STOP)
    assert folder.name == "slurm-9" and "(epoch" not in output


def aged(folder: Path, **changes) -> dict:
    """Write a lease of another machine that was last renewed two minutes ago."""
    holder = {"token": "old", "host": "far", "pid": 1, "process_began": "1", "machine": "another", "began": 0.0}
    holder |= changes
    (folder / "lease.json").write_text(json.dumps(holder))
    os.utime(folder / "lease.json", (time.time() - 120,) * 2)
    return holder


def test_a_second_writer_is_refused_and_readers_are_not(write, train, call, tmp_path):
    cfg = write("x.yml")
    _, folder = train(cfg, STOP)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    lease = Lease(folder)
    began = time.strftime("%Y-%m-%d", time.localtime(lease.me["began"]))
    for words in ((cfg,), (folder,), (cfg, f"run={folder.name}")):
        refused = call("train.py", *words, "train.resume=auto", STOP)
        assert_refused(refused, f"{folder} is being written by process {os.getpid()} on {lease.me['host']}", began)
    assert call("sample.py", cfg, "a red bird", "--n", 1, "--out", tmp_path / "out").returncode == 0
    after = {path: path.read_bytes() for path in before}
    assert after == before and (folder / "lease.json").is_file()
    lease.release()
    output, _ = train(cfg, "train.resume=auto", STOP)
    assert "going on from" in output and not list(folder.glob("lease*"))


def test_a_stale_lease_is_taken_over_by_one_of_many(tmp_path):
    """Also where one that tried before died in the midst of it."""
    for died in (False, True):
        aged(tmp_path)
        if died:
            aged(tmp_path, token="dead")
            (tmp_path / "lease.json").rename(tmp_path / "lease.old.claim")
            aged(tmp_path)
        won, refused = [], []

        def contend(won=won, refused=refused):
            try:
                won.append(Lease(tmp_path))
            except UserError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=contend) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(refused)) == (1, 11) and all("is being written by process" in text for text in refused)
        assert [path.name for path in tmp_path.iterdir()] == ["lease.json"]
        won[0].confirm()
        won[0].release()


def test_when_a_lease_is_stale(tmp_path):
    """On this machine when its process is gone, elsewhere when it was not renewed for a minute, by the disk's clock."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    me = Lease(tmp_path)
    me.release()
    here = {"machine": me.me["machine"], "pid": process.pid, "process_began": leases.process_start(process.pid)}
    for changes, renewed, free in (
        (here, 0, False),  # alive
        ({**here, "process_began": "1"}, 0, True),  # another process has its number now
        ({"machine": "another", "pid": 99999999}, 30, False),  # nobody can know
        ({"machine": "another"}, 70, True),
        (here, 70, True),  # it hangs, or slept
    ):
        aged(tmp_path, **changes)
        os.utime(tmp_path / "lease.json", (time.time() - renewed,) * 2)
        if free:
            Lease(tmp_path).release()
        else:
            with pytest.raises(UserError, match="try again in a minute"):
                Lease(tmp_path)
    process.kill()
    process.wait()
    aged(tmp_path, **here)
    os.utime(tmp_path / "lease.json")
    Lease(tmp_path).release()
    assert not list(tmp_path.iterdir())
    (tmp_path / "lease.json").write_text('{"tok')  # killed while writing it
    os.utime(tmp_path / "lease.json", (time.time() - 90,) * 2)
    Lease(tmp_path).release()


def test_a_requeued_job_waits_until_the_lease_is_stale(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(leases, "STALE_AFTER", 2.0)
    monkeypatch.setattr(leases, "LOOK_EVERY", 0.1)
    aged(tmp_path)
    os.utime(tmp_path / "lease.json")
    began = time.monotonic()
    lease = Lease(tmp_path, wait=True)
    assert 1 < time.monotonic() - began < 30
    assert "still held by process 1 on far" in capsys.readouterr().out
    lease.release()
    monkeypatch.setattr(leases, "WAITED_AT_MOST", 0.3)  # a holder that goes on renewing is not waited for for ever
    monkeypatch.setattr(leases, "STALE_AFTER", 60.0)
    aged(tmp_path)
    os.utime(tmp_path / "lease.json")
    with pytest.raises(UserError, match="one writer at a time"):
        Lease(tmp_path, wait=True)


def test_a_lease_is_renewed_and_its_loss_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "RENEWED_EVERY", 0.05)
    lease = Lease(tmp_path)
    os.utime(lease.path, (1, 1))
    for _ in range(200):
        if time.time() - lease.path.stat().st_mtime < 10:
            break
        time.sleep(0.02)
    else:
        raise AssertionError("never renewed")
    assert not lease.lost
    aged(tmp_path)
    assert any(lease.lost or time.sleep(0.02) for _ in range(200))
    with pytest.raises(UserError, match=r"taken over by process 1 on far .* nothing more is written"):
        lease.confirm()
    lease.release()
    assert lease.path.is_file()  # the other's


@pytest.mark.parametrize("when", ["train_step", "Evaluator.__call__", "sample_grid"])
def test_a_run_that_was_taken_over_writes_nothing_more(write, train, call, monkeypatch, tmp_path, when):
    """As after a laptop's sleep in the midst of a step, an evaluation or a grid."""
    from ratlip import course, trainer

    cfg = write("x.yml")
    _, folder = train(cfg, "train.max_epoch=1")
    logs = tmp_path / "logs/x" / folder.name
    owner, name = {
        "train_step": (trainer, when),
        "Evaluator.__call__": (trainer.Evaluator, "__call__"),
        "sample_grid": (course, when),
    }[when]
    original, seen = getattr(owner, name), {}

    def sleep(*arguments, **named):
        result = original(*arguments, **named)
        if not seen:
            aged(folder)
            seen.update(
                {path: path.read_bytes() for place in (folder, logs) for path in place.rglob("*") if path.is_file()}
            )
        return result

    monkeypatch.setattr(owner, name, sleep)
    monkeypatch.setattr(leases, "RENEWED_EVERY", 0.0 if when == "train_step" else 1000.0)
    result = call("train.py", cfg, "train.resume=auto", "train.max_epoch=2")
    assert_refused(result, f"{folder} was taken over by process 1 on far")
    assert {path: path.read_bytes() for path in seen} == seen
    assert {path for place in (folder, logs) for path in place.rglob("*") if path.is_file()} == set(seen)


def test_heads_are_read_without_tensors(tmp_path):
    """Of a checkpoint of 400 MB, in no time."""
    content = {"format": checkpoint.FORMAT, "epoch": 3, "step": 9, "epoch_steps": 3, "w": torch.zeros(100_000_000)}
    torch.save(content, tmp_path / "state_epoch_003.pth")
    began = time.process_time()
    (head,) = checkpoint.heads(tmp_path)
    assert (head.epoch, head.step, head.saved, head.run) == (3, 9, None, None)
    assert time.process_time() - began < 0.1


def test_sampling_names_what_it_would_need(write):
    cfg = write("with space.yml")
    with pytest.raises(UserError, match=r"bash scripts/train.sh '.*with space.yml'"):
        sampling.find_checkpoint(config.load(cfg))


def test_systems_of_one_file_keep_apart(write, train, call, tmp_path):
    """On disk, in what is newest, in going on; the file may have been a RATLIP's when a word chose a DF-GAN."""
    cfg = write("x.yml", **{"model.imsize": 32})
    text = [line for line in cfg.read_text().splitlines() if "d_channels" not in line and "feature_blocks" not in line]
    cfg.write_text("\n".join(text))
    _, ratlip = train(cfg, "train.max_epoch=1", "model.d_channels=16")
    _, dfgan = train(cfg, "train.max_epoch=1", "model.name=dfgan")
    assert (ratlip.parent.name, dfgan.parent.name) == ("x", "x_dfgan")
    draw = ("--n", 1, "--device", "cpu")
    for words, name in (((), "ratlip"), (("model.name=dfgan",), "dfgan")):
        result = call("sample.py", cfg, "a star", *words, *draw, "--out", tmp_path / name)
        assert f"{name}, epoch 1" in result.stdout, result.stderr
    assert "ratlip, epoch 1" in call("sample.py", ratlip, "a star", *draw, "--out", tmp_path / "r").stdout
    printed, again = train(cfg, "train.max_epoch=2", "train.resume=auto")
    assert again == ratlip and "ratlip on cpu" in printed
    printed, again = train(dfgan, "train.max_epoch=2", "train.resume=auto")
    assert again == dfgan and "dfgan on cpu" in printed
    assert_refused(call("train.py", dfgan, "train.resume=auto", "model.name=ratgan", "train.max_epoch=3"), "model.name")
    result = call("sample.py", cfg, "a star", "model.name=galip", *draw)
    assert_refused(result, "nothing has been trained")


def test_a_run_of_before_there_were_systems_goes_on_as_it_was(write, train, tmp_path, monkeypatch):
    """Its file said what the system's file says now, and its checkpoints named the optimisers otherwise."""
    place = tmp_path / "systems"
    shutil.copytree(config.SYSTEMS, place)
    cfg = write("x.yml", **{"train.lr_g": 5e-4})
    _, run = train(cfg, "train.max_epoch=2", STOP)
    (path,) = run.glob("state*.pth")
    content = checkpoint.read(path)
    for name, tag in (("generator", "g"), ("discriminator", "d")):
        content[f"optimizer_{tag}"] = content["optimizers"][name]
    for key in ("optimizers", "state", "text"):
        del content[key]
    torch.save(content, path)
    cfg = write("x.yml")
    with (place / "ratlip.yml").open("a") as file:
        file.write("\nfolder:\n  train: {lr_g: 5.0e-4}\n")
    monkeypatch.setattr(config, "SYSTEMS", place)
    printed, again = train(cfg, "train.max_epoch=2", "train.resume=auto")
    assert again == run and "train.lr_g" not in printed
    after = checkpoint.read(run / "state_epoch_002.pth")
    assert after["config"]["train.lr_g"] == 5e-4 and after["step"] == 6
    counts = {float(state["step"]) for state in after["optimizers"]["generator"]["state"].values()}
    assert counts == {6.0}
