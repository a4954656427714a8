"""A CLIP by name or from a file, in the formats people have, with what is stated about it."""

from pathlib import Path

from torch import nn

from ratlip.clips import from_open_clip, hub
from ratlip.clips.files import ClipModel, activation_for, agreed, clip, filled, quiet, read_file, refusing
from ratlip.errors import UserError, first_line


def read(weights: str, source: str = "openai", activation: str | None = None) -> ClipModel:
    """A CLIP on the CPU in float32, its weights exactly as stored.

    Args:
        weights: for "openai" a name that `clip` downloads ("ViT-B/32"), or a file: OpenAI's archive, a state dict in
            its names (PyTorch's or safetensors), Hugging Face's CLIPModel (its folder, or one of its files); for
            "open_clip" architecture:tag, architecture:file, hf-hub:name or local-dir:folder.
        source: "openai" or "open_clip".
        activation: "quick_gelu", "gelu", or None for what the weights state.

    Raises:
        UserError: no such file, not such a CLIP, a download that failed, an activation that is stated nowhere or
            stated otherwise.
    """
    if source == "open_clip":
        return from_open_clip.load(weights, activation)
    if weights in clip.available_models():
        agreed(activation, "quick_gelu", f"OpenAI's {weights}")
        return ClipModel(_downloaded(weights))
    path = Path(weights)
    if weights.startswith(from_open_clip.SCHEMES):
        raise UserError(f"clip.weights: {weights} is a name of open_clip's; add clip.source=open_clip")
    if not path.exists():
        raise UserError(
            f"clip.weights: no file {weights!r}, and no CLIP of that name; "
            f"give a path or one of {', '.join(clip.available_models())}"
        )
    with refusing(path):
        if path.is_dir():
            return hub.load(path, hub.folder_weights(path), activation)
        file = read_file(path)
        if file.is_hub:
            return hub.load(path, file, activation)
        return ClipModel(filled(file.weights, activation_for(path, file, activation)))


def _downloaded(name: str) -> nn.Module:
    try:
        with quiet():  # torch.jit.load is deprecated; OpenAI's archives are in that format
            return clip.load(name, device="cpu", jit=False)[0]
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"clip.weights: {name} could not be downloaded ({first_line(error)}); "
            "fetch the file elsewhere and set clip.weights to its path"
        ) from None
