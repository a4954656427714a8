"""Choices that depend on the machine: ways to compute the same, timed side by side where the program runs."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ratlip import device as devices
from ratlip import distributed
from ratlip.encoders.clip_towers import PRODUCTS, FrozenClip
from ratlip.systems.system import System

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


def settle_precision(asked: str, system: System, sentences: Tensor, place: torch.device) -> tuple[str, str]:
    """The precision to train in: the one `asked` for; with "auto" on a GPU bf16 where it computes in it; on a CPU the
    one of fp32 and bf16 in which parts of a step are faster here; the first process decides.

    Args:
        sentences: (B, E), of the captions of this process's share of a step, on the CPU.

    Returns:
        precision, and what was measured, in words; "" where nothing was.
    """

    def way(precision: str) -> Callable[[], object]:
        def work() -> None:
            with devices.autocast(place, precision):
                losses = system.parts_of_a_step(sentences)
            for loss, inputs in losses:
                torch.autograd.grad(loss, inputs, allow_unused=True)

        return work

    def decide() -> tuple[str, str]:
        if asked != "auto" or place.type != "cpu":
            return devices.choose_precision(asked, place), ""
        if not devices.has_bf16_routines():
            return "fp32", ""
        for network in system.networks.values():
            network.eval()  # else the sums of BatchNorm would wait for the other processes
        try:
            return fastest({precision: way(precision) for precision in ("fp32", "bf16")}, SECONDS["precision"])
        finally:
            for network in system.networks.values():
                network.train()

    return distributed.first_decides(decide)
