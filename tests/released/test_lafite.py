"""Published LAFITE files: read to the last bit, with the program text in them never run, and what is wrong named."""

import pickle
import pickletools
import re

import clip.model
import pytest
import torch
from data import fill
from helpers import SALT, fixture_input, released_weights
from released_lafite import answers, as_module

from ratlip.encoders.clip_towers import FrozenClip
from ratlip.errors import UserError
from ratlip.metrics.frechet import Gaussian, Moments, frechet_distance
from ratlip.released import lafite


@pytest.fixture(scope="module")
def weights():
    """Flat state dicts of the small published networks."""
    return {name: released_weights(f"lafite64.{name}") for name in ("G", "D")}


@pytest.fixture(scope="module")
def some_clip() -> FrozenClip:
    """Of which only the embedding's length counts."""
    return FrozenClip(clip.model.CLIP(512, 32, 1, 64, 16, 16, 49408, 64, 1, 1))


@pytest.mark.parametrize("key", ["old", "new"])
def test_tensors_to_the_last_bit(key, tmp_path):
    path = tmp_path / "network-snapshot-000000.pkl"
    path.write_bytes(answers()[f"pickle.{key}"].tobytes())
    assert lafite.is_pickle(path)
    content = lafite.read(path)  # its program text would raise SystemExit
    assert lafite.is_released(content)
    counts = []
    for name in ("G", "D", "G_ema"):
        found = lafite.tensors_of(content[name], name)
        counts.append(len(found))
        for key, tensor in found.items():
            expected = torch.as_tensor(fill.tensor(key, tuple(tensor.shape), SALT, True))
            assert torch.equal(tensor, expected), key
    assert counts == [12, 2, 12]
    assert "was executed" not in repr(content)  # the text is nowhere in what was read


def test_a_planted_call_is_refused(tmp_path):
    """The file with one global's name changed for another of the same length."""
    content = answers()["pickle.new"].tobytes()
    names = [argument for code, argument, _ in pickletools.genops(content) if isinstance(argument, str)]
    assert "_reconstruct_persistent_obj" in names
    planted = content.replace(b"torch_utils.persistence", b"torch_utils.persistenc3")
    (tmp_path / "planted.pkl").write_bytes(planted)
    with pytest.raises(UserError, match=r"planted\.pkl: refused: it asks for torch_utils\.persistenc3\._reconstruct"):
        lafite.read(tmp_path / "planted.pkl")


def test_files_of_something_else(tmp_path):
    path = tmp_path / "other.pkl"
    path.write_bytes(pickle.dumps({"G": 1}, protocol=4))
    with pytest.raises(UserError, match=r"other\.pkl: not a released LAFITE checkpoint: it has no G_ema"):
        lafite.read(path)
    path.write_bytes(answers()["pickle.old"].tobytes()[:9000])
    with pytest.raises(UserError, match=r"other\.pkl: no pickle that can be read, or cut short"):
        lafite.read(path)
    with pytest.raises(UserError, match="no checkpoint .*missing.pkl"):
        lafite.read(tmp_path / "missing.pkl")
    torch.save({"model": {}}, tmp_path / "zip.pkl")
    assert not lafite.is_pickle(tmp_path / "zip.pkl") and not lafite.is_pickle(tmp_path / "missing.pkl")


def test_settings_are_told_from_the_shapes(weights, some_clip):
    content = {"G_ema": as_module(weights["G"], conv_clamp=256), "D": as_module(weights["D"], conv_clamp=256)}
    generator, discriminator, info = lafite.load_networks(content, some_clip.clip)
    expected = {"system": "LAFITE", "imsize": 64, "z_dim": 512, "cond_dim": 512, "base": 2048, "most": 64}
    expected |= {"depth": 8, "structure": 2, "change": 64, "clamp": 256, "normalize": False}
    assert info == expected
    assert not generator.training and not discriminator.training
    assert lafite.describe(info) == (
        "released LAFITE, imsize 64, z_dim 512, cond_dim 512, base 2048, most 64, structure 2"
    )
    assert lafite.read_settings(released_weights("lafite.G"))["base"] == 32768
    generator, discriminator, _ = lafite.load_networks({"G_ema": content["G_ema"]}, some_clip)
    assert discriminator is None
    with pytest.raises(UserError, match="the checkpoint has no G$"):
        lafite.load_networks(content, some_clip, averaged=False)


@pytest.mark.parametrize("structure", [0, 3])
def test_other_structures(structure, weights, some_clip):
    """affine(w) + affine(u), or affine(w) alone: made from the small networks by names."""
    made = {}
    for key, value in weights["G"].items():
        name, leaf = key.rpartition(".")[::2]
        if name.endswith("affine_0"):
            made[f"{name.removesuffix('_0')}.{leaf}"] = value[:, :512] if leaf == "weight" else value
            value = value[:, 512:] if leaf == "weight" else value
        if structure == 0 or not re.search(r"\.(affine|pre)_\d\.", key):
            made[key] = value
    generator, _, info = lafite.load_networks({"G_ema": as_module(made)}, some_clip)
    assert info["structure"] == structure and info["clamp"] is None
    with torch.no_grad():
        one, other = (generator(torch.ones(1, 512), condition) for condition in torch.randn(2, 1, 512))
    assert torch.equal(one, other) == (structure == 3)  # which reads no condition


def test_released_frechet_distance():
    """Their covariance is divided by n, ours by n - 1."""
    one, other = fixture_input("lafite.fida", 64, 8).double(), 1.5 * fixture_input("lafite.fidb", 48, 8).double() + 0.3
    gaussians = []
    for features in (one, other):
        moments = Moments(8)
        moments.update(features)
        gaussian = moments.gaussian()
        gaussians.append(Gaussian(gaussian.mean, gaussian.covariance * (len(features) - 1) / len(features)))
    assert frechet_distance(*gaussians) == pytest.approx(float(answers()["fid"]), rel=1e-7)


def without(weights: dict, key: str) -> dict:
    return {name: value for name, value in weights.items() if name != key}


def test_the_first_thing_wrong_is_named(weights, some_clip):
    def load(change=lambda g: g, d=None, of=some_clip):
        content = {"G_ema": as_module(change(weights["G"]))}
        lafite.load_networks(content | ({"D": as_module(d)} if d else {}), of, "x.pkl")

    with pytest.raises(UserError, match=r"x\.pkl: G_ema has no synthesis\.b16\.conv1\.pre_0\.weight"):
        load(lambda g: without(g, "synthesis.b16.conv1.pre_0.weight"))
    with pytest.raises(UserError, match=r"G_ema has a key that no released network has: extra"):
        load(lambda g: {**g, "extra": torch.zeros(1)})
    with pytest.raises(UserError, match=r"D has no b4\.fts\.bias"):
        load(d=without(weights["D"], "b4.fts.bias"))
    with pytest.raises(UserError, match=r"G_ema draws at sides \[4, 8, 32, 64\]"):
        load(lambda g: without(g, "synthesis.b16.torgb.bias"))
    with pytest.raises(UserError, match="by no rule of a released network"):
        load(lambda g: {**g, "synthesis.b16.conv1.bias": torch.zeros(7)})
    with pytest.raises(UserError, match="CLIP of embedding 512, clip.weights has 64; .*ViT-B/32 or ViT-B/16"):
        load(of=FrozenClip(clip.model.CLIP(64, 32, 1, 64, 16, 16, 49408, 64, 1, 1)))
    with pytest.raises(UserError, match="not a released LAFITE checkpoint"):
        lafite.load_networks({"generator": {}}, some_clip)
