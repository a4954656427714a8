"""What benchmarks/ measures ours against, the plain rendering and ours without a saving: the same images, gradients and
training step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, fixture_input, relative_error, released_weights, small_clip_model, watch_gradients

from ratlip import config
from ratlip.data.loader import Batch
from ratlip.encoders.clip_towers import FrozenClip
from ratlip.models import blocks
from ratlip.released import load_networks
from ratlip.released.clip_gan import UNUSED
from ratlip.systems.clip_gan import ClipGan
from ratlip.trainer import Training, train_step

sys.path.append(str(ROOT / "benchmarks"))
import plain  # noqa: E402
import savings  # noqa: E402


@pytest.mark.parametrize("system", ["galip", "ratlip"])
@torch.no_grad()
def test_plain_gives_the_released_image(system, vitb32, fixtures):
    weights = released_weights(f"{system}.netG")
    generator = plain.Generator(vitb32.clip, system == "ratlip").eval()
    generator.load_state_dict({key: value for key, value in weights.items() if not UNUSED.match(key)})
    image = generator(fixture_input("noise", 1, 100), fixture_input("sent", 1, 512))
    assert relative_error(image, fixtures[f"{system}.image"]) < 1e-4


@torch.no_grad()
def test_plain_discriminator_and_image_tower_are_the_released_ones(vitb32, fixtures):
    networks = plain.NetD(), plain.NetC()
    for network, name in zip(networks, ("netD", "netC"), strict=True):
        weights = released_weights(name)
        network.load_state_dict({key: value for key, value in weights.items() if not UNUSED.match(key)})
    features = networks[0](fixture_input("feats", 2, 3, 768, 7, 7))
    assert relative_error(features, fixtures["netD.out"]) < 1e-4
    assert relative_error(networks[1](features, fixture_input("sent2", 2, 512)), fixtures["netC.logit"]) < 1e-4
    maps, embedding = plain.image_tower(vitb32.clip, fixture_input("image", 2, 3, 256, 256).tanh())
    assert relative_error(embedding, fixtures["img.emb"]) < 1e-4
    assert relative_error(maps.mean((3, 4)), fixtures["img.local.mean"]) < 1e-4


@pytest.fixture
def small(monkeypatch):
    """A small CLIP with a 7 x 7 grid, and plain networks that fit it, all in float64."""
    monkeypatch.setattr("clip.model.LayerNorm.forward", torch.nn.LayerNorm.forward)  # OpenAI's rounds to float32
    monkeypatch.setattr(plain, "CHANNELS", (128, 128, 128, 128, 64, 32, 16))
    monkeypatch.setattr(plain, "WIDTH", 64)
    monkeypatch.setattr(plain, "SENTENCE_DIM", 64)
    monkeypatch.setattr(plain, "CONDITION_DIM", 164)
    clip = FrozenClip(small_clip_model(56, 8, 64, 12), preprocess="released").double()
    torch.manual_seed(0)
    networks = {
        "netG": plain.Generator(clip.clip).double(),
        "netD": plain.NetD().double(),
        "netC": plain.NetC().double(),
    }
    with torch.no_grad():
        for name, parameter in (pair for network in networks.values() for pair in network.named_parameters()):
            if name.endswith(("gamma", "beta")):  # numbers that weigh the discriminator's branches
                parameter.fill_(0.5)
            elif "weight" not in name.rsplit(".", 1)[-1] or parameter.ndim == 1 or ".se." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return clip, networks


def ours(small, monkeypatch) -> tuple[Training, Batch, torch.Tensor, torch.Tensor]:
    """Our training of two pictures with the small networks' weights, in float64; its batch, noise and captions."""
    clip, networks = small
    states = {name: network.state_dict() for name, network in networks.items()}
    clip.products = "convolution"  # which "CLIP's products" does without
    generator, discriminator, _ = load_networks({"model": states}, clip)
    tokens = clip.tokenize(["a red bird", "a green bird with a long beak"])
    settings = config.EasyDict(config.unflatten(config.default_settings())).train
    settings.lr_g = settings.lr_d = 0.0
    system = ClipGan(settings, clip, generator.double().train(), discriminator.double())
    training = Training(system, None, clip.text(tokens)[0], "fp32", 10)
    noise = torch.randn(2, 100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    draws = {"noise": noise, "augment_real": torch.zeros(2, 3), "augment_fake": torch.zeros(2, 3)}
    monkeypatch.setattr("ratlip.trainer.randomness", lambda t, share: draws)
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2 - 1
    return training, Batch(images, torch.arange(2), torch.tensor([1, 0])), noise, tokens


@pytest.mark.parametrize("large", [1, 10**9])
def test_a_training_step_has_the_plain_gradients(small, large, monkeypatch):
    """Of both networks, in float64; with LARGE at 1 all maps are treated as large ones are."""
    monkeypatch.setattr(blocks, "LARGE", large)
    clip, networks = small
    training, batch, noise, tokens = ours(small, monkeypatch)
    found = watch_gradients(training)
    train_step(training, batch)

    net_g, net_d, net_c = (network.train() for network in networks.values())
    sentences, mismatched = training.sentences.clone().requires_grad_(), training.sentences.flip(0)
    fake = net_g(noise, training.sentences)
    maps, fake_maps = (plain.image_tower(clip.clip, images)[0].detach() for images in (batch.images, fake))
    loss_d = plain.losses_d(net_d, net_c, maps.requires_grad_(), fake_maps, sentences, mismatched)
    gradients = torch.autograd.grad(loss_d, [*net_d.parameters(), *net_c.parameters()])
    expected_d = {"netD": net_d, "netC": net_c}
    for name, network in expected_d.items():
        own, gradients = gradients[: len(list(network.parameters()))], gradients[len(list(network.parameters())) :]
        expected_d[name] = dict(zip((key for key, _ in network.named_parameters()), own, strict=True))
    assert_close(found["d"], load_networks({"model": expected_d}, clip)[1])

    autocast = torch.autocast("cpu", enabled=False)
    trainer = plain.Trainer(clip.clip, net_g, net_d, net_c, autocast, torch.amp.GradScaler("cpu", enabled=False))
    for optimizer in (trainer.optimizer_g, trainer.optimizer_d):
        optimizer.param_groups[0]["lr"] = 0.0
    trainer.step(batch.images, tokens, noise)
    expected_g = {**dict(net_g.named_buffers()), **{key: p.grad for key, p in net_g.named_parameters()}}
    assert_close(found["g"], load_networks({"model": {"netG": expected_g}}, clip)[0])


def assert_close(found, expected):
    """Gradients by parameter against the parameters of a network, which hold the expected gradients."""
    for name, gradient in expected.named_parameters():
        gradient = gradient.detach()
        largest = float(gradient.abs().max())
        assert (found[name] - gradient).abs().max() <= 1e-4 * largest + 1e-10, name


def test_no_saving_changes_the_numbers(small, monkeypatch):
    """Images and gradients of two steps in float64, without each saving in turn; what stands in for it runs."""
    monkeypatch.setattr(blocks, "LARGE", 1)  # that maps of this size are treated as large ones

    def numbers() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        training, batch, noise, _ = ours(small, monkeypatch)
        found = watch_gradients(training)
        for _ in range(2):
            train_step(training, batch)
        gradients = {key + name: value for key, own in found.items() for name, value in own.items()}
        with torch.no_grad():
            return training.generator.eval()(noise, training.sentences), gradients

    ran = set()

    def noted(attribute, replacement):
        return lambda *args, **kwargs: (ran.add(attribute), replacement(*args, **kwargs))[1]

    image, gradients = numbers()
    largest = {name: float(value.abs().max()) for name, value in gradients.items()}
    for saving, (places, replaced) in savings.SAVINGS.items():
        functions = [(owner, name, noted((owner, name), new)) for owner, name, new in replaced if callable(new)]
        constants = [entry for entry in replaced if not callable(entry[2])]
        monkeypatch.setitem(savings.SAVINGS, saving, (places, functions + constants))
        ran.clear()
        with savings.without(saving):
            found = numbers()
        dropped = {(FrozenClip, "drop_text_tower")}  # here the captions stay to be encoded
        assert ran == {(owner, name) for owner, name, _ in functions} - dropped, saving
        assert relative_error(found[0], image) < 1e-8, saving
        for name, gradient in gradients.items():
            assert (found[1][name] - gradient).abs().max() <= 1e-7 * largest[name] + 1e-10, (saving, name)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--batch", "0"], "0 is no whole number from 1 on"),
        (["--what", "data", "--savings"], "sample and train"),
        (["--what", "data", "--only", "ours"], "not measured for data"),
        (["--only", "nothing"], "plain, ours or one of sub-pixel"),
    ],
)
def test_words_that_make_no_sense(words, complaint):
    result = subprocess.run([sys.executable, "benchmarks/speed.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and complaint in result.stderr


def test_peak_memory_of_ours_without_a_saving():
    command = [sys.executable, "benchmarks/speed.py", "--batch", "1", "--threads", "1", "--only", "kept filters"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    memory = json.loads(result.stdout)
    assert 0.5 < memory["before"] < memory["peak"] < 8  # GiB: CLIP alone has 0.56


def test_what_a_gpu_would_show_runs_on_a_cpu():
    """Every part of gpu.sh: a line of it, and none that says that it failed."""
    command = ["bash", "benchmarks/gpu.sh", "--smoke"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    found = [line.split(":")[0] for line in result.stdout.splitlines()]
    speed = ["train, batch 1", "train, batch 1", "sample, batch 1", "sample, batch 2", "eval, batch 1"]
    assert found == ["tests", "waits", *speed, "reading", "demo", "largest"], result.stdout


def test_no_such_part():
    result = subprocess.run(["bash", "benchmarks/gpu.sh", "stepp"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "no part stepp; there are tests waits step compiled" in result.stderr


def test_the_command_measures_both():
    command = [sys.executable, "benchmarks/speed.py", "--what", "data", "--rounds", "1", "--threads", "1"]
    command += ["--pictures", "30", "1200"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "plain" in result.stdout and "x by the clock" in result.stdout
    listed = [line.split() for line in result.stdout.splitlines()[-2:]]
    assert [cells[0] for cells in listed] == ["30", "1,200"]
    assert all(float(seconds) >= 0 for cells in listed for seconds in cells[1:]) and len(listed[0]) == 7
