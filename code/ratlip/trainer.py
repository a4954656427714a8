"""Training: the step, whatever the system, and a run from its configuration to its end."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from easydict import EasyDict
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.optim import Adam
from torch.utils.data import DataLoader

from ratlip import build, checkpoint, choices, distributed, resume, runs
from ratlip import config as configuration
from ratlip import device as devices
from ratlip.course import Course
from ratlip.data import captions
from ratlip.data.inventory import cache_folder, usable_items
from ratlip.data.loader import Batch, Draw, EpochBatches, TrainingImages, shard_numbers, to_floats, training_loader
from ratlip.encoders import TextEncoder
from ratlip.evaluation import Evaluator, Scorer
from ratlip.guard import Guard
from ratlip.monitor import Monitor
from ratlip.paths import command
from ratlip.preparation import check_size
from ratlip.profiling import Trace
from ratlip.stopping import Stop
from ratlip.systems import SYSTEMS
from ratlip.systems.system import Phase, Step, System

TAGS = {"generator": "g", "discriminator": "d"}  # in logs, and in checkpoints of earlier programs


@dataclass
class Training:
    """Everything that a step changes, and what it reads."""

    system: System
    ema: nn.Module | None  # averaged generator
    sentences: Tensor  # (R, E) embeddings of all training captions, on the device
    precision: str
    total_steps: int
    encoder: TextEncoder | None = None  # of those
    optimizers: dict[str, Adam] = field(init=False)  # of each network
    scaler: GradScaler = field(init=False)  # of the losses, in fp16 only
    scaled: dict[str, SimpleNamespace] = field(init=False)  # of each phase, what the scaler takes for an optimiser
    guard: Guard = field(init=False)  # against steps that are not finite; counts them
    step: int = 0
    epoch: int = 0  # finished epochs
    measured: str = ""  # by which `precision` and the form of CLIP's products were chosen
    run: runs.Run | None = None  # that its checkpoints belong to
    in_step: bool = False  # then the networks are none that a checkpoint may hold

    def __post_init__(self):
        system, place = self.system, self.sentences.device
        self.optimizers = {}
        for name, network in system.networks.items():
            rate, betas = system.adam(name)
            self.optimizers[name] = Adam(network.parameters(), rate, betas, fused=True)
        moving = {name: system.networks[name] for name in system.moving}
        self.guard = Guard(moving, self.optimizers.values(), place)
        self.scaler = GradScaler(place.type, enabled=self.precision == "fp16")
        # It unscales an optimiser's gradients once a step; two phases may share one.
        self.scaled = {
            phase.name: SimpleNamespace(param_groups=self.optimizers[phase.network].param_groups)
            for phase in system.phases
        }
        if self.settings.compile:
            mode = "reduce-overhead" if place.type == "cuda" else None  # with CUDA graphs
            system.compile(partial(devices.compiled, mode=mode))

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        return self.sentences.device

    @property
    def settings(self) -> EasyDict:
        """The configuration's train group."""
        return self.system.settings

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Those that are trained, by name."""
        return self.system.networks

    @property
    def generator(self) -> nn.Module:
        """The network that draws the pictures."""
        return self.system.generator

    @property
    def bad_steps(self) -> int:
        """Steps left out so far because something was not finite; waits for the device."""
        return int(self.guard.bad_steps)

    @property
    def bad_in_a_row(self) -> int:
        """Those among the last steps, without one that was not left out; waits for the device."""
        return int(self.guard.bad_in_a_row)


def train_step(t: Training, batch: Batch, draws: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """One step: the system's phases, each of which updates a network; then the averaged generator.

    Where a loss or a gradient is not finite nothing is updated from there on: after a bad first phase no network, no
    BatchNorm average, no state and no averaged generator; what was updated before stays. All of the step is computed
    even so: whether it is bad is known on the device alone, which nothing here waits for.

    Args:
        draws: in place of what (seed, step) would give.

    Returns:
        loss terms, gradient norms and learning rates, by TensorBoard tag; not yet read from the device.
    """
    if t.settings.compile:
        torch.compiler.cudagraph_mark_step_begin()  # what CUDA graphs gave in the step before may be overwritten
    step = Step(
        images=to_floats(batch.images),  # (B, 3, S, S) in [-1, 1]; bytes until here
        sentences=t.sentences[batch.rows],
        wrong=t.sentences[batch.mismatched_rows],
        draws=randomness(t, len(batch.images)) if draws is None else draws,
        scale=t.scaler.scale(torch.ones((), device=batch.images.device)),  # scaler.get_scale() would read it
        watched=[],
        moved={},
    )
    set_learning_rates(t)
    t.guard.begin()
    logged: dict[str, Tensor] = {}
    for phase in t.system.phases:
        if t.step % phase.every == 0:
            logged |= update(t, phase, step)
    if t.ema is not None:
        update_ema(t.ema, t.generator, t.system.average_share(t.step + 1), t.guard)
    t.guard.end()
    t.scaler.update()

    t.step += 1
    for name, optimizer in t.optimizers.items():
        logged[f"learning_rate/{TAGS.get(name, name)}"] = torch.tensor(optimizer.param_groups[0]["lr"])
    return {**logged, "bad_steps": t.guard.bad_steps.clone()}


def update(t: Training, phase: Phase, step: Step) -> dict[str, Tensor]:
    """One phase: its loss, the gradients of its network and that network's update; gives what is logged."""
    network, optimizer = t.networks[phase.network], t.optimizers[phase.network]
    constant = [other for name, other in t.networks.items() if name not in (phase.network, "generator")]
    for other in constant:
        other.requires_grad_(False)
    with devices.autocast(step.images.device, t.precision):
        terms = phase.loss(step)
        loss = sum(value if weight == 1 else value * weight for value, weight in terms.values())
    t.scaler.scale(loss).backward()
    for other in constant:
        other.requires_grad_(True)

    t.guard.watch(loss, *step.watched)
    distributed.mean_gradients(network, t.guard.bad)  # and whether the step is bad on any process
    t.scaler.unscale_(t.scaled[phase.name])
    norm = clip_grad_norm_(network.parameters(), t.settings.clip_grad or float("inf")).detach()
    t.guard.watch(norm)
    optimizer.step()
    optimizer.zero_grad()  # at once, for the memory
    t.guard.updated(phase.network)
    for name, value in step.moved.items():
        t.system.state[name].copy_(t.guard.unless_bad(value, t.system.state[name]))
    step.watched.clear()
    step.moved.clear()
    logged = {f"loss_{phase.name}/{name}": value.detach() for name, (value, _) in terms.items()}
    return {**logged, f"gradient_norm/{phase.name}": norm}


def randomness(t: Training, share: int) -> dict[str, Tensor]:
    """What the system draws for this process's `share` of a step's images, on the CPU.

    It depends on (seed, step) alone, so that resuming, the device and the number of processes do not change it.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    draws = t.system.draws(np.random.default_rng((t.settings.seed, t.step)), share * world_size)
    return {name: torch.from_numpy(rows[rank::world_size]) for name, rows in draws.items()}


def set_learning_rates(t: Training) -> None:
    """Constant, then linearly to zero over the last `lr_decay` of the run."""
    left = (t.total_steps - t.step) / t.total_steps
    factor = min(1.0, left / t.settings.lr_decay) if t.settings.lr_decay else 1.0
    for name, optimizer in t.optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = t.system.adam(name)[0] * factor


@torch.no_grad()
def update_ema(ema: nn.Module, generator: nn.Module, share: float, guard: Guard) -> None:
    """Move the averaged generator by `share` of the way to the present one; not in a bad step."""
    averaged, present = ema.state_dict(), generator.state_dict()
    for name, value in averaged.items():
        towards = guard.unless_bad(present[name], value)
        if value.is_floating_point():  # BatchNorm's running statistics too
            value.lerp_(towards, share)
        else:
            value.copy_(towards)


def prepare(config: EasyDict) -> tuple[Training, EpochBatches, DataLoader, Evaluator]:
    """Data, CLIP and networks of a configuration, on this process's device, before the first step."""
    local_rank = distributed.start()
    place = devices.choose(config.train.device, local_rank)
    with distributed.first_process_first():  # before CLIP, which may be a long download, is asked for
        items, test_items = (usable_items(config, split) for split in ("train", "test"))
    check_size(config, {"train": items, "test": test_items}, distributed.world_size())
    torch.manual_seed(config.train.seed)
    clip = build.clip_of(config).to(place)
    share = -(-config.train.batch_size // distributed.world_size())
    measured = [choices.settle_products(clip, config.clip.products, share, place, learning=True)]
    table = captions.CaptionTable([item.captions for item in items])
    with distributed.first_process_first():
        encoder = build.text_encoder_of(config, clip)
        sentences = captions.embed(table, encoder, cache_folder(config.data), items)
    captions.say_cut(table, encoder, "training captions")
    batches = EpochBatches(
        table,
        config.train.batch_size,
        config.train.seed,
        distributed.rank(),
        distributed.world_size(),
        config.train.mismatch_pool,
        sentences,
        shard_numbers(items),
    )
    reading = (config.data.enlarge, config.data.flip, config.train.seed, config.data.fit)
    images = TrainingImages(items, config.model.imsize, *reading)
    loader = training_loader(images, batches, config.data.num_workers, pin=place.type == "cuda")
    evaluator = Evaluator(Scorer(config, clip, test_items), test_items, encoder=encoder)
    clip.drop_text_tower()

    kind = SYSTEMS[config.model.name]
    system = kind.build(config, clip, encoder).to(place)
    system.fit(some_images(images, place))
    ema = None
    if config.train.ema:
        ema = kind.make_generator(config, clip, encoder).to(place).eval().requires_grad_(False)
        ema.load_state_dict(system.generator.state_dict())
    devices.keep_freed_memory()  # from here on; what loading took has been given back
    asked = config.train.precision
    precision, times = choices.settle_precision(asked, system, sentences[:share], place)
    evaluator.precision, measured = precision, "; ".join(filter(None, [times, *measured]))
    # What was chosen is a setting from here on: the run goes on with it, whatever would be faster then.
    config.train.precision, config.clip.products = precision, clip.products
    total_steps = len(batches) * config.train.max_epoch
    training = Training(system, ema, sentences.to(place), precision, total_steps, encoder)
    training.measured = measured
    return training, batches, loader, evaluator


def some_images(images: TrainingImages, place: torch.device, count: int = 512) -> Iterator[Tensor]:
    """Batches (b, 3, S, S) in [-1, 1] of at most `count` training images, spread over the set."""
    numbers = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int).tolist()
    for batch in (numbers[i : i + 64] for i in range(0, len(numbers), 64)):
        yield to_floats(torch.stack([images[Draw(0, number, 0, 0)][0] for number in batch]).to(place))


def train(config: EasyDict, words: Sequence[str] = ()) -> None:
    """Train as `config` says, from the start or going on, and leave checkpoints, logs and grids behind.

    Args:
        words: key=value words of the command line, without those that ask to resume.
    """
    started = time.time()
    distributed.start()
    start = resume.decide(config, list(words))
    try:
        _train(resume.resolved(config, start), start, list(words), started)
    finally:
        start.leave()


def _train(config: EasyDict, start: resume.Start, words: list[str], started: float) -> None:
    """`train` with the settings that hold, where it is decided which run goes on. `started`: the time limit's begin."""
    t, batches, loader, evaluator = prepare(config)
    content = resume.read(start)
    scores: dict[str, dict[str, float]] = {}
    if content:
        resume.check(config, content, t.system.clip, t.encoder, len(batches) if start.place else None)
        scores = restore(t, content, start.place)
    start.enter(config, words)
    t.run, save_folder = start.run, start.run.folder
    monitor = Monitor(start.run, config, t.epoch if scores else -1, t.step, len(batches))
    trace = Trace(config.train.profile, monitor.folder)
    distributed.say(
        f"{config.model.name} on {t.sentences.device} in {t.precision}, CLIP's products as {t.system.clip.products}"
        f"{f' (measured: {t.measured})' if t.measured else ''}: {len(loader.dataset)} training images, "
        f"{len(batches)} steps an epoch, epochs: {config.train.max_epoch}; logs in {monitor.folder}"
    )
    if t.epoch >= config.train.max_epoch:
        distributed.say(f"nothing left to train: {t.epoch} epochs are done; raise train.max_epoch to go on")
    again = f"{command('resume.sh')} {runs.quoted(t.run)}"
    stop = Stop(config.train.max_hours, started)  # until here a signal ends the program: there is nothing to save
    course = Course(
        t,
        config,
        step=lambda batch: train_step(t, batch),
        write=lambda scores, path: save(t, config, scores, len(batches), path),
        batches=batches,
        loader=loader,
        evaluator=evaluator,
        monitor=monitor,
        trace=trace,
        stop=stop,
        scores=scores,
        folder=save_folder,
    )
    course.run(again)
    distributed.say(f"checkpoints  {save_folder}\nlogs, grids  {monitor.folder}")
    distributed.say(f"minutes      {(time.time() - started) / 60:.1f}")
    distributed.stop()


def save(t: Training, config: EasyDict, scores: dict, epoch_steps: int, path: Path) -> None:
    """Write a checkpoint, on the first process.

    No generator of random numbers has a state to save: noise, crops, order and captions all follow from the seed
    and the step.
    """
    if distributed.rank() > 0:
        return
    if t.run:
        t.run.confirm()
    content = {
        "format": checkpoint.FORMAT,
        "run": t.run.id if t.run else None,
        "saved": time.time(),
        "config": configuration.kept_settings(config),
        "clip": t.system.clip.identity if t.system.sees_clip or t.encoder is t.system.clip else None,
        "text": getattr(t.encoder, "identity", None) if t.encoder is not t.system.clip else None,
        "epoch": t.epoch,
        "step": t.step,
        "epoch_steps": epoch_steps,
        "bad_steps": t.bad_steps,
        "scores": scores,
        **{name: network.state_dict() for name, network in t.networks.items()},
        "ema": t.ema.state_dict() if t.ema is not None else None,
        "optimizers": {name: optimizer.state_dict() for name, optimizer in t.optimizers.items()},
        "scaler": t.scaler.state_dict(),
        "state": t.system.state,
    }
    checkpoint.save(content, path)


def restore(t: Training, content: dict, place: bool) -> dict[str, dict[str, float]]:
    """Take over a checkpoint's networks and optimisers and, if asked, its place; gives that place's scores."""
    for name, network in t.networks.items():
        network.load_state_dict(content[name])
    if t.ema is not None:
        t.ema.load_state_dict(content["ema"] or content["generator"])
    saved = content.get("optimizers") or {name: content[f"optimizer_{tag}"] for name, tag in TAGS.items()}
    for name, optimizer in t.optimizers.items():
        optimizer.load_state_dict(saved[name])
        for group in optimizer.param_groups:
            group["betas"] = t.system.adam(name)[1]  # as the configuration says now
    for name, value in content.get("state", {}).items():
        t.system.state[name].copy_(value)
    if not place:
        return {}
    if content["scaler"]:  # empty where the run was not in fp16 until now
        t.scaler.load_state_dict(content["scaler"])
    t.epoch, t.step = content["epoch"], content["step"]
    t.guard.bad_steps.fill_(content["bad_steps"])
    return content["scores"]
