"""What the tests share: released weights and inputs, a small CLIP, and runs of the real entry points."""

import os
import subprocess
import sys
import zlib
from pathlib import Path

import clip.model
import numpy as np
import torch
from data import fill
from torchvision.models import inception_v3

from ratlip.config import unread_settings

ROOT = Path(__file__).resolve().parents[1]
SALT = "developers"
# A thousandth of the demo: one evaluation at each end, a few steps between.
TINY_RUN = (
    "train.max_epoch=1",
    "train.batch_size=4",
    "train.precision=fp32",  # this and the next: runs that are compared bit for bit leave nothing to a stopwatch
    "clip.products=linear",
    "eval.samples=6",
    "model.nf=16",
    "model.d_channels=16",
    "data.num_workers=0",
    "clip.feature_blocks=null",
)


def tiny_run(system: str) -> list[str]:
    """TINY_RUN, as far as a system reads it."""
    return [word for word in TINY_RUN if word.split("=")[0] not in unread_settings(system)]


def released_weights(name: str) -> dict[str, torch.Tensor]:
    """State dict of one network of tests/data/*.shapes.json."""
    return {key: torch.as_tensor(value) for key, value in fill.state_dict(name, SALT).items()}


def fixture_input(name: str, *shape: int) -> torch.Tensor:
    """An input of the fixtures, drawn as tests/data/fill.py's text says."""
    random = np.random.RandomState(zlib.crc32(f"{SALT}:input.{name}".encode()))
    return torch.from_numpy(random.standard_normal(shape).astype(np.float32))


def fixture_picture(name: str, count: int, side: int) -> torch.Tensor:
    """Pictures (count, 3, side, side) of AttnGAN's and DAMSM's fixtures, in [-1, 1]."""
    blocks, noise = fixture_input(f"{name}.blocks", count, 3, 8, 8), fixture_input(name, count, 3, side, side)
    return torch.from_numpy(np.tanh(np.kron(blocks, np.ones((side // 8, side // 8), np.float32)) + 0.5 * noise.numpy()))


def family_fixtures(family: str) -> dict[str, np.ndarray]:
    """What the released systems of a family answer: tests/data/<family>/fixtures.npz."""
    return dict(np.load(ROOT / "tests" / "data" / family / "fixtures.npz"))


def small_clip_model(resolution: int = 64, patch: int = 16, width: int = 64, layers: int = 4) -> clip.model.CLIP:
    """A CLIP with random weights, small enough for any test."""
    torch.manual_seed(7)
    return clip.model.CLIP(64, resolution, layers, width, patch, 16, 49408, 64, 1, 2)


def save_stated(weights: dict[str, torch.Tensor], path: Path, activation: str = "quick_gelu") -> None:
    """Write a state dict that states its activation, as the demo's does."""
    weights._metadata[""]["activation"] = activation
    torch.save(weights, path)


def relative_error(found: torch.Tensor, expected: torch.Tensor | np.ndarray) -> float:
    """Largest difference over the largest expected magnitude."""
    found, expected = found.detach(), torch.as_tensor(expected).detach().double()
    return float((found.double() - expected).abs().max() / expected.abs().max())


def run(*words: object, environment: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess:
    """Run an entry point as its script would: run("train.py", "cfg/demo.yml", ...). Never raises on failure."""
    script, *arguments = map(str, words)
    return subprocess.run(
        [sys.executable, str(ROOT / "code" / script), *arguments],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


def assert_refused(result: subprocess.CompletedProcess, *parts: str) -> None:
    """One line on stderr that holds every part, exit code 2, no traceback."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for part in parts:
        assert part in lines[0], (part, lines[0])


def watch_gradients(training) -> dict[str, dict[str, torch.Tensor]]:
    """The gradients of a Training's "g" and "d", by parameter, that its latest step gave to the optimisers."""
    found = {}
    for key, network, optimizer in (
        ("g", training.generator, training.optimizers["generator"]),
        ("d", training.networks["discriminator"], training.optimizers["discriminator"]),
    ):

        def note(*_, key=key, network=network):
            found[key] = {name: p.grad.clone() for name, p in network.named_parameters()}

        optimizer.register_step_pre_hook(note)
    return found


def random_inception() -> dict[str, torch.Tensor]:
    """Seeded weights of torch-fidelity's Inception, of a scale that keeps pictures apart up to its last features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        weights = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False).state_dict()
        for name, weight in weights.items():
            if weight.ndim > 1:
                weight.normal_(std=(2 / weight[0].numel()) ** 0.5)
            elif name.endswith("bn.bias"):
                weight.normal_(std=0.1)
    return weights
