"""Train a tiny CLIP of the demo data set, measure it on held-out combinations and write it."""

import argparse
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ratlip import device as devices
from ratlip import errors
from ratlip.data.demo import SIDE, VALUES, Attributes, captions, render, splits
from ratlip.encoders.clip_towers import clip, transformer_block  # the package clip, its warnings silenced
from ratlip.paths import ROOT, typed

CLIP = clip.model.CLIP
CONTEXT = 32  # tokens
PIXELS = 0  # the vision block whose patch tokens keep the pixels; those of the last but one know what they show
MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)
BATCH, LEARNING_RATE, WARM_UP = 64, 1e-3, 50
ATTACK = 0.05  # largest change of a value in [-1, 1]


class Shape(NamedTuple):
    """The sizes of the image tower."""

    resolution: int  # pixels; pictures of SIDE are resized to it
    patch: int  # pixels
    width: int  # 64 for each head of attention
    layers: int
    embedding: int


def build(shape: Shape) -> CLIP:
    """A ViT of this shape and a text transformer of 2 layers (width 64), untrained."""
    model = CLIP(
        shape.embedding, shape.resolution, shape.layers, shape.width, shape.patch, CONTEXT, 49408, 64, 1, 2
    ).float()
    # Keep the pixels readable through ln_pre, which removes a token's mean and scale: an orthogonal patch
    # embedding on top of a constant vector large enough that the scale hardly depends on the patch.
    nn.init.orthogonal_(model.visual.conv1.weight.data.view(shape.width, -1), gain=0.7)
    position = model.visual.positional_embedding.data
    position += 2 * torch.randn(shape.width)
    # Shapes span patches, so attention must know rows and columns from the start (without this it is slow
    # to learn shapes); codes of few dimensions leave the others to the pixels.
    side = shape.resolution // shape.patch
    rows, columns = 0.5 * torch.randn(side, 1, shape.width), 0.5 * torch.randn(1, side, shape.width)
    position[1:] += (rows + columns).flatten(0, 1)
    return model


def encode_image(model: CLIP, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, 3, 64, 64) in [-1, 1] -> embeddings (B, E), patch tokens (B, g*g, W) of block PIXELS and of the last
    but one."""
    visual = model.visual
    x = visual.conv1(((resized(images, model) + 1) / 2 - MEAN) / STD).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + visual.positional_embedding
    x = visual.ln_pre(x)
    tokens = []
    for block in visual.transformer.resblocks:
        x = transformer_block(block, x)
        tokens.append(x[:, 1:])
    return visual.ln_post(x[:, 0]) @ visual.proj, tokens[PIXELS], tokens[-2]


def resized(images: Tensor, model: CLIP) -> Tensor:
    """Images (B, 3, 64, 64) at the model's resolution, as FrozenClip gives them to it."""
    size = 2 * (model.visual.input_resolution,)
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False)


def tokenize(attributes: list[Attributes], rng: np.random.Generator) -> Tensor:
    """One caption in random wording for each of B attribute tuples, as token ids (B, 32)."""
    return clip.tokenize([captions(a, rng, 1)[0] for a in attributes], context_length=CONTEXT)


def pictures(attributes: list[Attributes], rng: np.random.Generator) -> Tensor:
    """One picture for each of B attribute tuples, (B, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(render(attributes, rng)).permute(0, 3, 1, 2).float() / 127.5 - 1


def disturb(images: Tensor) -> Tensor:
    """Add blur, mottle and noise of random strength to pictures (B, 3, 64, 64) in [-1, 1].

    A generator's pictures have such faults; a discriminator sees them only if the features carry them.
    """
    count = len(images)

    def strength(most: float) -> Tensor:
        return most * torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < 0.6)

    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    blurred = F.avg_pool2d(F.pad(blurred, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    disturbed = torch.lerp(images, blurred, strength(1.0))
    for side in (8, 16, 32):
        mottle = F.interpolate(torch.randn(count, 3, side, side), SIDE, mode="bilinear")
        disturbed = disturbed + strength(0.2) * mottle
    disturbed = disturbed + strength(0.15) * torch.randn_like(images)
    return disturbed.clamp(-1, 1)


def patches(images: Tensor, model: CLIP) -> Tensor:
    """(B, 3, 64, 64) -> (B, g*g, 3 * patch * patch): the pixels of each patch that the model sees."""
    patch = model.visual.conv1.kernel_size
    return F.unfold(resized(images, model), patch, stride=patch).transpose(1, 2)


def near_misses(batch: list[Attributes], allowed: set[Attributes], rng: np.random.Generator) -> list[Attributes]:
    """For each combination an allowed one that differs from it in exactly one attribute."""
    misses = []
    for attributes in batch:
        miss = attributes
        while miss == attributes or miss not in allowed:
            field = rng.integers(len(VALUES))
            miss = attributes._replace(**{Attributes._fields[field]: int(rng.integers(len(VALUES[field])))})
        misses.append(miss)
    return misses


def batches(combinations: list[Attributes], rng: np.random.Generator) -> Iterator[list[Attributes]]:
    """Endless batches of about BATCH distinct combinations, each with nearly all shapes of some objects.

    Pictures that differ in shape alone show what a shape is; in random batches the large circles stay squares for long.
    """
    objects: dict[Attributes, list[Attributes]] = {}
    for attributes in combinations:
        objects.setdefault(attributes._replace(shape=0), []).append(attributes)
    groups, together = list(objects.values()), BATCH // len(VALUES.shape)
    while True:
        order = rng.permutation(len(groups))
        for start in range(0, len(order) - together + 1, together):
            yield [attributes for i in order[start : start + together] for attributes in groups[i]]


def contrastive(scale: Tensor, image: Tensor, text: Tensor, same: Tensor, shares: Tensor) -> Tensor:
    """CLIP's loss of embeddings image (B, E) and text (2 B, E): the first B texts match in order.

    The others are near misses; image i is to match its own by `shares` (B,) in [0, 1], and its caption by the rest.
    same (B, 2 B) marks equal combinations, which count as neither.
    """
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    own = torch.arange(len(image))
    same = same.clone()
    same[own, own] = False
    logits = logits.masked_fill(same, -math.inf)
    of_texts = F.cross_entropy(logits[:, : len(image)].T, own, reduction="none")
    return (shared(logits, own, own + len(image), shares).mean() + ((1 - shares) * of_texts).mean()) / 2


def shared(logits: Tensor, one: Tensor, other: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropies (B,) of logits (B, N) with the class `one`, by `shares` with the class `other`."""
    first, second = (F.cross_entropy(logits, wanted, reduction="none") for wanted in (one, other))
    return torch.lerp(first, second, shares)


def attribute_losses(logits: Tensor, wanted: Tensor, other: Tensor, shares: Tensor) -> Tensor:
    """Five cross-entropies (5,): logits (B, 31), those of the attributes side by side, wanted and other (B, 5)."""
    parts = logits.float().split([len(values) for values in VALUES], dim=1)
    return torch.stack([shared(part, wanted[:, i], other[:, i], shares).mean() for i, part in enumerate(parts)])


def attack(images: Tensor, strength: float, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Move every value of images (B, 3, 64, 64) by up to `strength`, so that the loss grows (arXiv 2001.03994).

    A generator that follows CLIP's gradient finds whatever CLIP mistakes for a star; so let there be little of that.
    """
    start = (images + strength * (2 * torch.rand_like(images) - 1)).requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(start), start)
    moved = start.detach() + 1.25 * strength * gradient.sign()
    return images + (moved - images).clamp(-strength, strength)


def train(steps: int, seed: int, shape: Shape) -> tuple[CLIP, nn.ModuleDict]:
    """Train on pictures and captions drawn on the fly; return the model and the heads that read its features."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    combinations, _ = splits()
    allowed = set(combinations)
    model = build(shape)
    # These heads are thrown away. They make the embeddings, and every patch token of the last block but one, separate
    # every attribute linearly, and block PIXELS keep every pixel.
    names = sum(map(len, VALUES))
    of_image, of_text, of_patch = (nn.Linear(size, names) for size in (shape.embedding, shape.embedding, shape.width))
    pixels = nn.Linear(shape.width, 3 * shape.patch**2)
    heads = nn.ModuleDict({"of_image": of_image, "of_text": of_text, "of_patch": of_patch, "pixels": pixels})
    everything = nn.ModuleList([model, heads])
    optimizer = torch.optim.AdamW(everything.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / WARM_UP, 0.01 + 0.99 * math.cos(math.pi / 2 * i / steps) ** 2)
    )
    precision = devices.choose_precision("auto", torch.device("cpu"))
    bar = tqdm(zip(range(steps), batches(combinations, rng), strict=False), total=steps, mininterval=5)
    for step, batch in bar:
        misses = near_misses(batch, allowed, rng)
        wanted, missed = torch.tensor(batch), torch.tensor(misses)
        # A quarter of the pictures blends into the near miss: between two attributes the way shall go up all along.
        jitter = int(rng.integers(2**32))
        images, others = (pictures(drawn, np.random.default_rng(jitter)) for drawn in (batch, misses))
        shares = torch.zeros(len(batch))
        shares[::4].uniform_()
        images = torch.lerp(images, others, shares[:, None, None, None])
        images[::2] = disturb(images[::2])

        with devices.autocast(images.device, precision):
            strength = ATTACK * min(1.0, max(0.0, (step / steps - 0.4) / 0.4))
            if strength:
                images[2::4] = attack(
                    images[2::4],
                    strength,
                    lambda x, to=(wanted[2::4], missed[2::4], shares[2::4]): attribute_losses(
                        of_image(encode_image(model, x)[0]), *to
                    ).sum(),
                )
            image, pixel_tokens, meaning_tokens = encode_image(model, images)
            text = model.encode_text(tokenize(batch + misses, rng))
            texts_of = torch.cat([wanted, missed])
            same = (wanted[:, None] == texts_of).all(2)
            matching = contrastive(model.logit_scale.exp(), image.float(), text.float(), same, shares)
            naming = attribute_losses(of_image(image), wanted, missed, shares)
            naming_text = attribute_losses(of_text(text), texts_of, texts_of, torch.zeros(len(text)))
            count = meaning_tokens.shape[1]
            naming_patch = attribute_losses(
                of_patch(meaning_tokens).flatten(0, 1),
                *(labels.repeat_interleave(count, dim=0) for labels in (wanted, missed, shares)),
            )
            error = (pixels(pixel_tokens).float() - patches(images, model)).square().mean((1, 2))
            # The logarithm keeps its pull however small the error gets; the constant stands for 46 dB.
            rebuilding = (error + 1e-4).log().mean()
            loss = matching + 0.5 * naming.sum() + 0.2 * naming_text.sum() + 0.5 * naming_patch.sum() + 0.2 * rebuilding

        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(everything.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        image_losses, patch_losses = (
            " ".join(f"{float(value):.2f}" for value in losses.detach()) for losses in (naming, naming_patch)
        )
        bar.set_postfix_str(
            f"match {matching:.2f}, image {image_losses}, patch {patch_losses}, text {naming_text.sum():.2f}, "
            f"PSNR {_psnr(error.detach().mean()):.1f} dB",
            refresh=False,
        )
    return model, heads


@torch.no_grad()
def evaluate(path: Path, heads: nn.ModuleDict) -> dict[str, float]:
    """Measure the saved file, as `clip.load` opens it, on the 500 test combinations, randomly worded."""
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    model, _ = clip.load(str(path), device="cpu", jit=False)
    model.requires_grad_(False)
    meaning = len(model.visual.transformer.resblocks) - 2
    _, test = splits()
    images, wanted = pictures(test, rng), torch.tensor(test)

    def image_of(pictures: Tensor) -> Tensor:
        return F.normalize(encode_image(model, pictures)[0], dim=1)

    def text_of(attributes: list[Attributes]) -> Tensor:
        return F.normalize(model.encode_text(tokenize(attributes, rng)), dim=1)

    own = text_of(test)
    with torch.enable_grad():
        attacked = attack(images, ATTACK, lambda x: -(image_of(x) * own).sum())
    shown = {"clean": images, "disturbed": disturb(images), "attacked": attacked}
    figures = {}
    for i, (field, values) in enumerate(zip(Attributes._fields, VALUES, strict=True)):
        options = [attributes._replace(**{field: i}) for attributes in test for i in range(len(values))]
        texts = text_of(options).view(len(test), len(values), -1)
        for kind, seen in shown.items():
            guess = (texts @ image_of(seen)[:, :, None])[..., 0].argmax(1)
            figures[f"zero-shot accuracy, {field}, {kind} pictures"] = (guess == wanted[:, i]).float().mean()
    cosine = image_of(images) @ own.T
    matched = torch.eye(len(test), dtype=torch.bool)
    found = cosine.argmax(1) == torch.arange(len(test))
    figures["retrieval of the caption among 500, top 1"] = found.float().mean()
    figures["mean cosine, matched pairs"] = cosine[matched].mean()
    figures["mean cosine, mismatched pairs"] = cosine[~matched].mean()
    for kind, seen in shown.items():
        _, pixel_tokens, meaning_tokens = encode_image(model, seen)
        error = F.mse_loss(heads["pixels"](pixel_tokens), patches(seen, model))
        figures[f"PSNR in dB of the pixels read from block {PIXELS}, {kind} pictures"] = _psnr(error)
        logits = heads["of_patch"](meaning_tokens).split([len(values) for values in VALUES], dim=2)
        right = (logits[0].argmax(2) == wanted[:, :1]).float().mean()
        figures[f"shape named by a patch token of block {meaning}, {kind} pictures"] = right
    return {name: float(value) for name, value in figures.items()}


def _psnr(mean_square_error: Tensor) -> float:
    return 10 * math.log10(4 / float(mean_square_error))  # the range -1..1 has peak 2


def main() -> None:
    """Train, write the weights, measure them and write the figures beside them."""
    defaults = argparse.ArgumentDefaultsHelpFormatter
    example = "example: source scripts/env.sh && python code/train_demo_clip.py --steps 400 --out clip.pt"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=defaults, epilog=example)
    parser.add_argument("--out", type=typed, default=ROOT / "assets/demo/clip.pt", help="file to write")
    parser.add_argument("--steps", type=int, default=1500, help=f"training steps of {BATCH} pictures")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data")
    parser.add_argument("--resolution", type=int, default=64, help="pixels along a side that it sees")
    parser.add_argument("--patch", type=int, default=8, help="pixels along a side of a patch")
    parser.add_argument("--width", type=int, default=192, help="of the image tower, 64 for each head of attention")
    parser.add_argument("--layers", type=int, default=4, help="of the image tower")
    parser.add_argument("--embedding", type=int, default=128, help="length of the embeddings")
    args = parser.parse_args()
    shape = Shape(*(getattr(args, field) for field in Shape._fields))
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    if shape.layers < 2 or min(shape) < 1 or shape.width % 64 or shape.resolution % shape.patch:
        parser.error("2 layers or more, --width a multiple of 64, --resolution one of --patch")

    start = time.time()
    model, heads = train(args.steps, args.seed, shape)
    seconds = time.time() - start
    args.out.parent.mkdir(parents=True, exist_ok=True)
    weights = model.state_dict()
    weights.update({key: value.half() for key, value in weights.items()})
    weights._metadata[""]["activation"] = "quick_gelu"  # a state dict's metadata; it is saved and loaded with it
    torch.save(weights, args.out)
    table = "\n".join(f"| {name} | {value:.4f} |" for name, value in evaluate(args.out, heads).items())
    stated = {field: value for field, value in shape._asdict().items() if value != parser.get_default(field)}
    options = "".join(f" --{field} {value}" for field, value in stated.items())
    command = f"python code/train_demo_clip.py --steps {args.steps} --seed {args.seed}{options}"
    vision = f"Vision: {shape.resolution} px, patch {shape.patch}, width {shape.width}, {shape.layers} layers"
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    text = f"""# {args.out.name}: a CLIP of the demo data set

Made by `{command}` on {date.today()} in {seconds:.0f} s ({machine}).
{vision}. Text: width 64, 2 layers, {CONTEXT} tokens.
Embedding {shape.embedding}. A float16 state dict that states its activation (QuickGELU), which `clip.load` opens.
Measured on the file, on the 500 combinations of attributes that are not in training:

| figure | value |
| --- | --- |
{table}
"""
    args.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    errors.run(main)
