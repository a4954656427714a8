"""Train the tiny CLIP of the demo data set, measure it on held-out combinations and write it."""

import argparse
import math
import os
import platform
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import clip
import numpy as np
import torch
import torch.nn.functional as F
from clip.model import CLIP
from torch import Tensor, nn
from tqdm import tqdm

from ratlip.data.demo import SIDE, VALUES, Attributes, captions, render, splits

ROOT = Path(__file__).resolve().parents[1]
PATCH, WIDTH, EMBEDDING, CONTEXT = 8, 192, 128, 32
FEATURE_BLOCKS = (0, 1, 2)  # the vision blocks whose patch tokens the discriminator reads
MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)
BATCH, LEARNING_RATE, WARM_UP = 64, 1e-3, 50


def build() -> CLIP:
    """A 64-pixel ViT of 4 layers (patch 8, width 192) and a text transformer of 2 (width 64), untrained."""
    model = CLIP(EMBEDDING, SIDE, 4, WIDTH, PATCH, CONTEXT, 49408, 64, 1, 2).float()
    # Keep the pixels readable through ln_pre, which removes a token's mean and scale: an orthogonal patch
    # embedding on top of a constant vector large enough that the scale hardly depends on the patch.
    nn.init.orthogonal_(model.visual.conv1.weight.data.view(WIDTH, -1), gain=0.7)
    position = model.visual.positional_embedding.data
    position += 2 * torch.randn(WIDTH)
    # Shapes span patches, so attention must know rows and columns from the start (without this it is slow
    # to learn shapes); codes of few dimensions leave the others to the pixels.
    side = SIDE // PATCH
    rows, columns = 0.5 * torch.randn(side, 1, WIDTH), 0.5 * torch.randn(1, side, WIDTH)
    position[1:] += (rows + columns).flatten(0, 1)
    return model


def encode_image(model: CLIP, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Images (B, 3, 64, 64) in [-1, 1] -> embeddings (B, 128), tokens (B, 64, 192) of FEATURE_BLOCKS."""
    visual = model.visual
    x = visual.conv1(((images + 1) / 2 - MEAN) / STD).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + visual.positional_embedding
    x = visual.ln_pre(x).transpose(0, 1)  # CLIP's blocks want (tokens, B, width)
    features = []
    for i, block in enumerate(visual.transformer.resblocks):
        x = block(x)
        if i in FEATURE_BLOCKS:
            features.append(x[1:].transpose(0, 1))
    return visual.ln_post(x[0]) @ visual.proj, features


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


def patches(images: Tensor) -> Tensor:
    """(B, 3, 64, 64) -> (B, 64, 192): the pixels of each patch of the 8x8 grid."""
    return F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)


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
    """Endless batches without a repetition inside a batch: equal pairs would be false negatives."""
    while True:
        order = rng.permutation(len(combinations))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            yield [combinations[i] for i in order[start : start + BATCH]]


def contrastive(scale: Tensor, image: Tensor, text: Tensor, same: Tensor) -> Tensor:
    """CLIP's loss of embeddings image (B, E) and text (B + M, E), of which the first B match in order.

    The M more texts are negatives; same (B, B + M) marks equal combinations, which count as neither.
    """
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    target = torch.arange(len(image))
    same = same.clone()
    same[target, target] = False
    logits = logits.masked_fill(same, -math.inf)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, : len(image)].T, target)) / 2


def attribute_losses(logits: Tensor, wanted: Tensor) -> Tensor:
    """Five cross-entropies (5,): logits (B, 31), those of the attributes side by side, wanted (B, 5)."""
    parts = logits.split([len(values) for values in VALUES], dim=1)
    return torch.stack([F.cross_entropy(part, wanted[:, i]) for i, part in enumerate(parts)])


def train(steps: int, seed: int) -> tuple[CLIP, nn.ModuleList]:
    """Train on pictures and captions drawn on the fly; return the model and its three pixel heads."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    combinations, _ = splits()
    allowed = set(combinations)
    model = build()
    # These heads are thrown away. They make the embeddings separate every attribute linearly, and the
    # discriminator's features keep every pixel.
    attributes_of_image, attributes_of_text = (nn.Linear(EMBEDDING, sum(map(len, VALUES))) for _ in range(2))
    pixels = nn.ModuleList(nn.Linear(WIDTH, 3 * PATCH**2) for _ in FEATURE_BLOCKS)
    everything = nn.ModuleList([model, attributes_of_image, attributes_of_text, pixels])
    optimizer = torch.optim.AdamW(everything.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / WARM_UP, 0.01 + 0.99 * math.cos(math.pi / 2 * i / steps) ** 2)
    )
    bar = tqdm(zip(range(steps), batches(combinations, rng), strict=False), total=steps, mininterval=5)
    for _, batch in bar:
        misses = near_misses(batch, allowed, rng)
        images = pictures(batch, rng)
        images[::2] = disturb(images[::2])
        wanted, texts_of = torch.tensor(batch), torch.tensor(batch + misses)
        same = (wanted[:, None] == texts_of).all(2)

        image, features = encode_image(model, images)
        text = model.encode_text(tokenize(batch + misses, rng))
        matching = contrastive(model.logit_scale.exp(), image, text, same)
        naming = attribute_losses(attributes_of_image(image), wanted)
        naming_text = attribute_losses(attributes_of_text(text), texts_of)
        rebuilt = [head(tokens) for head, tokens in zip(pixels, features, strict=True)]
        errors = [(patch - patches(images)).square().mean((1, 2)) for patch in rebuilt]
        # The logarithm keeps its pull however small the error gets; the constant stands for 46 dB.
        rebuilding = sum((error + 1e-4).log().mean() for error in errors)
        loss = matching + 0.5 * naming.sum() + 0.2 * naming_text.sum() + 0.2 * rebuilding

        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(everything.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        psnr = " ".join(f"{_psnr(error.detach().mean()):.1f}" for error in errors)
        image_losses = " ".join(f"{float(value):.2f}" for value in naming.detach())
        losses = f"match {matching:.2f}, image {image_losses}, text {naming_text.sum():.2f}, PSNR {psnr} dB"
        bar.set_postfix_str(losses, refresh=False)
    return model, pixels


@torch.no_grad()
def evaluate(path: Path, pixels: nn.ModuleList) -> dict[str, float]:
    """Measure the saved file, as `clip.load` opens it, on the 500 test combinations, randomly worded."""
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    model, _ = clip.load(str(path), device="cpu", jit=False)
    combinations, test = splits()
    images = pictures(test, rng)
    image = F.normalize(encode_image(model, images)[0], dim=1)

    def text_of(attributes: list[Attributes]) -> Tensor:
        return F.normalize(model.encode_text(tokenize(attributes, rng)), dim=1)

    figures = {}
    for field, values in zip(Attributes._fields, VALUES, strict=True):
        options = [attributes._replace(**{field: i}) for attributes in test for i in range(len(values))]
        texts = text_of(options).view(len(test), len(values), -1)
        guess = (texts @ image[:, :, None])[..., 0].argmax(1)
        right = guess == torch.tensor([getattr(attributes, field) for attributes in test])
        figures[f"zero-shot accuracy, {field}"] = right.float().mean()
    cosine = image @ text_of(test).T
    matched = torch.eye(len(test), dtype=torch.bool)
    found = cosine.argmax(1) == torch.arange(len(test))
    figures["retrieval of the caption among 500, top 1"] = found.float().mean()
    figures["mean cosine, matched pairs"] = cosine[matched].mean()
    figures["mean cosine, mismatched pairs"] = cosine[~matched].mean()
    for kind, shown in (("clean", images), ("disturbed", disturb(images))):
        _, features = encode_image(model, shown)
        for block, head, tokens in zip(FEATURE_BLOCKS, pixels, features, strict=True):
            error = F.mse_loss(head(tokens), patches(shown))
            figures[f"PSNR in dB of the pixels read from block {block}, {kind} pictures"] = _psnr(error)
    return {name: float(value) for name, value in figures.items()}


def _psnr(mean_square_error: Tensor) -> float:
    return 10 * math.log10(4 / float(mean_square_error))  # the range -1..1 has peak 2


def main() -> None:
    """Train, write the weights, measure them and write the figures beside them."""
    defaults = argparse.ArgumentDefaultsHelpFormatter
    example = "example: python code/train_demo_clip.py --steps 800 --out clip.pt"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=defaults, epilog=example)
    parser.add_argument("--out", type=Path, default=ROOT / "assets/demo/clip.pt", help="file to write")
    parser.add_argument("--steps", type=int, default=800, help=f"training steps of {BATCH} pictures")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data")
    args = parser.parse_args()

    start = time.time()
    model, pixels = train(args.steps, args.seed)
    seconds = time.time() - start
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save({key: value.half() for key, value in model.state_dict().items()}, args.out)
    table = "\n".join(f"| {name} | {value:.4f} |" for name, value in evaluate(args.out, pixels).items())
    command = f"python code/train_demo_clip.py --steps {args.steps} --seed {args.seed}"
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    text = f"""# {args.out.name}: the CLIP of the demo data set

Made by `{command}` on {date.today()} in {seconds:.0f} s ({machine}).
Vision: {SIDE} px, patch {PATCH}, width {WIDTH}, 4 layers. Text: width 64, 2 layers, {CONTEXT} tokens.
Embedding {EMBEDDING}. A float16 state dict, which `clip.load` opens.
Measured on the file, on the 500 combinations of attributes that are not in training:

| figure | value |
| --- | --- |
{table}
"""
    args.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
