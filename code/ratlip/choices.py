"""Choices that depend on the machine: ways to compute the same, timed side by side where the program runs."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ratlip import device as devices
from ratlip import distributed
from ratlip.encoders.clip_towers import PRODUCTS, FrozenClip
from ratlip.models.blocks import LARGE
from ratlip.models.clip_gan.discriminator import Discriminator
from ratlip.models.clip_gan.generator import Generator

LEAD = 0.1  # share of the published way's time that another must save to be taken
ROUNDS = 12
SECONDS = {"products": 0.5, "precision": 2.5}  # unless one call of each way takes longer


def fastest(ways: dict[str, Callable[[], object]], seconds: float) -> tuple[str, str]:
    """The first of `ways`, the published one, unless another takes a tenth less time: then the quickest.

    They are called in turns, for about `seconds`. Of each its quickest call counts: whatever else the machine does only
    adds to the others. The first round, which pays for new memory and prepared kernels, counts only where there is no
    time for another.

    Returns:
        its name, and the times in words.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    begun = time.perf_counter()
    for _ in range(ROUNDS):
        for name, work in ways.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
        latest = sum(own[-1] for own in times.values())
        if time.perf_counter() - begun + latest > seconds:
            break
    best = {name: min(own[1:] or own) for name, own in times.items()}
    published, quickest = next(iter(ways)), min(best, key=best.get)
    chosen = quickest if best[quickest] <= (1 - LEAD) * best[published] else published
    return chosen, ", ".join(f"{name} {1000 * best[name]:.3g} ms" for name in ways)


def settle_products(clip: FrozenClip, asked: str, batch: int, place: torch.device, learning: bool = False) -> str:
    """Set the form of CLIP's matrix products, `clip.products`: the one `asked` for; with "auto" on a CPU that which is
    faster here, in float32, for a batch of images; the first process decides.

    Args:
        learning: with the backward pass.

    Returns:
        what was measured, in words; "" where nothing was.
    """
    mlp = clip.clip.visual.transformer.resblocks[0].mlp
    x = torch.ones(min(batch, 16), 1 + clip.grid**2, clip.width, requires_grad=learning)

    def way(linear: Callable[..., Tensor]) -> Callable[[], object]:
        def work() -> None:
            y = linear(linear(x, mlp.c_fc.weight, mlp.c_fc.bias), mlp.c_proj.weight, mlp.c_proj.bias)
            if learning:
                torch.autograd.grad(y, x, y.detach())

        return work

    def decide() -> tuple[str, str]:
        if asked != "auto":
            return asked, ""
        if place.type != "cpu":
            return "linear", ""
        return fastest({name: way(linear) for name, linear in PRODUCTS.items()}, SECONDS["products"])

    clip.products, measured = distributed.first_decides(decide)
    return measured


def settle_precision(
    asked: str, generator: Generator, discriminator: Discriminator, share: int, place: torch.device
) -> tuple[str, str]:
    """The precision to train in: the one `asked` for; with "auto" on a GPU bf16 where it computes in it; on a CPU the
    one of fp32 and bf16 in which parts of a step are faster here; the first process decides.

    Args:
        share: images of this process in a step.

    Returns:
        precision, and what was measured, in words; "" where nothing was.
    """

    def way(precision: str) -> Callable[[], object]:
        def work() -> None:
            with devices.autocast(place, precision):
                losses = parts_of_a_step(generator, discriminator, share)
            for loss, inputs in losses:
                torch.autograd.grad(loss, inputs, allow_unused=True)

        return work

    def decide() -> tuple[str, str]:
        if asked != "auto" or place.type != "cpu":
            return devices.choose_precision(asked, place), ""
        if not devices.has_bf16_routines():
            return "fp32", ""
        training = generator.training
        generator.eval()  # else the sums of BatchNorm would wait for the other processes
        try:
            return fastest({precision: way(precision) for precision in ("fp32", "bf16")}, SECONDS["precision"])
        finally:
            generator.train(training)

    return distributed.first_decides(decide)


def parts_of_a_step(
    generator: Generator, discriminator: Discriminator, share: int
) -> list[tuple[Tensor, list[Tensor]]]:
    """The forward pass of what takes most of the time of a step of `share` images; losses, and what to differentiate
    each with respect to.

    The generator's blocks, each on maps of the run's shapes; CLIP and the discriminator. Where maps are large it is one
    image, as training takes these sample by sample, and of the blocks with small and with large maps, which are much
    alike, only the last is run.
    """
    clip, losses = generator.clip, []
    sides = zip([clip.grid, *generator.sizes], generator.sizes, strict=False)
    blocks = [(block, *own) for block, own in zip(generator.blocks, sides, strict=True)]
    small = [(block, h, size) for block, h, size in blocks if block.conv1.conv.out_channels * size**2 < LARGE]
    large = blocks[len(small) :]
    batch, timed = (1, [*small[-1:], large[-1]]) if large else (min(share, 16), small)
    for block, h, size in timed:
        x = torch.ones(batch, block.conv1.conv.in_channels, h, h).to(memory_format=torch.channels_last)
        affines = [(torch.ones(batch, channels, 1, 1),) * 2 for channels in block.affine_channels]
        (y,) = block([x.requires_grad_()], size, affines)  # (batch, C, size, size)
        losses.append((y.float().square().mean(), [x, *block.parameters()]))
    images = torch.ones(batch, 3, generator.sizes[-1], generator.sizes[-1], requires_grad=True)
    maps, _ = clip.image(images)
    logits = discriminator(maps, torch.ones(batch, clip.embedding_dim))
    losses.append((logits.float().mean(), [images, *discriminator.parameters()]))
    return losses
