"""What a run shows and keeps: TensorBoard, metrics.jsonl, and captioned grids of samples."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from easydict import EasyDict
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ratlip import distributed
from ratlip.config import dump

LOG_EVERY = 10  # steps between looks at the losses, each of which waits for the device
TEXT_HEIGHT = 14  # pixels of a line of caption
MIN_CELL = 128  # pixels; smaller pictures are enlarged by whole factors so that captions fit below them


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
        self.last_look, self.values = self.started, {}
        if self.active:
            (folder / "grids").mkdir(parents=True, exist_ok=True)
            self._drop_scores_after(epoch)
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
        self.last_look = now
        for tag, value in scalars.items():
            self.board.add_scalar(tag, value, step)
        self.bar.set_description(f"epoch {(step - 1) // self.epoch_steps + 1}/{self.config.train.max_epoch}")
        self.bar.set_postfix_str(_losses(values))

    def epoch(self, epoch: int, step: int) -> None:
        """End of an epoch: a line of its own where no bar can be shown."""
        if self.active and not self.on_terminal:
            spent = time.time() - self.started
            left = spent / max(1, step - self.first_step) * (self.total_steps - step)
            place = f"epoch {epoch}/{self.config.train.max_epoch}"
            print(f"{place}  {_losses(self.values)}  {_minutes(spent)}, {_minutes(left)} left", flush=True)

    def scores(self, scores: dict[str, float], protocols: dict[str, str], epoch: int, step: int) -> None:
        """One evaluation, and how its scores came about."""
        if self.active:
            write_scores(self.folder, self.board, scores, {"epoch": epoch, "step": step}, protocols)

    def grid(self, image: Image.Image, epoch: int, step: int) -> None:
        """A sample grid, as PNG and in TensorBoard."""
        if self.active:
            image.save(self.folder / "grids" / f"epoch_{epoch:04}.png")
            self.board.add_image("samples", np.asarray(image), step, dataformats="HWC")

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


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [-1, 1], clamped -> B pictures of 8 bits."""
    levels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in levels]


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most `width` pixels; a word that is wider than that is broken."""
    lines = [""]
    for word in text.split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def captioned_grid(images: Tensor, captions: Sequence[str], columns: int) -> Image.Image:
    """Images (B, 3, H, W) in [-1, 1] in rows of `columns`, each with its caption below, wrapped and never cut."""
    pictures = to_pictures(images)
    factor = max(1, -(-MIN_CELL // pictures[0].width))
    width, height = (side * factor for side in pictures[0].size)
    font = ImageFont.load_default(size=11)
    wrapped = [_wrap(caption, font, width) for caption in captions]
    cell = (width + 8, height + TEXT_HEIGHT * max(map(len, wrapped)) + 10)
    grid = Image.new("RGB", (columns * cell[0], -(-len(pictures) // columns) * cell[1]), "white")
    draw = ImageDraw.Draw(grid)
    for i, (picture, lines) in enumerate(zip(pictures, wrapped, strict=True)):
        x, y = i % columns * cell[0] + 4, i // columns * cell[1] + 4
        grid.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y))
        for number, line in enumerate(lines):
            draw.text((x, y + height + 2 + number * TEXT_HEIGHT), line, "black", font=font)
    return grid
