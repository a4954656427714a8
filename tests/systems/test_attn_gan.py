"""AttnGAN's numbers: networks and phases on the fixtures' weights and draws, in float64."""

import pytest
import torch
from helpers import family_fixtures, fixture_input, fixture_picture, relative_error, released_weights

from ratlip.models.attn_gan.generator import Condition
from ratlip.released.attn_gan import load_networks
from ratlip.systems.attn_gan import Terms, critic_terms, following

EXPECTED = family_fixtures("attngan")
ELSEWHERE = ("text.", "image.", "damsm.", "pretrain.", "data.")  # tests/encoders, tests/data/test_loader.py
STEPS = {64: 5, 128: 9, 256: 17}  # of the fixtures' slices


def condition_of(number: str, lengths: list[int]) -> Condition:
    words = fixture_input(f"words{number}", len(lengths), 256, 7).double()
    for row, length in zip(words, lengths, strict=True):
        row[:, length:] = 0
    return Condition(fixture_input(f"sent{number}", len(lengths), 256).double(), words, torch.tensor(lengths))


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
        critics.append(critic.requires_grad_(False))
    return answers


@pytest.mark.parametrize("key", [key for key in EXPECTED if not key.startswith(ELSEWHERE)])
def test_the_released_programs_number(key, found):
    assert found[key].shape == EXPECTED[key].shape
    assert relative_error(found[key], EXPECTED[key]) < 1e-5
