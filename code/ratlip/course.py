"""The loop of a run: steps, and between them samples, scores and checkpoints; leaving it loses nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from easydict import EasyDict
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from ratlip import checkpoint, distributed, errors
from ratlip import device as devices
from ratlip.data.loader import Batch, EpochBatches, TestImages, to_floats
from ratlip.errors import UserError
from ratlip.evaluation import Evaluator, scores_table
from ratlip.lease import Lost
from ratlip.monitor import Monitor
from ratlip.pictures import captioned_grid
from ratlip.profiling import Trace
from ratlip.sampling import generate, noise_of
from ratlip.stopping import Stop, Stopped, end_workers

if TYPE_CHECKING:
    from ratlip.trainer import Training

GRID = (8, 2)  # captions and noises of the sample grids
LOOK_EVERY = {"cpu": 1, "cuda": 10}  # steps between looks at the count of bad ones, which a GPU has to be waited for


@dataclass
class Course:
    """The loop of a run: passes over the images, and what is done between them.

    Whatever goes wrong between two steps, on whichever process, ends in `leave` on all of them: they meet before each
    step and wherever else they wait for each other, and one that has failed does not come.
    """

    t: "Training"
    config: EasyDict
    step: Callable[[Batch], dict[str, Tensor]]  # one update of the networks
    write: Callable[[dict, Path], None]  # a checkpoint, with these scores
    batches: EpochBatches
    loader: DataLoader
    evaluator: Evaluator
    monitor: Monitor
    trace: Trace
    stop: Stop
    scores: dict[str, dict[str, float]]  # columns of the closing table: start, end, best
    folder: Path  # of the checkpoints
    smaller_steps = "Lower train.lr_g and train.lr_d, set train.clip_grad or train.precision=fp32"  # where it diverges
    unsaved: bool = False  # a checkpoint is due that could not be written

    def run(self, again: str) -> None:
        """From the first step, or the one after the last, to the end of the last epoch or to what ends it before.

        Args:
            again: the command that goes on.
        """
        t, failure = self.t, None
        try:
            self.begin()
            while t.epoch < self.config.train.max_epoch:
                self.steps()
                self.finish_epoch()
        except (Exception, Stopped) as cause:
            failure = self.leave(cause, again)
            if failure is None:
                self.draw()
        else:
            distributed.say(f"\n{scores_table(self.scores, self.evaluator.protocols)}\n")
            self.monitor.hparams(self.scores["end"])
            self.draw()
        finally:
            self.trace.close()
            if t.run.lost:
                self.monitor.active = False  # nothing more is written, whatever it still holds
            self.monitor.close()
            self.stop.close()
            end_workers()
        if failure is not None:
            raise failure

    def begin(self) -> None:
        """What the networks draw before the first step, where that is not known."""
        if not self.scores:
            first, grid = self.evaluate(), self.grid()
            self.monitor.scores(first, self.evaluator.protocols, 0, 0)
            self.monitor.grid(grid, 0, 0)
            self.scores = {"start": first, "end": first, "best": first}

    def steps(self) -> None:
        """One pass over the images, or what is left of it."""
        t, device = self.t, self.t.device
        self.batches.epoch, self.batches.start = t.epoch, t.step - t.epoch * len(self.batches)
        for network in t.networks.values():
            network.train()
        for batch in self.stop.arriving(self.loader):
            batch = Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))
            distributed.meet()
            t.in_step = True
            values = self.step(batch)
            t.in_step = False
            if t.run.lost:
                t.run.confirm()
            self.monitor.step(values, t.step)
            self.trace.step()
            look = t.step % LOOK_EVERY[device.type] == 0 or t.step % len(self.batches) == 0
            if look and int(t.guard.longest_row) >= self.config.train.max_bad_steps:
                raise Diverged(t, self.folder, self.smaller_steps)
            if self.stop.asked():
                raise Stopped(self.stop.cause)
        distributed.meet()

    def finish_epoch(self) -> None:
        """At the stated intervals, and after the last: samples, scores, a checkpoint.

        The epoch counts as finished once they are there, so that a run that is stopped among them does them again.
        """
        t, log, scores = self.t, self.config.log, self.scores
        epoch = t.epoch + 1
        last = epoch == self.config.train.max_epoch
        self.monitor.epoch(epoch, t.step)
        if last or epoch % log.gen_interval == 0:
            self.monitor.grid(self.grid(), epoch, t.step)
        if last or epoch % log.test_interval == 0:
            scores["end"] = self.evaluate()
            self.monitor.scores(scores["end"], self.evaluator.protocols, epoch, t.step)
        t.epoch = epoch
        if scores["end"] is not scores["best"] and self.evaluator.better(scores["end"], scores["best"]):
            former, scores["best"] = scores["best"], scores["end"]
            if not self.try_to_save(self.folder / "best.pth"):
                scores["best"] = former
        path = self.folder / f"state_epoch_{epoch:03}.pth"
        if last:
            self.write(scores, path)
        elif self.unsaved or epoch % log.save_interval == 0:
            self.unsaved = not self.try_to_save(path)
        if path.exists():
            checkpoint.keep_newest(self.folder, self.config.train.keep, t.run.id)

    def evaluate(self) -> dict[str, float]:
        """Scores of what will be sampled."""
        with self.stop.at_once(together=True):
            return self.evaluator(self.t.ema or self.t.generator)

    def grid(self) -> Image.Image:
        """The sample grid."""
        with self.stop.at_once():
            return sample_grid(self.t, self.evaluator)

    def draw(self) -> None:
        """The filmstrip, of the first row below the real images, and the curves of the run so far."""
        networks = 1 if self.t.ema is None else 2
        self.monitor.draw(self.t.generator.sizes[-1], rows=1 + GRID[1] * networks, row=1)

    def try_to_save(self, path: Path) -> bool:
        """Write a checkpoint; where that fails training goes on, and the next epoch tries again."""
        try:
            self.write(self.scores, path)
        except Lost:
            raise
        except UserError as error:
            distributed.say(f"warning: {error}; training goes on, and saving is tried again after each epoch")
            return False
        return True

    def leave(self, cause: BaseException, again: str) -> BaseException | None:
        """Out of the loop before its end: all processes together, saved if the networks are those between two steps.

        Args:
            cause: what ended it on this process. again: the command that goes on.

        Returns:
            what is to be raised; None after a signal or the time limit.
        """
        if isinstance(cause, Diverged | Lost):
            return cause
        if self.t.in_step:
            newest = checkpoint.newest_first(self.folder, self.t.run.id)
            kept = (
                f"the newest checkpoint is {newest[0]}; go on with: {again}" if newest else "no checkpoint is there yet"
            )
            return told(cause, f"nothing is saved from a step that failed: {kept}", "train.batch_size")

        own = None if isinstance(cause, distributed.Elsewhere) else cause
        alone = distributed.world_size() == 1
        try:
            if own is not None:
                distributed.any_process(True)  # the others learn of it where they meet next
            causes = distributed.gather(
                own and (isinstance(own, Exception), errors.line(own) or errors.first_line(own))
            )
        except RuntimeError:  # a process has died; torchrun ends this one in some seconds
            causes, alone = [(True, errors.first_line(cause))], True
        failures = [f"process {rank}: {text[1]}" for rank, text in enumerate(causes) if text and text[0]]

        unsaved, kept = None, "nothing has been trained yet"
        if self.scores:
            path = self.folder / f"state_epoch_{self.t.epoch:03}_step_{self.t.step:08}.pth"
            try:
                self.write(self.scores, path)
                kept = f"saved as {path}; go on with: {again}"
            except UserError as error:
                unsaved, kept = error, f"not saved: {error}"
        if failures and not isinstance(own, Exception):
            distributed.say(f"\nstopped by {failures[0]}; {kept}")
        elif not failures and unsaved is None:
            stopped = next(text[1] for text in causes if text)
            distributed.say(f"\nstopped by {stopped} and saved; go on with: {again}")
        if not alone:
            kept = distributed.same(kept)  # when the first process has saved: torchrun ends all once one has ended
        if isinstance(own, Exception):
            return told(own, kept, "eval.batch_size")
        return SystemExit(2) if failures else unsaved


def told(error: Exception, kept: str, lower: str) -> Exception:
    """What to raise for an error that ended a run: one line with what is kept, or that said and the error itself.

    Args:
        lower: settings that take less memory where there was not enough.
    """
    line = errors.line(error, lower)
    if line is None:
        distributed.say(f"\n{kept}")
        return error
    return UserError(f"{line}; {kept}")


class Diverged(UserError):
    """Nothing finite comes any more: there is nothing that is worth saving."""

    def __init__(self, t: "Training", folder: Path, advice: str):
        good, row = checkpoint.newest_first(folder, t.run.id), int(t.guard.longest_row)
        super().__init__(
            f"training diverged: {row} steps in a row (to step {t.step}) had a loss or gradient that is not "
            f"finite; the last good checkpoint is {good[0] if good else 'not yet written'}. {advice}, then resume"
        )


def sample_grid(t: "Training", evaluator: Evaluator) -> Image.Image:
    """The same captions and noises each time, a column and a row each: captions of test images, drawn at
    random; those images; what the averaged generator draws for them; and what the present one does."""
    columns, noises = min(GRID[0], len(evaluator.items)), range(GRID[1])
    numbers = np.random.default_rng(0).choice(len(evaluator.items), columns, replace=False).tolist()
    rows = evaluator.table.starts[numbers]  # each image's first caption
    test_images = TestImages(evaluator.items, t.generator.sizes[-1], evaluator.scorer.config.data.fit)
    real, blocks = to_floats(torch.stack([test_images[number][0] for number in numbers])), []
    titles, device = ["real"], t.sentences.device
    sentences = evaluator.sentences[devices.send(torch.from_numpy(rows), device)]
    for name, generator in (("averaged", t.ema), ("present", t.generator)):
        if generator is None:
            continue
        training = generator.training
        for number in noises:
            noise = devices.send(noise_of(generator, 0, [number] * columns), device)
            blocks.append(generate(generator.eval(), noise, sentences, t.precision))
            titles.append(f"{name}, noise {number}")
        generator.train(training)
    texts = [""] * columns * (len(titles) - 1) + [evaluator.table.texts[row] for row in rows]
    return captioned_grid(torch.cat([real, *(block.cpu() for block in blocks)]), texts, columns, titles)
