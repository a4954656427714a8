"""Which checkpoint a run goes on from, and whether the configuration still fits it."""

import re
from pathlib import Path

from easydict import EasyDict

from ratlip import checkpoint, distributed
from ratlip import config as configuration
from ratlip.errors import UserError
from ratlip.stopping import restarted

# Settings that decide the networks' shapes or meaning: a checkpoint has been made with them and cannot change.
FIXED = re.compile(r"model\.(?!shipped$|d_start$)|clip\.(?!weights$)")
SILENT = ("train.resume",)


def find(config: EasyDict) -> tuple[str | None, dict | None]:
    """What `train.resume` asks for: the run's name and the checkpoint's content, on every process the same.

    null begins a run: (None, None). "auto" goes on with the newest run of this configuration: its newest checkpoint
    that can be read, or (run, None) if it was stopped before its first. A number is the epoch of a checkpoint, in the
    newest run that has it. A path is a checkpoint whose networks and optimisers a new run begins with: (None, content).
    After torchrun's restart it is "auto" whatever was asked, as the run has begun.

    Raises:
        UserError: no such checkpoint, or none of the run's can be read.
    """
    wanted = "auto" if restarted() else config.train.resume
    if wanted is None:
        return None, None
    base = Path(config.log.save_dir) / config.name
    found = _choose(base, wanted) if distributed.rank() == 0 else None
    chosen = Path(distributed.same(str(found or "")))
    if chosen == Path():
        distributed.say(f"nothing to resume below {base}: starting from the beginning")
        return None, None
    if chosen.is_dir():
        distributed.say(f"{chosen} was stopped before its first checkpoint: starting it again")
        return chosen.name, None
    content = checkpoint.read(chosen)
    if content.get("format") != checkpoint.FORMAT:
        raise UserError(f"train.resume: {chosen} is not a checkpoint of this program; convert released ones first")
    distributed.say(f"going on from {chosen} (epoch {content['epoch']}, step {content['step']})")
    same_run = wanted == "auto" or wanted.isdigit()
    return (chosen.parent.name if same_run else None), content


def check(config: EasyDict, content: dict, clip_shape: dict, epoch_steps: int | None) -> None:
    """Compare the configuration with the checkpoint's; say what differs.

    Args:
        clip_shape: of the CLIP that will be used. epoch_steps: of this run, None where it is a new one.

    Raises:
        UserError: the networks, CLIP, or the number of steps in an epoch would be others.
    """
    now = {key: value for key, value in configuration.flatten(config).items() if key != "name"}
    then = configuration.from_kept(content["config"])
    changed = [key for key in now if key in then and now[key] != then[key] and key not in SILENT]
    for key in changed:
        if FIXED.match(key):
            raise UserError(
                f"{key} is {now[key]}, the checkpoint was trained with {then[key]}: a run cannot change this; "
                f"add {key}={then[key]} or begin a new run"
            )
    if content["clip"] != clip_shape:
        raise UserError("clip.weights: not the CLIP that the checkpoint was trained with, its shapes differ")
    if epoch_steps and content["epoch_steps"] != epoch_steps:
        raise UserError(
            f"an epoch has {epoch_steps} steps now, the checkpoint's had {content['epoch_steps']}: "
            "train.batch_size and the number of training images must stay the same"
        )
    if changed:
        distributed.say("warning: settings that are not those of the checkpoint:")
        for key in changed:
            distributed.say(f"  {key}: {then[key]} -> {now[key]}")


def _choose(base: Path, wanted: str) -> Path | None:
    """A checkpoint, a run's folder without any, or None."""
    if wanted.isdigit():
        paths = checkpoint.newest_first(base)
        chosen = next((path for path in paths if path.name == f"state_epoch_{int(wanted):03}.pth"), None)
        if chosen is None:
            epochs = sorted({int(number) for path in paths for number in re.findall(r"epoch_(\d+)\.pth", path.name)})
            raise UserError(f"no checkpoint of epoch {wanted} below {base}; there are: {epochs or 'none'}")
        return chosen
    if wanted != "auto":
        return Path(wanted)
    run = max(base.glob("*/config.yml"), key=lambda path: path.stat().st_mtime_ns, default=None)
    if run is None:
        return None
    paths = checkpoint.newest_first(run.parent)
    for path in paths:
        try:
            checkpoint.read(path)
            return path
        except UserError as error:
            distributed.say(f"warning: {error}; left alone, trying the one before")
    if paths:
        raise UserError(f"none of the {len(paths)} checkpoints in {run.parent} can be read")
    return run.parent
