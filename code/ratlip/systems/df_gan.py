"""DF-GAN (arXiv 2008.05865) and RAT-GAN (arXiv 2204.10482): convolutions from noise and caption, and a critic."""

from collections.abc import Callable

import torch.nn.functional as F
from easydict import EasyDict
from torch import Tensor

from ratlip import device as devices
from ratlip import distributed, losses
from ratlip.encoders import TextEncoder
from ratlip.encoders.clip_towers import FrozenClip
from ratlip.models.df_gan.discriminator import Discriminator
from ratlip.models.df_gan.generator import Generator
from ratlip.systems.system import Phase, Step, System, Terms


class DfGan(System):
    """The critic sees the pictures themselves, and its penalty is part of its loss (DF-GAN) or an update of its own
    (RAT-GAN). The generator learns from the same drawn pictures."""

    def __init__(self, settings: EasyDict, clip: FrozenClip, generator: Generator, discriminator: Discriminator):
        super().__init__(settings, clip, {"discriminator": discriminator, "generator": generator})
        self.penalty_apart = generator.conditioner.state == "ratgan" and any(generator.conditioner.recurrent)
        self.phases = [Phase("d", "discriminator", self.criticise), Phase("g", "generator", self.generate)]
        if self.penalty_apart:
            self.phases.insert(1, Phase("gp", "discriminator", self.penalise))
        self.moving = ()
        self.draw = generator

    @staticmethod
    def make_generator(config: EasyDict, clip: FrozenClip, text: TextEncoder) -> Generator:
        model, own = config.model, config.ratgan
        shape = (model.imsize, model.nf, model.z_dim, text.embedding_dim, model.name)
        return Generator(*shape, affines=own.affines, start=own.g_start, noise_scale=model.noise_scale)

    @classmethod
    def build(cls, config: EasyDict, clip: FrozenClip, text: TextEncoder) -> "DfGan":
        model = config.model
        generator = cls.make_generator(config, clip, text)
        shape = (model.imsize, model.nf, text.embedding_dim, model.name)
        discriminator = Discriminator(*shape, start=model.d_start, attention=config.ratgan.attention)
        return cls(config.train, clip, generator, discriminator)

    def compile(self, compiled: Callable[[Callable], Callable]) -> None:
        # Not the discriminator, which MA-GP differentiates twice; torch.compile cannot.
        self.draw = compiled(self.draw)

    def criticise(self, s: Step) -> Terms:
        """Hinge loss at real, drawn and mismatched pairs; DF-GAN: and MA-GP."""
        discriminator = self.networks["discriminator"]
        if not self.penalty_apart:  # MA-GP differentiates with respect to both
            s.images.requires_grad_()
            s.sentences.requires_grad_()
        noise = devices.send(s.draws["noise"], s.images.device)
        s.fakes = self.draw(noise, s.sentences.detach())  # (B, 3, S, S)

        real_features = discriminator.features(s.images)
        real_logits = discriminator.logits(real_features, s.sentences)
        mismatched = F.relu(1 + discriminator.logits(real_features, s.wrong))  # (B, 1)
        terms = {
            "real": (losses.hinge_real(real_logits), 1),
            "fake": (losses.hinge_fake(discriminator(s.fakes.detach(), s.sentences.detach())), 0.5),
            "mismatched": (self.mean_of_pairs(mismatched), 0.5),
        }
        if not self.penalty_apart:
            inputs = (s.images, s.sentences)
            terms["ma_gp"] = (losses.matching_aware_gradient_penalty(real_logits, inputs, s.scale), 1)
        return terms

    def mean_of_pairs(self, mismatched: Tensor) -> Tensor:
        """Mean of (B, 1). RAT-GAN makes B - 1 mismatched pairs of a batch of B, so that the last one, of the last
        process, is left out."""
        if not self.penalty_apart:
            return mismatched.mean()
        processes = distributed.world_size()
        pairs = len(mismatched) * processes - 1
        kept = mismatched[:-1] if distributed.rank() == processes - 1 else mismatched
        return kept.sum() * processes / pairs  # the mean over processes is that over the pairs

    def penalise(self, s: Step) -> Terms:
        """MA-GP of the critic that has just been updated."""
        inputs = (s.images.detach().requires_grad_(), s.sentences.detach().requires_grad_())
        logits = self.networks["discriminator"](*inputs)
        return {"ma_gp": (losses.matching_aware_gradient_penalty(logits, inputs, s.scale), 1)}

    def generate(self, s: Step) -> Terms:
        """What the updated critic says of the same pictures."""
        return {"adversarial": (-self.networks["discriminator"](s.fakes, s.sentences.detach()).mean(), 1)}
