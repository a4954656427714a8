"""What a run shows and keeps: progress, TensorBoard, metrics.jsonl, and pictures of its samples and curves."""

import json
import logging
import os
import resource
import socket
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from easydict import EasyDict
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary
from tqdm import tqdm

from ratlip import distributed, output
from ratlip.config import dump, settings_of
from ratlip.pictures import curves, filmstrip, is_headline
from ratlip.runs import Run
from ratlip.text import readable

LOG_EVERY = 10  # steps between looks at the losses, each of which waits for the device
FRAMES = 12  # of the filmstrip
GIB = 2**30


class Monitor:
    """Shows a run on the terminal and keeps its logs; silent on all processes but the first. Logs that cannot be
    written end nothing: what there is no room for is left out.

    A run that goes on from a checkpoint (of so many finished epochs and steps) continues its logs: what was logged
    after that checkpoint is dropped. Epoch -1: there was none, and all is dropped.
    """

    def __init__(self, run: Run, config: EasyDict, epoch: int, step: int, epoch_steps: int):
        self.run, self.folder, self.config, self.epoch_steps = run, run.logs, config, epoch_steps
        self.total_steps = epoch_steps * config.train.max_epoch
        self.active = distributed.rank() == 0
        self.first_step, self.started = step, time.time()
        self.last_look = self.epoch_ended = self.started
        self.values: dict[str, Tensor] = {}
        self.board = Board(self.folder, purge_step=step + 1 if step else 0)
        if self.active:
            with output.optional(self.folder):
                (self.folder / "grids").mkdir(parents=True, exist_ok=True)
                self._drop_scores_after(epoch)
                for path, of in self._grids().items():
                    if of > epoch:
                        path.unlink()
                self.board.add(summary.text("config", f"```\n{dump(config)}\n```"), step)
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
        with output.optional(self.folder):
            self.board.scalars(scalars, step)
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
            self.run.confirm()
            with output.optional(self.folder):
                write_scores(self.folder, self.board, scores, {"epoch": epoch, "step": step}, protocols)

    def grid(self, image: Image.Image, epoch: int, step: int) -> None:
        """A sample grid, as PNG and in TensorBoard."""
        self._took_time()
        if self.active:
            self.run.confirm()
            with output.optional(self.folder):
                _save(image, self.folder / "grids" / f"epoch_{epoch:04}.png")
                self.board.add(summary.image("samples", np.asarray(image), dataformats="HWC"), step)

    def draw(self, side: int, rows: int, row: int) -> None:
        """filmstrip.png: one row of the grids of pictures of this side, over the run; curves.png: losses, scores."""
        if self.active and (grids := self._grids()):
            self.run.confirm()
            with output.optional(self.folder):
                self._draw(grids, side, rows, row)

    def _draw(self, grids: dict[Path, int], side: int, rows: int, row: int) -> None:
        sizes = {path: size for path in grids if (size := _size(path))}
        alike = [path for path, size in sizes.items() if size == list(sizes.values())[-1]]
        shown = sorted({round(place) for place in np.linspace(0, len(alike) - 1, FRAMES)})
        frames = {f"epoch {grids[alike[n]]}": picture for n in shown if (picture := _picture(alike[n]))}
        if frames:
            _save(filmstrip(frames, side, rows, row), self.folder / "filmstrip.png")

        logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of what was dropped when a run went on
        events = EventAccumulator(str(self.folder), size_guidance={"scalars": 0})
        events.Reload()
        scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        curves(scalars).savefig(self.folder / "curves.png", dpi=100)

    def hparams(self, scores: dict[str, float]) -> None:
        """The settings and final scores for TensorBoard's table of runs; the scores are those below scores/."""
        if self.active:
            settings = settings_of(self.config).items()
            plain = {key: v if isinstance(v, bool | int | float) else readable(str(v)) for key, v in settings}
            final = {f"scores/{name}": value for name, value in scores.items() if is_headline(f"scores/{name}")}
            with output.optional(self.folder):
                for part in summary.hparams(plain, final):
                    self.board.add(part)

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
            lines = path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _epoch_of(line) <= epoch]
            if lines[: len(kept)] == kept:
                os.truncate(path, sum(map(len, kept)))  # for which a full disk has room too
            else:
                partial = path.with_suffix(".jsonl.partial")
                partial.write_bytes(b"".join(kept))
                partial.replace(path)

    def close(self) -> None:
        """End the bar."""
        self.bar.close()


class Board:
    """A file of events below `folder` for TensorBoard, in which each is there as soon as it is added, or not at all.

    Args:
        purge_step: TensorBoard drops what earlier files of the folder hold from this step on; None: nothing.
    """

    def __init__(self, folder: Path, purge_step: int | None = None):
        name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}"
        self.path, self.purge_step = folder / name, purge_step

    def add(self, content: Summary, step: int = 0) -> None:
        """One event. Raises OSError."""
        events = [Event(summary=content, step=step)]
        if not (self.path.exists() and self.path.stat().st_size):
            if self.purge_step is not None:
                events.insert(0, Event(step=self.purge_step, session_log=SessionLog(status=SessionLog.START)))
            events.insert(0, Event(step=self.purge_step or 0, file_version="brain.Event:2"))
        written = BytesIO()
        records = RecordWriter(written)
        for event in events:
            event.wall_time = time.time()
            records.write(event.SerializeToString())
        output.append(self.path, written.getvalue())

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Numbers by tag. Raises OSError."""
        self.add(Summary(value=[summary.scalar(tag, value).value[0] for tag, value in values.items()]), step)


def write_scores(
    folder: Path, board: Board, scores: dict[str, float], what: dict[str, object], protocols: dict[str, str]
) -> None:
    """One evaluation: a line of metrics.jsonl that says of `what`, and TensorBoard scalars below `scores/`."""
    line = json.dumps({**what, **scores, "protocols": protocols}) + "\n"
    output.append(folder / "metrics.jsonl", line.encode())
    board.scalars({f"scores/{name}": value for name, value in scores.items()}, what.get("step", 0))


def _epoch_of(line: bytes) -> float:
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


def _picture(path: Path) -> Image.Image | None:
    """A picture; None of a file that is cut short."""
    try:
        return Image.open(path).convert("RGB")
    except OSError:
        return None


def _save(image: Image.Image, path: Path) -> None:
    """A PNG, whole or not at all; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        image.save(partial, "PNG")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
