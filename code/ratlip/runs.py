"""What a run is: its folder, the record of whose it is, its checkpoints; and which runs a configuration means."""

import json
import os
import re
import shlex
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from easydict import EasyDict

from ratlip import checkpoint, output, paths
from ratlip import config as configuration
from ratlip.disk import replacing
from ratlip.errors import UserError
from ratlip.lease import Lease, process_start

TIME = "%Y-%m-%d_%H-%M-%S"  # what runs are named by
SAME_EXPERIMENT = ("data.layout", "data.dir", "model.name")  # of runs without a record, beside the file's stem
TELLING = (*SAME_EXPERIMENT, "train.seed")  # words that tell runs of one file apart


@dataclass
class Run:
    """A run's folder, `<log.save_dir>/<experiment>/<run>`, and its record, run.json: what says whose it is.

    The record's keys: `id`, also in each of its checkpoints; `name`, the experiment's; `file`, the configuration that
    it was begun from, and `stated`, the settings of that; `words`, of the command line; `began` and `launched`
    (time.time()), and `launches`, the program's start that last wrote it; `origin`, the checkpoint that it began with.
    """

    folder: Path
    record: dict = field(default_factory=dict)  # {}: the run of a program that kept none
    logs: Path | None = None  # where it is written to, as `lease`
    lease: Lease | None = None  # on the first process

    @property
    def id(self) -> str | None:
        """What its checkpoints know it by."""
        return self.record.get("id")

    def heads(self) -> list[checkpoint.Head]:
        """Its checkpoints, the furthest first."""
        return checkpoint.heads(self.folder, self.id)

    def settings(self) -> dict | None:
        """Its own settings, flat; None where there are none to be read, beside checkpoints."""
        with suppress(UserError):
            return configuration.settings_of(configuration.load(self.folder / configuration.OWN))
        return None

    def system(self) -> str | None:
        """What it trains; None where that is not to be read."""
        settings = self.settings()
        return settings and settings["model.name"]

    def began(self) -> float:
        """When, in seconds since 1970; by its record, else its name, else (with neither) the folder's time."""
        stamp = re.match(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", self.folder.name)
        if "began" not in self.record and stamp:
            with suppress(ValueError):
                return time.mktime(time.strptime(stamp[0], TIME))
        return self.record.get("began") or self.folder.stat().st_mtime

    def last_saved(self) -> float:
        """When it last saved a checkpoint, as these say; else when it began."""
        return max((head.saved for head in self.heads() if head.saved), default=self.began())

    def confirm(self) -> None:
        """Raises UserError where another program has taken it over."""
        if self.lease:
            self.lease.confirm()

    @property
    def lost(self) -> bool:
        """Whether another program has taken it over."""
        return self.lease is not None and self.lease.lost

    def release(self) -> None:
        """Let others write it."""
        if self.lease:
            self.lease.release()


def below(folder: str | Path) -> list[Run]:
    """Every run below log.save_dir."""
    places = [path for depth in ("*", "*/*") for path in Path(folder).glob(depth)]
    found = [path for path in places if (path / configuration.OWN).is_file() or any(path.glob("state_epoch_*.pth"))]
    return [Run(path, configuration.read_record(path)) for path in found]


def of_experiment(config: EasyDict) -> list[Run]:
    """The runs that a configuration means, the one that saved last first.

    They are of its system, and begun from this very file, whatever it says now; if there are none, those whose file
    said what this one says, so that it may be moved, renamed or copied. Runs without a record are known by the file's
    stem and by what they were trained on. Where words say more (another seed), runs of which it is true are preferred.
    """
    found = [run for run in _of_file(config, below(config.log.save_dir)) if run.system() in (None, config.model.name)]
    return newest_first(_preferred(found, config.origin.words))


def newest_first(found: list[Run]) -> list[Run]:
    """By when they last saved."""
    return sorted(found, key=lambda run: (run.last_saved(), run.folder.name), reverse=True)


def named(config: EasyDict) -> Run | None:
    """The run that `run=` or the first argument names; None where neither does. UserError: there is no such run."""
    text = config.origin.run
    if text is None:
        folder = config.origin.folder
        return Run(folder, configuration.read_record(folder)) if folder else None
    found = below(config.log.save_dir)
    if os.sep in text:
        folder = configuration.run_folder(paths.typed(text)) or paths.typed(text)
        if not any(folder.glob("state_epoch_*.pth")) and not (folder / configuration.OWN).is_file():
            raise UserError(f"run={text}: that is no run's folder")
        return Run(folder, configuration.read_record(folder))
    same = [run for run in found if run.folder.name == text]
    own = _of_file(config, same) or [run for run in same if run.folder.parent.name == config.name] or same
    if len(own) > 1:
        raise UserError(f"run={text} may be {' or '.join(shown(run.folder) for run in own)}: give the path")
    if not own:
        names = ", ".join(run.folder.name for run in newest_first(_of_file(config, found))[:10]) or "none"
        raise UserError(f"run={text}: no such run below {config.log.save_dir}; {config.file} has: {names}")
    return own[0]


def of_launch(config: EasyDict, words: list[str], by: str) -> Run | None:
    """The run that this very command wrote before it was started again, `by` torchrun or SLURM."""
    mine = [run for run in below(config.log.save_dir) if run.record.get("launches", {}).get(by)]
    mine = [run for run in mine if run.record["launches"][by] == launches(config, words)[by]]
    return max(mine, key=lambda run: run.record["launched"], default=None)


def launches(config: EasyDict, words: list[str]) -> dict[str, str | None]:
    """What a command that torchrun or SLURM starts again has in common with its first start, and no other has."""
    command, parent = shlex.join([config.file, *words]), os.getppid()
    torchrun = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if torchrun == "none":  # nobody named it; its processes have the same parent
        torchrun = f"{socket.gethostname()} {parent} {process_start(parent)}"
    job = os.environ.get("SLURM_JOB_ID")
    return {"torchrun": f"{torchrun}: {command}", "slurm": f"{job}: {command}" if job else None}


def strangers(config: EasyDict, script: str) -> str:
    """What to add where nothing has been trained with a file, but runs have its name: which, and how to use one."""
    own = {run.folder for run in of_experiment(config)}
    others = [run for run in below(config.log.save_dir) if _stem(run) == config.name and run.folder not in own]
    if not others:
        return ""
    newest = newest_first(others)[0]
    of = newest.record.get("file") or "another configuration"
    use = f"{paths.command(f'{script}.sh')} {quoted(newest)}"
    return f"; {shown(newest.folder)} is of {of} (to use it all the same: {use})"


def shown(path: Path) -> str:
    """A path as it can be typed: relative where it lies below the present folder."""
    path = Path(os.path.abspath(path))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def quoted(run: Run) -> str:
    """The run's folder as a word for the shell."""
    return shlex.quote(shown(run.folder))


def begin(config: EasyDict, words: list[str], name: str | None, origin: dict | None) -> Run:
    """Make the folders of a new run, for its checkpoints and its logs; the name is free in both, or made so.

    Args:
        words: of the command line.
        name: as the user wants it; None: the time, and a number where another run has that.
        origin: what its record is to say of the checkpoint that it begins with.

    Raises:
        UserError: the name that the user wants is another run's.
    """
    save, logs = Path(config.log.save_dir) / config.name, Path(config.log.dir) / config.name
    save.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):  # logs that cannot be written end no run; `_logs` says so
        logs.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime(TIME)
    for chosen in [name] if name else (stamp if n == 1 else f"{stamp}_{n}" for n in range(1, 10_000)):
        if _claim(save / chosen, logs / chosen, again=bool(name)):
            break
    else:
        there = f"{shown(save / name)} or {shown(logs / name)}"
        raise UserError(f"run={name}: {there} is there already; resume that run, or choose another name")
    run = Run(save / chosen, lease=Lease(save / chosen))
    run.record = {"id": uuid.uuid4().hex, "name": config.name, "file": _recorded(config)}
    run.record |= {"began": time.time(), "words": words}
    if origin:
        file = Path(origin["checkpoint"]).resolve()
        if file.is_relative_to(save.parent.resolve()):  # may be moved together with this run
            file = os.path.relpath(file, run.folder.resolve())
        run.record["origin"] = origin | {"checkpoint": str(file)}
    try:
        take(run, config, words)
    except BaseException:
        run.release()
        raise
    return run


def take(run: Run, config: EasyDict, words: list[str]) -> None:
    """Note in a run's folder that it is written now, with which settings; find the folder of its logs."""
    if not run.record:
        run.record = {"id": uuid.uuid4().hex, "name": config.name, "file": _recorded(config), "began": run.began()}
    if config.origin.folder:
        run.record.setdefault("stated", dict(config.origin.stated))
    else:
        run.record["stated"] = dict(config.origin.stated)
        if not run.record["file"] or not (configuration.ROOT / run.record["file"]).is_file():
            run.record["file"] = _recorded(config)  # it was moved or renamed
    run.record |= {"launches": launches(config, words), "launched": time.time()}
    _write(run.folder / configuration.RECORD, json.dumps(run.record, indent=1))
    _write(run.folder / configuration.OWN, configuration.dump(config))
    run.logs = _logs(run, Path(config.log.dir))


def new_folder(base: Path, name: str) -> Path:
    """Make `base`/`name`, or with a number behind it where that is there already."""
    base.mkdir(parents=True, exist_ok=True)
    for n in range(1, 10_000):
        folder = base / (name if n == 1 else f"{name}_{n}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise UserError(f"{base / name}: that and 9,999 more are there already")


def _claim(save: Path, logs: Path, again: bool) -> bool:
    """Whether both folders are this run's from now on; `again`: they may be there as long as no run is in them."""
    try:
        save.mkdir()
    except FileExistsError:
        return again and not (save / configuration.OWN).is_file() and not any(save.glob("state_epoch_*.pth"))
    if os.path.abspath(save) == os.path.abspath(logs):
        return True
    try:
        logs.mkdir()
    except FileExistsError:
        save.rmdir()
        return False
    except OSError:
        return True
    return True


def _logs(run: Run, base: Path) -> Path:
    """`<log.dir>/<experiment>/<run>`, unless that is another run's: of two copies of a run each has its own logs."""
    place = Path(os.path.abspath(run.folder))
    base = base / place.parent.name
    for n in range(1, 10_000):
        folder = base / (place.name if n == 1 else f"{place.name}_{n}")
        owner = configuration.read_record(folder).get("run")
        other = Path(os.path.abspath(folder / owner)) if owner else place
        if other == place or not (other / configuration.OWN).is_file():
            break
    with output.optional(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if folder.resolve() != place.resolve():
            _write(folder / configuration.RECORD, json.dumps({"run": os.path.relpath(place, os.path.abspath(folder))}))
    return folder


def _of_file(config: EasyDict, found: list[Run]) -> list[Run]:
    """Of these runs, those of the configuration's file."""
    name = _recorded(config)
    file = (configuration.ROOT / name).resolve() if name else None
    recorded = [run for run in found if run.record.get("file")]
    own = [run for run in recorded if (configuration.ROOT / run.record["file"]).resolve() == file]
    own = own or [run for run in recorded if run.record.get("stated") == dict(config.origin.stated)]
    return own + [run for run in found if not run.record.get("file") and _alike(run, config)]


def _alike(run: Run, config: EasyDict) -> bool:
    """Whether a run without a record seems to be of the configuration."""
    if _stem(run) != config.name and run.folder.name != config.name:
        return False
    settings, now = run.settings(), configuration.settings_of(config)
    return settings is None or all(settings[key] == now[key] for key in SAME_EXPERIMENT)


def _preferred(found: list[Run], words: dict) -> list[Run]:
    telling = {key: value for key, value in words.items() if key in TELLING}
    if not telling:
        return found
    fitting = [run for run in found if (own := run.settings()) and all(own[k] == v for k, v in telling.items())]
    return fitting or found


def _stem(run: Run) -> str:
    return run.record.get("name") or run.folder.parent.name


def _recorded(config: EasyDict) -> str | None:
    """The configuration file as a record names it: relative to the repository where it lies there."""
    if config.origin.folder:  # the file that the run was begun from whose settings are used again
        return configuration.read_record(config.origin.folder).get("file")
    file = Path(config.file).resolve()
    return str(file.relative_to(configuration.ROOT)) if file.is_relative_to(configuration.ROOT) else str(file)


def _write(path: Path, text: str) -> None:
    """The whole text or none."""
    with replacing(path) as file:
        file.write(text.encode())
