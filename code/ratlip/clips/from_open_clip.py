"""Models that open_clip makes, with what it states of them."""

import pickle
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from ratlip.clips import hub
from ratlip.clips.files import (
    ASK,
    MEAN,
    RESIZES,
    STD,
    ClipModel,
    activation_of,
    agreed,
    clip,
    json_of,
    quiet,
    read_file,
    refusing,
    words,
)
from ratlip.errors import UserError

SCHEMES = ("hf-hub:", "local-dir:")  # of open_clip's names
# Captions that tell tokenizers apart: punctuation, capitals, entities, numbers, other scripts, and too many words.
CAPTIONS = (
    "a small blue heart, at the top-left: on a yellow background!",
    "It's 3 o'clock &amp; the café's  RED sign_says 'hi' (naïve), 東京 🙂.",
    "one green bird " * 60,
)
FAILURES = (  # what open_clip and huggingface_hub raise over files and names
    RuntimeError,
    OSError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    ImportError,
    AssertionError,
    pickle.UnpicklingError,
)


def load(weights: str, activation: str | None) -> ClipModel:
    """The model of architecture:tag, architecture:file, hf-hub:name or local-dir:folder."""
    try:
        import open_clip
    except ImportError:
        raise UserError("clip.source: open_clip is not installed; run: python -m pip install open_clip_torch") from None
    if Path(weights).is_dir():
        weights = f"local-dir:{weights}"
    scheme = weights.startswith(SCHEMES)
    name, _, pretrained = (weights, "", "") if scheme else weights.partition(":")
    forced = {} if scheme else _forced(name, pretrained, activation)
    try:
        with quiet():
            model = open_clip.create_model(name, pretrained or None, require_pretrained=True, **forced)
    except FAILURES as error:
        if weights.startswith("hf-hub:") and (folder := _hub_folder(weights.removeprefix("hf-hub:"))):
            with refusing(folder):
                return hub.load(folder, hub.folder_weights(folder), activation)
        raise UserError(f"clip.weights: open_clip cannot load {weights} ({words(error)}){_advice(weights)}") from None
    if not hasattr(model.visual, "class_embedding") or not hasattr(model, "token_embedding"):
        raise UserError(
            f"clip.weights: the towers of {weights} are built differently from OpenAI's (a ResNet, timm's, a text "
            "model of its own); a ViT such as ViT-B-32 is needed"
        )
    agreed(activation, activation_of(model), f"open_clip's {weights}")
    _same_tokenizer(open_clip, name, model)
    visual = model.visual
    resize = getattr(visual, "preprocess_cfg", {}).get("interpolation", "bicubic")
    if resize not in RESIZES.values():
        raise UserError(f"clip.weights: {weights} states interpolation {resize}; bicubic and bilinear are read")
    return ClipModel(model, getattr(visual, "image_mean", MEAN), getattr(visual, "image_std", STD), resize)


def _forced(architecture: str, pretrained: str, activation: str | None) -> dict:
    """What create_model must be told beyond the architecture: what the weights state, which it does not look at."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    named = f"open_clip's {architecture}"
    quick = (open_clip.get_model_config(architecture.replace("/", "-")) or {}).get("quick_gelu", False)
    path, preprocess = Path(pretrained), None
    if tag := get_pretrained_cfg(architecture.replace("/", "-"), pretrained):
        found = agreed(activation, "quick_gelu" if tag.get("quick_gelu") else "gelu", f"{named}:{pretrained}")
    elif not path.is_file():
        return {}  # open_clip says what is wrong
    else:
        with refusing(path):
            file = read_file(path)
        if file.is_hub or file.archive:
            kind = "Hugging Face's CLIPModel" if file.is_hub else "OpenAI's archive"
            raise UserError(f"clip.weights: {path} is {kind}: set clip.source=openai clip.weights={path}")
        stated, beside = file.activation, json_of(path.with_name("open_clip_config.json"))
        if beside:
            preprocess = beside.get("preprocess_cfg")
            stated = "quick_gelu" if beside.get("model_cfg", {}).get("quick_gelu") else "gelu"
        found = agreed(activation, stated, str(path))
        found = agreed(found, "quick_gelu" if quick else None, named) or ("gelu" if file.training else None)
        if found is None:
            raise UserError(f"clip.weights: {path} is a bare state dict, which does not state its activation: {ASK}")
    return {"force_quick_gelu": found == "quick_gelu", "force_preprocess_cfg": preprocess}


def _same_tokenizer(open_clip, name: str, model: nn.Module) -> None:
    """A UserError where open_clip reads captions for this model otherwise than OpenAI's tokenizer does."""
    length = len(model.positional_embedding)
    try:
        with quiet():
            theirs = open_clip.get_tokenizer(name if name.startswith(SCHEMES) else name.replace("/", "-"))
            tokens = theirs(list(CAPTIONS), context_length=length)
    except FAILURES as error:
        raise UserError(f"clip.weights: the tokenizer of {name} cannot be loaded ({words(error)})") from None
    if not torch.equal(tokens.long(), clip.tokenize(list(CAPTIONS), length, truncate=True).long()):
        raise UserError(f"clip.weights: {name} has another tokenizer than OpenAI's, which captions are read by")


def _hub_folder(name: str) -> Path | None:
    """Where a repository of the Hugging Face hub lies that holds a CLIPModel, downloaded once; None: it holds none."""
    from huggingface_hub import snapshot_download  # open_clip needs it too

    with suppress(*FAILURES), quiet():
        for weights in ("model*.safetensors*", "pytorch_model*.bin*"):
            folder = Path(snapshot_download(name, allow_patterns=["*.json", weights]))
            if any((folder / known).is_file() for known in hub.WEIGHTS) and (folder / "config.json").is_file():
                return folder
    return None


def _advice(weights: str) -> str:
    if weights.startswith("hf-hub:"):
        return "; without internet copy the repository's folder here and set clip.weights=local-dir:FOLDER"
    if weights.startswith("local-dir:"):
        return (
            f"; for Hugging Face's CLIPModel set clip.source=openai clip.weights={weights.removeprefix('local-dir:')}"
        )
    names = "architecture:tag, architecture:file, hf-hub:name or local-dir:folder"
    return f"; give {names}, without internet one that is on this machine"
