"""Which run is trained, from which checkpoint and with which settings, and whether these still fit it."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from easydict import EasyDict

from ratlip import checkpoint, distributed, runs
from ratlip import config as configuration
from ratlip import device as devices
from ratlip.encoders import TextEncoder, damsm
from ratlip.encoders.clip_towers import FrozenClip, require_same, trained_with
from ratlip.errors import UserError
from ratlip.lease import Lease
from ratlip.paths import command
from ratlip.runs import Run
from ratlip.stopping import restarted

# Settings that decide the networks' shapes or meaning: a checkpoint has been made with them and cannot change.
FIXED = re.compile(
    r"model\.(?!shipped$|d_start$|noise_scale$)|ratgan\.(?!g_start$)|text\.encoder$|"
    r"clip\.(?!(weights|source|activation|products|insist)$)"
)

MEASURED = ("train.precision", "clip.products")  # settings that the machine decides at the beginning (ratlip.choices)


@dataclass
class Start:
    """What training begins with, the same on every process, but for the lease, which the first has."""

    run: Run | None = None  # the run that goes on; None: a new one begins
    checkpoint: Path | None = None  # the networks and optimisers to begin with
    place: bool = False  # its epoch, step and scores are taken over too
    settings: dict = field(default_factory=dict)  # that hold from now on, flat
    origin: dict | None = None  # of a new run's record: what it begins with
    name: str | None = None  # of a new run, where the user gave one

    def enter(self, config: EasyDict, words: list[str]) -> None:
        """Make the new run's folder, or note in the old one that it goes on. Until here a new run leaves nothing."""

        def first() -> tuple[Path, Path, dict]:
            if self.run is None:
                self.run = runs.begin(config, words, self.name, self.origin)
            else:
                runs.take(self.run, config, words)
            return self.run.folder, self.run.logs, self.run.record

        folder, logs, record = distributed.first_decides(first)
        self.run = self.run or Run(folder)
        self.run.logs, self.run.record = logs, record

    def leave(self) -> None:
        """Let other programs write the run."""
        if self.run:
            self.run.release()


def decide(config: EasyDict, words: list[str]) -> Start:
    """What `train.resume` and `run=` ask for; a run that goes on is held from here on.

    null begins a run. "auto" goes on with the run that is named, else with the newest of this configuration: from its
    furthest checkpoint that can be read, or from its beginning if it was stopped before its first. A number is the
    epoch of a checkpoint: a new run begins from it, unless it is the furthest of its run, which then goes on. A path is
    a checkpoint whose networks and optimisers a new run begins with. After torchrun's restart it is the run that this
    command wrote before, whatever was asked, and in a job that SLURM started again where anything was.

    Args:
        words: of the command line, without what was asked.

    Raises:
        UserError: no such run or checkpoint, none of the run's can be read, or another program is writing it.
    """
    lease: list[Lease] = []

    def first() -> Start:
        try:
            start = _choose(config, words, lease)
            start.settings = _settings(config, start) | {"train.resume": None}
            start.settings |= _as_begun(config, start)
        except BaseException:
            for held in lease:
                held.release()
            raise
        return start

    start = distributed.first_decides(first)
    if lease:
        start.run.lease = lease[0]
    return start


def resolved(config: EasyDict, start: Start) -> EasyDict:
    """The configuration with the settings that hold from now on."""
    return configuration.resolve(start.settings, config.name, config.file, config.origin)


def read(start: Start) -> dict | None:
    """The content of the checkpoint to begin with, on every process; says which."""
    if start.checkpoint is None:
        return None
    content = checkpoint.read(start.checkpoint)
    if content.get("format") != checkpoint.FORMAT:
        raise UserError(
            f"train.resume: {start.checkpoint} is not a checkpoint of this program; convert released ones first"
        )
    distributed.say(f"going on from {start.checkpoint} (epoch {content['epoch']}, step {content['step']})")
    return content


def check(config: EasyDict, content: dict, clip: FrozenClip, encoder: TextEncoder, epoch_steps: int | None) -> None:
    """Compare the configuration with the checkpoint's; say what differs.

    Args:
        clip, encoder: those that will be used. epoch_steps: of this run, None where it is a new one.

    Raises:
        UserError: the networks, CLIP, or the number of steps in an epoch would be others.
    """
    now = configuration.settings_of(config)
    then = {**configuration.default_settings(), **_chosen(content["config"], config)}
    elsewhere = {key for key in now if key in configuration.OF_A_START or key.startswith("damsm.")}  # pretraining's
    changed = [key for key in now if key in then and now[key] != then[key] and key not in elsewhere]
    for key in changed:
        if FIXED.match(key):
            raise UserError(
                f"{key} is {now[key]}, the checkpoint was trained with {then[key]}: a run cannot change this; "
                f"add {key}={then[key]} or begin a new run"
            )
    if said := require_same(clip, trained_with(content), "the checkpoint", config.clip.insist):
        distributed.say(f"warning: the checkpoint: {said}")
    if content.get("text") and encoder is not clip:
        damsm.require_same(encoder, content["text"], "the checkpoint")
    if epoch_steps and content["epoch_steps"] != epoch_steps:
        raise UserError(
            f"an epoch has {epoch_steps} steps now, the checkpoint's had {content['epoch_steps']}: "
            "train.batch_size and the number of training images must stay the same"
        )
    if changed:
        distributed.say("warning: settings that are not those of the checkpoint:")
        for key in changed:
            distributed.say(f"  {key}: {then[key]} -> {now[key]}")


def _choose(config: EasyDict, words: list[str], lease: list[Lease]) -> Start:
    """`decide`, but for the settings, on the first process."""
    wanted, requeued = config.train.resume, int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    again = restarted() or requeued
    if restarted() and (run := runs.of_launch(config, words, by="torchrun")):
        return _go_on(run, lease, again)
    if requeued and wanted and (run := runs.of_launch(config, words, by="slurm")):
        return _go_on(run, lease, again)
    if wanted is None or not (wanted == "auto" or wanted.isdigit()):
        _refuse_taken_name(config)
        if wanted is None:
            return Start(name=config.origin.run)
        if Path(wanted).is_dir():
            raise UserError(f"train.resume: {wanted} is a folder; to go on with a run: {command('resume.sh')} {wanted}")
        return Start(None, Path(wanted), origin={"checkpoint": wanted, "place": False}, name=config.origin.run)
    try:
        run = runs.named(config)
    except UserError:
        if not again or os.sep in config.origin.run:
            raise
        distributed.say(f"{config.origin.run} was stopped before it was begun: beginning it")  # a job that is requeued
        return Start(name=config.origin.run)
    if wanted != "auto":
        return _from_epoch(config, [run] if run else runs.of_experiment(config), int(wanted), lease, again)
    run = run or next((run for run in runs.of_experiment(config) if run.settings() is not None), None)
    if run is None:
        more = runs.strangers(config, "resume")
        distributed.say(f"nothing to resume of {config.file} below {config.log.save_dir}: beginning a run{more}")
        return Start()
    return _go_on(run, lease, again)


def _refuse_taken_name(config: EasyDict) -> None:
    name = config.origin.run
    if name is None:
        return
    if Path(name).name != name or name.startswith("."):
        raise UserError(f"run={name}: a new run's name is a plain one, such as run=first-try")
    folder = Path(config.log.save_dir) / config.name / name
    if configuration.run_folder(folder):
        raise UserError(f"run={name}: {runs.shown(folder)} is there already; {command('resume.sh')} goes on with it")


def _go_on(run: Run, lease: list[Lease], wait: bool) -> Start:
    """The furthest checkpoint of the run that can be read, seen while nobody else writes it."""
    lease.append(Lease(run.folder, wait))
    for path in checkpoint.newest_first(run.folder, run.id):
        try:
            checkpoint.read(path)
            return Start(run, path, place=True)
        except UserError as error:
            distributed.say(f"warning: {error}; left alone, trying the one before")
    if count := len(list(run.folder.glob("state_epoch_*.pth"))):
        raise UserError(f"none of the {count} checkpoints in {run.folder} can be read")
    distributed.say(f"{run.folder} was stopped before its first checkpoint: starting it again")
    if origin := run.record.get("origin"):
        return Start(run, run.folder / origin["checkpoint"], place=origin["place"])
    return Start(run)


def _from_epoch(config: EasyDict, found: list[Run], epoch: int, lease: list[Lease], wait: bool) -> Start:
    """The state at the end of an epoch, in the newest of these runs that has it."""
    ends = {run.folder: [head for head in run.heads() if head.step == head.epoch * head.epoch_steps] for run in found}
    for run in found:
        head = next((head for head in ends[run.folder] if head.epoch == epoch), None)
        if head is None:
            continue
        if head.path == run.heads()[0].path:
            return _go_on(run, lease, wait)
        distributed.say(
            f"{runs.shown(run.folder)} has gone further than epoch {epoch} and stays as it is: a new run begins there"
        )
        origin = {"checkpoint": str(head.path), "place": True, "run": run.id, "epoch": head.epoch, "step": head.step}
        return Start(None, head.path, place=True, origin=origin)
    known = sorted({head.epoch for heads in ends.values() for head in heads})
    raise UserError(f"no checkpoint of epoch {epoch} of {config.file} below {config.log.save_dir}; there are: {known}")


def _settings(config: EasyDict, start: Start) -> dict:
    """The settings to train with, flat.

    Those of a run that goes on are its own, then what has changed in the configuration file since, then the words. Of a
    run without a record nobody knows what changed: the file holds, but for the seed.
    """
    now = configuration.settings_of(config)
    folder = start.run.folder if start.run else start.checkpoint.parent if start.place else None
    if folder is None or (config.origin.folder and os.path.samefile(folder, config.origin.folder)):
        return now
    run = Run(folder, configuration.read_record(folder))
    own, then, stated = run.settings(), run.record.get("stated"), config.origin.stated
    if own is None:
        return now
    if then is None:
        return {**now, "train.seed": own["train.seed"], **config.origin.words}
    defaults = configuration.base_settings(config.model.name, config.data.layout)
    said = {key: stated.get(key, default) for key, default in defaults.items()}
    changed = {key: value for key, value in said.items() if value != then.get(key, defaults[key])}
    of_this_start = {key: said[key] for key in configuration.OF_A_START}
    return {**own, **changed, **of_this_start, "log.save_dir": now["log.save_dir"], **config.origin.words}


def _as_begun(config: EasyDict, start: Start) -> dict:
    """What the machine decided when the run began, of the settings that are still "auto"; words may ask anew."""
    if not start.place:
        return {}
    then = _chosen(checkpoint.read(start.checkpoint, mmap=True)["config"], config)
    return {key: then[key] for key in MEASURED if start.settings[key] == "auto" and key not in config.origin.words}


def _chosen(kept: dict, config: EasyDict) -> dict:
    """A checkpoint's settings, with what programs that measured nothing took for "auto"."""
    if "clip.products" in kept:
        return kept
    place = devices.choose(config.train.device)
    precision = devices.choose_precision(kept.get("train.precision", "auto"), place)
    return {**kept, "train.precision": precision, "clip.products": "convolution"}
