"""Published AttnGAN files and configurations: the numbers they give, and those that are not what they should be."""

import pytest
import torch
import yaml
from helpers import released_weights

from ratlip import checkpoint
from ratlip.errors import UserError
from ratlip.models.attn_gan.discriminator import Discriminator
from ratlip.models.attn_gan.generator import Condition, Generator, stage_sizes
from ratlip.released.attn_gan import (
    _critic_key,
    _generator_key,
    critics_beside,
    describe,
    is_released,
    load_networks,
    translate,
)


@pytest.fixture(scope="module")
def net_g():
    return released_weights("attngan.netG")


@pytest.fixture(scope="module")
def net_d64():
    return released_weights("attngan.netD64")


def test_settings_from_shapes(net_g):
    generator, critics, info = load_networks(net_g)
    assert critics is None and generator.sizes == [64, 128, 256] and not generator.training
    settings = {"stages": 3, "nf": 32, "residuals": 2, "z_dim": 100, "condition_dim": 100, "cond_dim": 256}
    assert info == {"system": "AttnGAN", "name": "attngan", "epoch": None, "imsize": 256, **settings}


def of_size(channels: int) -> tuple[dict, list[dict]]:
    """A netG and netDs of AttnGAN's layout, of 16, 32 and 64 pixels, by published names; wide by `channels`."""
    sizes = stage_sizes(64, 3)
    net_g = Generator(sizes, channels, 12, 12, 5, 4, residuals=1).state_dict()
    critics = [(Discriminator(size, channels, 12), (size // 4).bit_length() - 1) for size in sizes]
    net_ds = [{_critic_key(k, n): v for k, v in critic.state_dict().items()} for critic, n in critics]
    return {_generator_key(key): value for key, value in net_g.items()}, net_ds


def test_a_folder_as_training_leaves_it(tmp_path):
    """Other sizes and settings than the published ones; critics beside the generator; `module.` before every key."""
    net_g, net_ds = of_size(2)
    path = tmp_path / "netG_epoch_50.pth"
    torch.save({f"module.{key}": value for key, value in net_g.items()}, path)
    generator, _, info = load_networks(checkpoint.read(path))
    assert describe(info) == "released AttnGAN, stages 3, nf 2, residuals 1, z_dim 5, cond_dim 12, imsize 64"
    for number, net_d in enumerate(net_ds):
        assert critics_beside(path, generator) is None
        torch.save(net_d, tmp_path / f"netD{number}.pth")
    critics = critics_beside(path, generator)
    assert generator.sizes == [critic.side for critic in critics] == [16, 32, 64]
    assert critics_beside(tmp_path / "bird_AttnGAN2.pth", generator) is None
    drawn = generator(torch.randn(2, 9), Condition(torch.randn(2, 12), torch.randn(2, 12, 3), torch.ones(2, 3).bool()))
    for critic, image in zip(critics, drawn.images, strict=True):
        assert critic(image, torch.randn(2, 12))[0].isfinite().all()
    torch.save(net_ds[0], tmp_path / "netD2.pth")
    with pytest.raises(UserError, match=r"netD2\.pth: of .* \(16, 12\) .* not \(64, 12\) as .*netG_epoch_50"):
        critics_beside(path, generator)
    torch.save(without(net_ds[0], "UNCOND_DNET.outlogits.0.weight"), tmp_path / "netD0.pth")
    with pytest.raises(UserError, match=r"netD0\.pth: a netD of AttnDCGAN"):
        critics_beside(path, generator)


def without(weights: dict, key: str) -> dict:
    return {name: value for name, value in weights.items() if name != key}


def test_the_first_thing_wrong_is_named(net_g, net_d64):
    counted = {"h_net1.fc.1.num_batches_tracked": torch.zeros((), dtype=torch.int64)}  # as ports write it
    assert is_released(net_g) and is_released(net_d64) and is_released({**net_g, **counted})
    load_networks({**net_g, **counted})
    for other in ({"model": {"netG": net_g}}, {"generator": {}}, [], {}, {"state_dict": net_g}):
        assert not is_released(other)
    for weights, part in (
        (without(net_g, "h_net3.upsample.2.bias"), r"netG has no h_net3\.upsample\.2\.bias"),
        ({**net_g, "surprise": torch.zeros(1)}, "netG has a key that no released network has: surprise"),
        ({**net_g, "h_net2.upsample.1.weight": torch.zeros(3)}, r"h_net2\.upsample\.1\.weight is \(3,\)"),
        ({**net_g, "img_net1.img.0.weight": 3}, "expected a tensor"),
        (without(net_d64, "img_code_s16.6.weight"), r"netD has no img_code_s16\.6\.weight"),
        (without(net_d64, "COND_DNET.jointConv.0.weight"), r"netD has no COND_DNET\.jointConv\.0\.weight"),
        # The variant, whose netG has one head for its largest picture, and whose netD no unconditional logit.
        ({**without(net_g, "img_net3.img.0.weight"), "img_net.img.0.weight": torch.zeros(3, 32, 3, 3)}, "AttnDCGAN"),
        ({key: value for key, value in net_d64.items() if "UNCOND" not in key}, "AttnDCGAN"),
    ):
        with pytest.raises(UserError, match=part):
            load_networks(weights)


BIRD = """
CONFIG_NAME: 'attn2'
DATASET_NAME: 'birds'
DATA_DIR: '../data/birds'
GPU_ID: 0
WORKERS: 4
B_VALIDATION: False
TREE: {BRANCH_NUM: 3}
TRAIN:
  FLAG: True
  NET_G: ''
  B_NET_D: True
  BATCH_SIZE: 20
  MAX_EPOCH: 600
  SNAPSHOT_INTERVAL: 50
  DISCRIMINATOR_LR: 0.0002
  GENERATOR_LR: 0.0002
  NET_E: '../DAMSMencoders/bird/text_encoder200.pth'
  SMOOTH: {GAMMA1: 4.0, GAMMA2: 5.0, GAMMA3: 10.0, LAMBDA: 5.0}
GAN: {DF_DIM: 64, GF_DIM: 32, Z_DIM: 100, R_NUM: 2}
TEXT: {EMBEDDING_DIM: 256, CAPTIONS_PER_IMAGE: 10}
"""


def test_a_published_configuration():
    settings, dropped = translate(yaml.safe_load(BIRD))
    assert settings == {
        "model.name": "attngan",
        "model.imsize": 256,
        "model.z_dim": 100,
        "data.layout": "bird",
        "data.dir": "../data/birds",
        "data.num_workers": 4,
        "text.encoder": "damsm",
        "text.weights": "../DAMSMencoders/bird/text_encoder200.pth",
        "train.batch_size": 20,
        "train.max_epoch": 600,
        "train.lr_g": 0.0002,
        "train.lr_d": 0.0002,
        "log.save_interval": 50,
        "attngan.stages": 3,
        "model.nf": 32,
        "model.d_channels": 64,
        "attngan.residuals": 2,
        "attngan.damsm": 5.0,
    }
    assert dropped == [
        "CONFIG_NAME", "GPU_ID", "B_VALIDATION", "TRAIN.FLAG", "TRAIN.NET_G", "TRAIN.B_NET_D", "TEXT.CAPTIONS_PER_IMAGE"
    ]  # fmt: skip


def test_a_configuration_of_damsm():
    tree = "{BRANCH_NUM: 1, BASE_SIZE: 299}"
    train = (
        "{FLAG: True, BATCH_SIZE: 48, MAX_EPOCH: 600, SNAPSHOT_INTERVAL: 50, ENCODER_LR: 0.002, RNN_GRAD_CLIP: 0.25}"
    )
    content = f"DATASET_NAME: birds\nTREE: {tree}\nTRAIN: {train}\nTEXT: {{WORDS_NUM: 18, CAPTIONS_PER_IMAGE: 10}}"
    settings, dropped = translate(yaml.safe_load(content))
    assert settings == {
        "data.layout": "bird",
        "text.words": 18,
        "damsm.batch_size": 48,
        "damsm.max_epoch": 600,
        "damsm.lr": 0.002,
        "damsm.clip_grad": 0.25,
        "log.save_interval": 50,
    }
    assert dropped == ["TRAIN.FLAG", "TEXT.CAPTIONS_PER_IMAGE"]


@pytest.mark.parametrize(("old", "new", "part"), [
    ("GAN: {", "GAN: {B_DCGAN: True, ", "AttnDCGAN"),
    ("GAMMA1: 4.0", "GAMMA1: 5.0", "TRAIN.SMOOTH.GAMMA1: 5.0; it is 4.0"),
])  # fmt: skip
def test_configurations_of_something_else(old, new, part):
    with pytest.raises(UserError, match=part):
        translate(yaml.safe_load(BIRD.replace(old, new)))
