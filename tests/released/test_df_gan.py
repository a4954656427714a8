"""Released DF-GAN and RAT-GAN checkpoints: the numbers they give, and files that are not what they should be."""

import pytest
import torch
from helpers import fixture_input, relative_error, released_weights

from ratlip import released
from ratlip.errors import UserError
from ratlip.losses import matching_aware_gradient_penalty
from ratlip.released import load_networks

NETWORKS = {256: "dfgan", 64: "dfgan64"}
STEP = {256: 17, 64: 5}  # of the rows and columns that the fixtures hold
ABOUT = {"nf": 32, "z_dim": 100, "cond_dim": 256}


@pytest.fixture(scope="module")
def dfgan_file():
    """Of an image size: what a state_epoch_*.pth holds."""
    head = released_weights("dfgan.netC")
    networks = {
        size: {"netG": released_weights(f"{name}.netG"), "netD": released_weights(f"{name}.netD"), "netC": head}
        for size, name in NETWORKS.items()
    }
    return {size: {"model": model, "epoch": 1220} for size, model in networks.items()}


@pytest.fixture(scope="module")
def ratgan_file():
    """What a netG_*.pth holds, with 6 affine layers a block or with 4 and two that never trained."""
    six = released_weights("ratgan.netG")
    untrained = {key: torch.zeros_like(value) for key, value in six.items() if key.endswith("fc_gamma.linear2.weight")}
    four = {**six, **{key: value for key, value in untrained.items() if ".affine4." in key or ".affine5." in key}}
    return {4: four, 6: six}


@torch.no_grad()
def check_generator(generator, answers, step: int, prefix: str, size: str = "") -> torch.Tensor:
    """Image, its mean, each block's output averaged over space, and what tanh gets; returns the image."""
    means, last = [], []
    hooks = [
        block.register_forward_hook(lambda *call: means.append(torch.cat(call[-1]).mean((2, 3))))
        for block in generator.blocks
    ]
    hooks.append(generator.to_rgb.register_forward_hook(lambda *call: last.append(call[-1])))
    image = generator(fixture_input("noise", 2, 100), fixture_input("sent", 2, 256))
    for hook in hooks:
        hook.remove()
    assert relative_error(image[:, :, ::step, ::step], answers[f"{prefix}.image{size}"]) < 1e-5
    assert relative_error(image.mean((2, 3)), answers[f"{prefix}.image{size}.mean"]) < 1e-5
    assert relative_error(torch.cat(means, 1), answers[f"{prefix}.blocks{size}.mean"]) < 1e-5
    if f"{prefix}.pretanh{size}" in answers:
        assert relative_error(torch.cat(last)[:, :, ::step, ::step], answers[f"{prefix}.pretanh{size}"]) < 1e-5
    return image


def inputs(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    name = "image" if size == 256 else f"image{size}"
    return fixture_input(name, 2, 3, size, size).tanh().requires_grad_(), fixture_input("sent", 2, 256).requires_grad_()


def gradient_norms(logits: torch.Tensor, *wrt: torch.Tensor) -> torch.Tensor:
    gradients = torch.autograd.grad(logits.sum(), wrt, retain_graph=True)
    return torch.cat([gradient.flatten(1) for gradient in gradients], 1).norm(dim=1)


@pytest.mark.parametrize("size", [256, 64])
def test_dfgan(size, dfgan_file, dfgan_answers):
    generator, discriminator, info = load_networks(dfgan_file[size], None)
    assert info == {"system": "DF-GAN", "epoch": 1220, "imsize": size, **ABOUT}
    assert generator.noise_scale == 0.88
    said = f"released DF-GAN, epoch 1220, nf 32, z_dim 100, cond_dim 256, imsize {size}"
    assert released.describe(info) == said
    check_generator(generator, dfgan_answers, STEP[size], "df", str(size))
    images, sentence = inputs(size)
    features = discriminator.features(images)
    assert relative_error(features[:, :: {256: 4, 64: 16}[size]], dfgan_answers[f"df.D{size}.out"]) < 1e-5
    logits = discriminator.logits(features, sentence)
    assert relative_error(logits, dfgan_answers[f"df.C{size}.logit"][:, :, 0, 0]) < 1e-5
    assert torch.equal(discriminator(images, sentence), logits)
    assert relative_error(gradient_norms(logits, images, sentence), dfgan_answers[f"df.magp{size}.norms"]) < 1e-5
    penalty = matching_aware_gradient_penalty(logits, (images, sentence))
    assert relative_error(penalty, dfgan_answers[f"df.magp{size}"]) < 1e-5


@pytest.mark.parametrize("affines", [4, 6])
def test_ratgan_generator(affines, ratgan_file, dfgan_answers):
    generator, discriminator, info = load_networks(ratgan_file[affines], None)
    assert discriminator is None
    assert info == {"system": "RAT-GAN", "epoch": None, "imsize": 256, **ABOUT, "affines": affines}
    assert released.describe(info).endswith(f"imsize 256, {affines} affine layers a block")
    prefix = "rat" if affines == 4 else "rat6"
    steps = []
    conditioner = generator.conditioner
    conditioner.start.register_forward_hook(lambda *call: steps.append(call[-1].chunk(2, 1)))
    conditioner.lstms[0].register_forward_hook(lambda *call: steps.append(call[-1]))
    image = check_generator(generator, dfgan_answers, 17, prefix)
    states = torch.stack([torch.cat([h[:, :8], c[:, :8]], 1) for h, c in steps])  # (1 + 7 * affines, 2, 16)
    assert relative_error(states, dfgan_answers[f"{prefix}.hc.steps"]) < 1e-5
    # The published program's second call goes on from the first one's state; ours starts anew.
    with torch.no_grad():
        again = generator(fixture_input("noise", 2, 100), fixture_input("sent", 2, 256))
    assert torch.equal(again, image)
    if affines == 4:
        assert relative_error(again[:, :, ::17, ::17], dfgan_answers["rat.again.image"]) > 1e-2


def test_ratgan_files_without_the_layers_that_never_ran(ratgan_file, dfgan_answers):
    """As users report of the published COCO file; and from DataParallel, with `module.` before every name."""
    weights = {
        f"module.{key}": value
        for key, value in ratgan_file[4].items()
        if not any(part in key for part in (".affine4.", ".affine5.", ".fea_l"))
    }
    generator, _, info = load_networks(weights, None)
    assert info["affines"] == 4
    check_generator(generator, dfgan_answers, 17, "rat")


def test_ratgan_discriminator(dfgan_answers):
    generator, discriminator, info = load_networks(released_weights("ratgan.netD"), None)
    assert generator is None
    about = {"nf": 32, "cond_dim": 256, "attention": False}
    assert info == {"system": "RAT-GAN", "epoch": None, "imsize": 256, **about}
    images, sentence = inputs(256)
    features = discriminator.features(images)
    logits = discriminator.logits(features, sentence)
    assert relative_error(features[:, ::8], dfgan_answers["rat.D.out"]) < 1e-5
    assert relative_error(logits, dfgan_answers["rat.D.logit"][:, :, 0, 0]) < 1e-5
    assert relative_error(gradient_norms(logits, images, sentence), dfgan_answers["rat.magp.norms"]) < 1e-5


@torch.no_grad()
def test_ratgan_discriminator_with_attention(dfgan_answers):
    _, discriminator, info = load_networks(released_weights("ratgan.netD_att"), None)
    assert info["attention"] and released.describe(info).endswith("discriminator with attention")
    images, sentence = inputs(256)
    features = discriminator.features(images)
    assert features.shape == (2, 512, 8, 8)
    assert relative_error(discriminator.attend(features, sentence), dfgan_answers["ratatt.p"]) < 1e-5
    logits = discriminator(images, sentence)
    assert relative_error(logits, dfgan_answers["ratatt.logit"][:, :, 0, 0]) < 1e-5


def test_files_with_module_prefixes(dfgan_file, tmp_path):
    model = dfgan_file[64]["model"]
    prefixed = {name: {f"module.{key}": value for key, value in net.items()} for name, net in model.items()}
    torch.save({"model": prefixed, "optimizers": {"optimizer_G": {}}, "epoch": 290}, tmp_path / "state_epoch_290.pth")
    generator, discriminator, info = load_networks(tmp_path / "state_epoch_290.pth", None)
    plain = load_networks({"model": model}, None)
    assert info["epoch"] == 290
    for ours, same in zip((generator, discriminator), plain, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), same.parameters(), strict=True))


def test_files_of_one_network(dfgan_file):
    model = dfgan_file[64]["model"]
    generator, discriminator, info = load_networks({"model": {"netG": model["netG"]}}, None)
    assert discriminator is None and info["z_dim"] == 100 and info["epoch"] is None
    assert "epoch" not in released.describe(info)
    generator, discriminator, info = load_networks({"model": {**model, "netG": {}}}, None)
    assert generator is None and (info["system"], info["nf"], info["imsize"]) == ("DF-GAN", 32, 64)


def without(weights: dict, *keys: str) -> dict:
    return {key: value for key, value in weights.items() if key not in keys}


def test_the_first_thing_wrong_is_named_of_dfgan(dfgan_file):
    model = dfgan_file[64]["model"]
    net_g, net_c = model["netG"], model["netC"]
    affine = "GBlocks.1.fuse2.affine1.fc_beta.linear2.bias"
    for changes, message in (
        ({"netG": without(net_g, affine)}, f"netG has no {affine}"),
        ({"netG": without(net_g, "fc.weight")}, r"netG has no fc\.weight"),
        ({"netG": {**net_g, "surprise": torch.zeros(1)}}, "netG has a key that no released network has: surprise"),
        ({"netG": {**net_g, "fc.bias": torch.zeros(7)}}, r"netG: fc\.bias is \(7,\), \(4096,\) was expected"),
        ({"netG": {**net_g, "fc.weight": torch.zeros(7)}}, r"fc\.weight is \(7,\); 2 axes"),
        ({"netG": {**net_g, "fc.weight": torch.zeros(4096, 400)}}, "netG: its shapes make cond_dim -44"),
        ({"netG": {**net_g, "fc.bias": "text"}}, r"netG: fc\.bias is a str"),
        ({"netG": {key: value for key, value in net_g.items() if "GBlocks.1" not in key}}, r"netG has no GBlocks\.1:"),
        (
            {"netG": {key: value for key, value in net_g.items() if key < "GBlocks.2"}},
            r"has no (fc\.weight|GBlocks\.2)",
        ),
        ({"netC": {**net_c, "joint_conv.2.weight": torch.zeros(1)}}, r"netC\.joint_conv\.2\.weight is \(1,\)"),
        ({"netC": {**net_c, "joint_conv.0.weight": torch.zeros(64, 300, 3, 3)}}, "cond_dim 256, netD and netC have 44"),
        ({"netD": without(model["netD"], "conv_img.weight")}, r"netD and netC has no conv_img\.weight"),
        ({"netG": None, "netC": None}, r"netG is a NoneType"),
    ):
        with pytest.raises(UserError, match=message):
            load_networks({"model": {**model, **changes}}, None)
    with pytest.raises(UserError, match="neither netG nor netD with netC"):
        load_networks({"model": {"netD": model["netD"]}}, None)


def test_the_first_thing_wrong_is_named_of_ratgan(ratgan_file):
    six = ratgan_file[6]
    for weights, message in (
        (without(six, "block3.affine5.fc_beta.linear1.bias"), r"netG has no block3\.affine5\.fc_beta\.linear1\.bias"),
        (without(six, "lstm.W"), r"netG has no lstm\.W"),
        (without(six, "lstm.noise2c.bias"), r"netG has no lstm\.noise2c\.bias"),
        ({**six, "lstm.noise2c.weight": torch.zeros(256, 7)}, r"noise2c\.weight is \(256, 7\), \(256, 100\)"),
        ({**six, "lstm.U": torch.zeros(64, 256)}, "its LSTM is 64 wide"),
        ({**six, "block0.affine6.weight": torch.zeros(1)}, r"no released network has: block0\.affine6\.weight"),
        ({key: value for key, value in six.items() if "lstm." not in key}, "DF-GAN from before June 2022"),
        (without(released_weights("ratgan.netD"), "block5.gamma"), r"netD has no block5\.gamma"),
    ):
        with pytest.raises(UserError, match=message):
            load_networks(weights, None)


def test_each_family_knows_its_own(dfgan_file, ratgan_file):
    """Files of the others, which may be laid out alike, are told apart by their keys."""
    galip = {"model": {"netG": {"fc_code.weight": torch.zeros(1), "mapping.conv.weight": torch.zeros(1)}}}
    for content, family in ((dfgan_file[64], "df_gan"), (ratgan_file[4], "df_gan"), (galip, "clip_gan")):
        known = [module for module in released.FAMILIES if module.is_released(content)]
        assert known[0].__name__ == f"ratlip.released.{family}"
        assert released.is_released(content)
    damsm = {"encoder.weight": torch.zeros(5, 3), "rnn.weight_ih_l0": torch.zeros(1)}
    for content in (damsm, {"generator": {}}, {}, None, {3: 4}):
        assert not released.is_released(content)
        with pytest.raises(UserError, match="not a released checkpoint of DF-GAN, RAT-GAN, GALIP, RATLIP"):
            load_networks(content, None)
