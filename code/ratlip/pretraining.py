"""DAMSM pretraining: a text and an image encoder that match, from captioned pictures alone (arXiv 1711.10485)."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from easydict import EasyDict
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Adam
from torch.utils.data import DataLoader

from ratlip import build, checkpoint, resume, runs
from ratlip import config as configuration
from ratlip import device as devices
from ratlip.course import Course
from ratlip.data.captions import CaptionTable, caption_place, say_cut
from ratlip.data.inventory import usable_items
from ratlip.data.items import Item
from ratlip.data.layouts import read_classes
from ratlip.data.loader import (
    Batch,
    EpochBatches,
    TestImages,
    TrainingImages,
    picture_batches,
    shard_numbers,
    to_floats,
    training_loader,
)
from ratlip.encoders.damsm import DamsmText, Vocabulary
from ratlip.encoders.damsm_image import URL, DamsmClip, DamsmImage, DamsmInception
from ratlip.encoders.damsm_losses import damsm_losses, sentence_scores
from ratlip.errors import UserError
from ratlip.guard import Guard
from ratlip.metrics.features import MissingWeights, find_weights
from ratlip.metrics.r_precision import CANDIDATES, first_of
from ratlip.monitor import Monitor
from ratlip.paths import command
from ratlip.pictures import captioned_grid
from ratlip.preparation import check_size
from ratlip.profiling import Trace
from ratlip.stopping import Stop

FOLDER = "damsm"  # below log.save_dir and log.dir: these runs are never taken for a generator's
BATCH_SIZE, TEST_BATCHES = 48, 51  # published
BETAS = (0.5, 0.999)
DECAY, LEAST_RATE = 0.98, 0.1  # of the rate after an epoch, and the share of it below which it does not go on falling
SHOWN = 8  # test pictures in a grid


@dataclass(eq=False)
class Pretraining:
    """Everything that a step changes, and what it reads."""

    settings: EasyDict  # the config's damsm group
    seed: int
    text: DamsmText
    image: DamsmImage
    tokens: Tensor  # (R, T) words of all training captions, on the device
    classes: Tensor  # (R,) of the pictures that they belong to
    precision: str  # of the frozen network below the image encoder; all else is in float32
    epoch_steps: int
    optimizer: Adam = field(init=False)
    guard: Guard = field(init=False)
    step: int = 0
    epoch: int = 0  # finished epochs
    run: runs.Run | None = None
    in_step: bool = False

    def __post_init__(self):
        trained = [p for network in self.networks.values() for p in network.parameters() if p.requires_grad]
        self.optimizer = Adam(trained, self.settings.lr, BETAS, fused=True)
        self.guard = Guard({"image": self.image}, [self.optimizer], self.device)

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        return self.tokens.device

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Those that are trained, by name."""
        return {"text": self.text, "image": self.image}

    def losses(self, images: Tensor, tokens: Tensor, classes: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Images (B, 3, S, S) in [-1, 1], tokens (B, T), classes (B,) -> the losses, codes and sentences (B, 256)."""
        with devices.autocast(images.device, self.precision):
            regions, codes = self.image(images)
        sentences, words = self.text.text(tokens)
        return damsm_losses(regions, codes, words, tokens.ne(0), sentences, classes), codes, sentences


def pretraining_step(t: Pretraining, batch: Batch) -> dict[str, Tensor]:
    """One update of both encoders, as published: Adam's moments begin anew with each epoch, its rate falls after each,
    and the text encoder's gradient alone is clipped.

    Returns:
        losses, the text encoder's gradient norm and the rate, by TensorBoard tag; not yet read from the device.
    """
    epoch, begun = divmod(t.step, t.epoch_steps)
    rate = learning_rate(t.settings.lr, epoch)
    t.optimizer.param_groups[0]["lr"] = rate
    if begun == 0:
        t.optimizer.state.clear()
    torch.manual_seed(int(np.random.SeedSequence((t.seed, t.step)).generate_state(1, np.uint64)[0]))  # of the dropout
    t.guard.begin()
    terms, _, _ = t.losses(to_floats(batch.images), t.tokens[batch.rows], t.classes[batch.rows])
    loss = torch.stack(list(terms.values())).sum()
    loss.backward()
    norm = clip_grad_norm_(t.text.parameters(), t.settings.clip_grad or float("inf")).detach()
    other = clip_grad_norm_(t.image.parameters(), float("inf")).detach()
    t.guard.watch(loss, norm, other)
    t.optimizer.step()
    t.optimizer.zero_grad()
    t.guard.end()
    t.step += 1
    logged = {f"loss_damsm/{name}": value.detach() for name, value in terms.items()}
    return {**logged, "gradient_norm/text": norm, "learning_rate/damsm": torch.tensor(rate),
            "bad_steps": t.guard.bad_steps.clone()}  # fmt: skip


def learning_rate(first: float, epoch: int) -> float:
    """The rate of an epoch, from 0: DECAY times the one before while that was above LEAST_RATE of the first."""
    rate = first
    for _ in range(epoch):
        if rate <= LEAST_RATE * first:
            break
        rate *= DECAY
    return rate


class Matching:
    """How well encoders match test pictures and captions: the losses in eval mode, and R@1.

    At most TEST_BATCHES batches of the test split, drawn once, with a caption drawn for each picture; the last one is
    left out where it is not full.
    """

    protocols: dict[str, str] = {}

    def __init__(
        self, items: Sequence[Item], classes: dict[str, int], text: DamsmText, batch_size: int, data: EasyDict
    ):
        count = min(len(items), TEST_BATCHES * batch_size)
        count = count // batch_size * batch_size or count
        rng = np.random.default_rng(0)
        self.items = [items[number] for number in rng.permutation(len(items))[:count]]
        self.batch_size, self.data = batch_size, data
        table = CaptionTable([item.captions for item in self.items])
        self.texts = [table.texts[row] for row in table.draw(np.arange(count), rng)]
        self.tokens = text.tokenize(self.texts)  # (N, T)
        self.classes = torch.tensor([classes.get(item.key, -1 - n) for n, item in enumerate(self.items)])
        kinds: dict[tuple, int] = {}
        self.kinds = torch.tensor([kinds.setdefault(tuple(words), len(kinds)) for words in self.tokens.tolist()])

    @torch.no_grad()
    def __call__(self, t: Pretraining) -> dict[str, float]:
        """{"loss", "loss/w0" and so on, "r_at_1": share of the pictures whose own caption is nearer than CANDIDATES - 1
        of others, in other words; "images", "seconds"}."""
        started = time.time()
        totals, codes, sentences = torch.zeros(4, dtype=torch.float64), [], []
        for images, numbers in self._read(t, len(self.items)):
            tokens, classes = (devices.send(values[numbers], t.device) for values in (self.tokens, self.classes))
            terms, code, sentence = t.losses(images, tokens, classes)
            totals += torch.stack(list(terms.values())).cpu() * len(images)
            codes.append(code.float().cpu())
            sentences.append(sentence.float().cpu())
        hits, _ = first_of(torch.cat(codes), torch.cat(sentences), self.kinds, torch.arange(len(self.items)))
        means = dict(zip(terms, (totals / len(self.items)).tolist(), strict=True))
        parts = {f"loss/{name}": value for name, value in means.items()}
        about = {"images": len(self.items), "seconds": time.time() - started}
        return {"loss": sum(means.values()), **parts, "r_at_1": float(hits.mean()), **about}

    def better(self, scores: dict[str, float], than: dict[str, float]) -> bool:
        """Whether the losses are lower."""
        return scores["loss"] < than["loss"]

    @torch.no_grad()
    def grid(self, t: Pretraining) -> Image.Image:
        """Some test pictures with their captions, and again with the nearest of CANDIDATES captions."""
        tokens = devices.send(self.tokens[:CANDIDATES], t.device)
        for images, _ in self._read(t, min(SHOWN, len(self.items))):
            _, codes = t.image(images)
            nearest = sentence_scores(codes.float(), t.text.text(tokens)[0]).argmax(1).tolist()
        texts = [*self.texts[: len(images)], *(self.texts[number] for number in nearest)]
        titles = ["its caption", f"the nearest of {len(tokens)}"]
        return captioned_grid(torch.cat([images, images]).cpu(), texts, len(images), titles)

    def _read(self, t: Pretraining, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the first `count` pictures, and their numbers; meanwhile both encoders are in eval mode."""
        modes = {network: network.training for network in t.networks.values()}
        try:
            for network in modes:
                network.eval()
            pictures = TestImages(self.items[:count], t.image.side, self.data.fit)
            yield from picture_batches(pictures, self.batch_size, self.data.num_workers, t.device)
        finally:
            for network, training in modes.items():
                network.train(training)


class Matched(Course):
    """The loop, with what is looked at in place of a generator's pictures."""

    smaller_steps = "Lower damsm.lr and damsm.clip_grad, or set train.precision=fp32"

    def evaluate(self) -> dict[str, float]:
        with self.stop.at_once(together=True):
            return self.evaluator(self.t)

    def grid(self) -> Image.Image:
        with self.stop.at_once():
            return self.evaluator.grid(self.t)

    def draw(self) -> None:
        """Nothing: the pictures of all grids are the same."""


def image_encoder_of(config: EasyDict) -> DamsmImage:
    """The image encoder that `config.damsm` describes, its two maps freshly initialised.

    Raises:
        UserError: there are no weights for the network below it.
    """
    if config.damsm.image_encoder == "clip":
        clip = build.clip_of(config)
        clip.drop_text_tower()
        return DamsmClip(clip)
    try:
        path, _, _ = find_weights(config.eval.inception_released_weights, URL, "eval.inception_released_weights")
    except MissingWeights as error:
        raise UserError(f"{error}; damsm.image_encoder=clip takes the image tower of clip.weights") from None
    encoder = DamsmInception()
    encoder.load_trunk(path)
    return encoder


def prepare(config: EasyDict) -> tuple[Pretraining, EasyDict, EpochBatches, DataLoader, Matching]:
    """Data, vocabulary and encoders of a configuration, on the device, before the first step; and the configuration as
    the loop reads it: with this training's sizes in the place of a generator's."""
    place = devices.choose(config.train.device)
    torch.manual_seed(config.train.seed)
    image = image_encoder_of(config)
    sizes = {"batch_size": config.damsm.batch_size, "max_epoch": config.damsm.max_epoch}
    loop = EasyDict({**config, "model": {**config.model, "imsize": image.side}, "train": {**config.train, **sizes}})
    items, test_items = (usable_items(loop, split) for split in ("train", "test"))
    if (asked := loop.train.batch_size) and asked > len(items):
        raise UserError(f"damsm.batch_size: {asked} is larger than the {len(items)} training images; null follows them")
    loop.train.batch_size = asked or min(BATCH_SIZE, len(items))
    check_size(loop, {"train": items, "test": test_items})

    tables = [CaptionTable([item.captions for item in own]) for own in (items, test_items)]
    vocabulary = Vocabulary.of(text for table in tables for text in table.texts)
    text = DamsmText(vocabulary, config.text.words, config.train.seed)
    for table, own in zip(tables, (items, test_items), strict=True):
        text.check(table.texts, partial(caption_place, table, own))
    table = tables[0]
    table.cut = text.cut(table.texts)
    say_cut(table, text, "training captions")
    classes = [read_classes(config.data.layout, Path(config.data.dir), split) for split in ("train", "test")]
    of_images = np.array([classes[0].get(item.key, -1 - number) for number, item in enumerate(items)])
    of_rows = torch.from_numpy(np.repeat(of_images, np.diff(table.starts)))

    batches = EpochBatches(table, loop.train.batch_size, config.train.seed, shards=shard_numbers(items))
    reading = (config.data.enlarge, config.data.flip, config.train.seed, config.data.fit)
    pictures = TrainingImages(items, image.side, *reading)
    loader = training_loader(pictures, batches, config.data.num_workers, pin=place.type == "cuda")
    t = Pretraining(
        config.damsm,
        config.train.seed,
        text.to(place),
        image.to(place),
        text.tokenize(table.texts).to(place),
        of_rows.to(place),
        devices.choose_precision(config.train.precision, place),
        len(batches),
    )
    matching = Matching(test_items, classes[1], text, loop.train.batch_size, config.data)
    return t, loop, batches, loader, matching


def pretrain(config: EasyDict, words: Sequence[str] = ()) -> None:
    """Train both encoders as `config` says, from the start or going on; the files of the run hold them and their
    vocabulary.

    Args:
        words: key=value words of the command line, without those that ask to resume.
    """
    started = time.time()
    for key in ("dir", "save_dir"):
        if Path(config.log[key]).name != FOLDER:
            config.log[key] = str(Path(config.log[key]) / FOLDER)
    start = resume.decide(config, list(words))
    try:
        _pretrain(resume.resolved(config, start), start, list(words), started)
    finally:
        start.leave()


def _pretrain(config: EasyDict, start: resume.Start, words: list[str], started: float) -> None:
    """`pretrain` with the settings that hold, where it is decided which run goes on."""
    t, loop, batches, loader, matching = prepare(config)
    content = resume.read(start)
    scores = restore(t, content, start.place) if content else {}
    start.enter(config, words)
    t.run = start.run
    monitor = Monitor(start.run, loop, t.epoch if scores else -1, t.step, len(batches))
    print(
        f"DAMSM with {config.damsm.image_encoder} on {t.device}: {len(loader.dataset)} training images, "
        f"{len(t.text.vocabulary):,} words, {len(batches)} steps an epoch, epochs: {loop.train.max_epoch}; "
        f"logs in {monitor.folder}"
    )
    if t.epoch >= loop.train.max_epoch:
        print(f"nothing left to train: {t.epoch} epochs are done; raise damsm.max_epoch to go on")
    course = Matched(
        t,
        loop,
        step=lambda batch: pretraining_step(t, batch),
        write=lambda scores, path: save(t, config, scores, path),
        batches=batches,
        loader=loader,
        evaluator=matching,
        monitor=monitor,
        trace=Trace(config.train.profile, monitor.folder),
        stop=Stop(config.train.max_hours, started),
        scores=scores,
        folder=t.run.folder,
    )
    course.run(f"{command('pretrain.sh')} {runs.quoted(t.run)} train.resume=auto")
    best = t.run.folder / "best.pth"
    pair = best if best.is_file() else checkpoint.newest_first(t.run.folder, t.run.id)[0]
    print(f"to use the pair: text.encoder=damsm text.weights={pair}\nminutes  {(time.time() - started) / 60:.1f}")


def save(t: Pretraining, config: EasyDict, scores: dict, path: Path) -> None:
    """Write a checkpoint: the pair, and what going on takes. All that is random follows from the seed and the step."""
    if t.run:
        t.run.confirm()
    content = {
        "format": checkpoint.FORMAT,
        "run": t.run.id if t.run else None,
        "saved": time.time(),
        "config": configuration.kept_settings(config),
        "epoch": t.epoch,
        "step": t.step,
        "epoch_steps": t.epoch_steps,
        "bad_steps": int(t.guard.bad_steps),
        "scores": scores,
        "vocabulary": t.text.vocabulary.words,
        "text": t.text.state_dict(),
        "image": t.image.kept(),
        "clip": t.image.clip.identity if isinstance(t.image, DamsmClip) else None,  # that it sees through
        "optimizer": t.optimizer.state_dict(),
    }
    checkpoint.save(content, path)


def restore(t: Pretraining, content: dict, place: bool) -> dict[str, dict[str, float]]:
    """Take over a checkpoint's encoders and, if asked, its place; gives that place's scores.

    Raises:
        UserError: other captions or images, another image encoder, or no checkpoint of pretraining.
    """
    if content.get("vocabulary") != t.text.vocabulary.words:
        what = "has other words than these captions" if "vocabulary" in content else "is none of pretrain.sh"
        raise UserError(f"train.resume: the checkpoint {what}: begin a new run")
    if place and content["epoch_steps"] != t.epoch_steps:
        raise UserError(
            f"an epoch has {t.epoch_steps} steps now, the checkpoint's had {content['epoch_steps']}: "
            "damsm.batch_size and the number of training images must stay the same"
        )
    if set(content["image"]) != set(t.image.kept()):
        raise UserError("damsm.image_encoder is not the checkpoint's: a run cannot change this")
    t.text.load_state_dict(content["text"])
    t.image.load_state_dict({**t.image.state_dict(), **content["image"]})
    if not place:
        return {}
    t.optimizer.load_state_dict(content["optimizer"])
    t.epoch, t.step = content["epoch"], content["step"]
    t.guard.bad_steps.fill_(content["bad_steps"])
    return content["scores"]
