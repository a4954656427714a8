"""AttnGAN (arXiv 1711.10485): what its critics, one for each picture size, and its generator learn from."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ratlip import distributed, losses
from ratlip.encoders.damsm_image import DamsmImage
from ratlip.encoders.damsm_losses import damsm_losses
from ratlip.models.attn_gan.discriminator import Discriminator
from ratlip.models.attn_gan.generator import Condition, Drawn
from ratlip.systems.system import Terms

Matched = dict[str, Tensor]


def critic_terms(critic: Discriminator, real: Tensor, fake: Tensor, sentence: Tensor, wrong: Tensor) -> Terms:
    """Of the critic of one size: pictures with and without their sentences.

    Real and drawn pictures go through it apart, each with batch statistics of their own; so do the wrong pairs.

    Args:
        real, fake: (B, 3, S, S) in [-1, 1]; the drawn ones are constants here.
        sentence: (B, E). wrong: (B, E), or one fewer on the last process, as `following` gives them.
    """
    samples = len(real) * distributed.world_size() - 1  # wrong pairs of the whole batch
    of_real, of_fake = critic.features(real), critic.features(fake.detach())
    c_real, c_fake = critic.matching(of_real, sentence), critic.matching(of_fake, sentence)
    c_wrong = critic.matching(of_real[: len(wrong)], wrong, samples)
    return {
        "c_real": (losses.logistic_real(c_real), 1 / 2),
        "c_fake": (losses.logistic_fake(c_fake), 1 / 3),
        # Gradients are means over the processes: of this their sum is the mean over all wrong pairs.
        "c_wrong": (losses.logistic_fake(c_wrong, samples / distributed.world_size()), 1 / 3),
        "u_real": (losses.logistic_real(critic.real(of_real)), 1 / 2),
        "u_fake": (losses.logistic_fake(critic.real(of_fake)), 1 / 3),
    }


def generator_terms(
    critics: Sequence[Discriminator],
    drawn: Drawn,
    sentence: Tensor,
    match: Callable[[Tensor], Matched],
    weight: float,
) -> Terms:
    """Of the generator: what the updated critics say of its pictures, how far the largest match their captions, and how
    far its conditions are from standard normal ones.

    Args:
        sentence: (B, E). match: of pictures (B, 3, S, S), see `damsm_match`.
        weight: of these, "lambda": 5 for birds, 50 for COCO.
    """
    terms: Terms = {}
    for critic, images in zip(critics, drawn.images, strict=True):
        conditional, unconditional = critic(images, sentence)
        terms[f"c{critic.side}"] = losses.logistic_real(conditional), 1
        terms[f"u{critic.side}"] = losses.logistic_real(unconditional), 1
    terms |= {name: (value, weight) for name, value in match(drawn.images[-1]).items()}
    return {**terms, "kl": (losses.kl_to_standard_normal(drawn.mu, drawn.logvar), 1)}


@torch.no_grad()
def following(sentence: Tensor) -> Tensor:
    """For each sample of this process's share (B, E) the sentence of the next one of the whole batch. The batch's last
    has none: the last process gives one fewer."""
    return distributed.whole_batch(sentence)[distributed.rank() + 1 :: distributed.world_size()]


def damsm_match(encoder: DamsmImage, images: Tensor, condition: Condition, classes: Tensor | None = None) -> Matched:
    """DAMSM's losses {"w0", "w1", "s0", "s1"} of pictures (B, 3, S, S) with their captions, among those of the whole
    batch.

    Args:
        encoder: of pictures. classes: (B,) of the pictures; None: each is of its own.
    """
    regions, codes = encoder(images)
    sentence, words, real = condition
    pairs = [regions, codes, words, real.to(words.dtype), sentence, *([] if classes is None else [classes])]
    regions, codes, words, real, sentence, *classes = map(distributed.whole_batch, pairs)
    return damsm_losses(regions, codes, words, real > 0, sentence, *classes)
