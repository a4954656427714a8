"""README.md and CONTRIBUTING.md: what they tell to type works, and what they say of the program is so."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY_RUN, assert_refused
from PIL import Image
from torch import nn

from ratlip import checkpoint, config, losses
from ratlip import device as devices
from ratlip.data import layouts
from ratlip.metrics.metric import Metric, Scored
from ratlip.systems import SYSTEMS
from ratlip.systems.system import Phase, System

README, CONTRIBUTING = ((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))

# README's commands that are not run below, and the tests that run the same script and words on something small.
ELSEWHERE = {
    r"bash scripts/check\.sh": ".ci/run",
    r"bash scripts/prepare\.sh cfg/bird\.yml --resize .*": "tests/test_preparation.py::test_a_second_run_does_nothing",
    r"bash scripts/prepare\.sh cfg/bird\.yml .*": "tests/test_preparation.py::test_the_table_and_the_cache",
    r"(GPUS=2 )?bash scripts/train\.sh cfg/bird\.yml": "tests/test_distributed.py::test_two_processes_train_as_one",
    r"bash scripts/resume\.sh cfg/bird\.yml": "tests/test_distributed.py::test_two_processes_stop_together_and_resume",
    r"bash scripts/resume\.sh saved_models/bird/\S+": "tests/test_runs.py::test_the_printed_command_goes_on",
    r"bash scripts/resume\.sh cfg/bird\.yml state_epoch=120": "tests/test_resume.py::test_resuming_picks_an_epoch",
    r"sbatch scripts/slurm\.sbatch cfg/bird\.yml": "tests/test_scripts.py::test_all_scripts_parse",
    r"bash scripts/test\.sh cfg/bird\.yml": "tests/test_evaluation.py::test_statistics_are_made_once",
    r"bash scripts/test\.sh cfg/\w+\.yml \S+\.pth .*": "tests/test_evaluation.py::test_a_released_checkpoint_is_scored",
    r"bash scripts/sample\.sh cfg/bird\.yml --captions .*": "tests/test_sampling.py::test_captions_from_a_file",
    r"bash scripts/test\.sh .* --images .*": "tests/test_evaluation.py::test_folders_score_as_torch_fidelity_says",
    r"bash scripts/pretrain\.sh cfg/bird\.yml": "tests/test_pretraining.py::test_a_run_leaves_a_pair",
    r"bash scripts/train\.sh .* text\.weights=.*": "tests/test_pretraining.py::test_a_generator_reads_the_pair",
    r"bash scripts/train\.sh cfg/bird\.yml model\.name=dfgan": "tests/systems/test_systems.py::test_a_step_learns",
    r"bash scripts/sample\.sh .* text\.encoder=damsm .*": "tests/test_sampling.py::test_a_released_dfgan",
    r"python code/convert\.py .*": "tests/test_convert.py::test_both_files_draw_the_same_picture",
}


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a language, those inside lists included."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)
    return [re.sub(f"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def commands(text: str) -> list[str]:
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    lines = [" ".join(re.sub(r"\s#.*", "", line).split()) for line in lines]
    return list(dict.fromkeys(line for line in lines if line))


RUN = [command for command in commands(README) if re.search(r"cfg/(demo|mine)\.yml", command)]


def test_every_command_of_the_readme_is_run():
    left = [command for command in commands(README) if command not in RUN]
    assert len(RUN) > 4 and len(left) > 8
    for command in left:
        places = [place for pattern, place in ELSEWHERE.items() if re.fullmatch(pattern, command)]
        assert places, f"README tells to run {command!r}: which test does?"
    for place in ELSEWHERE.values():
        name, _, test = place.partition("::")
        assert f"def {test}" in (ROOT / name).read_text() if test else (ROOT / name).is_file(), place


def test_the_readmes_commands_run_in_order(tmp_path, clip_file):
    """As they stand, with words after them that make them small, in a folder that holds what a clone does."""
    for name in ("assets", "requirements.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("code", "scripts", "cfg"):  # the repository is where the code lies
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (five_lines,) = blocks(README, "yaml")[:1]
    assert len(five_lines.splitlines()) == 5
    (tmp_path / "cfg/mine.yml").write_text(five_lines)
    for kind in ("images", "text"):  # so few pictures as the text allows, and no lists
        (tmp_path / "data/mine" / kind).mkdir(parents=True)
    for number in range(20):
        Image.new("RGB", (40, 30), (12 * number, 255 - 12 * number, 90)).save(
            tmp_path / f"data/mine/images/{number}.png"
        )
        (tmp_path / f"data/mine/text/{number}.txt").write_text(f"a square of shade {number}\n")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "GPUS": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "https_proxy": "http://127.0.0.1:9"}
    tiny = [
        *(word for word in TINY_RUN if "batch_size" not in word),
        f"clip.weights={clip_file}",
        "eval.metrics=[fd_clip]",
    ]
    small = {
        "demo": [*tiny, "train.batch_size=4", "data.layout=folder", "data.dir=data/mine", "model.imsize=16"],
        "mine": tiny,
    }
    order = ("prepare.sh", "train.sh", "resume.sh", "sample.sh", "test.sh")
    ordered = sorted(RUN, key=lambda command: order.index(re.search(r"(\w+\.sh)", command)[1]))
    for command in ordered:
        words = small[re.search(r"cfg/(\w+)\.yml", command)[1]]
        if "sample.sh" in command:
            words = [f"clip.weights={clip_file}", "--n", "1"]
        whole = f"{command} {shlex.join(words)}"
        result = subprocess.run(
            ["bash", "-c", whole], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
        )
        assert result.returncode == 0, (whole, result.stdout, result.stderr)
    assert (tmp_path / "samples/demo_overview.png").is_file() and (tmp_path / "samples/mine").is_dir()


def test_links_lead_somewhere():
    folders = ("data/README.md", "logs/README.md", "saved_models/README.md")
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "docs/running.md",
        "docs/demo.md",
        "docs/evaluation.md",
        "docs/results.md",
        *folders,
    ):
        text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(), flags=re.MULTILINE | re.DOTALL)
        anchors = {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
                   for title in re.findall(r"^#+ (.*)", text, re.MULTILINE)}  # fmt: skip
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            path, _, anchor = target.partition("#")
            assert not path or (ROOT / name).parent.joinpath(path).exists(), (name, target)
            assert not anchor or path or anchor in anchors, (name, target)


def test_contributings_examples_work(tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "LAYOUTS", dict(layouts.LAYOUTS))
    names = {"nn": nn, "torch": torch, "Metric": Metric, "LAYOUTS": layouts.LAYOUTS, "Layout": layouts.Layout}
    names |= {"System": System, "Phase": Phase}
    for block in blocks(CONTRIBUTING, "python"):
        exec(block, names)

    images = torch.stack([torch.zeros(3, 8, 8), torch.cat([torch.ones(3, 4, 8), -torch.ones(3, 4, 8)], dim=1)])
    metric = names["Contrast"](None, 2)
    metric.update(Scored(torch.arange(2), images, None, None))
    assert metric.compute()["contrast"] == pytest.approx(0.5, abs=0.01)

    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "filenames.pickle").write_bytes(b"\x80\x04]\x94\x8c\x03one\x94a.")
    for name, content in (("photos/one.jpg", b""), ("captions/one.txt", b"a car")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(content)
    items, problems = layouts.read_items("cars", tmp_path, "train")
    assert [item.captions for item in items] == [["a car"]] and not problems


def test_contributings_system_trains_resumes_scores_and_samples(demo_folder, clip_file, tmp_path, monkeypatch, call):
    """A seventh one, of its two files and its line."""
    names = {"nn": nn, "torch": torch, "Metric": Metric, "LAYOUTS": {}, "Layout": layouts.Layout}
    names |= {"System": System, "Phase": Phase, "devices": devices, "losses": losses}
    for block in blocks(CONTRIBUTING, "python"):
        exec(block, names)
    shutil.copytree(config.SYSTEMS, tmp_path / "systems")
    (settings,) = blocks(CONTRIBUTING, "yaml")
    (tmp_path / "systems" / "linear.yml").write_text(settings)
    monkeypatch.setattr(config, "SYSTEMS", tmp_path / "systems")
    monkeypatch.setitem(SYSTEMS, "linear", names["Linear"])

    few = ("data.layout=folder", f"data.dir={demo_folder}", "model.imsize=16", "eval.metrics=[clip_score]")
    own = [word for word in TINY_RUN if not word.startswith(("model.d_channels", "clip.feature_blocks"))]
    places = (f"log.dir={tmp_path}/logs", f"log.save_dir={tmp_path}/saved", f"clip.weights={clip_file}")
    words = ["cfg/demo.yml", "model.name=linear", *own, *few, *places, "train.device=cpu", "log.save_interval=1"]
    assert call("train.py", *words).returncode == 0
    result = call("train.py", *words, "train.resume=auto", "train.max_epoch=2")
    assert result.returncode == 0 and "going on from" in result.stdout, result.stderr
    (state,) = tmp_path.glob("saved/demo_linear/*/state_epoch_002.pth")
    assert checkpoint.read(state)["config"]["model.name"] == "linear"
    assert "linear, epoch 2" in call("test.py", *words).stdout
    result = call("sample.py", *words[:2], *places, "a red star", "--n", 2, "--out", tmp_path / "out")
    assert result.returncode == 0 and len(list((tmp_path / "out").glob("*.png"))) == 2, result.stderr
    result = call("train.py", *words, "model.d_whiten=true")
    assert_refused(result, "model.d_whiten is not read by linear, but by galip, ratlip")


FAMILIES = ("clip_gan", "df_gan", "attn_gan", "lafite")
ROOMS = ("systems", "models", "released")


def test_no_family_enters_anothers_rooms():
    """And outside them nobody names one, but for the lists of them."""
    code, lists = ROOT / "code" / "ratlip", {"systems/__init__.py", "released/__init__.py"}
    for path in sorted(code.rglob("*.py")):
        own = next((family for family in FAMILIES if family in (path.stem, path.parent.name)), None)
        imported = re.findall(rf"ratlip\.(?:{'|'.join(ROOMS)})[. ](?:import )?(\w+)", path.read_text())
        others = {family for family in imported if family in FAMILIES and family != own}
        place = str(path.relative_to(code))
        assert not others or place in lists, (place, others)
