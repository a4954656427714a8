"""Evaluation through scripts/test.sh's entry point, against torch-fidelity's own command, and during training."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from data.test_colours import rgb_profile
from helpers import ROOT, TINY_RUN, assert_refused, released_weights, run
from PIL import Image

from ratlip import config
from ratlip.data import demo
from ratlip.trainer import prepare, train_step

OFFLINE = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
MINE, THEIRS = 24, 20  # pictures in the two folders


@pytest.fixture
def words(demo_folder, tmp_path):
    """Settings for an evaluation of the shipped demo checkpoint on six test pictures, files below tmp_path."""
    data = tmp_path / "data"
    shutil.copytree(demo_folder, data)
    places = (f"data.dir={data}", f"log.dir={tmp_path}/logs", f"log.save_dir={tmp_path}/saved")
    return [
        "cfg/demo.yml",
        *places,
        "train.device=cpu",
        "train.precision=fp32",
        "clip.products=linear",
        "eval.samples=7",
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of demo pictures with colour profiles, turned, some with transparency; captions beside the first."""
    turned = Image.Exif()
    turned[0x0112] = 6
    rng, made = np.random.default_rng(3), []
    for name, combinations in (("mine", demo.splits()[1][:MINE]), ("theirs", demo.splits()[0][:THEIRS])):
        folder = tmp_path_factory.mktemp(name)
        for number, attributes in enumerate(combinations):
            picture = Image.fromarray(demo.render([attributes], rng)[0])
            if number % 3 == 0:  # none of which a scoring program heeds
                picture.putalpha(Image.linear_gradient("L").resize(picture.size))
            picture.save(folder / f"{number:03}.png", icc_profile=rgb_profile(), exif=turned)
            if name == "mine":
                (folder / f"{number:03}.txt").write_text(demo.captions(attributes, rng, 1)[0])
        made.append(folder)
    return made


def scores(result: subprocess.CompletedProcess, logs) -> dict:
    """What the newest evaluation below `logs` wrote, after one that succeeded."""
    assert result.returncode in (0, 3), result.stderr
    newest = max(logs.glob("*/test_*/metrics.jsonl"), key=os.path.getmtime)
    assert list(newest.parent.glob("events.out.tfevents.*"))
    return json.loads(newest.read_text())


def test_folders_score_as_torch_fidelity_says(folders, inception_file, tmp_path, words):
    mine, theirs = folders
    metrics = "eval.metrics=[fid,kid,precision,recall,clip_score,caption_accuracy]"
    result = run("test.py", *words, metrics, f"eval.inception_weights={inception_file}",
                 "--images", mine, "--against", theirs, environment=OFFLINE)  # fmt: skip
    found = scores(result, tmp_path / "logs")
    command = ["--input1", mine, "--input2", theirs, "--cpu", "--fid", "--kid", "--prc", "--kid-subset-size", THEIRS,
               "--feature-extractor", "inception-v3-compat", "--feature-extractor-weights-path", inception_file,
               "--no-cache", "--silent", "--json"]  # fmt: skip
    theirs_says = subprocess.run(
        [sys.executable, "-m", "torch_fidelity.fidelity", *map(str, command)],
        env={**os.environ, **OFFLINE}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert theirs_says.returncode == 0, theirs_says.stderr
    expected = json.loads(theirs_says.stdout[theirs_says.stdout.index("{") :])
    assert found["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    assert found["kid"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    assert (found["precision"], found["recall"]) == (expected["precision"], expected["recall"])
    assert 0 < found["recall"] and 0 < found["precision"]

    # The rest of what is said about them.
    assert found["images"] == MINE and found["fid/half"] > found["fid"]
    assert found["caption_accuracy"] == 1.0 and found["clip_score/standard_error"] > 0
    assert "kid/std" not in found and "subsets of 20" in found["protocols"]["kid"]
    assert "24 pictures" not in found["protocols"]["fid"] and "unreliable: 20 pictures" in found["protocols"]["fid"]
    assert f"20 pictures of {theirs}" in found["protocols"]["recall"]
    stages = [found[f"seconds/{name}"] for name in ("generate", "features", "statistics", "distance")]
    assert 0.5 * found["seconds"] < sum(stages) <= found["seconds"]
    assert all(name in result.stdout for name in ("fid/half", "recall", "seconds/features", "published 6726825d"))


def test_results_do_not_depend_on_batches_and_processes(words, folders, inception_file, tmp_path):
    """11 samples: no batch size but 1 and no number of processes divides them."""
    cheap = (*words, "eval.samples=11", "--against", folders[1])
    all_metrics = "eval.metrics=[fd_clip,clip_score,caption_accuracy,kid,precision,recall]"
    all_metrics = (all_metrics, f"eval.inception_weights={inception_file}")
    found = []
    for batch, more in ((64, all_metrics), (7, ()), (1, ())):
        result = run("test.py", *cheap, f"eval.batch_size={batch}", *more, environment=OFFLINE)
        found.append(scores(result, tmp_path / "logs"))
    two = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "code" / "test.py",
         *cheap, "eval.batch_size=4", *all_metrics],
        cwd=ROOT, env={**os.environ, **OFFLINE}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    found.append(scores(two, tmp_path / "logs"))
    assert found[-1].keys() == found[0].keys() > found[1].keys()
    for other in found[1:]:
        compared = [name for name in other if isinstance(other[name], float) and not name.startswith("seconds")]
        assert len(compared) > 8
        for name in compared:
            assert other[name] == pytest.approx(found[0][name], rel=1e-6), name


def test_statistics_are_made_once_kept_and_checked(words, tmp_path):
    first = scores(run("test.py", *words, environment=OFFLINE), tmp_path / "logs")
    (path,) = (tmp_path / "data" / "stats").iterdir()
    assert re.fullmatch(r"fd_clip-standard-[0-9a-f]{8}_test_64_6\.npz", path.name)
    content = dict(np.load(path))
    assert set(content) == {"mu", "sigma", "count", "protocol", "weights", "pictures"}
    assert (content["count"], content["mu"].shape, content["sigma"].shape) == (6, (128,), (128, 128))
    made = path.stat().st_mtime_ns
    again = scores(run("test.py", *words, environment=OFFLINE), tmp_path / "logs")
    assert path.stat().st_mtime_ns == made and again["fd_clip"] == first["fd_clip"]

    np.savez(path, mu=content["mu"], sigma=content["sigma"])
    assert_refused(run("test.py", *words, environment=OFFLINE), str(path), "not written by this program", "delete it")
    np.savez(path, **content)
    picture = tmp_path / "data" / "images" / "test" / "0.png"
    Image.new("RGB", (64, 64)).save(picture)  # another test picture: the statistics no longer hold
    result = run("test.py", *words, environment=OFFLINE)
    assert f"{path}: of other pictures; measured anew" in result.stdout
    assert scores(result, tmp_path / "logs")["fd_clip"] != first["fd_clip"]
    assert dict(np.load(path))["pictures"] != content["pictures"]


def test_released_statistics_and_weights(words, tmp_path):
    torch.save(released_weights("inception"), tmp_path / "inception.pth")
    np.savez(tmp_path / "bird.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    released = (
        *words,
        "eval.metrics=[fid_released,clip_score]",
        "clip.preprocess=released",
        f"eval.inception_released_weights={tmp_path}/inception.pth",
    )
    result = run("test.py", *released, f"eval.released_npz={tmp_path}/bird.npz", "eval.samples=4", environment=OFFLINE)
    found = scores(result, tmp_path / "logs")
    assert np.isfinite(found["fid_released"]) and "an unknown number of pictures" in found["protocols"]["fid_released"]
    assert "released input" in found["protocols"]["clip_score"]
    refused = run("test.py", *released, "eval.released_npz=nowhere.npz", environment=OFFLINE)
    assert_refused(refused, "eval.released_npz", "nowhere.npz")
    of_other_weights = {"count": 6, "protocol": "other", "weights": "00000000", "pictures": "0123456789abcdef"}
    for given, part in (
        ({"mu": np.zeros(64), "sigma": np.eye(64)}, "its mu is (64,)"),
        ({"mu": np.zeros(2048), "sigma": np.eye(2048), **of_other_weights}, "its protocol is other"),
    ):
        np.savez(tmp_path / "bird.npz", **given)
        before = (tmp_path / "bird.npz").read_bytes()
        refused = run("test.py", *released, f"eval.released_npz={tmp_path}/bird.npz", environment=OFFLINE)
        assert_refused(refused, "bird.npz", part)
        assert (tmp_path / "bird.npz").read_bytes() == before  # what is given is never made anew


def test_missing_weights_leave_the_other_metrics(words, demo_folder, clip_file, tmp_path):
    # Neither on this machine nor to be had: the proxy does not answer.
    nothing = {**OFFLINE, "TORCH_HOME": str(tmp_path / "torch"), "https_proxy": "http://127.0.0.1:9"}
    result = run("test.py", *words, "eval.metrics=[fid,kid,fd_clip]", environment=nothing)
    assert result.returncode == 3, result.stderr
    found = scores(result, tmp_path / "logs")
    assert "fd_clip" in found and "fid" not in found and "kid" not in found
    (line,) = [line for line in result.stderr.splitlines() if line]
    assert line.startswith("without fid, kid: ") and "weights-inception-2015-12-05-6726825d.pth" in line
    assert f"{tmp_path}/torch/hub/checkpoints" in line and "eval.inception_weights" in line

    few = ("data.layout=folder", f"data.dir={demo_folder}", "model.imsize=32", f"clip.weights={clip_file}")
    places = (f"log.dir={tmp_path}/logs2", f"log.save_dir={tmp_path}/saved")
    trained = run("train.py", "cfg/demo.yml", *TINY_RUN, *few, *places, "eval.metrics=[fid,clip_score]",
                  "eval.inception_weights=nowhere.pth")  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    (log,) = (tmp_path / "logs2" / "demo").iterdir()
    lines = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all("clip_score" in line and "fid" not in line for line in lines)
    assert "weights" in lines[0]["protocols"]["clip_score"]


def test_a_released_checkpoint_is_scored(vitb32, words, tmp_path):
    torch.save({"model": {"netG": released_weights("galip.netG")}, "epoch": 3}, tmp_path / "galip.pth")
    torch.save({key: value.half() for key, value in vitb32.clip.state_dict().items()}, tmp_path / "vit.pt")
    result = run("test.py", *words, tmp_path / "galip.pth", f"clip.weights={tmp_path}/vit.pt", "eval.samples=2",
                 "clip.activation=quick_gelu", "clip.feature_blocks=null", "eval.metrics=[clip_score]",
                 environment=OFFLINE)  # fmt: skip
    found = scores(result, tmp_path / "logs")
    assert "released GALIP, epoch 3" in found["scored"] and "galip.pth" in result.stdout
    assert "released input" in found["protocols"]["clip_score"]
    assert "it draws 224 px" in result.stdout and found["images"] == 2


def test_pictures_as_met(words, folders, tmp_path, call):
    """Several sizes and formats below one folder; no captions; the test split as the reference."""
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(9):
        size = (40 + 10 * (number % 3), 50, 3)
        name = f"deeper/{number}.jpg" if number % 2 else f"{number}.png"
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(folder / name)
    result = call("test.py", *words, "--images", folder)
    found = scores(result, tmp_path / "logs")
    assert found["images"] == 9 and np.isfinite(found["fd_clip"])
    assert "clip_score" not in found and "caption_accuracy" not in found

    long = "a small red star at the top on a white background " * 4
    for number in range(9):
        (folder / f"{'deeper/' * (number % 2)}{number}.txt").write_text(long if number == 4 else "a small red star")
    again = call("test.py", *words, f"log.dir={tmp_path}/captioned", "--images", folder)
    found = scores(again, tmp_path / "captioned")
    assert found["clip_score"] > 0 and "caption_accuracy" not in found
    assert "without caption_accuracy: no position found in caption 'a small red star'" in again.stdout
    alone = call("test.py", *words, "--images", folder, "eval.metrics=[caption_accuracy]")
    assert_refused(alone, "no position found", "demo data set only")
    assert f"1 of 9 captions of {folder} are longer than the 32 tokens" in again.stdout

    (folder / "2.txt").unlink()
    assert_refused(call("test.py", *words, "--images", folder), "2.txt", "no such caption file")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["nowhere.pth"], ["no checkpoint", "/nowhere.pth"]),
        (["a.pth", "b.pth"], ["one checkpoint at a time", "a.pth, b.pth"]),
        (["--images", "nowhere"], ["no folder", "/nowhere"]),
        (["--images", "scripts"], ["scripts: no pictures"]),
        (["a.pth", "--images", "assets"], ["a.pth", "assets"]),
        (["lr=3.pth"], ["unknown key 'lr'", "checkpoint", "after --"]),
        (["images=scripts"], ["the option --images scripts"]),
        (["--imags", "scripts"], ["unknown option '--imags'", "--images?"]),
        (["runs/lr=3/best.pth"], [f"no checkpoint {ROOT}/runs/lr=3/best.pth"]),
        (["--", "lr=3.pth"], [f"no checkpoint {ROOT}/lr=3.pth"]),
        (["eval.metrics=[fid,fids]"], ["eval.metrics", "fids", "fid_released"]),
        (["eval.samples=1"], ["at least 2"]),
        (["eval.metric=[fid]"], ["'eval.metric'", "did you mean 'eval.metrics'"]),
        (["eval.inception_weights=README.md", "eval.metrics=[fid]"], ["README.md"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_mistakes_end_in_one_line(words, arguments, parts, call):
    assert_refused(call("test.py", *words, *arguments), *parts)


def test_a_checkpoints_name_may_hold_an_equals_sign(words, tmp_path, call):
    shutil.copy(ROOT / "assets/demo/generator.pth", tmp_path / "lr=3.pth")
    for logs, path in (("a", tmp_path / "lr=3.pth"), ("b", os.path.relpath(tmp_path / "lr=3.pth", ROOT))):
        few = ("eval.samples=2", "eval.metrics=[clip_score]", f"log.dir={tmp_path}/{logs}")
        assert scores(call("test.py", *words, path, *few), tmp_path / logs)["scored"].startswith(str(path))


def test_a_folder_against_itself(words, folders, tmp_path):
    result = run("test.py", *words, "--images", folders[0], "--against", folders[0], "eval.metrics=[fd_clip]")
    assert abs(scores(result, tmp_path / "logs")["fd_clip"]) < 1e-3


def test_evaluation_leaves_training_as_it_was(demo_folder, clip_file, tmp_path):
    few = ("data.layout=folder", f"data.dir={demo_folder}", "model.imsize=32", f"clip.weights={clip_file}")
    made = config.load("cfg/demo.yml", [*TINY_RUN, *few, "train.device=cpu", "eval.metrics=[fd_clip,clip_score]"])
    training, batches, loader, evaluator = prepare(made)
    training.generator.train()
    batches.epoch = 0
    train_step(training, next(iter(loader)))

    def state() -> list[torch.Tensor]:
        networks = (training.generator, training.discriminator, training.ema, training.clip)
        values = [value for network in networks for value in network.state_dict().values()]
        numpy_state = torch.from_numpy(np.random.get_state()[1].astype(np.int64))
        return [torch.random.get_rng_state(), numpy_state, *(value.clone() for value in values)]

    before, mode = state(), [module.training for module in training.generator.modules()]
    evaluator(training.generator)  # in training mode, with BatchNorm
    after = state()
    assert len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert mode == [module.training for module in training.generator.modules()]


def test_the_first_steps_do_not_depend_on_kept_statistics(demo_folder, clip_file, tmp_path):
    shutil.copytree(demo_folder, tmp_path / "data", ignore=shutil.ignore_patterns("stats"))
    few = ("data.layout=folder", f"data.dir={tmp_path}/data", "model.imsize=32", f"clip.weights={clip_file}")
    made = config.load("cfg/demo.yml", [*TINY_RUN, *few, "train.device=cpu", "eval.metrics=[fd_clip]"])
    first = prepare(made)[0].generator.state_dict()
    assert list((tmp_path / "data" / "stats").iterdir())
    second = prepare(made)[0].generator.state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
