"""Training: the step of generator and discriminator, and a run from its configuration to its end."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from easydict import EasyDict
from torch import Tensor
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.optim import Adam
from torch.utils.data import DataLoader

from ratlip import build, checkpoint, choices, distributed, losses, resume, runs
from ratlip import config as configuration
from ratlip import device as devices
from ratlip.augment import augment
from ratlip.course import Course, draw_course
from ratlip.data import captions
from ratlip.data.inventory import cache_folder, usable_items
from ratlip.data.loader import Batch, Draw, EpochBatches, TrainingImages, shard_numbers, to_floats, training_loader
from ratlip.encoders.clip_towers import FrozenClip
from ratlip.evaluation import Evaluator, Scorer, scores_table
from ratlip.guard import Guard
from ratlip.models.clip_gan.discriminator import Discriminator
from ratlip.models.clip_gan.generator import Generator
from ratlip.monitor import Monitor
from ratlip.paths import command
from ratlip.preparation import check_size
from ratlip.profiling import Trace
from ratlip.stopping import Stop, Stopped, end_workers


@dataclass
class Training:
    """Everything that a step changes, and what it reads."""

    settings: EasyDict  # the config's train group
    clip: FrozenClip
    generator: Generator
    discriminator: Discriminator
    ema: Generator | None  # averaged generator
    sentences: Tensor  # (R, E) embeddings of all training captions, on the device
    precision: str
    total_steps: int
    optimizer_g: Adam = field(init=False)
    optimizer_d: Adam = field(init=False)
    scaler: GradScaler = field(init=False)  # of the losses, in fp16 only
    guard: Guard = field(init=False)  # against steps that are not finite; counts them
    draw: Callable = field(init=False)  # what a step calls of the generator and of CLIP, compiled or not
    see: Callable = field(init=False)
    feature_maps: Callable = field(init=False)
    step: int = 0
    epoch: int = 0  # finished epochs
    measured: str = ""  # by which `precision` and the form of CLIP's products were chosen
    run: runs.Run | None = None  # that its checkpoints belong to
    in_step: bool = False  # then the networks are none that a checkpoint may hold

    def __post_init__(self):
        s, betas = self.settings, (self.settings.beta1, self.settings.beta2)
        self.optimizer_g = Adam(self.generator.parameters(), s.lr_g, betas, fused=True)
        self.optimizer_d = Adam(self.discriminator.parameters(), s.lr_d, betas, fused=True)
        place = self.sentences.device.type
        self.guard = Guard([self.generator], [self.optimizer_d, self.optimizer_g], self.sentences.device)
        self.scaler = GradScaler(place, enabled=self.precision == "fp16")
        # Not the discriminator, which MA-GP differentiates twice; torch.compile cannot.
        self.draw, self.see, self.feature_maps = self.generator, self.clip.image, self.clip.feature_maps
        if s.compile:
            mode = "reduce-overhead" if place == "cuda" else None  # with CUDA graphs
            self.draw, self.see, self.feature_maps = (
                devices.compiled(function, mode=mode) for function in (self.draw, self.see, self.feature_maps)
            )

    @property
    def bad_steps(self) -> int:
        """Steps left out so far because something was not finite; waits for the device."""
        return int(self.guard.bad_steps)

    @property
    def bad_in_a_row(self) -> int:
        """Those among the last steps, without one that was not left out; waits for the device."""
        return int(self.guard.bad_in_a_row)


def train_step(t: Training, batch: Batch) -> dict[str, Tensor]:
    """One update of the discriminator, then one of the generator (GALIP, arXiv 2301.12959).

    The images that the discriminator learns from are the ones the generator then learns from: they are drawn,
    and seen by CLIP, once. Where a loss or a gradient is not finite nothing is updated from there on: after a bad
    discriminator neither network, its BatchNorm averages and the averaged generator included. All of the step is
    computed even so: whether it is bad is known on the device alone, which nothing here waits for.

    Returns:
        loss terms, gradient norms and learning rates, by TensorBoard tag; not yet read from the device.
    """
    generator, discriminator, scaler = t.generator, t.discriminator, t.scaler
    images = to_floats(batch.images)  # (B, 3, S, S) in [-1, 1]; bytes until here
    if t.settings.compile:
        torch.compiler.cudagraph_mark_step_begin()  # what CUDA graphs gave in the step before may be overwritten
    sentences = t.sentences[batch.rows].requires_grad_()  # (B, E); MA-GP differentiates with respect to them
    noise, real_draws, fake_draws = randomness(t, len(images))
    set_learning_rates(t)
    t.guard.begin()

    with devices.autocast(noise.device, t.precision):
        # What CLIP sees. No graph goes through it for real images: MA-GP starts at its feature maps.
        with torch.no_grad():
            real_maps = discriminator.prepare(t.feature_maps(augment(images, real_draws)))  # (B, N, W, g, g)
        real_maps.requires_grad_()
        fake_maps, fake_embeddings = t.see(augment(t.draw(noise, sentences.detach()), fake_draws))
        fake_maps = discriminator.prepare(fake_maps)

        # Discriminator
        real_features = discriminator.features(real_maps)
        real_logits = discriminator.logits(real_features, sentences)
        mismatched_logits = discriminator.logits(real_features, t.sentences[batch.mismatched_rows])
        d_real = losses.hinge_real(real_logits)
        fake_features = discriminator.features(fake_maps.detach())
        d_fake = losses.hinge_fake(discriminator.logits(fake_features, sentences.detach()))
        d_mismatched = losses.hinge_fake(mismatched_logits)
        scale = scaler.scale(torch.ones((), device=noise.device))  # as a tensor; scaler.get_scale() would read it
        penalty = losses.matching_aware_gradient_penalty(real_logits, (real_maps, sentences), scale)
        loss_d = d_real + (d_fake + d_mismatched) / 2 + penalty
        similarity = losses.clip_similarity(fake_embeddings, sentences.detach())
    scaler.scale(loss_d).backward()
    d_norm = finish_gradients(t, discriminator, t.optimizer_d, loss_d, similarity)
    t.optimizer_d.step()
    t.optimizer_d.zero_grad()  # at once, for the memory

    # Generator
    discriminator.requires_grad_(False)
    with devices.autocast(noise.device, t.precision):
        g_adversarial = -discriminator.logits(discriminator.features(fake_maps), sentences.detach()).mean()
    scaler.scale(g_adversarial - t.settings.sim_w * similarity).backward()
    discriminator.requires_grad_(True)
    g_norm = finish_gradients(t, generator, t.optimizer_g, g_adversarial)
    t.optimizer_g.step()
    t.optimizer_g.zero_grad()
    if t.ema is not None:
        update_ema(t.ema, generator, t.settings.ema, t.step + 1, t.guard)
    t.guard.end()
    scaler.update()

    t.step += 1
    return {
        "loss_d/real": d_real.detach(),
        "loss_d/fake": d_fake.detach(),
        "loss_d/mismatched": d_mismatched.detach(),
        "loss_d/ma_gp": penalty.detach(),
        "loss_g/adversarial": g_adversarial.detach(),
        "loss_g/clip_similarity": similarity.detach(),
        "gradient_norm/d": d_norm,
        "gradient_norm/g": g_norm,
        "learning_rate/g": torch.tensor(t.optimizer_g.param_groups[0]["lr"]),
        "learning_rate/d": torch.tensor(t.optimizer_d.param_groups[0]["lr"]),
        "bad_steps": t.guard.bad_steps.clone(),
    }


def finish_gradients(t: Training, network: torch.nn.Module, optimizer: Adam, *terms: Tensor) -> Tensor:
    """Average gradients over processes, undo the scaling of the loss, clip; gives the norm before clipping.

    Where the norm or one of the loss's `terms` is not finite, on any process, the step is bad on all of them.
    """
    t.guard.watch(*terms)
    distributed.mean_gradients(network, t.guard.bad)
    t.scaler.unscale_(optimizer)
    norm = clip_grad_norm_(network.parameters(), t.settings.clip_grad or float("inf")).detach()
    t.guard.watch(norm)
    return norm


def randomness(t: Training, share: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise (B, Z), and on the CPU what `augment` does to real and generated images (B, 3), for this process's share.

    They depend on (seed, step) alone, so that resuming, the device and the number of processes do not change them.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    rng = np.random.default_rng((t.settings.seed, t.step))
    noise = rng.standard_normal((share * world_size, t.generator.noise_dim), dtype=np.float32)
    shifts = rng.uniform(-1, 1, (2, share * world_size, 2)) * t.settings.augment_shift
    brighter = rng.uniform(-1, 1, (2, share * world_size, 1)) * t.settings.augment_brightness
    draws = np.concatenate([shifts, brighter], axis=2, dtype=np.float32)
    noise, *draws = (torch.from_numpy(a[rank::world_size]) for a in (noise, *draws))
    return devices.send(noise, t.sentences.device), *draws


def set_learning_rates(t: Training) -> None:
    """Constant, then linearly to zero over the last `lr_decay` of the run."""
    left = (t.total_steps - t.step) / t.total_steps
    factor = min(1.0, left / t.settings.lr_decay) if t.settings.lr_decay else 1.0
    for optimizer, rate in ((t.optimizer_g, t.settings.lr_g), (t.optimizer_d, t.settings.lr_d)):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor


@torch.no_grad()
def update_ema(ema: Generator, generator: Generator, decay: float, step: int, guard: Guard) -> None:
    """Move the averaged generator towards the present one, faster in the first steps; not in a bad step."""
    share = 1 - min(decay, (1 + step) / (10 + step))
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
        sentences = captions.embed(table, clip, cache_folder(config.data))
    captions.say_cut(table, clip, "training captions")
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
    images = TrainingImages(items, config.model.imsize, config.data.enlarge, config.data.flip, config.train.seed)
    loader = training_loader(images, batches, config.data.num_workers, pin=place.type == "cuda")
    evaluator = Evaluator(Scorer(config, clip, test_items), test_items)
    clip.drop_text_tower()

    generator, discriminator = (
        build.generator_of(config, clip).to(place),
        build.discriminator_of(config, clip).to(place),
    )
    if config.model.d_whiten:
        discriminator.fit_whitening(some_feature_maps(clip, images, place))
    ema = None
    if config.train.ema:
        ema = build.generator_of(config, clip).to(place).eval().requires_grad_(False)
        ema.load_state_dict(generator.state_dict())
    devices.keep_freed_memory()  # from here on; what loading took has been given back
    asked = config.train.precision
    precision, times = choices.settle_precision(asked, generator, discriminator, share, place)
    evaluator.precision, measured = precision, "; ".join(filter(None, [times, *measured]))
    # What was chosen is a setting from here on: the run goes on with it, whatever would be faster then.
    config.train.precision, config.clip.products = precision, clip.products
    total_steps = len(batches) * config.train.max_epoch
    training = Training(config.train, clip, generator, discriminator, ema, sentences.to(place), precision, total_steps)
    training.measured = measured
    return training, batches, loader, evaluator


@torch.no_grad()
def some_feature_maps(clip: FrozenClip, images: TrainingImages, place: torch.device, count: int = 512) -> Tensor:
    """CLIP feature maps (B, N, W, g, g) of B <= `count` training images, spread over the set."""
    numbers = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int).tolist()
    batches = [numbers[i : i + 64] for i in range(0, len(numbers), 64)]
    seen = (torch.stack([images[Draw(0, number, 0, 0)][0] for number in batch]) for batch in batches)
    return torch.cat([clip.feature_maps(to_floats(batch.to(place))) for batch in seen])


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
        resume.check(config, content, t.clip, len(batches) if start.place else None)
        scores = restore(t, content, start.place)
    start.enter(config, words)
    t.run, save_folder = start.run, start.run.folder
    monitor = Monitor(start.run, config, t.epoch if scores else -1, t.step, len(batches))
    trace = Trace(config.train.profile, monitor.folder)
    distributed.say(
        f"{config.model.name} on {t.sentences.device} in {t.precision}, CLIP's products as {t.clip.products}"
        f"{f' (measured: {t.measured})' if t.measured else ''}: {len(loader.dataset)} training images, "
        f"{len(batches)} steps an epoch, epochs: {config.train.max_epoch}; logs in {monitor.folder}"
    )
    if t.epoch >= config.train.max_epoch:
        distributed.say(f"nothing left to train: {t.epoch} epochs are done; raise train.max_epoch to go on")
    again = f"{command('resume.sh')} {runs.quoted(t.run)}"
    failure = None
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
    try:
        course.begin()
        while t.epoch < config.train.max_epoch:
            course.steps()
            course.finish_epoch()
    except (Exception, Stopped) as cause:
        failure = course.leave(cause, again)
        if failure is None:
            draw_course(t, monitor)
    else:
        distributed.say(f"\n{scores_table(course.scores)}\n")
        monitor.hparams(course.scores["end"])
        draw_course(t, monitor)
    finally:
        trace.close()
        if t.run.lost:
            monitor.active = False  # nothing more is written, whatever it still holds
        monitor.close()
        stop.close()
        end_workers()
    if failure is not None:
        raise failure
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
        "clip": t.clip.identity,
        "epoch": t.epoch,
        "step": t.step,
        "epoch_steps": epoch_steps,
        "bad_steps": t.bad_steps,
        "scores": scores,
        "generator": t.generator.state_dict(),
        "discriminator": t.discriminator.state_dict(),
        "ema": t.ema.state_dict() if t.ema is not None else None,
        "optimizer_g": t.optimizer_g.state_dict(),
        "optimizer_d": t.optimizer_d.state_dict(),
        "scaler": t.scaler.state_dict(),
    }
    checkpoint.save(content, path)


def restore(t: Training, content: dict, place: bool) -> dict[str, dict[str, float]]:
    """Take over a checkpoint's networks and optimisers and, if asked, its place; gives that place's scores."""
    t.generator.load_state_dict(content["generator"])
    t.discriminator.load_state_dict(content["discriminator"])
    if t.ema is not None:
        t.ema.load_state_dict(content["ema"] or content["generator"])
    for optimizer, name in ((t.optimizer_g, "optimizer_g"), (t.optimizer_d, "optimizer_d")):
        optimizer.load_state_dict(content[name])
        for group in optimizer.param_groups:
            group["betas"] = (t.settings.beta1, t.settings.beta2)  # as the configuration says now
    if not place:
        return {}
    if content["scaler"]:  # empty where the run was not in fp16 until now
        t.scaler.load_state_dict(content["scaler"])
    t.epoch, t.step = content["epoch"], content["step"]
    t.guard.bad_steps.fill_(content["bad_steps"])
    return content["scores"]
