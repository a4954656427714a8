"""Published LAFITE checkpoints, pickles with program text in them: read inertly, and the networks they hold."""

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ratlip import inert
from ratlip.encoders.clip_towers import FrozenClip
from ratlip.errors import UserError
from ratlip.models.lafite.discriminator import Discriminator
from ratlip.models.lafite.generator import Generator
from ratlip.models.lafite.layers import sides_to
from ratlip.paths import full
from ratlip.released.weights import fill, need

UNUSED = re.compile(r".*resample_filter$")  # the same filter in every layer
AVERAGED, TRAINED, CRITIC = "G_ema", "G", "D"


class Module(NamedTuple):
    """A pickled module: the name of its class, and its attributes."""

    kind: str
    state: dict[str, Any]


class Plain(dict):
    """In place of the dict with attributes that settings are kept in."""

    def __setstate__(self, _: Any) -> None:
        pass


def _module(meta: dict) -> Module:
    if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("state"), dict):
        raise UserError("refused: an object of its training program that is no module")
    return Module(str(meta.get("class_name")), meta["state"])  # not the program text beside them


def is_pickle(path: str | Path) -> bool:
    """Whether a file begins as published LAFITE checkpoints do: as a plain pickle, of protocol 3 or 4."""
    try:
        with open(path, "rb") as file:
            return file.read(2) in (b"\x80\x03", b"\x80\x04")
    except OSError:
        return False


def read(path: str | Path) -> dict:
    """The content of a published checkpoint, its modules as `Module`; nothing in it is imported or run.

    Raises:
        UserError: no such file, or one that holds anything else than such files do.
    """
    stand_ins: dict[str, Callable] = {
        **inert.calls_for_tensors(),
        "torch_utils.persistence._reconstruct_persistent_obj": _module,
        "dnnlib.util.EasyDict": Plain,
        "collections.OrderedDict": OrderedDict,
        "builtins.set": set,
        **{f"numpy.{core}.multiarray.scalar": inert.Nothing for core in ("core", "_core")},
        "numpy.dtype": inert.Nothing,
    }
    try:
        with open(path, "rb") as file:
            content = inert.load(file, stand_ins)
    except OSError as error:
        raise UserError(f"no checkpoint {full(Path(path))} ({error.strerror})") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not is_released(content):
        raise UserError(f"{path}: not a released LAFITE checkpoint: it has no G_ema")
    return content


def is_released(content: object) -> bool:
    """Whether what `read` gave is laid out like a released LAFITE checkpoint."""
    return isinstance(content, Mapping) and isinstance(content.get(AVERAGED), Module)


def tensors_of(module: Module, network: str) -> dict[str, Tensor]:
    """The parameters and buffers of a pickled module and those within it, by their names joined with dots."""
    found = {}
    for kind in ("_parameters", "_buffers"):
        for name, value in module.state.get(kind, {}).items():
            if isinstance(value, Tensor):
                found[name] = value
            elif value is not None:
                raise UserError(f"{network}: {name} is a {type(value).__name__}; expected a tensor")
    for name, inner in module.state.get("_modules", {}).items():
        if isinstance(inner, Module):
            found.update({f"{name}.{key}": value for key, value in tensors_of(inner, network).items()})
    return found


def load_networks(
    checkpoint: str | Path | Mapping, clip_model: nn.Module, path: str | Path | None = None, averaged: bool = True
) -> tuple[Generator | None, Discriminator | None, dict]:
    """Build the networks of a released checkpoint, in eval mode on the CPU.

    Args:
        checkpoint: a path, or what `read` gives for one.
        clip_model: the CLIP it was trained with, a `clip.model.CLIP` or a FrozenClip. ViT-B/32 and ViT-B/16 look alike
            in such a file: which of them it was must be known.
        path: where the content came from, for messages.
        averaged: the generator with averaged weights, to sample with, else the one that was being trained.

    Returns:
        generator: noise (B, 512), CLIP feature (B, E) -> pictures (B, 3, S, S), not clamped.
        discriminator: pictures, condition (B, E) -> logits (B, 1), features (B, E). None without D.
        info: system ("LAFITE"), imsize, z_dim, cond_dim, base, most, depth, structure, change, clamp, normalize.

    Raises:
        UserError: not such a file, keys missing or unknown, or another CLIP; names the first thing wrong.
    """
    if isinstance(checkpoint, str | Path):
        path, checkpoint = checkpoint, read(checkpoint)
    try:
        return _networks(checkpoint, clip_model, AVERAGED if averaged else TRAINED)
    except UserError as error:
        raise UserError(f"{path}: {error}" if path else str(error)) from None


def describe(info: Mapping) -> str:
    """What `load_networks` read from a file, in words."""
    names = ", ".join(f"{name} {info[name]}" for name in ("imsize", "z_dim", "cond_dim", "base", "most", "structure"))
    return f"released {info['system']}, {names}"


def _networks(checkpoint: Mapping, clip_model: nn.Module, which: str) -> tuple[Generator, Discriminator | None, dict]:
    if not is_released(checkpoint):
        raise UserError("not a released LAFITE checkpoint: it has no G_ema")
    clip = clip_model if isinstance(clip_model, FrozenClip) else FrozenClip(clip_model)
    module = checkpoint.get(which)
    if not isinstance(module, Module):
        raise UserError(f"the checkpoint has no {which}")
    weights = tensors_of(module, which)
    settings = read_settings(weights, which)
    settings.setdefault("cond_dim", clip.embedding_dim)
    settings["clamp"] = _attribute(module, "conv_clamp")
    if settings["cond_dim"] != clip.embedding_dim:
        raise UserError(
            f"the checkpoint was made with a CLIP of embedding {settings['cond_dim']}, clip.weights has "
            f"{clip.embedding_dim}; published checkpoints use ViT-B/32 or ViT-B/16"
        )
    shape = [settings[key] for key in ("cond_dim", "imsize")]
    width = {key: settings[key] for key in ("base", "most", "clamp")}
    own = {key: settings[key] for key in ("depth", "structure", "change")}
    generator = Generator(*shape, settings["z_dim"], **width, **own)
    fill(generator, weights, _generator_key, which, UNUSED)

    discriminator = None
    if isinstance(checkpoint.get(CRITIC), Module):
        settings["normalize"] = bool(_attribute(checkpoint[CRITIC], "d_use_norm"))
        discriminator = Discriminator(*shape, **width, normalize=settings["normalize"])
        names = {side: f"b{side}" for side in generator.sizes}
        released = [names[side] for side in reversed(generator.sizes)]
        weights = tensors_of(checkpoint[CRITIC], CRITIC)
        fill(discriminator, weights, lambda key: _discriminator_key(key, released), CRITIC, UNUSED)
    return generator, discriminator, {"system": "LAFITE", **settings}


def read_settings(weights: Mapping[str, Tensor], network: str = AVERAGED) -> dict:
    """The settings that the names and shapes of a released generator imply: imsize, z_dim, depth, base, most,
    structure, change, and cond_dim where a style reads the condition."""
    sides = [int(found[1]) for key in weights if (found := re.fullmatch(r"synthesis\.b(\d+)\.torgb\.bias", key))]
    imsize = max(sides, default=0)
    if sorted(sides) != (sides_to(imsize) if imsize >= 8 else []):
        raise UserError(f"{network} draws at sides {sorted(sides)}; 4, 8, 16, ... were expected")
    channels = {side: len(need(weights, f"synthesis.b{side}.conv1.bias", network, axes=1)) for side in sides}
    most, base = channels[4], channels[imsize] * imsize
    if any(channels[side] != min(base // side, most) for side in sides):
        raise UserError(f"{network} has channels {channels}, by no rule of a released network")
    depth = sum(re.fullmatch(r"mapping\.fc\d+\.weight", key) is not None for key in weights)
    structures = {side: _structure(weights, f"synthesis.b{side}.conv1") for side in sorted(sides)}
    change = max((side for side in sides if structures[side] != 1), default=0)
    below = {structures[side] for side in sides if side <= change}
    if len(below) > 1:
        raise UserError(f"{network} has styles of structures {structures}, as no released network")
    settings = {
        "imsize": imsize,
        "z_dim": need(weights, "mapping.fc0.weight", network, axes=2).shape[1],
        "depth": depth,
        "base": base,
        "most": most,
        "structure": below.pop() if below else 1,
        "change": change,
    }
    for name in ("pre_0", "scale_layer_0"):
        if (key := f"synthesis.b4.conv1.{name}.weight") in weights:
            settings["cond_dim"] = need(weights, key, network, axes=2).shape[1]
    return settings


def _structure(weights: Mapping[str, Tensor], layer: str) -> int:
    """The structure of a layer's style, by the names of its parts."""
    if f"{layer}.scale_layer_0.weight" in weights:
        return 1
    plain, joint = (f"{layer}.{name}.weight" in weights for name in ("affine", "affine_0"))
    return (0 if joint else 3) if plain else 2


def _attribute(module: Module, name: str) -> Any:
    """A setting of the first module that has it, this one or one within it, as attribute or as it was called with."""
    for kept in (module.state, module.state.get("_init_kwargs")):
        if isinstance(kept, Mapping) and name in kept and not isinstance(kept[name], inert.Nothing):
            return kept[name]
    inner = (_attribute(part, name) for part in module.state.get("_modules", {}).values() if isinstance(part, Module))
    return next((found for found in inner if found is not None), None)


def _generator_key(key: str) -> str:
    """The released name of one of Generator's keys."""
    for pattern, theirs in (
        (r"^mapping\.layers\.", "mapping.fc"),
        (r"^blocks\.(\d+)\.", lambda found: f"synthesis.b{4 * 2 ** int(found[1])}."),
        (r"\.style\.(pre|scale|shift)\.(\d)\.", r".\1_\2."),
        (r"\.scale_", ".scale_layer_"),
        (r"\.shift_", ".bias_layer_"),
        (r"\.style\.joint\.", ".affine_0."),
        (r"\.style\.affine\.", ".affine."),
    ):
        key = re.sub(pattern, theirs, key)
    return key


def _discriminator_key(key: str, sides: list[str]) -> str:
    """The released name of one of Discriminator's keys; `sides`: how the blocks are called, the largest first."""
    if found := re.fullmatch(r"blocks\.(\d+)\.(.*)", key):
        return f"{sides[int(found[1])]}.{found[2]}"
    if key.startswith("fromrgb."):
        return f"{sides[0]}.{key}"
    return f"b4.{key.replace('feature.', 'fts.')}"
