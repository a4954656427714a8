"""CLIP files in OpenAI's names: what they state, what they are asked for, and what is refused."""

import clip.model
import pytest
import torch
from helpers import relative_error, save_stated, small_clip_model
from safetensors.torch import save_file

from ratlip.encoders.clip_towers import load_clip
from ratlip.errors import UserError


@pytest.fixture(scope="module")
def model() -> clip.model.CLIP:
    """A small CLIP with weights that half precision holds exactly."""
    return small_clip_model(layers=2).half().float().eval()


def write(model: clip.model.CLIP, path, kind: str, activation: str = "quick_gelu"):
    """One of the formats, which states the activation."""
    weights = model.state_dict()
    if kind == "state dict":
        save_stated(weights, path)
    elif kind == "half":
        weights.update({key: value.half() for key, value in weights.items()})
        save_stated(weights, path)
    elif kind == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file({key: value.contiguous() for key, value in weights.items()}, path, {"activation": activation})
    else:
        inputs = torch.zeros(1, 3, 64, 64), torch.zeros(1, 16, dtype=torch.long)
        torch.jit.trace(model, inputs, check_trace=False).save(path)
    return path


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_every_format_is_the_same_clip(model, tmp_path):
    """The same checksum and, against OpenAI's own forward pass, the same features."""
    identities = []
    images, tokens = torch.rand(1, 3, 64, 64) * 2 - 1, clip.tokenize(["a red bird"], context_length=16)
    for number, kind in enumerate(("state dict", "half", "safetensors", "archive")):
        loaded = load_clip(str(write(model, tmp_path / f"{number}.pt", kind)))
        identities.append(loaded.identity)
        with torch.no_grad():
            assert relative_error(loaded.image(images)[1], model.encode_image(loaded.clip_input(images))) < 1e-5, kind
            assert relative_error(loaded.text(tokens)[0], model.encode_text(tokens)) < 1e-5, kind
    assert all(identity == identities[0] for identity in identities)
    assert identities[0]["activation"] == "quick_gelu"


def test_checksum_is_of_both_towers_and_nothing_else(model, tmp_path):
    found = []
    for key in (None, "logit_scale", "visual.proj", "ln_final.bias"):
        changed = {name: value.clone() for name, value in model.state_dict().items()}
        if key:
            changed[key] += 0.25
        torch.save(changed, tmp_path / "changed.pt")
        found.append(load_clip(str(tmp_path / "changed.pt"), activation="gelu").identity["checksum"])
    assert found[0] == found[1] and len(set(found)) == 3


def test_float32_stays_float32_and_seeds_draw_what_they_drew(tmp_path):
    """`clip.load` rounds to half precision; the random numbers that it takes are taken here too."""
    weights, path = small_clip_model(layers=2).state_dict(), tmp_path / "single.pt"
    save_stated(weights, path)
    torch.manual_seed(3)
    clip.load(str(path), device="cpu", jit=False)
    expected = torch.rand(3)
    torch.manual_seed(3)
    loaded = load_clip(str(path))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, weights[key]) for key, value in loaded.clip.state_dict().items())


def test_a_bare_state_dict_asks_for_its_activation(model, tmp_path):
    torch.save(dict(model.state_dict()), tmp_path / "bare.pt")
    bare = str(tmp_path / "bare.pt")
    with pytest.raises(UserError, match=r"bare\.pt is a bare state dict.*clip\.activation=quick_gelu.*activation=gelu"):
        load_clip(bare)
    quick, gelu = (load_clip(bare, activation=name) for name in ("quick_gelu", "gelu"))
    images = torch.rand(1, 3, 64, 64)
    assert relative_error(quick.image(images)[1], gelu.image(images)[1]) > 1e-3
    assert quick.identity["checksum"] == gelu.identity["checksum"] and quick.identity != gelu.identity
    stated = write(model, tmp_path / "stated.pt", "state dict")
    with pytest.raises(UserError, match=r"clip\.activation is gelu, but .*stated\.pt states quick_gelu"):
        load_clip(str(stated), activation="gelu")
    with pytest.raises(UserError, match=r"clip\.activation is gelu, but OpenAI's ViT-B/32 states quick_gelu"):
        load_clip("ViT-B/32", activation="gelu")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("visual.ln_pre.bias"), r"not a CLIP checkpoint \(it lacks visual\.ln_pre\.bias"),
        (lambda w: w.pop("text_projection"), r"not a CLIP checkpoint \(it lacks 'text_projection'"),
        (lambda w: w.update({"visual.transformer.resblocks.0.ls_1.gamma": torch.ones(64)}), r"ls_1\.gamma, which"),
        (lambda w: w.update({"visual.layer1.0.conv1.weight": torch.ones(1)}), "a ResNet image tower"),
        (lambda w: w.update({"ln_final.weight": torch.ones(32)}), "not a CLIP checkpoint"),
        (lambda w: w.update({"visual.conv1.weight": torch.ones(1280, 3, 16, 16)}), "how many heads"),
        (lambda w: w.update({"token_embedding.weight": torch.ones(49409, 64)}), "another tokenizer .*: 49409 words"),
        (lambda w: w.update({"visual.positional_embedding": torch.ones(18, 64)}), "not a CLIP|not square"),
    ],
)
def test_what_is_not_openais_structure_is_named(model, tmp_path, change, words):
    weights = dict(model.state_dict())
    change(weights)
    torch.save(weights, tmp_path / "odd.pt")
    with pytest.raises(UserError, match=words):
        load_clip(str(tmp_path / "odd.pt"), activation="gelu")


def test_schemes_of_open_clip_are_recognised():
    with pytest.raises(UserError, match="add clip.source=open_clip"):
        load_clip("hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K")
