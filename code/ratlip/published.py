"""Configuration files of the published programs, in this program's keys."""

import os
from pathlib import Path
from typing import Any, NamedTuple

TITLES = {"ratlip": "RATLIP", "galip": "GALIP", "dfgan": "DF-GAN", "ratgan": "RAT-GAN"}
GROUPS = ("text", "train", "tree")  # of DF-GAN and RAT-GAN; their keys come after the group's name and a dot
# Where published keys, in lower case, stand here; all others no longer mean anything.
SHARED = {
    "dataset_name": "data.layout",
    "data_dir": "data.dir",
    "imsize": "model.imsize",
    "z_dim": "model.z_dim",
    "nf": "model.nf",
    "manual_seed": "train.seed",
    "cuda": "train.device",
    "max_epoch": "train.max_epoch",
    "batch_size": "train.batch_size",
    "lr_g": "train.lr_g",
    "lr_d": "train.lr_d",
    "gen_interval": "log.gen_interval",
    "test_interval": "log.test_interval",
    "save_interval": "log.save_interval",
    "sample_times": "eval.sample_times",
    "npz_path": "eval.released_npz",
}
SEES_CLIP = {"clip4trn": "clip.weights", "sim_w": "train.sim_w"}
READS_DAMSM = {"text.damsm_name": "text.weights", "text.words_num": "text.words"}
KEYS = {
    "ratlip": {**SHARED, **SEES_CLIP},
    "galip": {**SHARED, **SEES_CLIP},
    "dfgan": {**SHARED, **READS_DAMSM, "trunc_rate": "model.noise_scale", "checkpoint": "model.shipped"},
    "ratgan": {
        **SHARED,
        **READS_DAMSM,
        "train.nf": "model.nf",
        "train.batch_size": "train.batch_size",
        "train.max_epoch": "train.max_epoch",
        "tree.base_size": "model.imsize",
    },
}
PATHS = ("data.dir", "eval.released_npz", "text.weights", "model.shipped")
LAYOUTS = {"birds": "bird", "cub": "bird", "flowers": "flower", "faces": "face", "celeba": "face"}


class Translated(NamedTuple):
    """What a published configuration says."""

    system: str  # as `model.name` has it
    settings: dict[str, Any]  # flat
    dropped: list[str]  # keys that no longer mean anything


def translate(content: dict, root: Path) -> Translated | None:
    """A published configuration in this program's keys; None: it is none.

    GALIP's and RATLIP's are flat, DF-GAN's is flat with a group TEXT, RAT-GAN's consists of groups.

    Args:
        root: of the repository; the published programs ran in their code/ folder.
    """
    said = {}  # by key in lower case: the key as it is written, and its value
    for key, value in content.items():
        if str(key).lower() in GROUPS and isinstance(value, dict):
            said.update({f"{key}.{inner}".lower(): (f"{key}.{inner}", own) for inner, own in value.items()})
        else:
            said[str(key).lower()] = (str(key), value)
    name = str(said.get("config_name", ("", ""))[1]).lower()
    system = _system(said, name)
    if system is None:
        return None
    keys = KEYS[system]
    settings = {keys[key]: _value(keys[key], value, root) for key, (_, value) in said.items() if key in keys}
    used = {"config_name", *keys}
    settings["model.name"] = system
    if settings.get("text.weights"):
        settings["text.encoder"] = "damsm"
    if system == "dfgan":
        used.add("truncation")
        if not said.get("truncation", ("", True))[1]:
            settings["model.noise_scale"] = 0.0
        if isinstance(settings.get("train.max_epoch"), int):
            settings["train.max_epoch"] -= 1  # there the first epoch that is not trained
        if "celeba" in name:
            settings["data.enlarge"] = 1.0
    return Translated(system, settings, [written for key, (written, _) in said.items() if key not in used])


def _system(said: dict, name: str) -> str | None:
    """The system that a configuration of these keys is of."""
    if "train.nf" in said and "tree.base_size" in said:
        return "ratgan"
    if "dataset_name" not in said:
        return None
    if any(key.startswith("text.") for key in said) and not any(key.startswith("clip4") for key in said):
        return "dfgan"
    return "galip" if "galip" in name else "ratlip"


def _value(key: str, value: Any, root: Path) -> Any:
    """A published value of what is `key` here."""
    if key in PATHS and value:
        # What is there only when seen from the code/ folder is meant from there.
        from_code = Path(os.path.normpath(root / "code" / str(value)))
        return str(from_code) if from_code.exists() and not (root / str(value)).exists() else value
    if key == "data.layout":
        return LAYOUTS.get(str(value).lower(), str(value).lower())
    if key == "train.device":
        return "auto" if value else "cpu"
    if key == "clip.weights" and isinstance(value, dict):
        return value.get("type")
    return value
