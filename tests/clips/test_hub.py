"""Hugging Face's CLIPModel, against transformers' own."""

import json

import pytest
import torch
from helpers import relative_error
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from ratlip.encoders.clip_towers import MEAN, clip, load_clip
from ratlip.errors import UserError

TEXT = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 256}
VISION = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 200}


@pytest.fixture(scope="module", params=["gelu", "quick_gelu"])
def folder(request, tmp_path_factory):
    """A CLIPModel as save_pretrained leaves it, in several files, with its preprocessing, and the model itself."""
    act, path = {"hidden_act": request.param}, tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**TEXT, **act, "max_position_embeddings": 16, "eos_token_id": 2, "projection_dim": 32},
            vision_config={**VISION, **act, "image_size": 32, "patch_size": 8, "projection_dim": 32},
            projection_dim=32,
            initializer_factor=10.0,  # else all biases are 0 and the towers hardly differ from linear ones
        )
    ).eval()
    model.save_pretrained(path, max_shard_size="6MB")
    CLIPImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3, resample=2).save_pretrained(path)
    return path, model


@torch.no_grad()
def test_folder_equals_transformers(folder):
    path, model = folder
    assert (path / "model.safetensors.index.json").is_file()
    ours, activation = load_clip(str(path)), model.config.vision_config.hidden_act
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    expected = model.get_image_features((images + 1) / 2 / 0.25 - 2)  # mean 0.5, standard deviation 0.25
    assert relative_error(ours.image(images)[1], pooled(expected)) < 1e-5
    tokens = ours.tokenize(["a red bird", "two green birds " * 40])
    assert relative_error(ours.text(tokens)[0], pooled(model.get_text_features(tokens))) < 1e-5
    found = ours.settings
    assert found == {"activation": activation, "heads": [4, 2], "mean": [0.5] * 3, "std": [0.25] * 3,
                     "resize": "bilinear"}  # fmt: skip
    bigger = torch.nn.functional.interpolate(images, (48, 48))
    resized = torch.nn.functional.interpolate((bigger + 1) / 2, (32, 32), mode="bilinear", antialias=True)
    assert relative_error(ours.clip_input(bigger), (resized - 0.5) / 0.25) < 1e-5


def pooled(features) -> torch.Tensor:
    """What get_image_features gives: a tensor, since transformers 5 the outputs around it."""
    return features if isinstance(features, torch.Tensor) else features.pooler_output


def test_one_file_of_it_is_the_same(folder, tmp_path):
    path, model = folder
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"Hugging Face's CLIPModel: put its config\.json.*clip\.activation=quick_gelu"):
        load_clip(str(tmp_path / "pytorch_model.bin"))
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text((path / name).read_text())
    expected = load_clip(str(path)).identity
    assert load_clip(str(tmp_path / "pytorch_model.bin")).identity == expected
    assert load_clip(str(tmp_path)).identity == expected
    # And as a state dict in OpenAI's names, which knows neither the heads nor the normalisation.
    torch.save(dict(load_clip(str(path)).clip.state_dict()), tmp_path / "openai.pt")
    again = load_clip(str(tmp_path / "openai.pt"), activation=expected["activation"])
    assert again.identity["checksum"] == expected["checksum"]
    assert (again.settings["heads"], again.settings["mean"]) == ([1, 1], [round(x, 6) for x in MEAN])
    other = {"gelu": "quick_gelu", "quick_gelu": "gelu"}[expected["activation"]]
    with pytest.raises(UserError, match=rf"clip\.activation is {other}, but .*config\.json states"):
        load_clip(str(path), activation=other)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", {"model_type": "siglip"}, "model_type is siglip"),
        ("config.json", {"vision_config": {"hidden_act": "gelu_new"}}, "hidden_act is gelu_new"),
        ("config.json", {"text_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps is 1e-06"),
        ("config.json", {"text_config": {"eos_token_id": 5}}, "eos_token_id is 5"),
        ("config.json", "{", "config.json: not valid JSON"),
        ("vocab.json", {"a": 0}, "vocab.json is another tokenizer"),
        ("tokenizer.json", {"model": {"vocab": {"a": 0}}}, "tokenizer.json is another tokenizer"),
        ("preprocessor_config.json", {"resample": 0}, "resample 0"),
    ],
)
@pytest.mark.parametrize("folder", ["gelu"], indirect=True)
def test_what_it_states_otherwise_is_refused(folder, tmp_path, file, content, words):
    for source in folder[0].iterdir():
        (tmp_path / source.name).symlink_to(source)
    (tmp_path / file).unlink(missing_ok=True)
    (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=words):
        load_clip(str(tmp_path))


@pytest.mark.parametrize("folder", ["gelu"], indirect=True)
def test_openais_own_vocabulary_is_accepted(folder, tmp_path):
    for source in folder[0].iterdir():
        (tmp_path / source.name).symlink_to(source)
    (tmp_path / "vocab.json").write_text(json.dumps(clip.clip._tokenizer.encoder))
    assert load_clip(str(tmp_path)).width == 64


def test_folders_of_something_else_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no folder of Hugging Face's CLIPModel: it needs config\.json"):
        load_clip(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(UserError, match=rf"clip\.source=open_clip clip\.weights=local-dir:{tmp_path}"):
        load_clip(str(tmp_path))
