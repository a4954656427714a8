"""Import of the published GALIP and RATLIP checkpoints: their keys, and the settings their shapes give away."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ratlip import checkpoint as checkpoint_file
from ratlip.clip_towers import FrozenClip
from ratlip.errors import UserError
from ratlip.models.blocks import AFFINES_PER_BLOCK
from ratlip.models.discriminator import Discriminator
from ratlip.models.generator import MAPPER_BLOCKS, Generator

IMAGE_SIZE = 224  # what their networks draw, whatever the config's imsize says
GENERATOR_BLOCKS = 6
# Stored but never used: the frozen CLIP that a netG carries along, and shortcuts of blocks that keep their width.
UNUSED = re.compile(r"mapping\.CLIP_ViT\.|DBlocks\.\d+\.conv_s\.")


def is_released(content: object) -> bool:
    """Whether a loaded file is laid out like a released GALIP or RATLIP checkpoint."""
    return isinstance(content, Mapping) and isinstance(content.get("model"), Mapping)


def load_networks(
    checkpoint: str | Path | Mapping, clip_model: nn.Module, path: str | Path | None = None
) -> tuple[Generator | None, Discriminator | None, dict]:
    """Build the networks of a released checkpoint, in eval mode on the CPU.

    Args:
        checkpoint: a path, or what torch.load gives for one: {"model": {"netG", "netD", "netC"}, "epoch"}.
        clip_model: the CLIP it was trained with, a `clip.model.CLIP` (then read with the released preprocessing)
            or a FrozenClip.
        path: where the content came from, for messages.

    Returns:
        generator: noise (B, Z), sentence (B, E) -> images (B, 3, 224, 224), not clamped. None without netG.
        discriminator: feature maps (B, N, W, g, g), sentence (B, E) -> (B, 1). None unless netD and netC are there.
        info: system ("GALIP" or "RATLIP"), epoch (or None), imsize, nf, z_dim, cond_dim, d_channels, as far as the
            file tells.

    Raises:
        UserError: not such a file, keys missing or unknown, or another CLIP; names the first thing wrong.
    """
    if isinstance(checkpoint, str | Path):
        path, checkpoint = checkpoint, checkpoint_file.read(checkpoint)
    try:
        return _networks(checkpoint, clip_model)
    except UserError as error:
        raise UserError(f"{path}: {error}" if path else str(error)) from None


def describe(info: Mapping) -> str:
    """What `load_networks` read from a file, in words."""
    names = [f"{name} {info[name]}" for name in ("nf", "z_dim", "cond_dim", "imsize") if name in info]
    drawn = f" (draws {IMAGE_SIZE} pixels)" if names else ""
    return ", ".join([f"released {info.get('system', 'discriminator')}", f"epoch {info['epoch']}", *names]) + drawn


def _networks(checkpoint: Mapping, clip_model: nn.Module) -> tuple[Generator | None, Discriminator | None, dict]:
    if not is_released(checkpoint):
        raise UserError("not a released GALIP or RATLIP checkpoint: it has no 'model' with netG, netD, netC")
    clip = clip_model if isinstance(clip_model, FrozenClip) else FrozenClip(clip_model, preprocess="released")
    networks = {name: _tensors(name, weights) for name, weights in checkpoint["model"].items()}
    net_g, net_d, net_c = (networks.get(name) for name in ("netG", "netD", "netC"))
    info: dict = {"epoch": checkpoint.get("epoch")}

    generator = discriminator = None
    if net_g:
        info.update(read_settings(net_g))
        _check_clip(info, net_g, clip)
        generator = Generator(
            clip,
            IMAGE_SIZE,
            info["nf"],
            info["z_dim"],
            info["system"].lower(),
            rat_state="independent",
            rat_scope="mapper",
            shuffle_attention=True,
        )
        _load(generator, net_g, _generator_key, "netG")
    if net_d and net_c:
        channels = _need(net_d, "main.conv_s.weight", "netD", axes=4).shape[0]
        info["d_channels"] = channels
        discriminator = Discriminator(clip, channels)
        betas = [_need(net_d, f"DBlocks.{i}.beta", "netD").flatten() for i in range(len(discriminator.betas))]
        head = {f"netC.{key}": value for key, value in net_c.items()}
        body = {key: value for key, value in net_d.items() if not re.fullmatch(r"DBlocks\.\d+\.beta", key)}
        _load(discriminator, {**body, **head, "betas": torch.cat(betas)}, _discriminator_key, "netD and netC")
    if generator is None and discriminator is None:
        raise UserError(f"the checkpoint's 'model' holds {sorted(networks)}: neither netG nor netD with netC")
    return generator, discriminator, info


def read_settings(net_g: Mapping[str, Tensor]) -> dict:
    """System, imsize, nf, z_dim and cond_dim that the shapes of a released netG imply."""
    blocks = {key.split(".")[1] for key in net_g if key.startswith("GBlocks.")}
    if len(blocks) != GENERATOR_BLOCKS:
        raise UserError(f"netG has {len(blocks)} generator blocks; the released networks have {GENERATOR_BLOCKS}")
    z_dim = _need(net_g, "fc_code.weight", "netG", axes=2).shape[1]
    return {
        "system": "RATLIP" if any(".rnn." in key for key in net_g) else "GALIP",
        "imsize": 4 * 2 ** len(blocks),
        "nf": _need(net_g, "to_rgb.1.weight", "netG", axes=4).shape[1],
        "z_dim": z_dim,
        "cond_dim": _need(net_g, "mapping.fc_prompt.weight", "netG", axes=2).shape[1] - z_dim,
    }


def _check_clip(info: dict, net_g: Mapping[str, Tensor], clip: FrozenClip) -> None:
    width = _need(net_g, "mapping.conv_fuse.weight", "netG", axes=4).shape[0]
    if (info["cond_dim"], width) != (clip.embedding_dim, clip.width):
        raise UserError(
            f"the checkpoint was made with a CLIP of width {width} and embedding {info['cond_dim']}, "
            f"clip.weights has {clip.width} and {clip.embedding_dim}; published checkpoints use ViT-B/32"
        )


def _tensors(network: str, weights: object) -> dict[str, Tensor]:
    if not isinstance(weights, Mapping):
        raise UserError(f"{network} is a {type(weights).__name__}; expected tensors by name")
    for key, value in weights.items():
        if not isinstance(value, Tensor | np.ndarray):
            raise UserError(f"{network}: {key} is a {type(value).__name__}; expected a tensor")
    return {str(key).removeprefix("module."): torch.as_tensor(value) for key, value in weights.items()}


def _need(weights: Mapping[str, Tensor], key: str, network: str, axes: int | None = None) -> Tensor:
    if key not in weights:
        raise UserError(f"{network} has no {key}: not a released GALIP or RATLIP network, or an incomplete one")
    if axes not in (None, weights[key].ndim):
        raise UserError(f"{network}: {key} is {tuple(weights[key].shape)}; {axes} axes were expected")
    return weights[key]


def _load(module: nn.Module, weights: Mapping[str, Tensor], released_key, network: str) -> None:
    """Fill `module` from `weights`, each of its keys looked up under its released name."""
    left, own = set(weights), {}
    galip = not any(".rnn." in key for key in weights)
    for key, value in module.state_dict().items():
        theirs = released_key(key, galip)
        found = _need(weights, theirs, network)
        if found.numel() != value.numel():  # some are stored with axes of length one around them
            raise UserError(f"{network}: {theirs} is {tuple(found.shape)}, {tuple(value.shape)} was expected")
        own[key] = found.reshape(value.shape)
        left.discard(theirs)
    unknown = sorted(key for key in left if not UNUSED.match(key))
    if unknown:
        raise UserError(f"{network} has a key that no released network has: {unknown[0]} ({len(unknown)} in all)")
    module.load_state_dict(own)
    module.eval()


def _generator_key(key: str, galip: bool) -> str:
    """The released netG name of one of Generator's keys."""
    if affine := re.fullmatch(r"conditioner\.affines\.(\d+)\.(gamma|beta)\.(\d)\.(\w+)", key):
        index, kind, layer, leaf = int(affine[1]), affine[2], affine[3], affine[4]
        block = _affine_prefix(index)
        named = {"0": "linear1", "2": "linear2"}
        recurrent = not galip and block.startswith("mapping.")
        return f"{block}.fc_{kind}.{layer if recurrent else named[layer]}.{leaf}"
    if lstm := re.fullmatch(r"conditioner\.lstms\.(\d+)\.(\w+)", key):
        return f"{_affine_prefix(int(lstm[1]))}.rnn.{lstm[2]}_l0"
    for pattern, theirs in (
        (r"^mapper_blocks\.", "mapping.FBlocks."),
        (r"^blocks\.", "GBlocks."),
        (r"^(conv_fuse|conv|fc_prompt)\.", r"mapping.\1."),
        (r"^to_rgb\.", "to_rgb.1."),
        (r"^(GBlocks\.\d+)\.conv([12])\.", r"\1.c\2."),
        (r"\.shortcut\.", ".c_sc."),
        (r"\.attention\.norm_", ".se.gn."),
        (r"\.attention\.", ".se."),
    ):
        key = re.sub(pattern, theirs, key)
    return re.sub(r"\.(c1|c2|conv2)\.conv\.", r".\1.", key) if galip else key


def _affine_prefix(index: int) -> str:
    """Where the affine layer of that number, in network order, stands in a released netG."""
    block, layer = divmod(index, AFFINES_PER_BLOCK)
    inside = f"fuse{layer // 2 + 1}.affine{layer % 2}"
    if block < MAPPER_BLOCKS:
        return f"mapping.FBlocks.{block}.{inside}"
    return f"GBlocks.{block - MAPPER_BLOCKS}.{inside}"


def _discriminator_key(key: str, galip: bool) -> str:
    """The released name of one of Discriminator's keys; netC's carry the network's name, betas are stacked."""
    for pattern, theirs in (
        (r"^blocks\.", "DBlocks."),
        (r"^judge\.", "netC.joint_conv."),
        (r"\.residual\.", ".conv_r."),
        (r"\.shortcut\.", ".conv_s."),
    ):
        key = re.sub(pattern, theirs, key)
    return key
