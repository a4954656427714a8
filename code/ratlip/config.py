"""Configuration: default.yml, the system, a run file, key=value words; strict, with errors a person can act on."""

import difflib
import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from easydict import EasyDict

from ratlip import paths, published
from ratlip.errors import UserError
from ratlip.paths import ROOT
from ratlip.text import decode_text

DEFAULT = ROOT / "cfg" / "default.yml"
SYSTEMS = ROOT / "cfg" / "systems"  # a file for each
OWN, RECORD = "config.yml", "run.json"  # in a run's folder: its settings, and whose it is (ratlip.runs)
NO_SETTINGS = ("name", "file", "origin")  # what else a resolved configuration carries
# What holds for one start of the program and no later one, unless the file says so.
OF_A_START = ("train.resume", "train.max_hours", "clip.insist")

CHOICES = {
    "data.layout": ("demo", "bird", "flower", "face", "coco", "folder", "webdataset", "parquet"),
    "data.fit": ("crop", "pad"),
    "model.rat.state": ("shared", "independent"),
    "model.rat.scope": ("mapper", "all"),
    "clip.source": ("openai", "open_clip"),
    "clip.activation": ("quick_gelu", "gelu"),
    "clip.preprocess": ("standard", "released"),
    "text.encoder": ("clip", "damsm"),
    "damsm.image_encoder": ("inception", "clip"),
    "ratgan.affines": (4, 6),
    "eval.clip_source": ("openai", "open_clip"),
    "eval.clip_activation": ("quick_gelu", "gelu"),
    "clip.products": ("auto", "linear", "convolution"),
    "train.device": ("auto", "cpu", "cuda"),
    "train.precision": ("auto", "fp32", "bf16", "fp16"),
}
AT_LEAST = {
    "data.num_workers": 0,
    "data.enlarge": 1.0,
    "model.nf": 16,
    "model.z_dim": 1,
    "model.d_channels": 4,
    "model.d_start": 0.0,
    "model.noise_scale": 0.0,
    "ratgan.g_start": 0.0,
    "text.words": 1,
    "damsm.batch_size": 2,
    "damsm.max_epoch": 1,
    "damsm.lr": 0.0,
    "damsm.clip_grad": 0.0,
    "train.batch_size": 2,  # the mismatched caption is another image's
    "train.mismatch_pool": 1,
    "train.max_epoch": 1,
    "train.seed": 0,
    "train.lr_g": 0.0,
    "train.lr_d": 0.0,
    "train.sim_w": 0.0,
    "train.clip_grad": 0.0,
    "train.max_bad_steps": 1,
    "train.max_hours": 0.0,
    "train.keep": 1,
    "eval.sample_times": 1,
    "eval.samples": 0,
    "eval.batch_size": 1,
    "eval.released_images": 2,
    "log.gen_interval": 1,
    "log.test_interval": 1,
    "log.save_interval": 1,
}
MULTIPLE_OF = {"model.nf": 16, "model.d_channels": 4}  # shuffle attention halves 8 groups of channels
SHARES = (
    "train.lr_decay",
    "train.beta1",
    "train.beta2",
    "train.ema",
    "train.augment_shift",
    "train.augment_brightness",
)  # from 0 up to 1
OPTIONAL = {  # null, or of this type
    "data.test_dir": str,
    "model.shipped": str,
    "train.batch_size": int,
    "train.resume": str,
    "clip.activation": str,
    "clip.feature_blocks": list,
    "clip.prompt_blocks": list,
    "text.weights": str,
    "text.vocabulary": str,
    "damsm.batch_size": int,
    "eval.clip_weights": str,
    "eval.clip_activation": str,
    "eval.inception_weights": str,
    "eval.inception_released_weights": str,
    "eval.released_npz": str,
}
PATHS = (
    "data.dir",
    "data.test_dir",
    "model.shipped",
    "clip.weights",  # or a name to download
    "text.weights",
    "text.vocabulary",
    "eval.clip_weights",  # as well
    "train.resume",  # or auto, or an epoch
    "eval.inception_weights",
    "eval.inception_released_weights",
    "eval.released_npz",
    "log.dir",
    "log.save_dir",
)
CLIP_FILES = {".pt", ".pth", ".bin", ".safetensors"}


@dataclass(frozen=True)
class Origin:
    """Where the settings of a configuration come from."""

    stated: dict[str, Any]  # of the file, flat; with a run's own config.yml, of the file it was begun from
    words: dict[str, Any]  # of the command line, flat
    run: str | None  # what the word run= names
    folder: Path | None  # the run whose own config.yml was given


def load(path: str | Path, overrides: Sequence[str] = ()) -> EasyDict:
    """The resolved configuration of a run file.

    Args:
        path: a YAML file with any of the keys of cfg/default.yml that the system reads; or the folder of a run, for its
            own config.yml. What is not in the caller's folder is looked for in the repository.
        overrides: words like "train.batch_size=8", stronger than the file; "run=NAME" names a run.

    Returns:
        Every key of default.yml, as nested attributes. `name` is the run file's stem (of a run's own file: the name of
        its experiment), with the system's behind it where a word has chosen another than the file; `file` its path,
        `origin` an `Origin`. Relative paths were meant from the repository in a file,
        from the working folder in a word; all are as they are used from the latter.

    Raises:
        UserError: names the file or word, the key, and the nearest valid key.
    """
    path, folder = _find(path)
    content = {} if path.resolve() == DEFAULT else _read_yaml(path)
    content = _read_keys(path, content)
    if folder:
        content.pop("train.resume", None)  # as programs before this one left it
    record = read_record(folder) if folder else {}
    run, words = _run_and_settings(overrides)
    defaults = default_settings()
    content = _checked([(str(path), content)], defaults)
    origin = Origin(record.get("stated", content), _checked(words, defaults), run, folder)
    name = record.get("name") or (folder.resolve().parent.name if folder else path.stem)

    systems = [
        settings.get("model.name", defaults["model.name"]) for settings in (content, {**content, **origin.words})
    ]
    if systems[0] != systems[1]:
        name = f"{name}_{systems[1]}"
    unread = unread_settings(systems[1])
    for source, settings in [*([] if folder else [(str(path), content)]), *words]:
        for key in sorted(unread.intersection(settings)):
            raise UserError(f"{source}: {key} is not read by {systems[1]}, but by {', '.join(_readers(key))}")
    layout = {**defaults, **content, **origin.words}["data.layout"]
    return resolve({**base_settings(systems[1], layout), **content, **origin.words}, name, str(path), origin)


def base_settings(system: str, layout: str) -> dict[str, Any]:
    """What holds where neither file nor word says anything, flat: the defaults, the system's, those for the layout."""
    defaults, content = default_settings(), _read_yaml(SYSTEMS / f"{system}.yml")
    below = base_settings(content["like"], layout) if "like" in content else defaults
    layouts = {name: flatten(content.pop(name)) for name in CHOICES["data.layout"] if name in content}
    own = flatten({key: value for key, value in content.items() if key not in ("like", "reads")})
    source = f"cfg/systems/{system}.yml"
    return {**below, **_checked([(source, own), (f"{source}: {layout}", layouts.get(layout, {}))], defaults)}


def unread_settings(system: str) -> set[str]:
    """The settings that belong to other systems, of those that the files of cfg/systems say they read."""
    return {key for key in default_settings() if (readers := _readers(key)) and system not in readers}


def _readers(key: str) -> list[str]:
    """The systems that say they read a setting, or the group that it is in; []: it is everybody's."""
    groups = {".".join(key.split(".")[:count]) for count in range(1, key.count(".") + 2)}
    return [system for system, reads in _reads(SYSTEMS).items() if groups & reads]


@functools.cache
def _reads(folder: Path) -> dict[str, set[str]]:
    """What each system says it reads."""
    return {file.stem: set(_read_yaml(file).get("reads", ())) for file in sorted(folder.glob("*.yml"))}


def resolve(settings: dict[str, Any], name: str, file: str, origin: Origin) -> EasyDict:
    """Flat settings as nested attributes, with what else a configuration carries.

    Args:
        settings: paths as in a file or as `settings_of` gives them: relative ones from the repository.
    """
    return EasyDict({"name": name, "file": file, "origin": origin, **unflatten(_placed(settings, file))})


def settings_of(config: EasyDict) -> dict[str, Any]:
    """Every setting of a resolved configuration, flat; paths as a run keeps them, so that they mean the same from any
    folder: from the repository where they lie in it, else in full."""
    settings = flatten({key: value for key, value in config.items() if key not in NO_SETTINGS})
    return {key: _change_path(key, value, Path.cwd(), paths.portable) for key, value in settings.items()}


def kept_settings(config: EasyDict) -> dict[str, Any]:
    """Those that a run goes on with, flat: that its system reads, and without what held for one start only."""
    origin, settings = config.get("origin"), settings_of(config)
    for key in OF_A_START:
        settings[key] = (origin.stated if origin else {}).get(key, default_settings()[key])
    for key in ("train.resume", *unread_settings(config.model.name)):
        del settings[key]
    return settings


def run_folder(path: str | Path) -> Path | None:
    """The folder of the run that is meant by its path, or by that of its own config.yml; None of any other file."""
    path = Path(path)
    folder = path.parent if path.name == OWN else path
    if not (folder / OWN).is_file():
        return None
    return folder if path.is_dir() or (folder / RECORD).is_file() or any(folder.glob("state_epoch_*.pth")) else None


def read_record(folder: Path) -> dict[str, Any]:
    """What a run's folder says of whose it is (`ratlip.runs`); {}: nothing, as with runs of earlier programs."""
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def split_words(
    words: Sequence[str], options: Iterable[str], other: str, is_other: Callable[[str], bool] = lambda word: False
) -> tuple[list[str], list[str]]:
    """The key=value words of a command line, which `load` takes, and its other words.

    A setting is what begins with a key and "=", or with words joined by dots and "=": `load` says what is wrong with
    those. Anything else with "=" that has no space in it may be meant as one, so that it is an error.

    Args:
        options: the command's own, to tell `n=4` from a setting. other: what else a word is, such as "caption".
        is_other: what says so of a word that looks like a setting, such as a file's name.

    Raises:
        UserError: an option without its dashes, or what may be meant as a setting.
    """
    known, settings, others = {**default_settings(), "run": None}, [], []
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in known or not is_other(word) and equals and re.fullmatch(r"\w+(\.\w+)+", key):
            settings.append(word)
        elif equals and key.lower() in options:
            raise UserError(f"{word!r}: did you mean the option --{key.lower()} {value}?")
        elif equals and re.fullmatch(r"\w+", key) and not re.search(r"\s", word) and not is_other(word):
            raise UserError(f"{word!r}: unknown key {key!r}{_nearest(key, known)} (if it is a {other}: after --)")
        else:
            others.append(word)
    return settings, others


def default_settings() -> dict[str, Any]:
    """Every key of cfg/default.yml, flat, with its default."""
    return flatten(_read_yaml(DEFAULT))


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{"train": {"seed": 1}} -> {"train.seed": 1}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: dict[str, Any]) -> dict:
    """{"train.seed": 1} -> {"train": {"seed": 1}}."""
    tree: dict = {}
    for key, value in flat.items():
        *groups, leaf = key.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return tree


def _placed(settings: dict[str, Any], source: str) -> dict[str, Any]:
    """Flat settings whose paths are written as in a file, from the repository, as they are used from here.

    Args:
        source: the file, for messages.
    """

    def place(key: str, value: Any) -> Any:
        where = f"{source}: {key}"
        return _change_path(key, value, ROOT, lambda text: paths.usable(paths.expand(text, where), ROOT))

    return {key: place(key, value) for key, value in settings.items()}


def from_kept(settings: dict[str, Any]) -> dict[str, Any]:
    """What `settings_of` gave, flat, with defaults of settings that came later; paths as they are used from here."""
    settings = {**default_settings(), **settings}
    return {key: _change_path(key, value, ROOT, paths.usable) for key, value in settings.items()}


def dump(config: EasyDict) -> str:
    """The configuration as YAML that `load` reads back, but for what held for one start only."""
    return yaml.safe_dump(unflatten(kept_settings(config)), sort_keys=False, default_flow_style=None)


def _find(path: str | Path) -> tuple[Path, Path | None]:
    """The configuration file, the caller's, else the repository's; and the run's folder where it is a run's own."""
    own = paths.typed(str(path))
    for place in (own, ROOT / own):
        folder = run_folder(place)
        if folder or place.is_file():
            found = folder / OWN if folder else place
            return Path(paths.usable(found, Path.cwd())), Path(paths.usable(folder, Path.cwd())) if folder else None
    known = ", ".join(sorted(p.name for p in DEFAULT.parent.glob("*.yml") if p != DEFAULT))
    places = " or ".join(dict.fromkeys(str(paths.full(place)) for place in (own, ROOT / own)))
    run = "" if own.suffix else " and no run's folder"
    raise UserError(f"no configuration file{run} {places}; cfg/ has {known}")


def _change_path(key: str, value: Any, base: Path, change: Callable[[str], str]) -> Any:
    """The value with `change` made to the path in it; what is no path stays as it is: a name, `auto`, an address."""
    if key not in PATHS or value is None or "://" in value or value.startswith("pipe:"):
        return value
    if key == "train.resume" and (value == "auto" or value.isdigit()):
        return value
    before = _before_clip_file(value, base) if key in ("clip.weights", "eval.clip_weights") else ""
    return value if before is None else before + change(value.removeprefix(before))


def _before_clip_file(value: str, base: Path) -> str | None:
    """What stands before the file in the name of a CLIP: "", or open_clip's "architecture:"; None for no file."""

    def is_file(text: str) -> bool:
        return text.startswith(("~", "$", "/", "./", "../")) or text != "" and (base / text).exists()

    architecture, colon, file = ("", "", value) if is_file(value) else value.rpartition(":")
    return architecture + colon if is_file(file) or Path(file).suffix in CLIP_FILES else None


def _read_yaml(path: Path) -> dict:
    try:
        content = yaml.safe_load(decode_text(path.read_bytes()))
    except yaml.YAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        raise UserError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', error)})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content or {}, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; expected keys and values as in cfg/default.yml")
    return content or {}


def _read_keys(path: Path, content: dict) -> dict[str, Any]:
    """What a file says, flat; of a published program's, which it tells in one line, in this program's keys."""
    found = published.translate(content, ROOT)
    if found is None:
        return flatten(content)
    dropped = ", ".join(found.dropped) or "no key"
    print(f"{path}: read as a released {published.TITLES[found.system]} configuration; no longer of meaning: {dropped}")
    return found.settings


def _run_and_settings(words: Sequence[str]) -> tuple[str | None, list[tuple[str, dict]]]:
    """The run that is named, if one is, and of each other word itself, and its key and value."""
    run, settings = None, []
    for word in words:
        key, equals, value = (part.strip() for part in word.partition("="))
        if not equals or not key:
            raise UserError(f"{word!r}: expected key=value, for example train.batch_size=8")
        if key == "run":
            if not value:
                raise UserError(f"{word!r}: expected the name of a run, or the path of its folder")
            run = value
            continue
        settings.append((repr(word), {key: _read_value(word, key, value)}))
    return run, settings


def _read_value(word: str, key: str, text: str) -> Any:
    """The value of a word; a path as it would stand in a file, from the repository or in full."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if key in PATHS and not isinstance(value, str) and text not in ("", "null"):
        value = text  # folders named ~, 007 or 2024-05-01
    if isinstance(value, str):
        value = _change_path(key, value, Path.cwd(), lambda text: paths.portable(paths.expand(text, repr(word))))
    return value


def _checked(sources: Sequence[tuple[str, dict]], defaults: dict[str, Any]) -> dict[str, Any]:
    """What each source says, later ones over earlier, each value in its default's type; UserError names the source."""
    settings = {}
    for source, values in sources:
        for key, value in values.items():
            if key not in defaults:
                raise UserError(f"{source}: unknown key {key!r}{_nearest(key, defaults)}")
            settings[key] = _check(source, key, value, defaults[key])
    return settings


def _nearest(key: str, known: dict) -> str:
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    near = same_leaf or difflib.get_close_matches(key, known, 1, 0.5)
    near = near or [k for k in known if difflib.get_close_matches(leaf, [k.rsplit(".", 1)[-1]], 1, 0.6)]
    return f"; did you mean {near[0]!r}?" if near else "; cfg/default.yml lists all keys"


def _check(source: str, key: str, value: Any, default: Any) -> Any:
    """The value in the default's type, or a UserError."""
    expected = OPTIONAL.get(key, type(default))
    if value is None and key in OPTIONAL:
        return None
    if expected is float and not isinstance(value, bool):
        with suppress(TypeError, ValueError):
            value = float(value)  # YAML 1.1 reads 1e-4 as text
    if expected is str and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # a name that happens to be a number
    if isinstance(value, bool) and expected is not bool or not isinstance(value, expected):
        raise UserError(f"{source}: {key} must be of type {expected.__name__}, not {value!r}")
    choices = [file.stem for file in sorted(SYSTEMS.glob("*.yml"))] if key == "model.name" else CHOICES.get(key)
    if choices and value not in choices:
        raise UserError(f"{source}: {key} must be one of {', '.join(map(str, choices))}, not {value!r}")
    if key in AT_LEAST and not AT_LEAST[key] <= value < float("inf"):
        raise UserError(f"{source}: {key} must be a number of at least {AT_LEAST[key]}, not {value}")
    if key in SHARES and not 0 <= value < 1:
        raise UserError(f"{source}: {key} must be at least 0 and below 1, not {value}")
    if key == "model.imsize" and value != 224 and (value < 8 or value & (value - 1)):
        raise UserError(f"{source}: {key} must be 4 * 2^k (8, 16, 32, 64, 128, 256, ...) or 224, not {value}")
    if key in MULTIPLE_OF and value % MULTIPLE_OF[key]:
        raise UserError(f"{source}: {key} must be a multiple of {MULTIPLE_OF[key]}, not {value}")
    return value
