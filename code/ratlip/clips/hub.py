"""Hugging Face's CLIPModel: its folder or files as OpenAI's model, with what its JSON files state."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ratlip import checkpoint
from ratlip.clips.files import ASK, END_OF_TEXT, MEAN, RESIZES, STD, ClipModel, File, agreed, clip, filled, json_of
from ratlip.errors import UserError

ACTIVATIONS = ("quick_gelu", "gelu")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# Hugging Face's names of CLIPModel and OpenAI's. Projections are stored transposed, and q, k, v one by one.
NAMES = (
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^vision_model\.embeddings\.", "visual."),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^visual_projection\.weight", "visual.proj"),
    (r"^text_projection\.weight", "text_projection"),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)


def load(path: Path, file: File, activation: str | None) -> ClipModel:
    """The CLIPModel of a folder, or of one of its files, with what the JSON files there state."""
    folder = path if path.is_dir() else path.parent
    heads, config = None, json_of(folder / "config.json")
    if config:
        heads, stated = _settings(folder / "config.json", config)
        activation = agreed(activation, stated, str(folder / "config.json"))
        _same_vocabulary(folder)
    else:
        activation = agreed(activation, file.activation, str(path))
    if activation is None:
        raise UserError(
            f"clip.weights: {path} is Hugging Face's CLIPModel: put its config.json (and preprocessor_config.json) "
            f"beside it, which states its activation, or {ASK}"
        )
    model = filled(_in_openai_names(file.weights), activation, heads)
    seen = json_of(folder / "preprocessor_config.json") or json_of(folder / "processor_config.json").get(
        "image_processor", {}
    )
    number = seen.get("resample", 3)
    if number not in RESIZES:
        raise UserError(
            f"{folder}/preprocessor_config.json: resample {number}; only 2 (bilinear) and 3 (bicubic) are read"
        )
    normalised = seen.get("do_normalize", True)
    mean, std = (seen.get("image_mean", MEAN), seen.get("image_std", STD)) if normalised else ((0.0,) * 3, (1.0,) * 3)
    return ClipModel(model, mean, std, RESIZES[number])


def folder_weights(folder: Path) -> File:
    """The tensors of Hugging Face's folder, from one file or from several that an index lists."""
    name = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if name is None or not (folder / "config.json").is_file():
        if (folder / "open_clip_config.json").is_file():
            raise UserError(
                f"clip.weights: {folder} is a folder of open_clip's: set clip.source=open_clip "
                f"clip.weights=local-dir:{folder}"
            )
        raise UserError(
            f"clip.weights: {folder} is no folder of Hugging Face's CLIPModel: it needs config.json and one of "
            f"{', '.join(WEIGHTS)}"
        )
    if not name.endswith(".json"):
        return File(checkpoint.read(folder / name))
    parts = sorted(set(json_of(folder / name)["weight_map"].values()))
    return File({key: value for part in parts for key, value in checkpoint.read(folder / part).items()})


def _settings(path: Path, config: dict) -> tuple[tuple[int, int], str]:
    """Heads of the image and text tower, and the activation, of config.json; what it leaves out is transformers'
    default. A UserError where it asks for something that OpenAI's structure has not."""
    if config.get("model_type", "clip") != "clip":
        raise UserError(f"{path}: model_type is {config['model_type']}; a CLIPModel with both towers has clip")
    vision, text = (
        {**config.get(f"{tower}_config", {}), **(config.get(f"{tower}_config_dict") or {})}
        for tower in ("vision", "text")
    )
    acts = [tower.get("hidden_act", "quick_gelu") for tower in (vision, text)]
    if acts[0] != acts[1] or acts[0] not in ACTIVATIONS:
        raise UserError(f"{path}: hidden_act is {acts[0]} and {acts[1]}; quick_gelu in both towers, or gelu, is read")
    for tower in (vision, text):
        if tower.get("layer_norm_eps", 1e-5) != 1e-5:
            raise UserError(f"{path}: layer_norm_eps is {tower['layer_norm_eps']}; OpenAI's structure has 1e-05")
    end = text.get("eos_token_id", END_OF_TEXT)
    if end not in (2, END_OF_TEXT):  # 2: old versions' way of saying the largest id
        raise UserError(f"{path}: eos_token_id is {end}; OpenAI's tokenizer ends with {END_OF_TEXT}")
    return (vision.get("num_attention_heads", 12), text.get("num_attention_heads", 8)), acts[0]


def _in_openai_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's tensors under OpenAI's names."""
    found, parts = {}, {}
    for theirs, value in weights.items():
        name = theirs
        for pattern, ours in NAMES:
            name = re.sub(pattern, ours, name)
        if part := re.fullmatch(r"(.*\.attn)\.([qkv])_proj\.(weight|bias)", name):
            parts[f"{part[1]}.in_proj_{part[3]}", part[2]] = value
        elif not name.endswith("position_ids"):
            found[name] = value.T if name in ("visual.proj", "text_projection") else value
    for name in {name for name, _ in parts}:
        found[name] = torch.cat([parts[name, letter] for letter in "qkv"])
    return found


def _same_vocabulary(folder: Path) -> None:
    """A UserError where the folder has another tokenizer's vocabulary than OpenAI's."""
    for name in ("vocab.json", "tokenizer.json"):
        content = json_of(folder / name)
        words = content.get("model", {}).get("vocab", {}) if name == "tokenizer.json" else content
        if any(clip.clip._tokenizer.encoder.get(word) != number for word, number in words.items()):
            raise UserError(
                f"clip.weights: {folder / name} is another tokenizer than OpenAI's, which captions are read by"
            )
