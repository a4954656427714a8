"""DAMSM's image encoders: the released numbers, their files, and what a CLIP's patches give."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    family_fixtures,
    fixture_input,
    fixture_picture,
    random_inception,
    relative_error,
    released_weights,
)
from torchvision.models import inception_v3

from ratlip.encoders.damsm import DamsmText, Vocabulary
from ratlip.encoders.damsm_image import DamsmClip, DamsmInception, load_damsm_image
from ratlip.encoders.damsm_losses import damsm_losses
from ratlip.errors import UserError


@pytest.fixture(scope="module")
def answers():
    return family_fixtures("attngan")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The text encoder of a published pair, with its image encoder beside it."""
    folder = tmp_path_factory.mktemp("pair")
    for name in ("text", "image"):
        torch.save(released_weights(f"damsm.{name}"), folder / f"{name}_encoder200.pth")
    return folder / "text_encoder200.pth"


@pytest.fixture(scope="module")
def released(files) -> DamsmInception:
    return load_damsm_image(str(files), None).double()


def test_regions_and_codes_are_the_released_ones(released, answers):
    images = fixture_picture("image256", 2, 256).double()
    with torch.no_grad():
        regions, codes = released(images)
    assert not released.training and regions.shape == (2, 256, 17, 17)
    assert relative_error(regions[:, ::8, ::4, ::4], answers["image.regions.slice"]) < 1e-5
    assert relative_error(regions.mean((2, 3)), answers["image.regions.mean"]) < 1e-5
    assert relative_error(codes, answers["image.code"]) < 1e-5
    assert relative_error(codes, answers["image.code.unaligned"]) > 1e-4


def test_batch_statistics_are_the_released_ones(files, answers):
    encoder = load_damsm_image(str(files), None).double().train()
    with torch.no_grad():
        regions, codes = encoder(fixture_picture("image256", 2, 256).double())
    assert relative_error(regions.mean((2, 3)), answers["image.train.regions.mean"]) < 1e-5
    assert relative_error(codes, answers["image.train.code"]) < 1e-5
    moved = encoder.Mixed_7c.branch1x1.bn
    found = torch.stack([moved.running_mean, moved.running_var])
    assert relative_error(found, answers["image.train.running"]) < 1e-5


def test_gradients_of_pictures_are_the_released_ones(released, answers):
    images = fixture_picture("real256", 3, 256).double().requires_grad_()
    real = torch.arange(7) < torch.tensor([7, 5, 2])[:, None]
    words = fixture_input("words3", 3, 256, 7).double() * real[:, None]
    terms = damsm_losses(
        *released(images), words, real, fixture_input("sent3", 3, 256).double(), torch.tensor([4, 9, 4])
    )
    losses = torch.stack(list(terms.values()))
    assert relative_error(losses, answers["damsm.picture.loss"]) < 1e-5
    norms = [torch.autograd.grad(part.sum(), images, retain_graph=True)[0].flatten(1).norm(dim=1)
             for part in (losses[:2], losses[2:])]  # fmt: skip
    assert relative_error(torch.stack(norms), answers["damsm.picture.grad"]) < 1e-5
    assert all(p.grad is None for p in released.parameters())


def test_the_trunk_is_torchvisions(tmp_path):
    weights = inception_v3(weights=None, init_weights=False).state_dict()
    weights |= {key: value for key, value in random_inception().items() if not key.startswith("fc.")}
    torch.save(weights, tmp_path / "inception.pth")
    encoder = DamsmInception()
    assert float(encoder.emb_features.weight.detach().abs().max()) == pytest.approx(0.1, abs=1e-3)
    encoder.load_trunk(tmp_path / "inception.pth")
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert trained == {"emb_features.weight", "emb_cnn_code.weight", "emb_cnn_code.bias"}
    network = inception_v3(weights=None, init_weights=False, transform_input=False).eval()
    network.load_state_dict(weights)
    network.fc = torch.nn.Identity()
    images = fixture_picture("image256", 1, 256)
    with torch.no_grad():
        expected = network(F.interpolate(images, (299, 299), mode="bilinear", align_corners=True))
        assert relative_error(encoder.eval().features(images)[1], expected) < 1e-5
    del weights["Mixed_6e.branch1x1.conv.weight"]
    torch.save(weights, tmp_path / "inception.pth")
    with pytest.raises(UserError, match="inception.pth has no Mixed_6e.branch1x1.conv.weight"):
        encoder.load_trunk(tmp_path / "inception.pth")


def test_regions_of_a_clip(small_clip, tmp_path):
    """They are its patch tokens as its own class token is treated, and its embedding."""
    encoder, images = DamsmClip(small_clip), torch.rand(2, 3, 64, 64) * 2 - 1
    regions, codes = encoder(images)
    assert regions.shape == (2, 256, 4, 4) and codes.shape == (2, 256)
    seen, embedding = small_clip.regions(images)
    assert relative_error(embedding, small_clip.image(images)[1]) < 1e-5
    tower, patches = small_clip.clip.visual, []
    hook = tower.transformer.register_forward_hook(lambda _, __, tokens: patches.append(tokens))
    tower(small_clip.clip_input(images))
    hook.remove()
    tokens = (tower.ln_post(patches[0].transpose(0, 1)) @ tower.proj)[:, 1:]  # (B, g*g, E)
    assert relative_error(seen, tokens.transpose(1, 2).unflatten(2, (4, 4))) < 1e-5

    text = DamsmText(Vocabulary(["<end>", "a"]))
    content = {"vocabulary": text.vocabulary.words, "text": text.state_dict(), "image": encoder.kept()}
    torch.save({**content, "clip": small_clip.identity}, tmp_path / "pair.pth")
    again = load_damsm_image(str(tmp_path / "pair.pth"), small_clip)
    assert torch.equal(again(images)[0], regions) and not any(p.requires_grad for p in again.parameters())
    torch.save({**content, "clip": {**small_clip.identity, "checksum": "0"}}, tmp_path / "pair.pth")
    with pytest.raises(UserError, match="pair.pth was trained with another CLIP"):
        load_damsm_image(str(tmp_path / "pair.pth"), small_clip)


def test_a_missing_image_encoder_is_named(files, tmp_path):
    shutil.copy(files, tmp_path)
    with pytest.raises(UserError, match=r"no image encoder .*image_encoder200.pth beside .*text_encoder200.pth"):
        load_damsm_image(str(tmp_path / "text_encoder200.pth"), None)
    shutil.copy(files, tmp_path / "image_encoder200.pth")
    with pytest.raises(UserError, match=r"image_encoder200.pth has no emb_features.weight"):
        load_damsm_image(str(tmp_path / "text_encoder200.pth"), None)
