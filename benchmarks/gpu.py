"""The parts of benchmarks/gpu.sh: what only a GPU can show, each a line (or one for each batch size) as soon as it is
known."""

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import speed  # which puts code/ on the path
import torch

from ratlip import config
from ratlip.data.captions import CaptionTable
from ratlip.data.inventory import usable_items, write_copies
from ratlip.data.loader import Batch, EpochBatches, TrainingImages, training_loader
from ratlip.encoders.clip_towers import FrozenClip
from ratlip.systems.clip_gan import ClipGan
from ratlip.trainer import Training, train_step

ROOT = speed.HERE.parent
CARD = 24 - 0.6  # GiB that a 24 GB card leaves to PyTorch
DEMO_SECONDS = 60
FULL = ["--brief", "--device", "cuda", "--precision", "bf16", "--plain-precision", "fp16", "--rounds", "3"]
SMALL = ["--brief", "--smoke", "--rounds", "1", "--no-memory"]


def tests(smoke: bool) -> str:
    """pytest -m gpu."""
    # Only files that have such tests: others may import what a lent machine has not.
    every = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    some = every[:1] if smoke else every  # without a GPU all of them are skipped
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rfE", *some]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    counts = [line for line in lines if re.match(r"\d+ \w+.* in [\d.]+s", line)]
    failed = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))]
    said = "; ".join([*counts[-1:], *failed])
    if result.returncode:
        raise RuntimeError(said or result.stderr)
    return said


def waits(smoke: bool) -> str:
    """Steps in which PyTorch refuses to wait for the GPU; how far ahead of it the host is."""
    training, steps = birds(smoke), 1 if smoke else 5
    batch = batch_of(training, 2 if smoke else 64)
    for _ in range(2):  # libraries are loaded in the first
        train_step(training, batch)
    if smoke:
        return f"not on a CPU; {training.bad_steps} bad steps of {training.step}"
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    started = time.perf_counter()
    for _ in range(steps):
        train_step(training, batch)
    asked = time.perf_counter()
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    asked, done = ((end - started) / steps for end in (asked, time.perf_counter()))
    return f"none in {steps} steps of 64 at 256 px in bf16; the host takes {asked:.3f} s a step, the GPU {done:.3f} s"


def birds(smoke: bool) -> Training:
    """The training that cfg/bird.yml describes, of random weights, in bf16."""
    place = torch.device("cpu" if smoke else "cuda")
    if smoke:
        speed.shrink()
    settings = config.load(
        str(ROOT / "cfg/bird.yml"), ["model.imsize=16", "model.nf=16", "model.d_channels=32"] if smoke else []
    )
    clip = FrozenClip(speed.random_clip()).to(place)
    clip.drop_text_tower()
    system = ClipGan.build(settings, clip, clip).to(place)
    ema = ClipGan.make_generator(settings, clip, clip).to(place)
    ema.load_state_dict(system.generator.state_dict())
    ema.eval().requires_grad_(False)
    sentences = torch.randn(1000, clip.embedding_dim, device=place)
    return Training(system, ema, sentences, "bf16", 10**6)


def batch_of(training: Training, count: int) -> Batch:
    """So many random pictures, with captions."""
    side, place = training.generator.sizes[-1], training.sentences.device
    rows = torch.arange(count, device=place)
    return Batch(torch.rand(count, 3, side, side, device=place) * 2 - 1, rows, rows.roll(1))


def step(smoke: bool, *more: str) -> None:
    """The training step, in time and memory."""
    speed.main(["--what", "train", *(SMALL if smoke else FULL), "--batch", "1" if smoke else "64", *more])


def compiled(smoke: bool) -> None:
    """The same, compiled, with CUDA graphs."""
    step(smoke, "--compile")


def sampling(smoke: bool) -> None:
    """Pictures from captions."""
    words = [*SMALL, "--batch", "1", "2"] if smoke else [*FULL, "--no-memory", "--batch", "1", "16", "64"]
    speed.main(["--what", "sample", *words])


def evaluation(smoke: bool) -> None:
    """Drawing pictures and computing CLIP's features of them."""
    words = [*SMALL, "--batch", "1"] if smoke else [*FULL, "--no-memory", "--batch", "64"]
    speed.main(["--what", "eval", *words])


def reading(smoke: bool) -> str:
    """Training images from the resized copies, onto the GPU."""
    workers, batch, epochs = (1, 4, 1) if smoke else (min(16, os.cpu_count()), 64, 3)
    place = torch.device("cpu" if smoke else "cuda")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        speed.pictures(Path(folder), 20 if smoke else 288)
        settings = config.EasyDict({**config.unflatten(config.default_settings()), "name": "gpu", "file": "gpu.yml"})
        settings.data.update(dir=folder, num_workers=workers)
        write_copies(settings, usable_items(settings, "train"))
        items = usable_items(settings, "train") * (1 if smoke else 20)
        images = TrainingImages(items, settings.model.imsize, settings.data.enlarge, settings.data.flip, seed=0)
        batches = EpochBatches(CaptionTable([item.captions for item in items]), batch, seed=0)
        loader = training_loader(images, batches, workers, pin=not smoke)
        started = None
        for batches.epoch in range(epochs + 1):
            for own in loader:
                own = [tensor.to(place, non_blocking=True) for tensor in own]
            started = started or time.perf_counter()  # the processes have begun in the first pass
        if not smoke:
            torch.cuda.synchronize()
        rate = epochs * len(batches) * batch / (time.perf_counter() - started)
    return f"{rate:,.0f} images a second at {settings.model.imsize} px from the resized copies, {workers} processes"


def demo(smoke: bool) -> str:
    """The demo for a minute, scored after each pass over its pictures."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"{key}={folder}/{key}" for key in ("log.dir", "log.save_dir", "data.dir")]
        small = ["train.device=cpu", "eval.samples=8", "train.max_hours=1e-9", "eval.metrics=[fd_clip]"]
        full = ["train.device=cuda", f"train.max_hours={DEMO_SECONDS / 3600}", "log.test_interval=1"]
        command = [sys.executable, "code/train.py", "cfg/demo.yml", *words, *(small if smoke else full)]
        started = time.perf_counter()
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        if result.returncode:
            raise RuntimeError(result.stderr.strip()[-300:])
        (log,) = Path(folder).glob("log.dir/demo/*/metrics.jsonl")
        scores = [json.loads(line) for line in log.read_text().splitlines()]
    names = [name for name in ("fd_clip", "clip_score", "caption_accuracy") if name in scores[0]]
    shown = ", ".join(f"{name} {scores[0][name]:.3g} to {scores[-1][name]:.3g}" for name in names)
    return f"{shown} in {scores[-1]['step']} steps; {seconds:.0f} s from start to end of the program"


def largest(smoke: bool) -> str:
    """The largest batch, by eights, that trains at 256 pixels on a card of 24 GB."""
    training = birds(smoke)
    if not smoke:
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, CARD / total))

    def fits(count: int) -> bool:
        try:
            for _ in range(2):
                train_step(training, batch_of(training, count))
        except torch.OutOfMemoryError:
            for optimizer in training.optimizers.values():
                optimizer.zero_grad()
            training.networks["discriminator"].requires_grad_(True)
            return False
        finally:
            torch.cuda.empty_cache()
        return True

    most, too_many = 0, 2 if smoke else 8  # in eights
    while not smoke and fits(8 * too_many):
        most, too_many = too_many, 2 * too_many
    while not smoke and too_many - most > 1:
        middle = (most + too_many) // 2
        most, too_many = (middle, too_many) if fits(8 * middle) else (most, middle)
    if smoke:
        return f"not on a CPU; a batch of 2 fits: {fits(2)}"
    peak = torch.cuda.max_memory_reserved() / 2**30
    return f"batch {8 * most} at 256 px in bf16 on a 24 GB card, {8 * too_many} does not fit; {peak:.1f} GiB reserved"


PARTS = {
    part.__name__: part
    for part in (tests, waits, step, compiled, sampling, evaluation, reading, demo, largest)
}  # fmt: skip


def main() -> int:
    """Run parts one after the other; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--smoke", action="store_true", help="small, on a CPU")
    words = parser.parse_args()
    status = 0
    for name in words.parts:
        try:
            said = PARTS[name](words.smoke)
            if said:
                print(f"{name}: {said}", flush=True)
        except Exception as error:
            print(f"{name}: failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
