"""Published GALIP and RATLIP checkpoints: their keys, and the settings their shapes give away."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ratlip.encoders.clip_towers import FrozenClip
from ratlip.errors import UserError
from ratlip.models.blocks import AFFINES_PER_BLOCK
from ratlip.models.clip_gan.discriminator import Discriminator
from ratlip.models.clip_gan.generator import MAPPER_BLOCKS, Generator
from ratlip.released.weights import fill, need, renamed, tensors

SYSTEMS = ("GALIP", "RATLIP")
IMAGE_SIZE = 224  # what their networks draw, whatever the config's imsize says
GENERATOR_BLOCKS = 6
# Stored but never used: the frozen CLIP that a netG carries along, and shortcuts of blocks that keep their width.
UNUSED = re.compile(r"mapping\.CLIP_ViT\.|DBlocks\.\d+\.conv_s\.")


def is_released(content: object) -> bool:
    """Whether a loaded file is laid out like a released GALIP or RATLIP checkpoint, as DF-GAN's are too."""
    return isinstance(content, Mapping) and isinstance(content.get("model"), Mapping)


def load_networks(checkpoint: Mapping, clip_model: nn.Module) -> tuple[Generator | None, Discriminator | None, dict]:
    """Build the networks of a released checkpoint, in eval mode on the CPU.

    Args:
        checkpoint: {"model": {"netG", "netD", "netC"}, "epoch"}.
        clip_model: the CLIP it was trained with, a `clip.model.CLIP` (then read with the released preprocessing)
            or a FrozenClip.

    Returns:
        generator: noise (B, Z), sentence (B, E) -> images (B, 3, 224, 224), not clamped. None without netG.
        discriminator: feature maps (B, N, W, g, g), sentence (B, E) -> (B, 1). None unless netD and netC are there.
        info: system (unless there is no netG), epoch (or None), imsize, nf, z_dim, cond_dim, d_channels, as far as the
            file tells.

    Raises:
        UserError: keys missing or unknown, or another CLIP; names the first thing wrong.
    """
    clip = clip_model if isinstance(clip_model, FrozenClip) else FrozenClip(clip_model, preprocess="released")
    networks = {name: tensors(name, weights) for name, weights in checkpoint["model"].items()}
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
        galip = info["system"] == "GALIP"
        fill(generator, net_g, lambda key: _generator_key(key, galip), "netG", UNUSED)
    if net_d and net_c:
        channels = need(net_d, "main.conv_s.weight", "netD", axes=4).shape[0]
        info["d_channels"] = channels
        discriminator = Discriminator(clip, channels)
        betas = [need(net_d, f"DBlocks.{i}.beta", "netD").flatten() for i in range(len(discriminator.betas))]
        head = {f"netC.{key}": value for key, value in net_c.items()}
        body = {key: value for key, value in net_d.items() if not re.fullmatch(r"DBlocks\.\d+\.beta", key)}
        weights = {**body, **head, "betas": torch.cat(betas)}
        fill(discriminator, weights, _discriminator_key, "netD and netC", UNUSED)
    if generator is None and discriminator is None:
        raise UserError(f"the checkpoint's 'model' holds {sorted(networks)}: neither netG nor netD with netC")
    return generator, discriminator, info


def describe(info: Mapping) -> str:
    """What `load_networks` read from a file, in words."""
    names = [f"{name} {info[name]}" for name in ("nf", "z_dim", "cond_dim", "imsize") if name in info]
    drawn = f" (draws {IMAGE_SIZE} pixels)" if names else ""
    return ", ".join([f"released {info.get('system', 'discriminator')}", f"epoch {info['epoch']}", *names]) + drawn


def settings(info: Mapping) -> dict:
    """The settings of ours that networks of `load_networks` have, flat."""
    found = {
        "model.name": info["system"].lower(),
        "model.imsize": IMAGE_SIZE,
        "model.nf": info["nf"],
        "model.z_dim": info["z_dim"],
        "clip.preprocess": "released",
    }
    if info["system"] == "RATLIP":
        found["model.rat.state"] = "independent"
    if "d_channels" in info:
        found["model.d_channels"] = info["d_channels"]
    return found


def read_settings(net_g: Mapping[str, Tensor]) -> dict:
    """System, imsize, nf, z_dim and cond_dim that the shapes of a released netG imply."""
    blocks = {key.split(".")[1] for key in net_g if key.startswith("GBlocks.")}
    if len(blocks) != GENERATOR_BLOCKS:
        raise UserError(f"netG has {len(blocks)} generator blocks; the released networks have {GENERATOR_BLOCKS}")
    z_dim = need(net_g, "fc_code.weight", "netG", axes=2).shape[1]
    return {
        "system": "RATLIP" if any(".rnn." in key for key in net_g) else "GALIP",
        "imsize": 4 * 2 ** len(blocks),
        "nf": need(net_g, "to_rgb.1.weight", "netG", axes=4).shape[1],
        "z_dim": z_dim,
        "cond_dim": need(net_g, "mapping.fc_prompt.weight", "netG", axes=2).shape[1] - z_dim,
    }


def _check_clip(info: dict, net_g: Mapping[str, Tensor], clip: FrozenClip) -> None:
    width = need(net_g, "mapping.conv_fuse.weight", "netG", axes=4).shape[0]
    if (info["cond_dim"], width) != (clip.embedding_dim, clip.width):
        raise UserError(
            f"the checkpoint was made with a CLIP of width {width} and embedding {info['cond_dim']}, "
            f"clip.weights has {clip.width} and {clip.embedding_dim}; published checkpoints use ViT-B/32"
        )


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
    key = renamed(
        key,
        (r"^mapper_blocks\.", "mapping.FBlocks."),
        (r"^blocks\.", "GBlocks."),
        (r"^(conv_fuse|conv|fc_prompt)\.", r"mapping.\1."),
        (r"^to_rgb\.", "to_rgb.1."),
        (r"^(GBlocks\.\d+)\.conv([12])\.", r"\1.c\2."),
        (r"\.shortcut\.", ".c_sc."),
        (r"\.attention\.norm_", ".se.gn."),
        (r"\.attention\.", ".se."),
    )
    return re.sub(r"\.(c1|c2|conv2)\.conv\.", r".\1.", key) if galip else key


def _affine_prefix(index: int) -> str:
    """Where the affine layer of that number, in network order, stands in a released netG."""
    block, layer = divmod(index, AFFINES_PER_BLOCK)
    inside = f"fuse{layer // 2 + 1}.affine{layer % 2}"
    if block < MAPPER_BLOCKS:
        return f"mapping.FBlocks.{block}.{inside}"
    return f"GBlocks.{block - MAPPER_BLOCKS}.{inside}"


def _discriminator_key(key: str) -> str:
    """The released name of one of Discriminator's keys; netC's carry the network's name, betas are stacked."""
    return renamed(
        key,
        (r"^blocks\.", "DBlocks."),
        (r"^judge\.", "netC.joint_conv."),
        (r"\.residual\.", ".conv_r."),
        (r"\.shortcut\.", ".conv_s."),
    )
