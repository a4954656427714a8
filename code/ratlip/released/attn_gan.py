"""Published AttnGAN checkpoints: their keys, the settings their shapes give away, and their configuration files."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ratlip import checkpoint as checkpoint_file
from ratlip.errors import UserError
from ratlip.models.attn_gan.discriminator import Discriminator
from ratlip.models.attn_gan.generator import Generator
from ratlip.released.weights import fill, need, renamed, tensors

SYSTEMS = ("AttnGAN",)
UNUSED = re.compile("(?!)")  # of what these files hold everything has a part in the results
ONE_STAGE = (
    "AttnDCGAN, a variant of AttnGAN with one picture size (birds' bird_AttnDCGAN2.pth), which is not built here; "
    "bird_AttnGAN2.pth and coco_AttnGAN2.pth are AttnGAN itself"
)
# Where the keys of a published configuration stand here: in all of them, in those of the GAN, in those of DAMSM.
NESTED = {
    "DATASET_NAME": "data.layout",
    "DATA_DIR": "data.dir",
    "WORKERS": "data.num_workers",
    "TEXT.WORDS_NUM": "text.words",
}
GAN = {
    "TREE.BRANCH_NUM": "attngan.stages",
    "TRAIN.NET_E": "text.weights",
    "TRAIN.BATCH_SIZE": "train.batch_size",
    "TRAIN.MAX_EPOCH": "train.max_epoch",
    "TRAIN.SNAPSHOT_INTERVAL": "log.save_interval",
    "TRAIN.GENERATOR_LR": "train.lr_g",
    "TRAIN.DISCRIMINATOR_LR": "train.lr_d",
    "TRAIN.SMOOTH.LAMBDA": "attngan.damsm",
    "GAN.GF_DIM": "model.nf",
    "GAN.DF_DIM": "model.d_channels",
    "GAN.Z_DIM": "model.z_dim",
    "GAN.CONDITION_DIM": "attngan.condition_dim",
    "GAN.R_NUM": "attngan.residuals",
}
DAMSM = {
    "TRAIN.BATCH_SIZE": "damsm.batch_size",
    "TRAIN.MAX_EPOCH": "damsm.max_epoch",
    "TRAIN.SNAPSHOT_INTERVAL": "log.save_interval",
    "TRAIN.ENCODER_LR": "damsm.lr",
    "TRAIN.RNN_GRAD_CLIP": "damsm.clip_grad",
}
LAYOUTS = {"birds": "bird"}
# What is the same in every published configuration, and is no setting here.
FIXED = {"TRAIN.SMOOTH.GAMMA1": 4.0, "TRAIN.SMOOTH.GAMMA2": 5.0, "TRAIN.SMOOTH.GAMMA3": 10.0, "TEXT.EMBEDDING_DIM": 256}


def is_released(content: object) -> bool:
    """Whether a loaded file is a netG or a netD of AttnGAN's: tensors by name, nothing around them."""
    if not isinstance(content, Mapping):
        return False
    keys = {str(key).removeprefix("module.") for key in content}
    return {"ca_net.fc.weight", "h_net1.fc.0.weight"} <= keys or "img_code_s16.0.weight" in keys


def load_networks(
    checkpoint: Mapping, clip_model: nn.Module | None = None
) -> tuple[Generator | None, list[Discriminator] | None, dict]:
    """Build the network of a published file, in eval mode on the CPU.

    Args:
        checkpoint: a netG or a netD, tensors by name.
        clip_model: not read; no CLIP belongs to this system.

    Returns:
        generator: None in a file of a netD.
        critics: the one in a file of a netD, else None; `critics_beside` finds those of a netG.
        info: system, epoch (None: the file's name may tell), imsize, stages, nf, residuals, z_dim, condition_dim,
            cond_dim, d_channels, as far as the file tells.

    Raises:
        UserError: keys missing or unknown; names the first thing wrong.
    """
    weights = tensors("the file", checkpoint)
    about = {"system": "AttnGAN", "name": "attngan", "epoch": None}
    if "ca_net.fc.weight" in weights:
        generator, info = _generator(weights)
        return generator, None, {**about, **info}
    critic, info = _critic(weights)
    return None, [critic], {**about, **info}


def critics_beside(path: Path, generator: Generator) -> list[Discriminator] | None:
    """The netD0.pth, netD1.pth and so on that training leaves beside its netG_epoch_<n>.pth; None where not all of them
    are there, or `path` is named otherwise.

    Raises:
        UserError: one that is none, or is of another size or condition than the generator's.
    """
    places = [path.with_name(f"netD{number}.pth") for number in range(len(generator.sizes))]
    if not re.fullmatch(r"netG_epoch_\d+\.pth", path.name) or not all(place.is_file() for place in places):
        return None
    critics = []
    for place, size in zip(places, generator.sizes, strict=True):
        content = checkpoint_file.read(place)
        try:
            critic, info = _critic(tensors("the file", content))
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        own, theirs = (size, generator.sentence_dim), (critic.side, info["cond_dim"])
        if own != theirs:
            raise UserError(f"{place}: of pictures and sentences of {theirs} pixels and numbers, not {own} as {path}")
        critics.append(critic)
    return critics


def describe(info: Mapping) -> str:
    """What `load_networks` read from a file, in words."""
    names = ("epoch", "stages", "nf", "residuals", "z_dim", "cond_dim", "d_channels", "imsize")
    return ", ".join([f"released {info['system']}", *(f"{name} {info[name]}" for name in names if info.get(name))])


def translate(content: Mapping) -> tuple[dict[str, Any], list[str]]:
    """A published nested configuration (cfg/bird_attn2.yml, cfg/DAMSM/bird.yml) in this program's keys, flat.

    Returns:
        settings, and the keys that have no meaning here.

    Raises:
        UserError: what is not built here.
    """
    flat = _flat(content)
    if flat.get("GAN.B_DCGAN"):
        raise UserError(f"GAN.B_DCGAN: a configuration of {ONE_STAGE}")
    for key, value in FIXED.items():
        if key in flat and flat[key] != value:
            raise UserError(f"{key}: {flat[key]}; it is {value} in every published configuration, and here")
    stages, pretraining = flat.get("TREE.BRANCH_NUM", 3), flat.get("TREE.BRANCH_NUM") == 1
    keys = {**NESTED, **(DAMSM if pretraining else GAN)}
    settings: dict[str, Any] = {ours: flat[key] for key, ours in keys.items() if flat.get(key) not in (None, "")}
    if not pretraining:
        settings |= {"model.name": "attngan", "model.imsize": flat.get("TREE.BASE_SIZE", 64) << (stages - 1)}
        settings["text.encoder"] = "damsm"
    if "data.layout" in settings:
        settings["data.layout"] = LAYOUTS.get(settings["data.layout"], settings["data.layout"])
    used = {*keys, *FIXED, "TREE.BRANCH_NUM", "TREE.BASE_SIZE", "GAN.B_DCGAN"}
    return settings, [key for key in flat if key not in used]


def _flat(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in tree.items():
        found.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return found


def _generator(weights: dict[str, Tensor]) -> tuple[Generator, dict]:
    info = read_settings(weights)
    sizes = [info["imsize"] >> later for later in range(info["stages"] - 1, -1, -1)]
    dims = [info[name] for name in ("nf", "cond_dim", "cond_dim", "z_dim", "condition_dim", "residuals")]
    generator = _built(lambda: Generator(sizes, *dims))
    fill(generator, _counted(weights), _generator_key, "netG", UNUSED)
    return generator, info


def read_settings(net_g: Mapping[str, Tensor]) -> dict:
    """The settings that the shapes of a published netG imply."""
    if any(key.startswith("img_net.") for key in net_g):
        raise UserError(f"a netG of {ONE_STAGE}")
    condition_dim = need(net_g, "ca_net.fc.weight", "netG", axes=2).shape[0] // 4
    stages = sum(bool(re.fullmatch(r"img_net\d+\.img\.0\.weight", key)) for key in net_g)
    doublings = sum(bool(re.fullmatch(r"h_net1\.upsample\d+\.1\.weight", key)) for key in net_g)
    return {
        "imsize": 4 * 2 ** (doublings + stages - 1),
        "stages": stages,
        "nf": need(net_g, "img_net1.img.0.weight", "netG", axes=4).shape[1],
        "residuals": sum(bool(re.fullmatch(r"h_net2\.residual\.\d+\.block\.0\.weight", key)) for key in net_g),
        "z_dim": need(net_g, "h_net1.fc.0.weight", "netG", axes=2).shape[1] - condition_dim,
        "condition_dim": condition_dim,
        "cond_dim": net_g["ca_net.fc.weight"].shape[1],
    }


def _critic(weights: dict[str, Tensor]) -> tuple[Discriminator, dict]:
    if "UNCOND_DNET.outlogits.0.weight" not in weights and "COND_DNET.outlogits.0.weight" in weights:
        raise UserError(f"a netD of {ONE_STAGE}")
    channels = need(weights, "img_code_s16.0.weight", "netD", axes=4).shape[0]
    halvings = sum(bool(re.fullmatch(r"img_code_s(16\.[0258]|\d\d+\.0)\.weight", key)) for key in weights)
    joint = need(weights, "COND_DNET.jointConv.0.weight", "netD", axes=4)
    cond_dim = joint.shape[1] - joint.shape[0]
    critic = _built(lambda: Discriminator(4 * 2**halvings, channels, cond_dim))
    fill(critic, _counted(weights), lambda key: _critic_key(key, halvings), "netD", UNUSED)
    return critic, {"imsize": critic.side, "d_channels": channels, "cond_dim": cond_dim}


def _built(make: Callable[[], nn.Module]) -> nn.Module:
    """A network whose weights will all be replaced: not started, which takes many seconds for orthogonal ones."""
    with torch.device("meta"):
        network = make()
    return network.to_empty(device="cpu")


def _counted(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the `num_batches_tracked` that files of before PyTorch 0.4 have not."""
    means = [key for key in weights if key.endswith("running_mean")]
    counts = {key.replace("running_mean", "num_batches_tracked"): torch.zeros((), dtype=torch.int64) for key in means}
    return {**counts, **weights}


def _generator_key(key: str) -> str:
    """The published netG name of one of Generator's keys."""
    key = re.sub(r"^stages\.(\d+)", lambda found: f"h_net{int(found[1]) + 2}", key)
    key = re.sub(r"^to_rgb\.(\d+)", lambda found: f"img_net{int(found[1]) + 1}.img.0", key)
    key = re.sub(r"^first\.ups\.(\d+)", lambda found: f"h_net1.upsample{int(found[1]) + 1}", key)
    return renamed(
        key,
        (r"^augmentation\.", "ca_net."),
        (r"^first\.fc\.", "h_net1.fc.0."),
        (r"^first\.bn\.", "h_net1.fc.1."),
        (r"\.attention\.project\.", ".att.conv_context."),
        (r"\.first\.conv\.", ".block.0."),
        (r"\.first\.bn\.", ".block.1."),
        (r"\.second\.conv\.", ".block.3."),
        (r"\.second\.bn\.", ".block.4."),
        (r"\.up\.", ".upsample."),
        (r"\.(upsample\d*)\.conv\.", r".\1.1."),
        (r"\.(upsample\d*)\.bn\.", r".\1.2."),
    )


def _critic_key(key: str, halvings: int) -> str:
    """The published netD name of one of Discriminator's keys."""
    parts = {"conv": 0, "bn": 1}
    if layer := re.fullmatch(r"halving\.(\d+)\.(conv|bn)\.(\w+)", key):
        number, part = int(layer[1]), parts[layer[2]]
        if number < 3:
            return f"img_code_s16.{3 * number + 2 + part}.{layer[3]}"
        return f"img_code_s{2 ** (number + 2)}.{part}.{layer[3]}"
    if layer := re.fullmatch(r"narrowing\.(\d+)\.(conv|bn)\.(\w+)", key):
        return f"img_code_s{2**halvings}_{int(layer[1]) + 1}.{parts[layer[2]]}.{layer[3]}"
    return renamed(
        key,
        (r"^first\.", "img_code_s16.0."),
        (r"^joint\.conv\.", "COND_DNET.jointConv.0."),
        (r"^joint\.bn\.", "COND_DNET.jointConv.1."),
        (r"^conditional\.", "COND_DNET.outlogits.0."),
        (r"^unconditional\.", "UNCOND_DNET.outlogits.0."),
    )
