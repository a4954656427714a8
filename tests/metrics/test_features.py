"""The feature spaces against the released systems' numbers, and weights that are missing or something else."""

import hashlib
import zlib

import numpy as np
import pytest
import torch
from easydict import EasyDict
from helpers import SALT, fixture_input, relative_error, released_weights
from safetensors.torch import save_file
from torchvision.models import inception_v3

from ratlip.encoders.damsm import DamsmText, Vocabulary
from ratlip.encoders.damsm_image import DamsmClip
from ratlip.errors import UserError
from ratlip.metrics import features
from ratlip.metrics.features import (
    ClipSpace,
    DamsmSpace,
    InceptionSpace,
    MissingWeights,
    ReleasedInceptionSpace,
    padded,
    released_inception_input,
)
from ratlip.metrics.metric import Scored
from ratlip.metrics.r_precision import DamsmRPrecision
from ratlip.paths import full

NOWHERE = {"inception_weights": "nowhere.pth", "inception_released_weights": "nowhere.pth"}


@pytest.fixture(scope="module")
def fid_images() -> torch.Tensor:
    """The pictures of the fixtures, some values outside [-1, 1]."""
    random = np.random.RandomState(zlib.crc32(f"{SALT}:input.fidimgs".encode()))
    return torch.from_numpy(random.uniform(-1.5, 1.5, (2, 3, 224, 224)).astype(np.float32))


@pytest.fixture(scope="module")
def released_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(released_weights("inception"), path)
    return path


def test_released_inception_input(fid_images, fixtures):
    found = released_inception_input(fid_images)[:, :, ::23, ::23]
    assert relative_error(found, fixtures["inception.input.slice"]) < 1e-5


def test_released_inception_features(fid_images, fixtures, dfgan_answers, small_clip, released_file):
    """GALIP's and RATLIP's, and DF-GAN's, which is fed in the same way."""
    before = torch.random.get_rng_state()
    settings = EasyDict({"eval": {"inception_released_weights": str(released_file)}})
    space = ReleasedInceptionSpace(settings, small_clip)
    found = space(fid_images)
    assert relative_error(found, fixtures["inception.features"]) < 1e-5
    images = fixture_input("image", 2, 3, 256, 256).tanh()
    assert relative_error(released_inception_input(images)[:, :, ::23, ::23], dfgan_answers["fid.input"]) < 1e-5
    assert relative_error(space(images), dfgan_answers["fid.features"]) < 1e-5
    assert torch.equal(torch.random.get_rng_state(), before)
    assert space.checksum == hashlib.sha256(released_file.read_bytes()).hexdigest()[:8]
    assert "other weights than the published 0cc3c7bd" in space.protocol


@pytest.mark.parametrize("space", [InceptionSpace, ReleasedInceptionSpace])
def test_missing_weights_say_what_to_do(space, small_clip, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = {InceptionSpace: "weights-inception-2015-12-05-6726825d.pth"}.get(space, "inception_v3_google-0cc3c7bd.pth")
    parts = ["https://", name, f"{tmp_path}/hub/checkpoints/{name}", f"sha256 begins {name[-12:-4]}", "set eval.incep"]
    with pytest.raises(MissingWeights) as caught:
        space(EasyDict({"eval": NOWHERE}), small_clip)
    assert all(part in str(caught.value) for part in [*parts, f"no file {full('nowhere.pth')}"]), caught.value


def test_a_download_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MissingWeights, match="download failed"):
        features.find_weights(None, "http://127.0.0.1:9/some-12345678.pth", "eval.inception_weights")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_download_with_another_checksum_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    content = b"weights"
    right, wrong = hashlib.sha256(content).hexdigest()[:8], "12345678"
    for digits in (right, wrong):
        (tmp_path / f"some-{digits}.pth").write_bytes(content)
    path, checksum, note = features.find_weights(None, (tmp_path / f"some-{right}.pth").as_uri(), "key")
    assert path.read_bytes() == content and (checksum, note) == (right, "")
    with pytest.raises(MissingWeights, match="download failed .*invalid hash"):
        features.find_weights(None, (tmp_path / f"some-{wrong}.pth").as_uri(), "key")


@pytest.mark.parametrize("space", [InceptionSpace, ReleasedInceptionSpace])
def test_files_of_something_else_are_named(space, small_clip, clip_file, tmp_path):
    other = tmp_path / "other.pth"
    torch.save(inception_v3(weights=None, num_classes=3, init_weights=False).state_dict(), other)
    text = tmp_path / "text.pth"
    text.write_text("hello")
    for path, part in ((other, "does not hold this Inception's weights"), (text, "is no checkpoint")):
        settings = EasyDict({"eval": {key: str(path) for key in NOWHERE}})
        with pytest.raises(UserError, match=f"{path.name}.*{part}"):
            space(settings, small_clip)


def test_damsm_space_is_that_of_the_pair(small_clip, tmp_path):
    """As it stands in a file of pretrain.sh; and the CLIP that it was made with, if any."""
    torch.manual_seed(0)
    text, image = DamsmText(Vocabulary.of(["a red ring", "a blue star"])).eval(), DamsmClip(small_clip).eval()
    pair = {"vocabulary": text.vocabulary.words, "text": text.state_dict(), "image": image.kept()}
    torch.save({**pair, "clip": small_clip.identity}, tmp_path / "pair.pth")
    about = {"weights": str(tmp_path / "pair.pth"), "vocabulary": None, "words": 18}
    settings = EasyDict({"text": about, "data": {"dir": "."}, "train": {"seed": 0}})
    space = DamsmSpace(settings, small_clip)
    images, captions = torch.rand(3, 3, 64, 64) * 2 - 1, ["a blue ring", "red", "a star"]
    found = space(images)
    assert relative_error(found, image(images)[1]) < 1e-5
    sentences = space.also(found, captions)["damsm_sentences"]
    assert relative_error(sentences, text.encode(text.tokenize(captions))) < 1e-5 and space.also(found, None) == {}
    metric = DamsmRPrecision(None, 3)
    metric.update(Scored(torch.arange(3), images, captions, None, {"damsm": sentences, "damsm_sentences": sentences}))
    scores = {"r_precision_damsm": 1, "r_precision_damsm/std": 0, "r_precision_damsm/candidates": 3}
    assert metric.compute() == scores
    with pytest.raises(UserError, match="'a dog'|'dog' has no word"):
        space.also(found, ["red", "dog", "star"])
    image.emb_cnn_code.weight.data += 1
    torch.save({**pair, "clip": small_clip.identity}, tmp_path / "pair.pth")
    assert DamsmSpace(settings, small_clip).checksum != space.checksum
    settings.text.weights = None
    with pytest.raises(MissingWeights, match="text.weights"):
        DamsmSpace(settings, small_clip)


def test_clip_space_is_known_by_its_weights(small_clip):
    space = ClipSpace(EasyDict(), small_clip)
    images = torch.rand(3, 3, 64, 64) * 2 - 1
    assert relative_error(space(images), small_clip.image(images)[1]) < 1e-5
    assert space.statistics == f"fd_clip-standard-{space.checksum}"
    with torch.no_grad():
        small_clip.clip.visual.proj += 1
        other = ClipSpace(EasyDict(), small_clip)
        small_clip.clip.visual.proj -= 1
    assert other.checksum != space.checksum


@pytest.mark.parametrize(("space", "file", "key"), [
    (InceptionSpace, "inception_file", "inception_weights"),
    (ReleasedInceptionSpace, "released_file", "inception_released_weights"),
])  # fmt: skip
def test_safetensors_are_the_same_weights(space, file, key, small_clip, request, tmp_path):
    path = request.getfixturevalue(file)
    save_file(torch.load(path, weights_only=True), tmp_path / "weights.safetensors")
    held = []
    for named in (path, tmp_path / "weights.safetensors"):
        made = space(EasyDict({"eval": {**NOWHERE, key: str(named)}}), small_clip)
        held.append(next(part for part in vars(made).values() if isinstance(part, torch.nn.Module)).state_dict())
    assert held[0] and all(torch.equal(value, held[1][name]) for name, value in held[0].items())


def test_padding_repeats_the_last_row():
    rows = torch.arange(6.0).view(3, 2)
    assert padded(rows).shape == (16, 2) and torch.equal(padded(rows)[:3], rows)
    assert torch.equal(padded(rows)[3:], rows[-1:].expand(13, 2))
    assert torch.equal(padded(torch.ones(20, 2)), torch.ones(20, 2))
