"""What a run shows and keeps: progress, TensorBoard, metrics.jsonl, and pictures of its samples and curves."""

import json
import logging
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from easydict import EasyDict
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from ratlip import distributed
from ratlip.config import dump, kept
from ratlip.pictures import curves, filmstrip, is_headline

LOG_EVERY = 10  # steps between looks at the losses, each of which waits for the device
FRAMES = 12  # of the filmstrip
GIB = 2**30


class Monitor:
    """Shows a run on the terminal and keeps its logs below `folder`; silent on all processes but the first.

    A run that goes on from a checkpoint (of so many finished epochs and steps) continues its logs: what was logged
    after that checkpoint is dropped. Epoch -1: there was none, and all is dropped.
    """

    def __init__(self, folder: Path, config: EasyDict, epoch: int, step: int, epoch_steps: int):
        self.folder, self.config, self.epoch_steps = folder, config, epoch_steps
        self.total_steps = epoch_steps * config.train.max_epoch
        self.active = distributed.rank() == 0
        self.first_step, self.started = step, time.time()
        self.last_look = self.epoch_ended = self.started
        self.values: dict[str, Tensor] = {}
        if self.active:
            (folder / "grids").mkdir(parents=True, exist_ok=True)
            self._drop_scores_after(epoch)
            for path, of in self._grids().items():
                if of > epoch:
                    path.unlink()
            self.board = SummaryWriter(str(folder), purge_step=step + 1 if step else 0)
            self.board.add_text("config", f"```\n{dump(config)}\n```", step)
        self.on_terminal = self.active and sys.stderr.isatty()
        self.bar = tqdm(
            total=self.total_steps, initial=step, unit="step", disable=not self.on_terminal, dynamic_ncols=True
        )

    def step(self, values: dict[str, Tensor], step: int) -> None:
        """One training step: moves the bar; now and then logs the loss terms and rates."""
        self.bar.update()
        self.values = values
        if not self.active or step % LOG_EVERY:
            return
        now = time.time()
        scalars = {tag: float(value) for tag, value in values.items()}
        scalars["speed/images_per_second"] = LOG_EVERY * self.config.train.batch_size / (now - self.last_look)
        scalars |= _memory()
        self.last_look = now
        for tag, value in scalars.items():
            self.board.add_scalar(tag, value, step)
        self.bar.set_description(f"epoch {(step - 1) // self.epoch_steps + 1}/{self.config.train.max_epoch}")
        self.bar.set_postfix_str(_losses(values))

    def epoch(self, epoch: int, step: int) -> None:
        """End of an epoch: a line of its own where no bar can be shown."""
        self.epoch_ended = time.time()
        if self.active and not self.on_terminal:
            spent, steps = self.epoch_ended - self.started, step - self.first_step
            left = spent / max(1, steps) * (self.total_steps - step)
            place = f"epoch {epoch}/{self.config.train.max_epoch}"
            rate = f"{steps * self.config.train.batch_size / spent:.3g} images/s"
            print(f"{place}  {_losses(self.values)}  {rate}, {_minutes(spent)}, {_minutes(left)} left", flush=True)

    def scores(self, scores: dict[str, float], protocols: dict[str, str], epoch: int, step: int) -> None:
        """One evaluation, and how its scores came about."""
        self._took_time()
        if self.active:
            write_scores(self.folder, self.board, scores, {"epoch": epoch, "step": step}, protocols)

    def grid(self, image: Image.Image, epoch: int, step: int) -> None:
        """A sample grid, as PNG and in TensorBoard."""
        self._took_time()
        if self.active:
            _save(image, self.folder / "grids" / f"epoch_{epoch:04}.png")
            self.board.add_image("samples", np.asarray(image), step, dataformats="HWC")

    def draw(self, side: int, rows: int, row: int) -> None:
        """filmstrip.png: one row of the grids of pictures of this side, over the run; curves.png: losses, scores."""
        if not self.active or not (grids := self._grids()):
            return
        sizes = {path: size for path in grids if (size := _size(path))}
        alike = [path for path, size in sizes.items() if size == list(sizes.values())[-1]]
        shown = sorted({round(place) for place in np.linspace(0, len(alike) - 1, FRAMES)})
        frames = {f"epoch {grids[alike[n]]}": Image.open(alike[n]).convert("RGB") for n in shown}
        _save(filmstrip(frames, side, rows, row), self.folder / "filmstrip.png")

        self.board.flush()
        logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of what was dropped when a run went on
        events = EventAccumulator(str(self.folder), size_guidance={"scalars": 0})
        events.Reload()
        scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        curves(scalars).savefig(self.folder / "curves.png", dpi=100)

    def hparams(self, scores: dict[str, float]) -> None:
        """The settings and final scores for TensorBoard's table of runs; the scores are those below scores/."""
        if self.active:
            settings = kept(self.config).items()
            plain = {key: v if isinstance(v, bool | int | float | str) else str(v) for key, v in settings}
            final = {f"scores/{name}": value for name, value in scores.items() if is_headline(f"scores/{name}")}
            for summary in hparams(plain, final):
                self.board.file_writer.add_summary(summary)

    def _grids(self) -> dict[Path, int]:
        """The sample grids that are there, and their epochs, in order."""
        paths = sorted((self.folder / "grids").glob("epoch_*.png"))
        found = {path: int(path.stem.removeprefix("epoch_")) for path in paths}
        return dict(sorted(found.items(), key=lambda pair: pair[1]))

    def _took_time(self) -> None:
        """Do not count what was done since the epoch ended as time of the training steps."""
        now = time.time()
        self.last_look += now - self.epoch_ended
        self.epoch_ended = now

    def _drop_scores_after(self, epoch: int) -> None:
        path = self.folder / "metrics.jsonl"
        if path.is_file():
            lines = [line for line in path.read_text().splitlines() if _epoch_of(line) <= epoch]
            partial = path.with_suffix(".jsonl.partial")
            partial.write_text("".join(f"{line}\n" for line in lines))
            partial.replace(path)

    def close(self) -> None:
        """End the bar and write out what is buffered."""
        self.bar.close()
        if self.active:
            self.board.close()


def write_scores(
    folder: Path, board: SummaryWriter, scores: dict[str, float], what: dict[str, object], protocols: dict[str, str]
) -> None:
    """One evaluation: a line of metrics.jsonl that says of `what`, and TensorBoard scalars below `scores/`."""
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({**what, **scores, "protocols": protocols}) + "\n")
    for name, value in scores.items():
        board.add_scalar(f"scores/{name}", value, what.get("step", 0))


def _epoch_of(line: str) -> float:
    """The epoch of a line of metrics.jsonl; endless for one that a kill cut short."""
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _losses(values: dict[str, Tensor]) -> str:
    return "  ".join(f"{tag.split('/')[1]} {float(v):.2f}" for tag, v in values.items() if tag.startswith("loss"))


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _memory() -> dict[str, float]:
    """The most memory that this process has held so far, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of what getrusage counts
    found = {"memory/process_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
    if torch.cuda.is_available():
        found["memory/gpu_gib"] = torch.cuda.max_memory_reserved() / GIB
    return found


def _size(path: Path) -> tuple[int, int] | None:
    """Width and height of a picture; None of a file that is none."""
    try:
        with Image.open(path) as image:
            return image.size
    except OSError:
        return None


def _save(image: Image.Image, path: Path) -> None:
    """A PNG, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    image.save(partial, "PNG")
    os.replace(partial, path)
