"""Released GALIP and RATLIP checkpoints: the numbers they give, and files that are not what they should be."""

import pytest
import torch
from helpers import fixture_input, relative_error, released_weights, small_clip_model

from ratlip.errors import UserError
from ratlip.losses import matching_aware_gradient_penalty
from ratlip.released import load_networks


@pytest.fixture(scope="module")
def net_g():
    return {system: released_weights(f"{system}.netG") for system in ("galip", "ratlip")}


@pytest.fixture(scope="module")
def net_d():
    return {"netD": released_weights("netD"), "netC": released_weights("netC")}


@pytest.mark.parametrize("system", ["galip", "ratlip"])
@torch.no_grad()
def test_generator_image(system, net_g, vitb32, fixtures):
    generator, discriminator, info = load_networks({"model": {"netG": net_g[system]}, "epoch": 580}, vitb32)
    image = generator(fixture_input("noise", 1, 100), fixture_input("sent", 1, 512))
    assert image.shape == (1, 3, 224, 224)
    assert relative_error(image, fixtures[f"{system}.image"]) < 1e-4
    assert discriminator is None
    expected = {"system": system.upper(), "epoch": 580, "imsize": 256, "nf": 64, "z_dim": 100, "cond_dim": 512}
    assert info == expected


def test_discriminator_and_gradient_penalty(net_d, vitb32, fixtures):
    generator, discriminator, _ = load_networks({"model": net_d}, vitb32)
    assert generator is None
    maps = fixture_input("feats", 2, 3, 768, 7, 7).requires_grad_()
    sentence = fixture_input("sent2", 2, 512).requires_grad_()
    assert relative_error(discriminator.features(maps), fixtures["netD.out"]) < 1e-4
    logits = discriminator(maps, sentence)
    assert relative_error(logits, fixtures["netC.logit"]) < 1e-4
    penalty = matching_aware_gradient_penalty(logits, (maps, sentence))
    assert relative_error(penalty, fixtures["magp"]) < 1e-4
    gradients = torch.autograd.grad(discriminator(maps, sentence).sum(), (maps, sentence))
    norms = torch.cat([g.flatten(1) for g in gradients], dim=1).norm(dim=1)
    assert relative_error(norms, fixtures["magp.norms"]) < 1e-4


def test_file_with_module_prefixes_and_a_raw_clip(net_g, net_d, vitb32, fixtures, tmp_path):
    networks = {"netG": net_g["ratlip"], **net_d}
    prefixed = {name: {f"module.{key}": value for key, value in net.items()} for name, net in networks.items()}
    torch.save({"model": prefixed}, tmp_path / "released.pth")
    generator, discriminator, info = load_networks(tmp_path / "released.pth", vitb32.clip)
    assert info["system"] == "RATLIP" and info["epoch"] is None
    with torch.no_grad():
        image = generator(fixture_input("noise", 1, 100), fixture_input("sent", 1, 512))
        logits = discriminator(fixture_input("feats", 2, 3, 768, 7, 7), fixture_input("sent2", 2, 512))
    assert relative_error(image, fixtures["ratlip.image"]) < 1e-4
    assert relative_error(logits, fixtures["netC.logit"]) < 1e-4


def test_the_first_thing_wrong_is_named(net_g, net_d, vitb32):
    weights = dict(net_g["galip"])
    del weights["GBlocks.3.c2.weight"]
    with pytest.raises(UserError, match=r"netG has no GBlocks\.3\.c2\.weight"):
        load_networks({"model": {"netG": weights}}, vitb32)
    with pytest.raises(UserError, match="netG has a key that no released network has: surprise"):
        load_networks({"model": {"netG": {**net_g["galip"], "surprise": torch.zeros(1)}}}, vitb32)
    with pytest.raises(UserError, match=r"netC: netC\.joint_conv\.2\.weight is|joint_conv\.2\.weight is"):
        load_networks({"model": {**net_d, "netC": {**net_d["netC"], "joint_conv.2.weight": torch.zeros(1)}}}, vitb32)
    with pytest.raises(UserError, match="CLIP of width 768 and embedding 512"):
        load_networks({"model": {"netG": net_g["galip"]}}, small_clip_model())
    with pytest.raises(UserError, match="neither netG nor netD"):
        load_networks({"model": {"netD": net_d["netD"]}}, vitb32)
    with pytest.raises(UserError, match="not a released"):
        load_networks({"generator": {}}, vitb32)
