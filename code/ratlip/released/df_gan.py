"""Published DF-GAN and RAT-GAN checkpoints: their keys, and the settings their shapes give away."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ratlip.errors import UserError
from ratlip.models.df_gan.discriminator import Discriminator
from ratlip.models.df_gan.generator import HIDDEN_DIM, Generator
from ratlip.released.weights import fill, need, renamed, tensors

SYSTEMS = ("DF-GAN", "RAT-GAN")
# Numbers of a RAT-GAN block's affine layers, in the order in which they are run.
ORDERS = {4: (0, 1, 2, 3), 6: (0, 1, 4, 2, 3, 5)}
NOISE_SCALE = 0.88  # with which DF-GAN was sampled and evaluated
LINEARS = {"0": "linear1", "2": "linear2"}  # of an affine layer
# Stored but never used: RAT-GAN's LSTM again in each block, layers that its program no longer runs, the last block in
# place of which the attention critic has another; in both, shortcuts of blocks that keep their width.
UNUSED = r"(block\d+|DBlocks\.\d+)\.conv_s\.|block\d+\.(lstm|fea_l|fea_ll)\."


def is_released(content: object) -> bool:
    """Whether a loaded file is laid out like a DF-GAN checkpoint, or like a netG or netD of RAT-GAN."""
    if not isinstance(content, Mapping):
        return False
    model = content.get("model")
    if isinstance(model, Mapping):
        networks = [network for network in model.values() if isinstance(network, Mapping)]
        return any(_has(network, r"(fc|conv_img)\.") for network in networks)
    return _has(content, r"conv_img\.") and _has(content, r"block\d+\.")


def load_networks(
    checkpoint: Mapping, clip_model: nn.Module | None = None
) -> tuple[Generator | None, Discriminator | None, dict]:
    """Build the networks of a released checkpoint, in eval mode on the CPU.

    Args:
        checkpoint: DF-GAN's {"model": {"netG", "netD", "netC"}, "epoch"}; RAT-GAN's netG or netD, tensors by name.
        clip_model: not read; no CLIP belongs to these systems.

    Returns:
        generator: noise (B, Z), sentence (B, E) -> images (B, 3, S, S) in (-1, 1). None without netG.
        discriminator: images (B, 3, S, S), sentence (B, E) -> (B, 1). None without netD, or DF-GAN's netC.
        info: system, epoch (or None), imsize, nf, z_dim, cond_dim; of RAT-GAN also affines (4 or 6, a block) and
            attention (whether its netD has one), as far as the file tells.

    Raises:
        UserError: keys missing or unknown; names the first thing wrong.
    """
    if "model" in checkpoint:
        networks = {name: tensors(name, weights) for name, weights in checkpoint["model"].items()}
        net_g, net_d, net_c = (networks.get(name) for name in ("netG", "netD", "netC"))
        if not net_g and not (net_d and net_c):
            raise UserError(f"the checkpoint's 'model' holds {sorted(networks)}: neither netG nor netD with netC")
        generator, about_g = _dfgan_generator(net_g) if net_g else (None, {})
        discriminator, about_d = _dfgan_discriminator(net_d, net_c) if net_d and net_c else (None, {})
        for name in about_g.keys() & about_d.keys():
            if about_g[name] != about_d[name]:
                raise UserError(f"netG has {name} {about_g[name]}, netD and netC have {about_d[name]}")
        epoch = checkpoint.get("epoch")
        return generator, discriminator, {"system": "DF-GAN", "epoch": epoch, **about_d, **about_g}
    if _has(checkpoint, r"COND_DNET\.|conv_img\.weight"):
        discriminator, info = _ratgan_discriminator(tensors("netD", checkpoint))
        return None, discriminator, {"system": "RAT-GAN", "epoch": None, **info}
    generator, info = _ratgan_generator(tensors("netG", checkpoint))
    return generator, None, {"system": "RAT-GAN", "epoch": None, **info}


def describe(info: Mapping) -> str:
    """What `load_networks` read from a file, in words."""
    known = [f"{name} {info[name]}" for name in ("epoch", "nf", "z_dim", "cond_dim", "imsize") if info.get(name)]
    known += [f"{info['affines']} affine layers a block"] if "affines" in info else []
    known += ["discriminator with attention"] if info.get("attention") else []
    return ", ".join([f"released {info['system']}", *known])


def settings(info: Mapping) -> dict:
    """The settings of ours that networks of `load_networks` have, flat."""
    found = {f"model.{name}": info[name] for name in ("imsize", "nf", "z_dim")}
    found |= {"model.name": info["system"].lower().replace("-", ""), "text.encoder": "damsm"}
    return found | {f"ratgan.{name}": info[name] for name in ("affines", "attention") if name in info}


def _has(weights: Mapping, pattern: str) -> bool:
    """Whether the pattern matches a name from its beginning on, after `module.`."""
    return any(re.match(rf"(module\.)?(?:{pattern})", key) for key in weights if isinstance(key, str))


def _blocks(weights: Mapping[str, Tensor], network: str, name: str, fewest: int) -> int:
    """How many blocks of that name a network has; a UserError where one of them is missing."""
    numbers = {int(found[1]) for key in weights if (found := re.match(rf"{re.escape(name)}(\d+)\.", key))}
    for number in range(max(fewest, len(numbers))):
        if number not in numbers:
            raise UserError(f"{network} has no {name}{number}: not a network of this system, or an incomplete one")
    return len(numbers)


def _check(info: Mapping[str, int], network: str) -> None:
    """A UserError where shapes make no sense together."""
    for name, value in info.items():
        if value < 1:
            raise UserError(f"{network}: its shapes make {name} {value}; not a released network of this system")


def _dfgan_generator(weights: Mapping[str, Tensor]) -> tuple[Generator, dict]:
    z_dim = need(weights, "fc.weight", "netG", axes=2).shape[1]
    condition = need(weights, "GBlocks.0.fuse1.affine0.fc_gamma.linear1.weight", "netG", axes=2).shape[1]
    info = {
        "imsize": 4 * 2 ** _blocks(weights, "netG", "GBlocks.", fewest=3),
        "nf": need(weights, "to_rgb.1.weight", "netG", axes=4).shape[1],
        "z_dim": z_dim,
        "cond_dim": condition - z_dim,
    }
    _check(info, "netG")
    generator = Generator(info["imsize"], info["nf"], z_dim, info["cond_dim"], noise_scale=NOISE_SCALE)
    fill(generator, weights, lambda key: generator_key(key, None), "netG", re.compile(UNUSED))
    return generator, info


def _ratgan_generator(weights: dict[str, Tensor]) -> tuple[Generator, dict]:
    if not _has(weights, r"(block\d+\.)?lstm\."):
        raise UserError(
            "netG has no LSTM: a DF-GAN from before June 2022, whose networks differ from those published since; "
            "only the later ones, state_epoch_*.pth, are read"
        )
    info = {
        "imsize": 2 * 2 ** _blocks(weights, "netG", "block", fewest=4),
        "nf": need(weights, "conv_img.1.weight", "netG", axes=4).shape[1],
        "z_dim": need(weights, "fc.weight", "netG", axes=2).shape[1],
        "cond_dim": need(weights, "lstm.W", "netG", axes=2).shape[0],
        # Where a fifth layer is stored but never run, it never trained either.
        "affines": 6 if weights.get("block0.affine4.fc_gamma.linear2.weight", torch.zeros(1)).any() else 4,
    }
    if (hidden := need(weights, "lstm.U", "netG", axes=2).shape[0]) != HIDDEN_DIM:
        raise UserError(f"netG: its LSTM is {hidden} wide; the published one is {HIDDEN_DIM}")
    _check(info, "netG")
    weights = {**weights, "lstm.W": weights["lstm.W"].T, "lstm.U": weights["lstm.U"].T}
    for leaf, axes in (("weight", 2), ("bias", 1)):
        h, c = (need(weights, f"lstm.noise2{state}.{leaf}", "netG", axes) for state in "hc")
        if h.shape != c.shape:
            raise UserError(f"netG: lstm.noise2c.{leaf} is {tuple(c.shape)}, {tuple(h.shape)} was expected")
        weights[f"lstm.start.{leaf}"] = torch.cat([h, c])
    generator = Generator(info["imsize"], info["nf"], info["z_dim"], info["cond_dim"], "ratgan", info["affines"])
    unused = UNUSED + r"|lstm\.noise2[hc]\.(weight|bias)$" + r"|block\d+\.affine[45]\." * (info["affines"] == 4)
    fill(generator, weights, lambda key: generator_key(key, ORDERS[info["affines"]]), "netG", re.compile(unused))
    return generator, info


def _dfgan_discriminator(body: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> tuple[Discriminator, dict]:
    weights = {**body, **{f"netC.{key}": value for key, value in head.items()}}
    return _discriminator(weights, "netD and netC", "DBlocks.", "netC.", "dfgan")


def _ratgan_discriminator(weights: Mapping[str, Tensor]) -> tuple[Discriminator, dict]:
    attention = _has(weights, r"COND_DNET\.joint_conv_att\.")
    discriminator, info = _discriminator(weights, "netD", "block", "COND_DNET.", "ratgan", attention)
    return discriminator, {**info, "attention": attention}


def _discriminator(
    weights: Mapping[str, Tensor], network: str, block: str, head: str, name: str, attention: bool = False
) -> tuple[Discriminator, dict]:
    """The discriminator whose blocks are named `block` and a number there, and whose judging layers follow `head`."""
    blocks = _blocks(weights, network, block, fewest=3)
    last = need(weights, f"{block}{blocks - 1}.conv_r.2.weight", network, axes=4).shape[0]
    joint = need(weights, f"{head}joint_conv.0.weight", network, axes=4).shape[1]
    info = {
        "imsize": 4 * 2**blocks,
        "nf": need(weights, "conv_img.weight", network, axes=4).shape[0],
        "cond_dim": joint - last,
    }
    _check(info, network)
    discriminator = Discriminator(info["imsize"], info["nf"], info["cond_dim"], name, attention=attention)
    unused = UNUSED + (rf"|{block}{blocks - 1}\." * attention)
    fill(discriminator, weights, lambda key: discriminator_key(key, block, head), network, re.compile(unused))
    return discriminator, info


def generator_key(key: str, order: Sequence[int] | None) -> str:
    """The released netG name of one of Generator's keys.

    RAT-GAN's LSTM comes under lstm.W and lstm.U as stored there but transposed, and under lstm.start its noise2h and
    noise2c, one after the other.

    Args:
        order: of the affine layers of a RAT-GAN's block, one of ORDERS; None: DF-GAN.
    """
    if found := re.fullmatch(r"conditioner\.affines\.(\d+)\.(gamma|beta)\.(\d)\.(\w+)", key):
        block, layer = divmod(int(found[1]), len(order or ORDERS[4]))
        inside = f"affine{order[layer]}" if order else f"fuse{layer // 2 + 1}.affine{layer % 2}"
        return f"{'block' if order else 'GBlocks.'}{block}.{inside}.fc_{found[2]}.{LINEARS[found[3]]}.{found[4]}"
    return renamed(
        key,
        (r"^conditioner\.start\.", "lstm.start."),
        (r"^conditioner\.lstms\.0\.weight_ih$", "lstm.W"),
        (r"^conditioner\.lstms\.0\.weight_hh$", "lstm.U"),
        (r"^conditioner\.lstms\.0\.bias_ih$", "lstm.bias"),
        (r"^blocks\.(\d+)\.", r"block\1." if order else r"GBlocks.\1."),
        (r"^to_rgb\.", "conv_img.1." if order else "to_rgb.1."),
        (r"\.conv([12])\.conv\.", r".c\1."),
        (r"\.conv2\.gain$", ".gamma"),
        (r"\.shortcut\.", ".c_sc."),
    )


def discriminator_key(key: str, block: str, head: str) -> str:
    """The released name of one of Discriminator's keys; `block` and `head` as in `_discriminator`."""
    return renamed(
        key,
        (r"^blocks\.(\d+)\.", rf"{block}\1."),
        (r"^judge\.", f"{head}joint_conv."),
        (r"^attention\.", f"{head}joint_conv_att."),
        (r"^joint\.", f"{head}block."),
        (r"\.residual\.", ".conv_r."),
        (r"\.shortcut\.", ".conv_s."),
    )
