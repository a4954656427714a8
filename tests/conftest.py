"""Fixtures: the released systems' numbers, CLIPs, and a data set of a few pictures."""

import runpy
import signal
import subprocess
import sys
from pathlib import Path

import clip.model
import numpy as np
import pytest
import torch
from helpers import ROOT, TINY_RUN, random_inception, released_weights, save_stated, small_clip_model
from PIL import Image

from ratlip.data import demo
from ratlip.encoders.clip_towers import FrozenClip, load_clip

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, by the programs that tests start too


@pytest.fixture(scope="session")
def fixtures() -> dict[str, np.ndarray]:
    """What the released systems answer."""
    return dict(np.load(ROOT / "tests" / "data" / "fixtures.npz"))


@pytest.fixture(scope="session")
def dfgan_answers() -> dict[str, np.ndarray]:
    """What the released DF-GAN and RAT-GAN answer."""
    return dict(np.load(ROOT / "tests" / "data" / "dfgan" / "fixtures.npz"))


@pytest.fixture(scope="session")
def vitb32() -> FrozenClip:
    """ViT-B/32 with the fixtures' weights, read with the released preprocessing."""
    weights = released_weights("clip.vitb32")
    model = clip.model.build_model(dict(weights)).float()
    model.load_state_dict(weights)  # again: build_model rounds to half precision
    return FrozenClip(model, preprocess="released")


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory) -> Path:
    """A small CLIP's state dict, as clip.load opens it; it states its activation."""
    path = tmp_path_factory.mktemp("clip") / "small.pt"
    save_stated(small_clip_model().state_dict(), path)
    return path


@pytest.fixture(scope="session")
def judge_file(tmp_path_factory) -> Path:
    """A CLIP of another shape than those that generators read; a bare state dict, which states no activation."""
    path = tmp_path_factory.mktemp("judge") / "judge.pt"
    torch.save({**small_clip_model(resolution=32, patch=8, layers=2).state_dict()}, path)
    return path


@pytest.fixture(scope="session")
def small_clip(clip_file) -> FrozenClip:
    """The small CLIP, loaded."""
    return load_clip(str(clip_file))


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory) -> Path:
    """A folder data set of 12 training and 6 test pictures of the demo."""
    folder = tmp_path_factory.mktemp("data") / "few"
    rng = np.random.default_rng(0)
    for split, combinations in zip(("train", "test"), demo.splits(), strict=True):
        keys = []
        for number, attributes in enumerate(combinations[: {"train": 12, "test": 6}[split]]):
            keys.append(f"{split}/{number}")
            for kind in ("images", "text"):
                (folder / kind / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(demo.render([attributes], rng)[0]).save(folder / "images" / f"{keys[-1]}.png")
            (folder / "text" / f"{keys[-1]}.txt").write_text("\n".join(demo.captions(attributes, rng, 3)))
        (folder / f"{split}.txt").write_text("\n".join(keys))
    return folder


@pytest.fixture
def data_words(clip_file, tmp_path):
    """data_words(place, *more, layout="folder"): a configuration file of a data set, and overrides for a small run."""

    def data_words(place: object, *more: str, layout: str = "folder") -> list[str]:
        mine = tmp_path / "mine.yml"
        mine.write_text(f"data:\n  layout: {layout}\n  dir: '{place}'\nmodel:\n  imsize: 16\n")
        places = (f"log.dir={tmp_path}/logs", f"log.save_dir={tmp_path}/saved", f"clip.weights={clip_file}")
        return [str(mine), *TINY_RUN, *places, "train.device=cpu", "eval.sample_times=1", *more]

    return data_words


@pytest.fixture
def call(monkeypatch, capfd):
    """call("prepare.py", *words): `helpers.run` of an entry point inside this process, which saves its start."""

    def call(script: str, *words: object) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        monkeypatch.chdir(ROOT)
        capfd.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / "code" / script), run_name="__main__")
        except SystemExit as exit:
            code = exit.code
        return subprocess.CompletedProcess([script, *words], code, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory) -> Path:
    """Random weights as a file of torch-fidelity's Inception."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(random_inception(), path)
    return path
