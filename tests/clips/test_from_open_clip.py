"""Models that open_clip makes, against its own encode_image and encode_text."""

import json

import open_clip
import pytest
import torch
from helpers import relative_error, small_clip_model
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from ratlip.encoders.clip_towers import MEAN, load_clip
from ratlip.errors import UserError

VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32, "mlp_ratio": 3.0}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}

LAYERS = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 64}
HUB = {"text_config": {**LAYERS, "max_position_embeddings": 16}, "vision_config": {**LAYERS, "image_size": 32}}


def write(folder, vision=(), text=(), preprocess=(), **more) -> tuple[str, torch.nn.Module]:
    """A folder as open_clip's push_to_hub leaves it, with random weights; its name, and the model."""
    config = {"embed_dim": 32, "vision_cfg": {**VISION, **dict(vision)}, "text_cfg": {**TEXT, **dict(text)}, **more}
    torch.manual_seed(1)
    model = open_clip.CLIP(**json.loads(json.dumps(config))).eval()
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.5)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()},
              folder / "open_clip_model.safetensors")  # fmt: skip
    content = {"model_cfg": config, "preprocess_cfg": dict(preprocess)}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return f"local-dir:{folder}", model


@pytest.mark.parametrize("quick", [False, True])
@torch.no_grad()
def test_a_folder_computes_what_open_clip_does(tmp_path, quick):
    """The activation, normalisation and resize that it states, with heads and hidden widths unlike OpenAI's."""
    normal = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    name, model = write(tmp_path, quick_gelu=quick, preprocess=normal)
    ours = load_clip(name, "open_clip")
    assert ours.settings["activation"] == ("quick_gelu" if quick else "gelu")
    assert load_clip(str(tmp_path), "open_clip").identity == ours.identity  # a folder by its path
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert relative_error(ours.image(images)[1], model.encode_image(images)) < 1e-5  # (x / 2 + 0.5 - 0.5) / 0.5
    tokens = ours.tokenize(["a red bird", "two green birds " * 40])
    assert relative_error(ours.text(tokens)[0], model.encode_text(tokens)) < 1e-5
    assert (ours.settings["heads"], ours.settings["resize"]) == ([2, 2], "bilinear")
    with pytest.raises(UserError, match=r"clip\.activation is .*, but open_clip's local-dir:.* states"):
        load_clip(name, "open_clip", "gelu" if quick else "quick_gelu")


@pytest.mark.parametrize(
    ("vision", "text", "words"),
    [
        ({"ls_init_value": 0.1}, {}, "embeddings of images differ"),
        ({"pool_type": "avg"}, {}, "embeddings of images differ"),
        ({"final_ln_after_pool": True, "pool_type": "avg"}, {}, "embeddings of images differ"),
        ({"attentional_pool": True}, {}, "built otherwise"),
        ({}, {"ls_init_value": 0.1}, "embeddings of captions differ"),
        ({}, {"no_causal_mask": True}, "embeddings of captions differ"),
        ({}, {"pool_type": "last"}, "embeddings of captions differ"),
        ({}, {"proj_type": "none", "width": 32, "heads": 1}, "built otherwise"),
        ({}, {"tokenizer_kwargs": {"clean": "canonicalize"}}, "another tokenizer"),
        ({"image_size": [32, 16]}, {}, "not square"),
    ],
)
def test_another_structure_is_one_line(tmp_path, vision, text, words):
    name, _ = write(tmp_path, vision, text)
    with pytest.raises(UserError, match=words):
        load_clip(name, "open_clip")


@pytest.fixture
def architecture(tmp_path):
    """architecture(name, **of the model) registers one with open_clip and gives its model."""

    def architecture(name: str, **more) -> torch.nn.Module:
        config = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT, **more}
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(tmp_path / f"{name}.json")
        return open_clip.create_model(name)

    return architecture


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_files_of_an_architecture(architecture, tmp_path):
    """A training checkpoint is what its architecture says; a bare state dict may be either and asks."""
    weights = architecture("tiny-plain").state_dict()
    training, bare, hub, archive = (tmp_path / name for name in ("epoch_3.pt", "bare.pt", "hub.bin", "archive.pt"))
    torch.save({"epoch": 3, "name": "x", "state_dict": {f"module.{k}": v for k, v in weights.items()}}, training)
    torch.save(dict(weights), bare)
    torch.save({"vision_model.post_layernorm.weight": torch.zeros(8)}, hub)
    inputs = torch.zeros(1, 3, 64, 64), torch.zeros(1, 16, dtype=torch.long)
    torch.jit.trace(small_clip_model(layers=1).eval(), inputs, check_trace=False).save(archive)

    found = load_clip(f"tiny-plain:{training}", "open_clip")
    assert found.settings["activation"] == "gelu"
    quick = load_clip(f"tiny-plain:{bare}", "open_clip", "quick_gelu")
    assert quick.settings["activation"] == "quick_gelu"
    assert quick.identity["checksum"] == found.identity["checksum"]
    for name, words in (
        (f"tiny-plain:{bare}", r"bare\.pt is a bare state dict.*clip\.activation=quick_gelu"),
        (f"tiny-plain:{hub}", r"is Hugging Face's CLIPModel: set clip\.source=openai clip\.weights="),
        (f"tiny-plain:{archive}", r"is OpenAI's archive: set clip\.source=openai"),
        ("tiny-plain:nowhere", "open_clip cannot load"),
        ("no-such-architecture:x", "open_clip cannot load"),
        ("tiny-plain", "open_clip cannot load"),
        (str(bare), "open_clip cannot load"),
    ):
        with pytest.raises(UserError, match=words):
            load_clip(name, "open_clip")
    with pytest.raises(UserError, match=r"checkpoint of open_clip's training.*clip\.weights=ARCHITECTURE:.*epoch_3"):
        load_clip(str(training))

    architecture("tiny-quick", quick_gelu=True)
    assert load_clip(f"tiny-quick:{bare}", "open_clip").settings["activation"] == "quick_gelu"
    with pytest.raises(UserError, match=r"clip\.activation is gelu, but open_clip's tiny-quick states quick_gelu"):
        load_clip(f"tiny-quick:{bare}", "open_clip", "gelu")


@pytest.mark.parametrize("vision", [{"timm_model_name": "resnet18"}, {"layers": [1, 1, 1, 1]}])
def test_other_image_towers_are_named(architecture, tmp_path, vision):
    model = architecture("tiny-other", vision_cfg={**VISION, **vision, "image_size": 64})
    torch.save({"state_dict": model.state_dict()}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="built differently from OpenAI's"):
        load_clip(f"tiny-other:{tmp_path}/other.pt", "open_clip")


def test_a_tag_states_its_activation(architecture, monkeypatch, tmp_path):
    """As ViT-B-32:openai does, which is QuickGELU, though the architecture by itself computes with GELU."""
    from open_clip import factory, pretrained

    torch.save(dict(architecture("tiny-tagged").state_dict()), tmp_path / "weights.pt")
    tags = {"quick": {"quick_gelu": True, "mean": (0.5, 0.5, 0.5)}, "plain": {}}
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-tagged", {k: pretrained._pcfg("x", **v) for k, v in tags.items()})
    monkeypatch.setattr(factory, "download_pretrained", lambda *_, **__: str(tmp_path / "weights.pt"))
    quick, plain = (load_clip(f"tiny-tagged:{tag}", "open_clip").settings for tag in tags)
    assert (quick["activation"], quick["mean"]) == ("quick_gelu", [0.5] * 3)
    assert (plain["activation"], plain["mean"]) == ("gelu", [round(x, 6) for x in MEAN])
    with pytest.raises(
        UserError, match=r"clip\.activation is gelu, but open_clip's tiny-tagged:quick states quick_gelu"
    ):
        load_clip("tiny-tagged:quick", "open_clip", "gelu")


def test_names_of_the_hub(tmp_path, monkeypatch):
    """Offline, from Hugging Face's cache: a repository of open_clip's, and one of transformers'."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for kind in ("open_clip", "transformers"):
        folder = tmp_path / f"models--some--{kind}" / "snapshots" / ("0" * 40)
        folder.mkdir(parents=True)
        (folder.parents[1] / "refs").mkdir()
        (folder.parents[1] / "refs" / "main").write_text("0" * 40)
        if kind == "open_clip":
            name, _ = write(folder, preprocess={"mean": [0.5] * 3})
            expected = load_clip(name, "open_clip").identity
        else:
            CLIPModel(CLIPConfig(**HUB)).save_pretrained(folder)
            expected = load_clip(str(folder)).identity
        assert load_clip(f"hf-hub:some/{kind}", "open_clip").identity == expected
    with pytest.raises(UserError, match=r"cannot load hf-hub:some/where .*local-dir:FOLDER"):
        load_clip("hf-hub:some/where", "open_clip")
