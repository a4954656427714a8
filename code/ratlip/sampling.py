"""From captions to images: finding a checkpoint, loading its generator, seeded noise."""

import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from easydict import EasyDict
from torch import Tensor, nn

from ratlip import build, checkpoint, choices, released, runs
from ratlip import config as configuration
from ratlip import device as devices
from ratlip.encoders import TextEncoder, damsm
from ratlip.encoders.clip_towers import OPENAI, FrozenClip, require_same, trained_with
from ratlip.errors import UserError
from ratlip.paths import command

NOISE_LIMIT = 2  # where DF-GAN cuts normal noise


def seeded_noise(seed: int, numbers: Sequence[int | tuple[int, ...]], dim: int) -> Tensor:
    """Standard normal noise (B, dim) of the samples with these numbers, or tuples of numbers: each depends on the seed
    and its own alone."""
    keys = [(seed, *number) if isinstance(number, tuple) else (seed, number) for number in numbers]
    return torch.from_numpy(np.stack([np.random.default_rng(k).standard_normal(dim, dtype=np.float32) for k in keys]))


def noise_of(generator: nn.Module, seed: int, numbers: Sequence[int | tuple[int, ...]]) -> Tensor:
    """`seeded_noise` as the generator draws from when it is not trained."""
    noise = seeded_noise(seed, numbers, generator.noise_dim)
    scale = getattr(generator, "noise_scale", 0)
    return truncated(noise, NOISE_LIMIT, scale) if scale else noise


def truncated(noise: Tensor, limit: float, scale: float = 1.0) -> Tensor:
    """Standard normal noise of any shape as `scale` times noise of the normal distribution cut off at +-limit (> 0).

    Quantiles are mapped to quantiles: a smaller limit gives less varied pictures of the same order (the truncation
    trick of BigGAN, Brock et al. 2019, arXiv 1809.11096), a large one the noise itself. DF-GAN was evaluated with limit
    2 and scale 0.88.
    """
    if not limit > 0:
        raise UserError(f"noise is truncated at a number above 0, not {limit}")
    outside = torch.special.ndtr(torch.tensor(-limit, dtype=torch.float64))  # below -limit, and above limit
    quantiles = outside + torch.special.ndtr(noise.double()) * (1 - 2 * outside)
    return (scale * torch.special.ndtri(quantiles).clamp(-limit, limit)).to(noise.dtype)


def interpolate(start: Tensor, end: Tensor, count: int) -> Tensor:
    """From one noise or sentence embedding (D,) to another, in (count, D) equal steps, both ends included.

    The direction moves along the great circle and the length linearly, so that noise between two noises is as long
    as they are; a straight line would pass nearer to zero than noise ever lies.
    """
    shares = torch.linspace(0, 1, count, dtype=start.dtype, device=start.device)[:, None]
    lengths = start.norm().lerp(end.norm(), shares)  # (count, 1)
    first, last = F.normalize(start, dim=0), F.normalize(end, dim=0)
    angle = torch.atan2((last - first).norm(), (last + first).norm()) * 2
    directions = ((1 - shares) * angle).sin() * first + (shares * angle).sin() * last
    # The same direction, or opposite ones: between these there is no one great circle.
    return torch.where(angle.sin() < 1e-4, start.lerp(end, shares), directions / angle.sin() * lengths)


@torch.no_grad()
def draw(generator: nn.Module, sentences: Tensor, noise: Tensor, precision: str = "fp32") -> Tensor:
    """Every caption with every noise: sentence embeddings (C, E), noise (N, Z) -> images (C, N, 3, S, S) in [-1, 1]."""
    return torch.stack(
        [generate(generator, noise, sentence.expand(len(noise), -1), precision) for sentence in sentences]
    )


@torch.no_grad()
def generate(generator: nn.Module, noise: Tensor, sentences: Tensor, precision: str = "fp32") -> Tensor:
    """noise (B, Z), sentence embeddings (B, E), both on the generator's device -> images (B, 3, S, S) in [-1, 1]."""
    with devices.autocast(noise.device, precision):
        return generator(noise, sentences).float().clamp(-1, 1)


def compiled(generator: nn.Module) -> nn.Module:
    """The generator, on its device, compiled by `ratlip.device.compiled`. The first call for each batch size takes a
    minute or more, later ones are faster, most of all for single images on a CPU."""
    from torch._inductor import config as inductor  # takes seconds

    inductor.freezing = True  # weights become constants; as an option of torch.compile it is not seen
    return devices.compiled(generator.requires_grad_(False))


@torch.no_grad()
def embed_captions(encoder: TextEncoder, captions: Sequence[str]) -> Tensor:
    """Captions -> sentence embeddings (B, E). Raises UserError for one that is empty or cannot be read."""
    for number, caption in enumerate(captions, 1):
        if not caption.strip():
            raise UserError(f"caption {number} is empty; give a description such as 'a small red star'")
    encoder.check(captions, lambda number: f"caption {number + 1}")
    return encoder.encode(encoder.tokenize(captions, whole=True))


@torch.no_grad()
def similarities(clip: FrozenClip, images: Tensor, sentences: Tensor) -> Tensor:
    """Cosines (B,) of images (B, 3, S, S) in [-1, 1] and sentence embeddings (B, E) in CLIP, between -1 and 1."""
    return F.cosine_similarity(clip.image(images)[1], sentences, dim=1)


def find_checkpoint(config: EasyDict) -> Path:
    """The furthest checkpoint of the run that is named, else of the newest trained with this configuration, else the
    one shipped for it."""
    named = runs.named(config)
    for run in [named] if named else runs.of_experiment(config):
        if heads := run.heads():
            return heads[0].path
    if named:
        raise UserError(f"{runs.shown(named.folder)} holds no checkpoint yet that can be read")
    if config.model.shipped:
        return Path(config.model.shipped)
    raise UserError(
        f"nothing has been trained with {config.file} yet (no checkpoint of it below {config.log.save_dir}); "
        f"run: {command('train.sh')} {shlex.quote(config.file)}, or name a checkpoint{runs.strangers(config, 'sample')}"
    )


def choose_products(clip: FrozenClip, config: EasyDict) -> None:
    """Set the form of CLIP's products for drawing and scoring: as the user says, else the one that is faster here. What
    a run took where it was trained is of no matter, since they agree to rounding."""
    origin = config.get("origin")
    asked = {**origin.stated, **origin.words}.get("clip.products", "auto") if origin else config.clip.products
    choices.settle_products(clip, asked, config.eval.batch_size, clip.mean.device)


def own_precision(path: str | Path) -> str:
    """The precision that a checkpoint's run trained and was evaluated in, wherever it is used now; "fp32" where it does
    not say, as those of other programs and of earlier ones that took what the machine had."""
    with suppress(UserError):  # other formats
        content = checkpoint.read(path, mmap=True)
        if content.get("format") == checkpoint.FORMAT:
            return content["config"].get("train.precision", "auto").replace("auto", "fp32")
    return "fp32"


def load_generator(config: EasyDict, path: str | Path) -> tuple[nn.Module, FrozenClip, TextEncoder, str]:
    """The generator of a checkpoint, ours or a released one, in eval mode on the CPU; averaged weights if it has any.

    Returns:
        generator, its CLIP, what reads its captions (CLIP or another), and a line that says what was loaded. The
        network's settings are the checkpoint's own; where its encoders are found on this machine (`clip.source`,
        `.weights`, `.activation`; `text.weights`, `.vocabulary`) `config` may say.

    Raises:
        UserError: not a checkpoint, an incomplete one, or another encoder than it was trained with.
    """
    devices.keep_freed_memory()
    content = checkpoint.read(path)
    if released.is_released(content):
        return _released_generator(config, content, path)
    if content.get("format") != checkpoint.FORMAT:
        raise UserError(checkpoint.UNKNOWN.format(path))
    if "vocabulary" in content:
        raise UserError(f"{path} holds no generator: it is a pair of encoders, of pretrain.sh")
    # A checkpoint from before a setting existed was made with what is its default now.
    own = EasyDict(configuration.unflatten(configuration.from_kept(content["config"])))
    own.clip.update(_whereabouts(own, config, "clip", ("source", "weights", "activation")))
    own.text.update(_whereabouts(own, config, "text", ("weights", "vocabulary")))
    own.data = config.data
    clip = build.clip_of(own)
    said = require_same(clip, trained_with(content), str(path), config.clip.insist)
    choose_products(clip, config)
    encoder = build.text_encoder_of(own, clip)
    if content.get("text"):
        damsm.require_same(encoder, content["text"], str(path))
    generator = build.generator_of(own, clip, encoder)
    try:
        generator.load_state_dict(content.get("ema") or content["generator"])
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{path} is incomplete: {' '.join(str(error).split())[:200]}") from None
    kind = "averaged weights" if content.get("ema") else "weights"
    about = f"{path}: {own.model.name}, epoch {content['epoch']}, {kind}"
    return generator.eval(), clip, encoder, f"{about}; {said}" if said else about


def _released_generator(config: EasyDict, content: dict, path: str | Path) -> tuple:
    """`load_generator` of a published file."""
    sees = released.reads_clip(content)
    clip = build.clip_of(EasyDict({**config, "clip": {**config.clip, "preprocess": "released"}}) if sees else config)
    choose_products(clip, config)
    generator, _, info = released.load_networks(content, clip, path)
    if generator is None:
        raise UserError(f"{path} holds no netG to sample from")
    if sees:
        require_same(clip, {**clip.shape, **OPENAI}, str(path), config.clip.insist)
        return generator, clip, clip, f"{path}: {released.describe(info)}"
    encoder = build.text_encoder_of(config, clip)
    if encoder.embedding_dim != info["cond_dim"]:
        name = info["system"].lower().replace("-", "")
        raise UserError(
            f"{path} is a released {info['system']}, of sentence vectors of {info['cond_dim']} numbers; here they have "
            f"{encoder.embedding_dim}: set model.name={name} text.encoder=damsm, and text.weights and text.vocabulary "
            "to the encoder that it was trained with"
        )
    return generator, clip, encoder, f"{path}: {released.describe(info)}"


def _whereabouts(own: EasyDict, config: EasyDict, group: str, keys: Sequence[str]) -> dict[str, str | None]:
    """Where an encoder of a checkpoint is found: where the user says, in the configuration or a word; else where it
    was in training, unless that is a file of another machine."""
    origin = config.get("origin")
    said = {**origin.stated, **origin.words} if origin else configuration.flatten(config)
    then, now = own[group], config[group]
    there = then.weights == now.weights or then.weights is None or Path(then.weights).exists()
    chosen = now if not there or any(f"{group}.{key}" in said for key in keys) else then
    return {key: chosen[key] for key in keys}
