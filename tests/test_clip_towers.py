"""The frozen CLIP towers against the released systems' numbers and OpenAI's own forward pass."""

import pytest
import torch
import torch.nn.functional as F
from helpers import fixture_input, relative_error, small_clip_model

from ratlip.clip_towers import MEAN, STD, FrozenClip, default_feature_blocks, default_prompt_blocks, load_clip
from ratlip.errors import UserError

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
