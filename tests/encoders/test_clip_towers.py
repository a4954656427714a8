"""The frozen CLIP towers against the released systems' numbers and OpenAI's own forward pass."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TINY_RUN, assert_refused, fixture_input, relative_error, run, save_stated, small_clip_model
from safetensors.torch import save_file

from ratlip import checkpoint
from ratlip.clips.files import filled
from ratlip.data import captions, demo
from ratlip.data.loader import to_floats
from ratlip.encoders.clip_towers import (
    MEAN,
    STD,
    FrozenClip,
    default_feature_blocks,
    default_prompt_blocks,
    load_clip,
    require_same,
    trained_with,
)
from ratlip.errors import UserError
from ratlip.metrics.features import ClipSpace

CAPTIONS = (
    "this bird has a grey body color with a few patches of brown on its crown and coverts",
    "a photo",
)


@torch.no_grad()
def test_released_image_tower(vitb32, fixtures):
    images = fixture_input("image", 2, 3, 256, 256).tanh()
    maps, embedding = vitb32.image(images)
    assert relative_error(embedding, fixtures["img.emb"]) < 1e-4
    assert relative_error(maps.mean((3, 4)), fixtures["img.local.mean"]) < 1e-4
    assert relative_error(maps[:, :, :8], fixtures["img.local.slice"]) < 1e-4
    assert relative_error(vitb32.clip_input(images)[:, :, ::27, ::27], fixtures["clip_input.released.slice"]) < 1e-5


@torch.no_grad()
def test_released_text_tower(vitb32, fixtures):
    sentence, words = vitb32.text(vitb32.tokenize(CAPTIONS))
    assert relative_error(sentence, fixtures["txt.sent"]) < 1e-4
    assert relative_error(words[:, :16, :32], fixtures["txt.words.slice"]) < 1e-4


@pytest.mark.parametrize(
    ("resolution", "patch", "width", "layers"), [(64, 16, 64, 4), (48, 8, 128, 1), (32, 32, 64, 3)]
)
@torch.no_grad()
def test_any_vit_equals_openai(resolution, patch, width, layers):
    model = small_clip_model(resolution, patch, width, layers)
    ours = FrozenClip(model)
    images = torch.rand(2, 3, resolution, resolution) * 2 - 1
    prepared = (images * 0.5 + 0.5 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    maps, embedding = ours.image(images)
    assert relative_error(embedding, model.encode_image(prepared)) < 1e-5
    assert maps.shape == (2, len(ours.feature_blocks), width, resolution // patch, resolution // patch)
    assert torch.equal(ours.feature_maps(images), maps)
    tokens = ours.tokenize(["a red bird", "two green birds " * 40])  # the second is cut
    assert relative_error(ours.text(tokens)[0], model.encode_text(tokens)) < 1e-5


@pytest.mark.parametrize("side", [64, 48])  # CLIP's own, and one that is resized
def test_bfloat16_is_float32_rounded(small_clip, side):
    """Embeddings, feature maps and the gradient of the pictures; bfloat16 has 8 bits."""
    torch.manual_seed(0)
    images, found = torch.rand(3, 3, side, side) * 2 - 1, {}
    for enabled in (False, True):
        seen = images.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            maps, embedding = small_clip.image(seen.bfloat16() if enabled else seen)  # as generators draw them
        (maps.float().square().mean() + embedding.float().square().mean()).backward()
        found[enabled] = maps, embedding, seen.grad
    for one, other in zip(found[True], found[False], strict=True):
        assert relative_error(one.float(), other) < 0.03


@torch.no_grad()
def test_mapper_puts_a_prompt_before_its_block_and_drops_it_after():
    model = small_clip_model()
    ours = FrozenClip(model, prompt_blocks=[1, 2])
    features, prompts = torch.randn(2, 64, 4, 4), torch.randn(2, 2, 64)
    visual = model.visual
    x = torch.cat([visual.class_embedding.expand(2, 1, -1), features.flatten(2).transpose(1, 2)], dim=1)
    x = visual.ln_pre(x + visual.positional_embedding).transpose(0, 1)  # OpenAI's blocks want (tokens, B, W)
    for i, block in enumerate(visual.transformer.resblocks):
        x = block(torch.cat([x, prompts[None, :, i - 1]]))[:-1] if i in (1, 2) else block(x)
    expected = x[1:].permute(1, 2, 0).reshape(2, 64, 4, 4)
    assert relative_error(ours.mapper(features, prompts), expected) < 1e-5


def test_standard_input_is_antialiased_bicubic(small_clip):
    images = torch.rand(1, 3, 96, 96) * 2 - 1
    resized = F.interpolate((images + 1) / 2, (64, 64), mode="bicubic", antialias=True)
    expected = (resized - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert relative_error(small_clip.clip_input(images), expected) < 1e-6


def test_default_blocks_are_the_released_ones_and_scale():
    assert default_feature_blocks(12) == (1, 4, 8)
    assert default_prompt_blocks(12) == (1, 2, 3, 4, 5, 6, 7, 8)
    assert default_feature_blocks(4) == (0, 1, 2)
    assert default_prompt_blocks(4) == (1, 2)
    assert default_feature_blocks(24) == (3, 9, 17)
    for depth in range(1, 33):
        features, prompts = default_feature_blocks(depth), default_prompt_blocks(depth)
        assert 0 <= min(features) and max(features) < depth
        assert all(0 < block < depth for block in prompts)


def test_stays_frozen(small_clip):
    small_clip.train()
    assert not small_clip.training and not small_clip.clip.training
    images = torch.zeros(1, 3, 64, 64, requires_grad=True)
    small_clip.image(images)[1].sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in small_clip.parameters())


@torch.no_grad()
def test_without_its_text_tower_images_stay():
    clip, images = FrozenClip(small_clip_model()), torch.rand(1, 3, 64, 64)
    before, count = clip.image(images)[1], sum(p.numel() for p in clip.parameters())
    clip.drop_text_tower()
    assert torch.equal(clip.image(images)[1], before)
    assert sum(p.numel() for p in clip.parameters()) < count - 49408 * 64  # the token embedding alone


def test_files_that_are_not_a_clip_are_named(tmp_path):
    for name, content in (("text.pt", b"hello"), ("empty.pt", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            load_clip(str(tmp_path / name))
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt is not a CLIP"):
        load_clip(str(tmp_path / "other.pt"))
    with pytest.raises(UserError, match="no file 'nowhere.pt'"):
        load_clip("nowhere.pt")


@pytest.mark.parametrize("blocks", [[], [4], [1, 1], [2, 1], [-1]])
def test_impossible_blocks_are_refused(clip_file, blocks):
    with pytest.raises(UserError, match="clip.feature_blocks"):
        load_clip(str(clip_file), feature_blocks=blocks)


@pytest.fixture(scope="module")
def trained(demo_folder, clip_file, tmp_path_factory):
    """Words of a small run, after it; its checkpoint; and another CLIP of the same shapes."""
    folder = tmp_path_factory.mktemp("trained")
    places = (f"log.dir={folder}/logs", f"log.save_dir={folder}/saved", f"data.dir={demo_folder}")
    words = ["cfg/demo.yml", *TINY_RUN, *places, "data.layout=folder", "model.imsize=16", "eval.metrics=[clip_score]"]
    result = run("train.py", *words, f"clip.weights={clip_file}")
    assert result.returncode == 0, result.stderr
    (state,) = folder.glob("saved/demo/*/state_epoch_001.pth")
    weights = small_clip_model().state_dict()
    weights["text_projection"] += 0.1
    save_stated(weights, folder / "other.pt")
    return words, state, folder / "other.pt"


def test_a_checkpoint_knows_its_clip(trained, clip_file, tmp_path, call):
    """Another CLIP of the same shapes is refused wherever a checkpoint is used, unless it is insisted on."""
    words, state, other = trained
    weights = load_clip(str(clip_file)).clip.state_dict()
    save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / "same.safetensors",
              {"activation": "quick_gelu"})  # fmt: skip
    uses = {
        "sample.py": [words[0], "a red bird", "--checkpoint", state, "--n", 1, "--out", tmp_path],
        "test.py": [*words, state],
        "train.py": [*words, "train.resume=auto", "train.max_epoch=2"],
    }
    for script, use in uses.items():
        assert_refused(call(script, *use, f"clip.weights={other}"), "another CLIP (checksum ", "clip.insist=true")
        same = call(script, *use, f"clip.weights={tmp_path}/same.safetensors")
        assert same.returncode == 0 and "another CLIP" not in same.stdout, same.stderr
        insisted = call(script, *use, "train.max_epoch=3", f"clip.weights={other}", "clip.insist=true")
        assert insisted.returncode == 0 and "as clip.insist says (checksum " in insisted.stdout, insisted.stderr
    stored = checkpoint.read(state.with_name("state_epoch_003.pth"))["clip"]
    assert stored == load_clip(str(other)).identity  # what it goes on with from there


def test_what_is_said_of_another_clip(small_clip, clip_file):
    then = small_clip.identity
    assert require_same(small_clip, then, "it", insist=False) == ""
    for key, value in (("activation", "gelu"), ("mean", [0.5] * 3), ("heads", [2, 1]), ("resize", "bilinear")):
        with pytest.raises(UserError, match=rf"it was trained with another CLIP \({key} "):
            require_same(small_clip, {**then, key: value}, "it", insist=False)
        assert key in require_same(small_clip, {**then, key: value}, "it", insist=True)
    with pytest.raises(UserError, match="it was trained with a CLIP of embedding 32"):
        require_same(small_clip, {**then, "embedding": 32}, "it", insist=True)


def test_checkpoints_of_before_know_shapes(small_clip, clip_file):
    """Those computed with OpenAI's activation and normalisation, where the CLIP came by clip.source=openai."""
    before = {"clip": small_clip.shape, "config": {"clip.source": "openai"}}
    said = require_same(small_clip, trained_with(before), "it", insist=False)
    assert "only shapes could be compared" in said
    bare = dict(torch.load(clip_file, weights_only=True))
    gelu = FrozenClip(filled(bare, "gelu"))
    with pytest.raises(UserError, match=r"another CLIP \(activation quick_gelu, here gelu\)"):
        require_same(gelu, trained_with(before), "it", insist=False)
    unknown = {**before, "config": {"clip.source": "open_clip"}}
    assert "only shapes" in require_same(gelu, trained_with(unknown), "it", insist=False)
    with pytest.raises(UserError, match=r"mean \[0\.481455, .*here \[0\.5"):
        require_same(FrozenClip(filled(bare, "gelu"), mean=[0.5] * 3), trained_with(unknown), "it", insist=False)


def test_the_shipped_checkpoint_knows_the_shipped_clip():
    found = load_clip("assets/demo/clip.pt").identity
    assert checkpoint.read("assets/demo/generator.pth")["clip"] == found and len(found["checksum"]) == 64
    import clip

    assert clip.load("assets/demo/clip.pt", device="cpu", jit=False)[0].visual.input_resolution == 64


def test_the_shipped_judge_is_another_clip_that_knows_the_demo():
    """It finds the shape, colour, size, place and background of a picture among all, and is no larger than 8 MB."""
    judge, other = load_clip("assets/demo/judge.pt"), load_clip("assets/demo/clip.pt")
    assert judge.settings["activation"] == "quick_gelu" and Path("assets/demo/judge.pt").stat().st_size <= 8e6
    assert (judge.resolution, judge.width, judge.depth) != (other.resolution, other.width, other.depth)
    rng, asked = np.random.default_rng(0), demo.splits()[1][:100]
    images = to_floats(torch.from_numpy(demo.render(asked, rng)).permute(0, 3, 1, 2))
    seen = F.normalize(judge.image(images)[1], dim=1)
    for field, (name, values) in enumerate(zip(demo.Attributes._fields, demo.VALUES, strict=True)):
        options = [a._replace(**{name: value}) for a in asked for value in range(len(values))]
        texts = [demo.captions(attributes, rng, 1)[0] for attributes in options]
        sentences = F.normalize(judge.text(judge.tokenize(texts))[0], dim=1).unflatten(0, (len(asked), -1))
        guessed = (sentences @ seen[:, :, None])[..., 0].argmax(1)
        assert (guessed == torch.tensor(asked)[:, field]).float().mean() > 0.9, name


def test_caches_tell_activation_and_normalisation_apart(clip_file, tmp_path):
    """OpenAI's keep the names that they had; all others have their own."""
    bare = dict(torch.load(clip_file, weights_only=True))
    clips = {
        "openai": FrozenClip(filled(bare, "quick_gelu")),
        "gelu": FrozenClip(filled(bare, "gelu")),
        "mean": FrozenClip(filled(bare, "quick_gelu"), mean=[0.5] * 3),
        "bilinear": FrozenClip(filled(bare, "quick_gelu"), resize="bilinear"),
        "heads": FrozenClip(filled(bare, "quick_gelu", (2, 2))),
    }
    spaces = {name: ClipSpace(None, clip) for name, clip in clips.items()}
    assert len({space.statistics for space in spaces.values()}) == len({s.protocol for s in spaces.values()}) == 5
    digest = hashlib.sha256()
    for weight in clips["openai"].clip.visual.state_dict().values():
        digest.update(weight.numpy().tobytes())
    assert spaces["openai"].statistics == f"fd_clip-standard-{digest.hexdigest()[:8]}"
    assert spaces["openai"].protocol == "CLIP image embedding, standard input"
    assert "activation gelu" in spaces["gelu"].protocol and "mean [0.5, 0.5, 0.5]" in spaces["mean"].protocol

    table, files = captions.CaptionTable([["a red bird"]]), []
    for name, clip in clips.items():
        captions.embed(table, clip, tmp_path / name)
        files += [path.name for path in (tmp_path / name).glob("captions_*.pt")]
    assert len(files) == 5 and len(set(files)) == 3  # only activation and heads are the text tower's
    text = hashlib.sha256(b"a red bird")
    for key, weight in clips["openai"].clip.state_dict().items():
        if not key.startswith("visual."):
            text.update(weight.numpy().tobytes())
    assert files[0] == f"captions_{text.hexdigest()[:16]}.pt"
