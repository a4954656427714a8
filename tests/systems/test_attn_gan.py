"""AttnGAN's numbers: networks and phases on the fixtures' weights and draws, in float64."""

import os
import socket
import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers import ROOT, family_fixtures, fixture_input, fixture_picture, relative_error, released_weights

from ratlip.encoders.damsm_image import DamsmInception
from ratlip.models.attn_gan.generator import Condition
from ratlip.released.attn_gan import load_networks
from ratlip.systems.attn_gan import critic_terms, damsm_match, following, generator_terms
from ratlip.systems.system import Terms

EXPECTED = family_fixtures("attngan")
ELSEWHERE = ("text.", "image.", "damsm.", "pretrain.", "data.")  # tests/encoders, tests/data/test_loader.py
STEPS = {64: 5, 128: 9, 256: 17}  # of the fixtures' slices


def condition_of(number: str, lengths: list[int]) -> Condition:
    words = fixture_input(f"words{number}", len(lengths), 256, 7).double()
    for row, length in zip(words, lengths, strict=True):
        row[:, length:] = 0
    return Condition(
        fixture_input(f"sent{number}", len(lengths), 256).double(),
        words,
        torch.arange(words.shape[2]) < torch.tensor(lengths)[:, None],
    )


def noise_of(number: str, count: int) -> torch.Tensor:
    return torch.cat([fixture_input(f"{name}{number}", count, 100) for name in ("noise", "eps")], dim=1).double()


def values(terms: Terms) -> list[torch.Tensor]:
    """The terms, and what is differentiated of them."""
    return [*(value for value, _ in terms.values()), sum(value * weight for value, weight in terms.values())]


def norms(*parts: list[torch.nn.Module]) -> torch.Tensor:
    """Gradient norm of each part of a network."""
    gradients = [[p.grad.flatten() for module in part for p in module.parameters()] for part in parts]
    return torch.stack([torch.cat(own).norm() for own in gradients])


def running(norm: torch.nn.Module, every: int) -> torch.Tensor:
    return torch.stack([norm.running_mean, norm.running_var])[:, ::every].clone()


@torch.no_grad()
def drawn_pictures(generator) -> dict[str, torch.Tensor]:
    """In eval mode, attention by each sample's own mask and by the published program's."""
    found = {}
    for mask, prefix in (("own", "g."), ("released", "g.released.")):
        for stage in generator.stages:
            stage.attention.mask = mask
        drawn = generator(noise_of("", 2), condition_of("", [7, 4]))
        found |= {f"{prefix}mu": drawn.mu, f"{prefix}logvar": drawn.logvar}
        for image in drawn.images:
            step = STEPS[image.shape[-1]]
            found[f"{prefix}image{image.shape[-1]}.slice"] = image[..., ::step, ::step]
        for number, (shares, step) in enumerate(zip(drawn.attention, (9, 17), strict=True), 1):
            found[f"{prefix}attention{number}.slice"] = shares[..., ::step, ::step]
    for stage in generator.stages:
        stage.attention.mask = "own"
    return found


@torch.no_grad()
def judged(critic) -> dict[str, torch.Tensor]:
    """In eval mode."""
    features = critic.features(fixture_picture(f"image{critic.side}", 2, critic.side).double())
    sentence = fixture_input("sent", 2, 256).double()
    return {
        f"d{critic.side}.features.slice": features[:, ::16],
        f"d{critic.side}.cond": critic.matching(features, sentence).sigmoid(),
        f"d{critic.side}.uncond": critic.real(features).sigmoid(),
    }


def released_image_encoder() -> DamsmInception:
    """With the fixtures' weights, in eval mode."""
    encoder = DamsmInception().double().eval().requires_grad_(False)
    counts = {key: value for key, value in encoder.state_dict().items() if key.endswith("num_batches_tracked")}
    encoder.load_state_dict({**counts, **released_weights("damsm.image")})
    return encoder


@pytest.fixture(scope="module")
def found():
    """What the product answers, by the fixtures' keys: networks at rest, then a training step."""
    generator, _, _ = load_networks(released_weights("attngan.netG"))
    answers = drawn_pictures(generator.double())
    condition = condition_of("3", [7, 5, 2])
    drawn = generator.train()(noise_of("3", 3), condition)
    answers["step.fake256.slice"] = drawn.images[-1][..., ::17, ::17]
    critics = []
    for fake in drawn.images:
        side = fake.shape[-1]
        _, (critic,), _ = load_networks(released_weights(f"attngan.netD{side}"))
        answers |= judged(critic.double())
        real = fixture_picture(f"real{side}", 3, side).double()
        terms = values(critic_terms(critic.train(), real, fake, condition.sentence, following(condition.sentence)))
        terms[-1].backward()
        answers[f"step.d{side}"] = torch.stack(terms)
        parts = [[critic.first, *critic.halving[:3]], *([layer] for layer in (*critic.halving[3:], *critic.narrowing))]
        answers[f"step.d{side}.grad"] = norms(*parts, [critic.unconditional], [critic.joint, critic.conditional])
        if side == 64:
            answers["step.d64.running"] = running(critic.joint.bn, 8)
        torch.optim.Adam(critic.parameters(), 2e-4, (0.5, 0.999)).step()
        critic.zero_grad()
        critics.append(critic.requires_grad_(False))
    encoder = released_image_encoder()
    match = partial(damsm_match, encoder, condition=condition, classes=torch.tensor([4, 9, 4]))
    terms = values(generator_terms(critics, drawn, condition.sentence, match, 5))
    terms[-1].backward()
    answers["step.g"] = torch.stack(terms)
    stages = [[stage] for stage in (generator.first, *generator.stages)]
    heads = [[to_rgb] for to_rgb in generator.to_rgb]
    in_turn = [part for pair in zip(stages, heads, strict=True) for part in pair]
    answers["step.g.grad"] = norms([generator.augmentation], *in_turn)
    answers["step.g.running"] = running(generator.first.bn, 256)
    answers["step.d64.running2"] = running(critics[0].joint.bn, 8)
    return answers


@pytest.mark.parametrize("key", [key for key in EXPECTED if not key.startswith(ELSEWHERE)])
def test_the_released_programs_number(key, found):
    assert found[key].shape == EXPECTED[key].shape
    assert relative_error(found[key], EXPECTED[key]) < 1e-5


PHASES = """
import sys
import torch
from torch import nn
from ratlip import distributed
from ratlip.models.attn_gan.discriminator import Discriminator
from ratlip.models.attn_gan.generator import Condition, Generator
from ratlip.systems.attn_gan import critic_terms, damsm_match, following, generator_terms


class Encoder(nn.Module):
    def forward(self, images):
        regions = images.unfold(2, 8, 8).unfold(3, 8, 8).mean((4, 5)).repeat(1, 4, 1, 1)
        return regions, regions.mean((2, 3)) + images[:, :1, 0, 0]


distributed.start()
share = slice(distributed.rank(), None, distributed.world_size())
torch.manual_seed(0)
generator = Generator([8, 16], 4, 12, 12, z_dim=5, condition_dim=4).double()
critics = [Discriminator(side, 4, 12).double() for side in generator.sizes]
noise, sentence, words = torch.randn(4, 9).double(), torch.randn(4, 12).double(), torch.randn(4, 12, 5).double()
reals = [torch.rand(4, 3, side, side).double() for side in generator.sizes]
condition = Condition(sentence[share], words[share], (torch.arange(5) < torch.tensor([5, 1, 3, 4])[:, None])[share])
drawn = generator(noise[share], condition)
found = {}
for critic, real, fake in zip(critics, reals, drawn.images):
    terms = critic_terms(critic, real[share], fake, condition.sentence, following(condition.sentence))
    sum(value * weight for value, weight in terms.values()).backward()
    found |= {f"{critic.side} {name}": value.detach() for name, (value, _) in terms.items()}
    distributed.mean_gradients(critic, *(found[f"{critic.side} {name}"] for name in terms))
    found |= {f"{critic.side} {name}": p.grad for name, p in critic.named_parameters()}
    critic.requires_grad_(False)
match = lambda images: damsm_match(Encoder(), images, condition, torch.tensor([3, 4, 4, 5])[share])
terms = generator_terms(critics, drawn, condition.sentence, match, 5)
sum(value * weight for value, weight in terms.values()).backward()
found |= {name: value.detach() for name, (value, _) in terms.items()}
distributed.mean_gradients(generator, *(found[name] for name in terms))
found |= {name: p.grad for name, p in generator.named_parameters()}
for number, network in enumerate([generator, *critics]):
    found |= {f"{number} {name}": value for name, value in network.named_buffers()}
torch.save(found, sys.argv[1] + str(distributed.rank()))
distributed.stop()
"""


def test_two_processes_learn_what_one_does(tmp_path):
    """Terms, gradients, running statistics: wrong pairs and contrasts are those of the whole batch."""
    (tmp_path / "phases.py").write_text(PHASES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "PYTHONPATH": str(ROOT / "code"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen([sys.executable, tmp_path / "phases.py", tmp_path / name], env=common | more)
        for name, more in (("one", {}), ("two", {**together, "RANK": "0"}), ("two", {**together, "RANK": "1"}))
    ]
    assert [process.wait(timeout=240) for process in started] == [0, 0, 0]
    one, first, second = (torch.load(tmp_path / name) for name in ("one0", "two0", "two1"))
    assert {"8 c_wrong", "16 u_fake", "w1", "kl", "1 joint.bn.running_var", "first.fc.weight"} < set(one)
    for name, expected in one.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], expected, rtol=1e-9, atol=1e-11), name
