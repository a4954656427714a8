"""Paths in settings, words and options, and every script called from a folder of one's own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, assert_refused
from PIL import Image

from ratlip import checkpoint, config, paths
from ratlip.errors import UserError


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The caller's folder, with HOME and SCRATCH beside it."""
    for name in ("project", "home", "scratch"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def setting(loaded, key: str) -> str:
    return config.flatten(loaded)[key]


@pytest.mark.parametrize("key", config.PATHS)
@pytest.mark.parametrize(
    ("written", "in_a_file", "in_a_word"),
    [
        ("~/a/x.pt", "{base}/home/a/x.pt", "{base}/home/a/x.pt"),
        ("$SCRATCH/x.pt", "{base}/scratch/x.pt", "{base}/scratch/x.pt"),
        ("${SCRATCH}-2/x.pt", "{base}/scratch-2/x.pt", "{base}/scratch-2/x.pt"),
        ("data/x.pt", f"{ROOT}/data/x.pt", "{base}/project/data/x.pt"),
        ("../x.pt", f"{ROOT.parent}/x.pt", "{base}/x.pt"),
        ("/somewhere/x.pt", "/somewhere/x.pt", "/somewhere/x.pt"),
    ],
)
def test_where_a_path_leads(elsewhere, key, written, in_a_file, in_a_word):
    group, name = key.split(".")
    (elsewhere / "mine.yml").write_text(f"{group}:\n  {name}: {written}\n")
    base, system = str(elsewhere.parent), ["model.name=dfgan"] if group == "text" else []
    assert str(paths.full(setting(config.load("mine.yml", system), key))) == in_a_file.format(base=base)
    (elsewhere / "mine.yml").write_text("")
    word = setting(config.load("mine.yml", [*system, f"{key}={written}"]), key)
    assert str(paths.full(word)) == in_a_word.format(base=base)
    if written == "data/x.pt":
        assert word == written  # as the caller wrote it, since that is what works there


@pytest.mark.parametrize(
    "word",
    [
        "clip.weights=ViT-B/32",
        "clip.weights=ViT-L/14@336px",
        "clip.weights=ViT-B-32:laion2b_s34b_b79k",
        "clip.weights=hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
        "train.resume=auto",
        "train.resume=120",
        "data.dir=https://host/{0..3}.tar",
        "data.dir=pipe:cat x.tar",
        "data.test_dir=null",
    ],
)
def test_what_is_no_path_stays_as_it_is(elsewhere, word):
    (elsewhere / "mine.yml").write_text("")
    key, _, value = word.partition("=")
    assert setting(config.load("mine.yml", [word]), key) == (None if value == "null" else value)


def test_braces_of_shards_and_architectures_of_open_clip(elsewhere):
    base = elsewhere.parent
    (elsewhere / "mine.yml").write_text(
        "data: {dir: '$SCRATCH/{00000..00331}.tar', test_dir: 'data/v-{0..1}.tar'}\nclip: {weights: 'ViT-B-32:~/b.pt'}"
    )
    loaded = config.load("mine.yml")
    assert loaded.data.dir == f"{base}/scratch/{{00000..00331}}.tar"
    assert loaded.data.test_dir == f"{ROOT}/data/v-{{0..1}}.tar"
    assert loaded.clip.weights == f"ViT-B-32:{base}/home/b.pt"
    word = config.load("mine.yml", ["clip.weights=ViT-B-32:own/b.safetensors", "data.dir={0..3}.tar"])
    assert (word.clip.weights, word.data.dir) == ("ViT-B-32:own/b.safetensors", "{0..3}.tar")
    assert config.settings_of(word)["clip.weights"] == f"ViT-B-32:{elsewhere}/own/b.safetensors"


@pytest.mark.parametrize("name", ["~", "007", "2024-05-01", "no", "1_000"])
def test_a_folder_may_have_a_name_that_yaml_takes_for_something_else(elsewhere, name):
    (elsewhere / "mine.yml").write_text("")
    found = config.load("mine.yml", [f"log.dir={name}"]).log.dir
    assert paths.full(found) == (elsewhere.parent / "home" if name == "~" else elsewhere / name)


@pytest.mark.parametrize(
    ("written", "parts"),
    [
        ("$NOWHERE/x", ["the environment variable NOWHERE is not set"]),
        ("${NOWHERE}/x", ["the environment variable NOWHERE is not set"]),
        ("$EMPTY/x", ["the environment variable EMPTY is not set"]),
        ("${SCRATCH:-x}/x", ["SCRATCH:-x is not set"]),
        ("~nobody-of-that-name/x", ["no home folder ~nobody-of-that-name"]),
    ],
)
def test_no_folder_is_ever_called_so(elsewhere, monkeypatch, call, written, parts):
    """In a file, a word and an option, each named."""
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOWHERE", raising=False)
    mine = elsewhere / "mine.yml"
    mine.write_text(f"log:\n  dir: {written}\n")
    assert_refused(call("prepare.py", mine), str(mine), "log.dir", written, *parts)
    assert_refused(call("prepare.py", "cfg/demo.yml", f"data.dir={written}"), f"'data.dir={written}'", *parts)
    assert_refused(call("sample.py", "cfg/demo.yml", "a red star", "--out", written), written, *parts)
    assert_refused(call("test.py", "cfg/demo.yml", "--images", written), written, *parts)
    mine.write_text(f"log:\n  dir: {written}\n")
    assert config.load(mine, ["log.dir=logs"]).log.dir == "logs"  # what another setting replaces does no harm


def test_what_earlier_versions_left_in_such_a_folder_is_not_passed_over(elsewhere, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", elsewhere / "repository")
    left = elsewhere / "repository/~/saved"
    left.mkdir(parents=True)
    (elsewhere / "mine.yml").write_text("log:\n  save_dir: ~/saved\n")
    with pytest.raises(UserError, match=re.escape(f"move {left} there")):
        config.load("mine.yml")
    left.rename(elsewhere.parent / "home/saved")
    assert config.load("mine.yml").log.save_dir == f"{elsewhere.parent}/home/saved"


def test_what_a_run_keeps_means_the_same_from_any_folder(elsewhere, monkeypatch):
    (elsewhere / "mine.yml").write_text("data:\n  dir: data/birds\n")
    first = config.load("mine.yml", ["log.dir=logs", f"log.save_dir={ROOT}/saved", "clip.weights=../c.pt"])
    assert (first.log.dir, first.data.dir) == ("logs", f"{ROOT}/data/birds")
    kept = config.settings_of(first)
    assert kept["data.dir"] == "data/birds" and kept["log.save_dir"] == "saved"
    assert kept["log.dir"] == f"{elsewhere}/logs" and kept["clip.weights"] == f"{elsewhere.parent}/c.pt"
    (elsewhere / "mine.yml").write_text(config.dump(first))
    for folder in (ROOT, ROOT / "cfg", elsewhere.parent):
        monkeypatch.chdir(folder)
        again = config.load(elsewhere / "mine.yml")
        assert config.settings_of(again) == kept
        tree = config.unflatten(config.from_kept(kept))
        assert tree == {group: again[group] for group in tree}
        assert again.data.dir == ("data/birds" if folder == ROOT else f"{ROOT}/data/birds")


def test_a_link_is_not_taken_away_from_under_a_path(elsewhere):
    (elsewhere / "far/away").mkdir(parents=True)
    (elsewhere / "link").symlink_to("far/away")
    (elsewhere / "link/../x").touch()
    assert paths.full("link/../x").samefile(elsewhere / "far/x") and paths.full("far/../x") == elsewhere / "x"


@pytest.fixture(scope="module")
def project(tmp_path_factory, clip_file):
    """A folder of one's own with a configuration, 20 pictures, and files that are called as modules of Python are."""
    folder = tmp_path_factory.mktemp("own") / "my project"
    for kind in ("images", "text"):
        (folder / "pics" / kind).mkdir(parents=True)
    for number in range(20):
        Image.new("RGB", (20, 24), (12 * number, 9, 90)).save(folder / f"pics/images/{number}.png")
        (folder / f"pics/text/{number}.txt").write_text(f"a square of shade {number}\n")
    for name in ("random", "re", "torch", "logging", "ratlip", "config"):
        (folder / f"{name}.py").write_text("raise SystemExit('a file of the caller was imported')")
    small = "model: {imsize: 16, d_channels: 16, nf: 16}\ntrain: {max_epoch: 1, precision: fp32}\n"
    (folder / "mine.yml").write_text(f"data: {{layout: folder, num_workers: 0}}\neval: {{samples: 6}}\n{small}")
    (folder / "clip.pt").symlink_to(clip_file)
    return folder


def script(folder: Path, name: str, *words: object, processes: int = 1) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "GPUS": str(processes)}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "CDPATH": str(ROOT.parent)}
    return subprocess.run(
        ["bash", os.path.relpath(ROOT / "scripts" / name, folder), *map(str, words)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


WORDS = ("mine.yml", "clip.weights=clip.pt", "data.dir=pics", "eval.metrics=[clip_score]", "log.dir=my logs",
         "log.save_dir=saved")  # fmt: skip


@pytest.mark.parametrize("processes", [1, 2])
def test_scripts_called_from_a_folder_of_ones_own(project, processes):
    """With paths as the shell completes them there; what is printed can be used there."""
    before = {path.name for path in ROOT.iterdir()}
    if processes == 1:
        prepared = script(project, "prepare.sh", *WORDS)
        assert prepared.returncode == 0 and "caption embeddings  pics/cache" in prepared.stdout, prepared.stderr
    trained = script(project, "train.sh", *WORDS, f"train.seed={processes}", processes=processes)
    assert trained.returncode == 0, trained.stderr
    (saved,) = re.findall(r"^checkpoints  (saved/.*)$", trained.stdout, re.MULTILINE)
    (logs,) = re.findall(r"^logs, grids  (my logs/.*)$", trained.stdout, re.MULTILINE)
    assert (project / logs / "metrics.jsonl").is_file()
    state = project / saved / "state_epoch_001.pth"
    assert checkpoint.read(state)["config"]["data.dir"] == str(project / "pics")
    tested = script(project, "test.sh", *WORDS, state.relative_to(project), processes=processes)
    assert tested.returncode == 0, tested.stderr
    (kept,) = re.findall(r"^kept in (my logs/.*)$", tested.stdout, re.MULTILINE)
    assert (project / kept).is_dir()
    assert {path.name for path in ROOT.iterdir()} == before


def test_sampling_from_a_folder_of_ones_own(project):
    """The repository's configuration by the name it has there, and the caller's own, which comes first."""
    shipped = script(project, "sample.sh", "cfg/demo.yml", "a small red star", "--n", 1)
    assert shipped.returncode == 0, shipped.stderr
    assert f"{ROOT}/assets/demo/generator.pth: ratlip" in shipped.stdout
    assert list((project / "samples").rglob("*small-red-star*.png"))
    given = ("--checkpoint", "best of all.pth", "--n", 1, "--out", "drawn/here")
    (project / "best of all.pth").symlink_to(ROOT / "assets/demo/generator.pth")
    drawn = script(project, "sample.sh", "cfg/demo.yml", "a small red star", *given)
    assert drawn.returncode == 0 and "best of all.pth: ratlip" in drawn.stdout, drawn.stderr
    assert list((project / "drawn/here").rglob("*.png"))
    scored = script(project, "test.sh", *WORDS, "--images", "pics/images", "--against", "pics/images",
                    "eval.metrics=[fd_clip]")  # fmt: skip
    assert scored.returncode == 0 and "pictures of pics/images" in scored.stdout, scored.stderr

    (project / "cfg").mkdir()
    (project / "cfg/demo.yml").write_text("model: {shipped: null}\n")
    (project / "draw").symlink_to(ROOT / "scripts/sample.sh")
    own = script(project, project / "draw", "cfg/demo.yml", "a small red star", "--n", 1)
    assert_refused(own, "nothing has been trained", f"bash {ROOT}/scripts/train.sh cfg/demo.yml")


@pytest.mark.parametrize(
    ("name", "words", "place"),
    [
        ("train.sh", ["nothing.yml"], "nothing.yml"),
        ("sample.sh", ["cfg/demo.yml", "a red star", "--checkpoint", "nothing.pth"], "nothing.pth"),
        ("test.sh", ["cfg/demo.yml", "--images", "nowhere"], "nowhere"),
    ],
)
def test_the_place_that_was_looked_at_is_named_in_full(project, name, words, place):
    assert_refused(script(project, name, *words), f"{project}/{place}")
