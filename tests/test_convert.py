"""Released checkpoints written as ours: the same pictures, ready to train on from, and files that are neither."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import assert_refused, fixture_input, relative_error, released_weights
from PIL import Image

from ratlip import checkpoint, config
from ratlip.released import load_networks
from ratlip.systems import SYSTEMS
from ratlip.systems.clip_gan import ClipGan
from ratlip.trainer import Training


@pytest.fixture
def converted(request, tmp_path, call):
    """A released file with `module.` prefixes and without optimizers, what was printed, and the file of ours.

    Only the GALIP one has a discriminator.
    """
    system = request.param
    names = {"netG": f"{system}.netG", **({"netD": "netD", "netC": "netC"} if system == "galip" else {})}
    networks = {
        name: {f"module.{key}": value for key, value in released_weights(source).items()}
        for name, source in names.items()
    }
    torch.save({"model": networks, "epoch": 580}, tmp_path / "released.pth")
    target = tmp_path / "saved" / "bird" / "released" / "state_epoch_580.pth"
    result = call("convert.py", tmp_path / "released.pth", target)
    assert result.returncode == 0, result.stderr
    settings = "epoch 580, nf 64, z_dim 100, cond_dim 512, imsize 256 (draws 224 pixels)"
    assert f"released {system.upper()}, {settings}" in result.stdout
    return tmp_path / "released.pth", result.stdout, target


@pytest.mark.parametrize("converted", ["ratlip"], indirect=True)
def test_both_files_draw_the_same_picture(converted, vitb32, tmp_path, call):
    source, _, target = converted
    torch.save({key: value.half() for key, value in vitb32.clip.state_dict().items()}, tmp_path / "vit.pt")
    pictures = []
    # The converted one is found as the newest of its configuration.
    for words in (["--checkpoint", source], [f"log.save_dir={tmp_path}/saved"]):
        result = call("sample.py", "cfg/bird.yml", "a grey bird", f"clip.weights={tmp_path}/vit.pt", *words,
                      "clip.activation=quick_gelu", "--n", 1, "--out", tmp_path / "out")  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert ("released RATLIP, epoch 580, nf 64" if not pictures else f"{target}: ratlip, epoch") in result.stdout
        (path,) = (tmp_path / "out").glob("01_a-grey-bird_*.png")
        pictures.append(np.asarray(Image.open(path)))
        path.unlink()
    assert pictures[0].shape == (224, 224, 3)
    assert np.array_equal(*pictures)


@pytest.mark.parametrize("converted", ["galip", "ratlip"], indirect=True)
def test_training_can_go_on_from_it(converted, vitb32, fixtures):
    _, printed, target = converted
    content = checkpoint.read(target)
    assert (content["epoch"], content["format"], content["clip"]["width"]) == (580, checkpoint.FORMAT, vitb32.width)
    assert content["clip"] == {key: value for key, value in vitb32.identity.items() if key != "checksum"}
    # The printed words make the network that is stored.
    words = printed.splitlines()[-1].removeprefix("to train on, set ").split()
    again = config.load("cfg/bird.yml", words)
    stored = {key: value for key, value in content["config"].items() if key.startswith(("model.", "clip."))}
    assert {key: config.flatten(again)[key] for key in stored} == stored
    t = Training(ClipGan.build(again, vitb32, vitb32), None, torch.empty(0), "fp32", 1)
    for name, network in t.networks.items():
        network.load_state_dict(content[name])
        t.optimizers[name].load_state_dict(content["optimizers"][name])
    generator, discriminator = t.generator, t.networks["discriminator"]
    assert all(torch.equal(content["ema"][key], value) for key, value in content["generator"].items())
    with torch.no_grad():
        image = generator.eval()(fixture_input("noise", 1, 100), fixture_input("sent", 1, 512))
        logits = discriminator(fixture_input("feats", 2, 3, 768, 7, 7), fixture_input("sent2", 2, 512))
    assert relative_error(image, fixtures[f"{again.model.name}.image"]) < 1e-4
    if again.model.name == "galip":
        assert relative_error(logits, fixtures["netC.logit"]) < 1e-4
    else:
        assert "new discriminator" in printed


class Trap:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def small(**changes) -> dict:
    """The keys of a released GALIP that its settings are read from, at no size."""
    weights = {f"GBlocks.{i}.c1.weight": torch.zeros(1) for i in range(6)}
    weights |= {"fc_code.weight": torch.zeros(3136, 100), "to_rgb.1.weight": torch.zeros(3, 64, 3, 3)}
    weights |= {
        "mapping.fc_prompt.weight": torch.zeros(6144, 612),
        "mapping.conv_fuse.weight": torch.zeros(768, 64, 5, 5),
    }
    return {"model": {"netG": {**weights, **changes}}}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"weights": torch.zeros(3)}, ["neither RATLIP's nor a released"]),
        ({"format": checkpoint.FORMAT}, ["RATLIP's own already"]),
        ({"model": {}}, ["neither netG nor netD"]),
        ({"model": {"netG": 5}}, ["netG is a int"]),
        (small(**{"fc_code.bias": "text"}), ["netG: fc_code.bias is a str"]),
        (small(**{"fc_code.weight": torch.zeros(3)}), ["fc_code.weight is (3,); 2 axes"]),
        (small(), ["netG has no "]),
        (small(**{"GBlocks.6.c1.weight": torch.zeros(1)}), ["netG has 7 generator blocks"]),
        (small(**{"mapping.conv_fuse.weight": torch.zeros(192, 64, 5, 5)}), ["CLIP of width 192", "ViT-B/32"]),
        ({"model": {"netG": {}}, "hook": Trap()}, ["refused", "mkdir"]),
    ],
    ids=lambda value: value[0][:24] if isinstance(value, list) else "",
)
def test_the_first_thing_wrong_is_named(content, parts, tmp_path, call):
    torch.save(content, tmp_path / "in.pth")
    assert_refused(call("convert.py", tmp_path / "in.pth", tmp_path / "out.pth"), "in.pth", *parts)
    assert {path.name for path in tmp_path.iterdir()} == {"in.pth"}


def test_cut_short_and_there_already(tmp_path, call):
    torch.save(small(), tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:5000])
    assert_refused(call("convert.py", tmp_path / "cut.pth", tmp_path / "out.pth"), "cut.pth", "cut short")
    assert_refused(call("convert.py", tmp_path / "nowhere.pth", tmp_path / "out.pth"), "no checkpoint", "nowhere.pth")
    assert_refused(call("convert.py", tmp_path / "whole.pth", tmp_path / "cut.pth"), "cut.pth", "there already")
    assert (tmp_path / "cut.pth").stat().st_size == 5000


@pytest.mark.parametrize("system", ["dfgan", "ratgan"])
def test_systems_without_clip(system, clip_file, tmp_path, call):
    """Without the text encoder: it is asked for where captions are read."""
    if system == "dfgan":
        networks = {name: released_weights(f"dfgan64.{name}") for name in ("netG", "netD")}
        content = {"model": {**networks, "netC": released_weights("dfgan.netC")}, "epoch": 1220}
    else:
        content = released_weights("ratgan.netG")
    torch.save(content, tmp_path / "released.pth")
    result = call("convert.py", tmp_path / "released.pth", tmp_path / "ours.pth")
    assert result.returncode == 0, result.stderr
    assert ("begin with a new discriminator" in result.stdout) == (system == "ratgan")
    ours = checkpoint.read(tmp_path / "ours.pth")
    assert ours["clip"] is None and ours["config"]["text.encoder"] == "damsm"
    words = result.stdout.splitlines()[-1].removeprefix("to train on, set ").split()
    again = config.load("cfg/bird.yml", words)
    stored = {key: value for key, value in ours["config"].items() if key.startswith(("model.", "ratgan."))}
    assert {key: config.flatten(again)[key] for key in stored} == stored
    built = SYSTEMS[system].build(again, None, SimpleNamespace(embedding_dim=256))
    generator, discriminator, _ = load_networks(tmp_path / "released.pth", None)
    inputs = fixture_input("noise", 2, 100), fixture_input("sent", 2, 256)
    with torch.no_grad():
        built.generator.load_state_dict(ours["generator"])
        assert torch.equal(built.generator.eval()(*inputs), generator(*inputs))
    if discriminator is not None:
        assert all(torch.equal(value, ours["discriminator"][key]) for key, value in discriminator.state_dict().items())
    result = call(
        "sample.py", "cfg/bird.yml", "a grey bird", "--checkpoint", tmp_path / "ours.pth", f"clip.weights={clip_file}"
    )
    assert_refused(result, "text.encoder=damsm", "text.weights names no file")
