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
import torch.nn.functional as F
from data.test_colours import rgb_profile
from helpers import ROOT, TINY_RUN, assert_refused, released_weights, run
from PIL import Image

from ratlip import config, sampling
from ratlip.data import demo
from ratlip.data.inventory import usable_items
from ratlip.data.loader import Pictures, TestImages, to_floats
from ratlip.encoders.clip_towers import load_clip
from ratlip.evaluation import Evaluator, Scorer
from ratlip.metrics.cmmd import squared_mmd
from ratlip.metrics.diversity import vendi
from ratlip.pictures import save_picture, to_pictures
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
    metrics = "eval.metrics=[fid,kid,precision,recall,is,clip_score,r_precision,caption_accuracy]"
    result = run("test.py", *words, metrics, f"eval.inception_weights={inception_file}",
                 "--images", mine, "--against", theirs, environment=OFFLINE)  # fmt: skip
    found = scores(result, tmp_path / "logs")
    command = ["--input1", mine, "--input2", theirs, "--cpu", "--fid", "--kid", "--prc", "--isc", "--kid-subset-size",
               THEIRS,
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
    assert found["is"] == pytest.approx(expected["inception_score_mean"], rel=1e-4)
    assert found["is/std"] == pytest.approx(expected["inception_score_std"], rel=1e-3)
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
    all_metrics = "eval.metrics=[fd_clip,cmmd,clip_score,diversity,caption_accuracy,kid,precision,recall]"
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
    assert set(content) == {"mu", "sigma", "count", "protocol", "weights", "pictures", "features"}
    assert (content["count"], content["mu"].shape, content["sigma"].shape) == (6, (128,), (128, 128))
    made = path.stat().st_mtime_ns
    again = scores(run("test.py", *words, environment=OFFLINE), tmp_path / "logs")
    assert path.stat().st_mtime_ns == made and again["fd_clip"] == first["fd_clip"]

    np.savez(path, mu=content["mu"], sigma=content["sigma"])
    assert_refused(run("test.py", *words, environment=OFFLINE), str(path), "not written by this program", "delete it")
    np.savez(path, **{key: value for key, value in content.items() if key != "features"})
    result = run("test.py", *words, environment=OFFLINE)
    assert f"{path}: of an earlier version, which kept no picture's features; measured anew" in result.stdout
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


CLIPS_METRICS = ("fd_clip", "cmmd", "clip_score", "diversity")


def test_the_judge_is_another_clip(words, judge_file, folders, tmp_path, call):
    """A generator reads one CLIP and is scored by the other: as its pictures, in a folder, are by that one."""
    asked = f"eval.metrics=[{','.join(CLIPS_METRICS)}]"
    judge = (f"eval.clip_weights={judge_file}", "eval.clip_activation=quick_gelu")
    own = scores(call("test.py", *words, asked), tmp_path / "logs")
    cache = tmp_path / "data" / "cache"
    kept = len(list(cache.glob("captions_*.pt")))
    result = call("test.py", *words, asked, *judge, f"log.dir={tmp_path}/judged")
    found = scores(result, tmp_path / "judged")
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    for name in CLIPS_METRICS:
        assert found[name] != own[name]
        assert own["protocols"][name].startswith("judged by assets/demo/clip.pt (clip.weights); CLIP image embedding")
        assert found["protocols"][name].startswith(f"judged by {judge_file} (eval.clip_weights); CLIP image embedding")
        assert rows[name].endswith(f"judged by {judge_file} (eval.clip_weights)")
    stats = [path.name for path in (tmp_path / "data" / "stats").iterdir()]
    assert len(stats) == 2 and len(list(cache.glob("captions_*.pt"))) == kept + 1

    drawn = tmp_path / "drawn"
    made = config.load("cfg/demo.yml", [*words[1:], *judge, asked])
    generator, clip, *_ = sampling.load_generator(made, ROOT / "assets/demo/generator.pth")
    evaluator = Evaluator(Scorer(made, clip, usable_items(made, "test")), usable_items(made, "test"))
    for scored in evaluator._generated(generator):
        for number, picture, text in zip(scored.numbers, to_pictures(scored.images), scored.captions, strict=True):
            drawn.mkdir(exist_ok=True)
            save_picture(picture, drawn / f"{number}.png", text)
    as_clip = (f"clip.weights={judge_file}", "clip.activation=quick_gelu", "clip.feature_blocks=null")
    folder = scores(call("test.py", *words, asked, *as_clip, f"log.dir={tmp_path}/folder", "--images", drawn),
                    tmp_path / "folder")  # fmt: skip
    for name in ("fd_clip", "cmmd", "clip_score"):  # PNGs have eight bits
        assert folder[name] == pytest.approx(found[name], rel=0.02), name
    assert "diversity" not in folder  # no caption has eight pictures


@pytest.mark.parametrize(
    ("words_for_judge", "parts"),
    [
        (["eval.clip_weights=nowhere.pt"], ["eval.clip_weights: no file 'nowhere.pt'"]),
        (["eval.clip_weights={judge}"], ["eval.clip_weights", "eval.clip_activation=quick_gelu"]),
        (["eval.clip_weights=ViT-B-32:{judge}"], ["eval.clip_weights", "no CLIP of that name"]),
        (["eval.clip_source=hub"], ["eval.clip_source must be one of openai, open_clip"]),
        (["eval.clip_weights=README.md"], ["eval.clip_weights: ", "README.md is not a CLIP"]),
    ],
)
def test_a_judge_that_cannot_be_loaded_is_named(words, judge_file, words_for_judge, parts, call):
    given = [word.format(judge=judge_file) for word in words_for_judge]
    result = call("test.py", *words, *given)
    assert_refused(result, *parts)
    assert " clip.weights" not in result.stderr and ": clip.weights" not in result.stderr


def test_training_is_judged_and_does_not_depend_on_it(demo_folder, clip_file, judge_file, tmp_path):
    few = ("data.layout=folder", f"data.dir={demo_folder}", "model.imsize=32", f"clip.weights={clip_file}")
    made, networks = [*TINY_RUN, *few, "train.device=cpu", "eval.metrics=[clip_score,diversity]"], []
    for judge in ((), (f"eval.clip_weights={judge_file}", "eval.clip_activation=gelu")):
        training, _, _, evaluator = prepare(config.load("cfg/demo.yml", [*made, *judge]))
        networks.append(training.generator.state_dict())
        found = evaluator(training.generator)
        assert 1 <= found["diversity"] <= 8 and "diversity/real" not in found
    assert all(torch.equal(value, networks[1][name]) for name, value in networks[0].items())
    assert (
        "activation gelu" in evaluator.protocols["clip_score"] and str(judge_file) in evaluator.protocols["diversity"]
    )


def test_real_pictures_are_scored_as_if_they_had_been_generated(words, tmp_path, call):
    """Captions and all samples as a generator has them; distances of one half of the pictures to the other."""
    asked = "eval.metrics=[fd_clip,cmmd,clip_score,diversity,caption_accuracy]"
    result = call("test.py", *words, asked, "--real", "eval.samples=14")
    found = scores(result, tmp_path / "logs")
    assert found["images"] == 14 and found["caption_accuracy"] == 1.0
    assert "the test split's own pictures" in found["scored"]
    assert "against 3 pictures of the test split, the others are scored" in found["protocols"]["fd_clip"]
    assert not (tmp_path / "data" / "stats").exists()  # of halves nothing is kept

    made = config.load("cfg/demo.yml", [*words[1:], asked, "eval.samples=14"])
    items, clip = usable_items(made, "test"), load_clip("assets/demo/clip.pt")
    images = to_floats(torch.stack([TestImages(items, 64)[number][0] for number in range(6)]))
    units = F.normalize(clip.image(images)[1].double(), dim=1)
    pairs = [(number % 6, items[number % 6].captions[number // 6]) for number in range(14)]
    sentences = F.normalize(clip.text(clip.tokenize([text for _, text in pairs]))[0].double(), dim=1)
    expected = 100 * (units[[number for number, _ in pairs]] * sentences).sum(1).mean()
    assert found["clip_score"] == pytest.approx(float(expected), rel=1e-5)
    assert found["cmmd"] == pytest.approx(1000 * squared_mmd(units[::2], units[1::2], 10), abs=1e-3)
    generated = scores(call("test.py", *words, asked, f"log.dir={tmp_path}/drawn"), tmp_path / "drawn")
    assert 1 < generated["diversity"] < generated["diversity/real"] == found["diversity"]


def test_real_pictures_against_a_folder_and_too_few(words, folders, tmp_path, call):
    against = ("--real", "eval.metrics=[fd_clip]", "--against", folders[1])
    found = scores(call("test.py", *words, *against), tmp_path / "logs")
    assert found["images"] == 6 and f"20 pictures of {folders[1]}" in found["protocols"]["fd_clip"]
    assert_refused(call("test.py", *words, "--real", "a.pth"), "--real", "a.pth")
    (tmp_path / "data" / "test.txt").write_text("test/0\ntest/1\ntest/2")
    assert_refused(call("test.py", *words, "--real", "eval.metrics=[fd_clip]"), "3 pictures", "needs 4")


def test_pictures_of_one_caption_have_a_diversity(words, folders, tmp_path, call):
    """Where a folder holds eight of a caption and size, as sample.sh --n 8 leaves them."""
    folder, rng = tmp_path / "drawn", np.random.default_rng(0)
    folder.mkdir()
    for number in range(19):  # nine of one caption, eight of another of which one is larger, and two more
        attributes = demo.splits()[1][0 if number < 9 else 1 if number < 17 else number]
        picture = Image.fromarray(demo.render([attributes], rng)[0])
        picture = picture.resize((70, 70)) if number == 12 else picture
        save_picture(picture, folder / f"{number:02}.png", demo.captions(attributes, np.random.default_rng(1), 1)[0])
    result = call("test.py", *words, "eval.metrics=[diversity]", "--images", folder)
    found = scores(result, tmp_path / "logs")
    assert "8 pictures of each of 1 captions" in found["protocols"]["diversity"]
    images = to_floats(torch.stack([Pictures(sorted(folder.glob("*.png")))[n][0] for n in range(8)]))
    units = F.normalize(load_clip("assets/demo/clip.pt").image(images)[1].double(), dim=1)
    assert found["diversity"] == pytest.approx(float(vendi(units @ units.T)), rel=1e-5)
    assert found["images"] == 8
    none = call("test.py", *words, "eval.metrics=[clip_score,diversity]", "--images", folders[0])
    assert "without diversity: no caption has 8 pictures" in none.stdout
    assert "diversity" not in scores(none, tmp_path / "logs")


def test_evaluation_leaves_training_as_it_was(demo_folder, clip_file, tmp_path):
    few = ("data.layout=folder", f"data.dir={demo_folder}", "model.imsize=32", f"clip.weights={clip_file}")
    made = config.load("cfg/demo.yml", [*TINY_RUN, *few, "train.device=cpu", "eval.metrics=[fd_clip,clip_score]"])
    training, batches, loader, evaluator = prepare(made)
    training.generator.train()
    batches.epoch = 0
    train_step(training, next(iter(loader)))

    def state() -> list[torch.Tensor]:
        networks = (*training.networks.values(), training.ema, training.system.clip)
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
