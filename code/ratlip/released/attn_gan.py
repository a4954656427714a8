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
from ratlip.released.weights import fill, need, tensors

UNUSED = re.compile("(?!)")  # of what these files hold everything has a part in the results
ONE_STAGE = (
    "AttnDCGAN, a variant of AttnGAN with one picture size (birds' bird_AttnDCGAN2.pth), which is not built here; "
    "bird_AttnGAN2.pth and coco_AttnGAN2.pth are AttnGAN itself"
)
# Where the keys of a published configuration stand here.
NESTED = {
    "DATASET_NAME": "data.layout",
    "DATA_DIR": "data.dir",
    "WORKERS": "data.num_workers",
    "TREE.BRANCH_NUM": "attngan.stages",
    "TRAIN.NET_E": "text.weights",
    "TRAIN.BATCH_SIZE": "train.batch_size",
    "TRAIN.MAX_EPOCH": "train.max_epoch",
    "TRAIN.SNAPSHOT_INTERVAL": "log.save_interval",
    "TRAIN.GENERATOR_LR": "train.lr_g",
    "TRAIN.DISCRIMINATOR_LR": "train.lr_d",
    "TRAIN.SMOOTH.LAMBDA": "attngan.damsm",
    "GAN.GF_DIM": "attngan.nf",
    "GAN.DF_DIM": "attngan.d_channels",
    "GAN.Z_DIM": "model.z_dim",
    "GAN.CONDITION_DIM": "attngan.condition_dim",
    "GAN.R_NUM": "attngan.residuals",
    "TEXT.WORDS_NUM": "text.words",
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
    checkpoint: str | Path | Mapping, encoder: nn.Module | None = None, path: str | Path | None = None
) -> tuple[Generator | None, list[Discriminator] | None, dict]:
    """Build the networks of a published file, in eval mode on the CPU.

    Args:
        checkpoint: a path, or what torch.load gives for one: a netG, or one netD.
        encoder: the text encoder it is to read captions with, whose embedding's size is compared. None: any.
        path: where the content came from: for messages, and for the netD0.pth, netD1.pth and so on that lie beside a
            netG_epoch_<n>.pth, where all of them are there.

    Returns:
        generator: of all sizes. None in a file of a netD.
        critics: of each size, the smallest first; of a netD's file that one. None without.
        info: system ("AttnGAN"), epoch (or None), imsize, stages, nf, residuals, z_dim, condition_dim, cond_dim,
            d_channels, as far as the files tell.

    Raises:
        UserError: not such a file, keys missing or unknown, or another encoder; names the first thing wrong.
    """
    if isinstance(checkpoint, str | Path):
        path, checkpoint = checkpoint, checkpoint_file.read(checkpoint)
    try:
        if not is_released(checkpoint):
            raise UserError("not a published AttnGAN network: neither a netG nor a netD")
        weights = tensors("the file", checkpoint)
        if "ca_net.fc.weight" not in weights:
            critic, info = _critic(weights, "netD")
            return None, [critic], {"system": "AttnGAN", "epoch": None, **info}
        generator, info = _generator(weights, encoder)
    except UserError as error:
        raise UserError(f"{path}: {error}" if path else str(error)) from None
    named = re.fullmatch(r"netG_epoch_(\d+)\.pth", Path(path).name) if path else None
    info["epoch"] = int(named[1]) if named else None
    critics = _critics_beside(Path(path), generator.sizes, info) if named else None
    return generator, critics, info


def describe(info: Mapping) -> str:
    """What `load_networks` read from a file, in words."""
    names = ("stages", "nf", "residuals", "z_dim", "cond_dim", "d_channels", "imsize")
    found = [f"{name} {info[name]}" for name in names if name in info]
    return ", ".join([f"released {info['system']}", f"epoch {info['epoch']}", *found])


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
    pretraining = flat.get("TREE.BRANCH_NUM") == 1  # of DAMSM: no GAN in it
    settings: dict[str, Any] = {"text.encoder": "damsm"} if pretraining else {"model.name": "attngan"}
    for key, ours in NESTED.items():
        if flat.get(key) not in (None, ""):
            settings[ours] = flat[key]
    if pretraining:
        del settings["attngan.stages"]
    elif "TREE.BASE_SIZE" in flat or "attngan.stages" in settings:
        settings["model.imsize"] = flat.get("TREE.BASE_SIZE", 64) << (settings.get("attngan.stages", 3) - 1)
    if "data.layout" in settings:
        settings["data.layout"] = LAYOUTS.get(settings["data.layout"], settings["data.layout"])
    used = {*NESTED, *FIXED, "TREE.BASE_SIZE", "GAN.B_DCGAN"}
    return settings, [key for key in flat if key not in used]


def _flat(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in tree.items():
        found.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return found


def _generator(weights: dict[str, Tensor], encoder: nn.Module | None) -> tuple[Generator, dict]:
    info = read_settings(weights)
    if encoder is not None and info["cond_dim"] != encoder.embedding_dim:
        raise UserError(
            f"the network reads words and sentences of {info['cond_dim']} numbers, this encoder's have "
            f"{encoder.embedding_dim}; published ones were trained with DAMSM (text.encoder=damsm)"
        )
    sizes = [info["imsize"] >> later for later in range(info["stages"] - 1, -1, -1)]
    dims = [info[name] for name in ("nf", "cond_dim", "cond_dim", "z_dim", "condition_dim", "residuals")]
    generator = _built(lambda: Generator(sizes, *dims))
    fill(generator, _counted(weights), _generator_key, "netG", UNUSED)
    return generator, info


def read_settings(net_g: Mapping[str, Tensor]) -> dict:
    """The settings that the shapes of a published netG imply, and its system."""
    if any(key.startswith("img_net.") for key in net_g):
        raise UserError(f"a netG of {ONE_STAGE}")
    condition_dim = need(net_g, "ca_net.fc.weight", "netG", axes=2).shape[0] // 4
    stages = sum(bool(re.fullmatch(r"img_net\d+\.img\.0\.weight", key)) for key in net_g)
    doublings = sum(bool(re.fullmatch(r"h_net1\.upsample\d+\.1\.weight", key)) for key in net_g)
    return {
        "system": "AttnGAN",
        "imsize": 4 * 2 ** (doublings + stages - 1),
        "stages": stages,
        "nf": need(net_g, "img_net1.img.0.weight", "netG", axes=4).shape[1],
        "residuals": sum(bool(re.fullmatch(r"h_net2\.residual\.\d+\.block\.0\.weight", key)) for key in net_g),
        "z_dim": need(net_g, "h_net1.fc.0.weight", "netG", axes=2).shape[1] - condition_dim,
        "condition_dim": condition_dim,
        "cond_dim": net_g["ca_net.fc.weight"].shape[1],
    }


def _critics_beside(path: Path, sizes: list[int], info: dict) -> list[Discriminator] | None:
    """Those of netD0.pth and so on beside a netG, into whose `info` their channels go; None where one is missing."""
    places = [path.with_name(f"netD{number}.pth") for number in range(len(sizes))]
    if not all(place.is_file() for place in places):
        return None
    critics = []
    for place, size in zip(places, sizes, strict=True):
        try:
            critic, own = _critic(tensors("netD", checkpoint_file.read(place)), "netD")
        except UserError as error:
            raise UserError(str(error) if str(place) in str(error) else f"{place}: {error}") from None
        if critic.side != size or own["cond_dim"] != info["cond_dim"]:
            raise UserError(f"{place}: of pictures of {critic.side} pixels, which are {size} in {path}")
        info["d_channels"] = own["d_channels"]
        critics.append(critic)
    return critics


def _critic(weights: dict[str, Tensor], name: str) -> tuple[Discriminator, dict]:
    if "UNCOND_DNET.outlogits.0.weight" not in weights and "COND_DNET.outlogits.0.weight" in weights:
        raise UserError(f"a netD of {ONE_STAGE}")
    channels = need(weights, "img_code_s16.0.weight", name, axes=4).shape[0]
    halvings = sum(bool(re.fullmatch(r"img_code_s(16\.[0258]|\d\d+\.0)\.weight", key)) for key in weights)
    joint = need(weights, "COND_DNET.jointConv.0.weight", name, axes=4)
    cond_dim = joint.shape[1] - joint.shape[0]
    critic = _built(lambda: Discriminator(4 * 2**halvings, channels, cond_dim))
    fill(critic, _counted(weights), lambda key: _critic_key(key, halvings), name, UNUSED)
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
    for pattern, theirs in (
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
    ):
        key = re.sub(pattern, theirs, key)
    return key


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
    for pattern, theirs in (
        (r"^first\.", "img_code_s16.0."),
        (r"^joint\.conv\.", "COND_DNET.jointConv.0."),
        (r"^joint\.bn\.", "COND_DNET.jointConv.1."),
        (r"^conditional\.", "COND_DNET.outlogits.0."),
        (r"^unconditional\.", "UNCOND_DNET.outlogits.0."),
    ):
        key = re.sub(pattern, theirs, key)
    return key
