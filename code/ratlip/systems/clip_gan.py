"""RATLIP (arXiv 2405.08114) and GALIP (arXiv 2301.12959): a generator and a discriminator that see through a CLIP."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from easydict import EasyDict
from torch import Tensor

from ratlip import device as devices
from ratlip import losses
from ratlip.augment import augment
from ratlip.encoders import TextEncoder
from ratlip.encoders.clip_towers import FrozenClip
from ratlip.models.blocks import LARGE
from ratlip.models.clip_gan.discriminator import Discriminator
from ratlip.models.clip_gan.generator import Generator
from ratlip.systems.system import Phase, Step, System, Terms


class ClipGan(System):
    """The discriminator learns from what CLIP sees of real and drawn pictures; the generator from the same drawn ones,
    which are drawn, and seen by CLIP, once."""

    sees_clip = True

    def __init__(self, settings: EasyDict, clip: FrozenClip, generator: Generator, discriminator: Discriminator):
        super().__init__(settings, clip, {"discriminator": discriminator, "generator": generator})
        self.phases = [Phase("d", "discriminator", self.criticise), Phase("g", "generator", self.generate)]
        # What a step calls of the generator and of CLIP, compiled or not.
        self.draw, self.see, self.feature_maps = generator, clip.image, clip.feature_maps

    @staticmethod
    def make_generator(config: EasyDict, clip: FrozenClip, text: TextEncoder) -> Generator:
        model = config.model
        return Generator(
            clip,
            model.imsize,
            model.nf,
            model.z_dim,
            model.name,
            rat_state=model.rat.state,
            rat_scope=model.rat.scope,
            shuffle_attention=model.shuffle_attention,
        )

    @staticmethod
    def make_discriminator(config: EasyDict, clip: FrozenClip) -> Discriminator:
        """The discriminator that `config` describes, freshly initialised."""
        return Discriminator(clip, config.model.d_channels, config.model.d_start, config.model.d_whiten)

    @classmethod
    def build(cls, config: EasyDict, clip: FrozenClip, text: TextEncoder) -> "ClipGan":
        return cls(config.train, clip, cls.make_generator(config, clip, text), cls.make_discriminator(config, clip))

    @torch.no_grad()
    def fit(self, images: Iterable[Tensor]) -> None:
        if self.networks["discriminator"].whiten:
            maps = torch.cat([self.clip.feature_maps(batch) for batch in images])  # (B, N, W, g, g)
            self.networks["discriminator"].fit_whitening(maps)

    def compile(self, compiled: Callable[[Callable], Callable]) -> None:
        # Not the discriminator, which MA-GP differentiates twice; torch.compile cannot.
        self.draw, self.see, self.feature_maps = map(compiled, (self.draw, self.see, self.feature_maps))

    def draws(self, rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
        """Noise (B, Z), and what `augment` does to real and generated images, (B, 3) each."""
        noise = super().draws(rng, count)
        shifts = rng.uniform(-1, 1, (2, count, 2)) * self.settings.augment_shift
        brighter = rng.uniform(-1, 1, (2, count, 1)) * self.settings.augment_brightness
        real, fake = np.concatenate([shifts, brighter], axis=2, dtype=np.float32)
        return {**noise, "augment_real": real, "augment_fake": fake}

    def parts_of_a_step(self, sentences: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
        """The generator's blocks, each on maps of the run's shapes; CLIP and the discriminator. Where maps are large it
        is one image, as training takes these sample by sample, and of the blocks with small and with large maps, which
        are much alike, only the last is run."""
        generator, clip, losses = self.generator, self.clip, []
        sides = zip([clip.grid, *generator.sizes], generator.sizes, strict=False)
        blocks = [(block, *own) for block, own in zip(generator.blocks, sides, strict=True)]
        small = [(block, h, size) for block, h, size in blocks if block.conv1.conv.out_channels * size**2 < LARGE]
        large = blocks[len(small) :]
        batch, timed = (1, [*small[-1:], large[-1]]) if large else (min(len(sentences), 16), small)
        for block, h, size in timed:
            x = torch.ones(batch, block.conv1.conv.in_channels, h, h).to(memory_format=torch.channels_last)
            affines = [(torch.ones(batch, channels, 1, 1),) * 2 for channels in block.affine_channels]
            (y,) = block([x.requires_grad_()], size, affines)  # (batch, C, size, size)
            losses.append((y.float().square().mean(), [x, *block.parameters()]))
        images = torch.ones(batch, 3, generator.sizes[-1], generator.sizes[-1], requires_grad=True)
        maps, _ = clip.image(images)
        discriminator = self.networks["discriminator"]
        logits = discriminator(maps, torch.ones(batch, clip.embedding_dim))
        losses.append((logits.float().mean(), [images, *discriminator.parameters()]))
        return losses

    def criticise(self, s: Step) -> Terms:
        """Hinge loss at real, drawn and mismatched pairs, and MA-GP."""
        discriminator = self.networks["discriminator"]
        sentences = s.sentences.requires_grad_()  # (B, E); MA-GP differentiates with respect to them
        noise = devices.send(s.draws["noise"], s.images.device)

        # What CLIP sees. No graph goes through it for real images: MA-GP starts at its feature maps.
        with torch.no_grad():
            real_maps = self.feature_maps(augment(s.images, s.draws["augment_real"]))  # (B, N, W, g, g)
            real_maps = discriminator.prepare(real_maps)
        real_maps.requires_grad_()
        fakes = augment(self.draw(noise, sentences.detach()), s.draws["augment_fake"])
        fake_maps, fake_embeddings = self.see(fakes)
        s.fake_maps = discriminator.prepare(fake_maps)

        real_features = discriminator.features(real_maps)
        real_logits = discriminator.logits(real_features, sentences)
        mismatched_logits = discriminator.logits(real_features, s.wrong)
        real = losses.hinge_real(real_logits)
        fake_features = discriminator.features(s.fake_maps.detach())
        fake = losses.hinge_fake(discriminator.logits(fake_features, sentences.detach()))
        mismatched = losses.hinge_fake(mismatched_logits)
        penalty = losses.matching_aware_gradient_penalty(real_logits, (real_maps, sentences), s.scale)
        s.similarity = losses.clip_similarity(fake_embeddings, sentences.detach())
        s.watched.append(s.similarity)  # pictures that are no numbers teach nobody
        return {"real": (real, 1), "fake": (fake, 0.5), "mismatched": (mismatched, 0.5), "ma_gp": (penalty, 1)}

    def generate(self, s: Step) -> Terms:
        """What the updated discriminator says of the same pictures, and how far CLIP finds them like their captions."""
        discriminator = self.networks["discriminator"]
        adversarial = -discriminator.logits(discriminator.features(s.fake_maps), s.sentences.detach()).mean()
        return {"adversarial": (adversarial, 1), "clip_similarity": (s.similarity, -self.settings.sim_w)}
