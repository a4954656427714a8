"""LAFITE's step: four phases, each of draws that are handed in, and what it keeps between steps (arXiv 2111.13792)."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ratlip.encoders.clip_towers import FrozenClip
from ratlip.models.lafite import condition as conditions
from ratlip.models.lafite import losses
from ratlip.models.lafite.condition import View, draw_view, seen
from ratlip.models.lafite.discriminator import Discriminator
from ratlip.models.lafite.generator import Generator
from ratlip.models.lafite.noise import keys_of, normal

DIRECTION = 1  # purpose of the path length's numbers; the noise maps' is 0


@dataclass
class Settings:
    """The losses' weights as published by default; `itd` and so on are the released program's names."""

    condition: str = "text"  # or "image", "mixed"
    mixing_prob: float = 0.5  # share of image features where the condition is mixed
    temperature: float = 0.5
    lam: float = 0.0  # share of the contrast over the columns
    contrast: str = "released"  # or "plain"
    itd: float = 10.0  # the critic's feature and the condition
    itc: float = 10.0  # CLIP's feature of the generated picture and the condition
    iid: float = 0.0  # the critic's features of the real and the generated picture
    iic: float = 0.0  # CLIP's features of both
    gamma: float = 10.0  # of R1
    path_weight: float = 2.0
    path_interval: int = 4
    r1_interval: int = 16
    style_mixing: float = 0.9


class State(nn.Module):
    """What the system keeps between steps: the mean path length. As a buffer, so that a bad step can be undone."""

    def __init__(self):
        super().__init__()
        self.register_buffer("path_mean", torch.zeros(()))


class Networks(NamedTuple):
    """What the phases read."""

    generator: Generator
    discriminator: Discriminator
    clip: FrozenClip  # of the standard preprocessing
    state: State


class Real(NamedTuple):
    """A process's share of a batch."""

    images: Tensor  # (B, 3, S, S) in [-1, 1]
    text: Tensor | None  # (B, E) CLIP's features of a caption each; None where only pictures are read
    features: Tensor | None  # (B, E) CLIP's features of the pictures; None where only captions are read


class Draws(NamedTuple):
    """A process's share of a phase's draws."""

    noise: Tensor  # (B, Z) standard normal
    second: Tensor | None  # (B, Z) alike, for the rows of w from `crossover` on
    crossover: int | None  # 1 to rows - 1, one for the batch; None: no style mixing
    perturbation: Tensor  # (B, E) standard normal: the noise in the condition
    coin: Tensor  # (B, 1) uniform in [0, 1): image feature or text feature
    view: View  # of the generated pictures by CLIP, one for the batch
    direction: Tensor | None = None  # (max(1, B / 2), 3, S, S) standard normal, of the path length


class Term(NamedTuple):
    """Part of a phase's loss: weight * mean of the values (B,)."""

    values: Tensor
    weight: float


Terms = dict[str, Term]


def loss_of(terms: Terms) -> Tensor:
    """The sum of the terms' weighted means."""
    return sum(term.weight * term.values.mean() for term in terms.values())


def draw(rng: np.random.Generator, n: Networks, s: Settings, share: int, rank: int, processes: int) -> Draws:
    """The draws of a phase, on the CPU; those of a batch follow from `rng` alone, whatever the number of processes."""
    count, mixes, rows = share * processes, rng.uniform() < s.style_mixing, n.generator.rows
    size = n.generator.sizes[-1]
    crossover, view = int(rng.integers(1, rows)), draw_view(rng, size, n.clip.resolution)
    noise, second = rng.standard_normal((2, count, n.generator.noise_dim), dtype=np.float32)
    perturbation = rng.standard_normal((count, n.generator.condition_dim), dtype=np.float32)
    coin = rng.uniform(size=(count, 1)).astype(np.float32)
    noise, second, perturbation, coin = (
        torch.from_numpy(numbers[rank::processes]) for numbers in (noise, second, perturbation, coin)
    )
    return Draws(noise, second if mixes else None, crossover if mixes else None, perturbation, coin, view)


def condition_of(real: Real, d: Draws, s: Settings) -> Tensor:
    """The condition (B, E) of unit length that a phase reads."""
    if s.condition == "text":
        return conditions.from_text(real.text, d.perturbation)
    if s.condition == "image":
        return conditions.from_image(real.features, d.perturbation)
    return conditions.mixed(real.text, real.features, d.perturbation, d.coin, s.mixing_prob)


def pictures(n: Networks, d: Draws, condition: Tensor) -> tuple[Tensor, Tensor]:
    """Generated pictures (b, 3, S, S) of the first b samples, as many as there are conditions, and their rows of w
    (b, R, 512). Moves the kept mean of w, as the released program does in every phase."""
    noise = d.noise[: len(condition)]
    second = None if d.second is None else d.second[: len(condition)]
    rows = n.generator.styles(noise, second, d.crossover, track=True)
    return n.generator.synthesis(rows, condition, n.generator.maps(noise)), rows


def _contrast(a: Tensor, b: Tensor, s: Settings) -> Tensor:
    return losses.contrast(a, b, s.temperature, s.lam, s.contrast)


def generator_phase(n: Networks, real: Real, d: Draws, s: Settings) -> Terms:
    """The generator's loss. Parameters of the discriminator need no gradient here."""
    condition = condition_of(real, d, s)
    images, _ = pictures(n, d, condition)
    logits, features = n.discriminator(images, condition)
    terms = {"adversarial": Term(losses.logistic_real(logits), 1.0)}
    if s.itc or s.iic:
        embedding = n.clip.image(seen(images, n.clip.resolution, d.view))[1]
        if s.itc:
            terms["clip_condition"] = Term(_contrast(embedding, condition, s), -s.itc)
        if s.iic:
            terms["clip_image"] = Term(_contrast(embedding, F.normalize(real.features, dim=1), s), -s.iic)
    if s.itd:
        terms["feature_condition"] = Term(_contrast(features, condition, s), -s.itd)
    if s.iid:
        with torch.no_grad():
            of_real = n.discriminator(real.images, condition)[1]
        terms["feature_real"] = Term(_contrast(of_real, features, s), -s.iid)
    return terms


def path_length_phase(n: Networks, real: Real, d: Draws, s: Settings, scale: float | Tensor = 1.0) -> Terms:
    """The generator's path length regularisation, of the first half of the samples; moves `state.path_mean`.

    Args:
        scale: the loss scale of float16, within the inner gradient.
    """
    condition = condition_of(real, d, s)
    images, rows = pictures(n, d, condition[: max(1, len(condition) // 2)])
    direction = d.direction
    if direction is None:
        direction = normal(keys_of(d.noise[: len(images)]), images[0].numel(), DIRECTION).view(images.shape)
    lengths = losses.path_lengths(images, rows, direction, scale)
    penalty, mean = losses.path_penalty(lengths, n.state.path_mean.clone())
    n.state.path_mean.copy_(mean.detach())
    return {"path_length": Term(penalty, s.path_weight * s.path_interval)}


def discriminator_phase(n: Networks, real: Real, d: Draws, s: Settings) -> Terms:
    """The discriminator's loss; real and generated pictures have the same condition."""
    condition = condition_of(real, d, s)
    with torch.no_grad():
        images, _ = pictures(n, d, condition)
    fake_logits, _ = n.discriminator(images, condition)
    real_logits, features = n.discriminator(real.images, condition)
    terms = {
        "fake": Term(losses.logistic_fake(fake_logits), 1.0),
        "real": Term(losses.logistic_real(real_logits), 1.0),
    }
    if s.itd:
        terms["feature_condition"] = Term(_contrast(features, condition, s), -s.itd)
    return terms


def r1_phase(n: Networks, real: Real, d: Draws, s: Settings, scale: float | Tensor = 1.0) -> Terms:
    """The discriminator's gradient penalty at real pictures. `scale` as in `path_length_phase`."""
    images = real.images.detach().requires_grad_()
    logits, _ = n.discriminator(images, condition_of(real, d, s))
    return {"r1": Term(losses.gradient_penalty(logits, images, scale), s.gamma / 2 * s.r1_interval)}


def lazy_adam(rate: float, betas: tuple[float, float], interval: int) -> tuple[float, tuple[float, float]]:
    """Learning rate and betas where every `interval` steps a regulariser takes a step of its own (0: none does), so
    that Adam moves as far as with all in one (StyleGAN2, arXiv 1912.04958, appendix B)."""
    share = interval / (interval + 1) if interval else 1.0
    return rate * share, tuple(beta**share for beta in betas)


def default_gamma(size: int, batch_size: int) -> float:
    """R1's gamma where none is given: 0.0002 S^2 / N, S in pixels."""
    return 0.0002 * size**2 / batch_size


def average_kept(batch_size: int, images: int, half_life: float | None = None, ramp: float | None = 0.05) -> float:
    """Share of the averaged generator that a step keeps, after `images` were seen before it; 0: it becomes the
    generator.

    Args:
        half_life: in images; None: as published, 10 / 32 thousand for each picture of a batch.
        ramp: the half-life is no longer than this share of the images seen; None: it is from the first step on, as
            where a run goes on from another's weights.
    """
    half_life = batch_size * 10_000 / 32 if half_life is None else half_life
    if ramp is not None:
        half_life = min(half_life, ramp * images)
    return 0.5 ** (batch_size / max(half_life, 1e-8))
