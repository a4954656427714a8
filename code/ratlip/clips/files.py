"""What a file of CLIP weights holds, and OpenAI's model filled with it."""

import json
import logging
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ratlip import checkpoint
from ratlip.errors import UserError, first_line

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # clip imports pkg_resources, which warns of its end
    import clip

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's training images, RGB in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
RESIZES = {2: "bilinear", 3: "bicubic"}  # by Pillow's numbers
END_OF_TEXT = 49407  # its id, the largest of OpenAI's tokenizer; the start's is the one before
HEAD = 64  # width of an attention head in OpenAI's models
WIDEST = 1024  # of OpenAI's image towers; open_clip's wider ones (ViT-H, g, bigG) have wider heads
UNUSED = {"input_resolution", "context_length", "vocab_size", "logit_bias"}  # stored, but of no tower
ASK = "add clip.activation=quick_gelu (OpenAI's) or clip.activation=gelu (most of open_clip's)"


@dataclass
class ClipModel:
    """A CLIP in OpenAI's structure, and what its source states of its input."""

    model: nn.Module  # with encode_image and encode_text of its own
    mean: Sequence[float] = MEAN  # of the three colours, in [0, 1]
    std: Sequence[float] = STD
    resize: str = "bicubic"  # or bilinear


@dataclass
class File:
    """What a file holds."""

    weights: dict[str, Tensor]  # in OpenAI's names or Hugging Face's
    activation: str | None = None  # as it states
    training: bool = False  # whether open_clip's training left it
    archive: bool = False  # whether it is OpenAI's, of code and weights

    @property
    def is_hub(self) -> bool:
        """Whether it is Hugging Face's CLIPModel."""
        return any(key.startswith(("vision_model.", "text_model.")) for key in self.weights)


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """A UserError in place of what goes wrong with a file of something else."""
    try:
        yield
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else words(error)
        raise UserError(f"clip.weights: {path} is not a CLIP checkpoint ({reason})") from None


def read_file(path: Path) -> File:
    """What a file of CLIP weights holds: OpenAI's archive, a state dict, safetensors or a checkpoint of a training."""
    if code := _archived_code(path):
        with quiet():
            weights = torch.jit.load(path, map_location="cpu").state_dict()
        return File(weights, "quick_gelu" if "sigmoid" in code else "gelu" if "gelu" in code else None, archive=True)
    try:
        content = checkpoint.read(path)
    except UserError as error:
        raise UserError(f"clip.weights: {path} is not a CLIP checkpoint ({error})") from None
    stated = getattr(content, "_metadata", {}).get("", {}).get("activation")
    training = isinstance(content.get("state_dict"), Mapping)
    weights = content["state_dict"] if training else content
    return File({str(key).removeprefix("module."): value for key, value in weights.items()}, stated, training)


def _archived_code(path: Path) -> str:
    """The code of a TorchScript archive, which says what it computes; empty for any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if "/code/" in name and name.endswith(".py")]
            return "\n".join(archive.read(name).decode(errors="replace") for name in names)
    except (zipfile.BadZipFile, OSError):
        return ""


def activation_for(path: Path, file: File, asked: str | None) -> str:
    """The activation of a file in OpenAI's names: as it states, or as asked."""
    if any(key.startswith("visual.layer1.") for key in file.weights):
        raise UserError(f"clip.weights: {path} has a ResNet image tower; a ViT such as ViT-B/32 is needed")
    for key in ("visual.proj", "text_projection"):
        file.weights[key]  # a KeyError where it is no CLIP at all: better said than asking for its activation
    if found := agreed(asked, file.activation, str(path)):
        return found
    if file.training:
        raise UserError(
            f"clip.weights: {path} is a checkpoint of open_clip's training, which does not state its activation: set "
            f"clip.source=open_clip clip.weights=ARCHITECTURE:{path}, or {ASK}"
        )
    raise UserError(f"clip.weights: {path} is a bare state dict, which does not state its activation: {ASK}")


def agreed(asked: str | None, stated: str | None, what: str) -> str | None:
    """What is asked for or stated; a UserError where both are and differ."""
    if asked and stated and asked != stated:
        raise UserError(
            f"clip.activation is {asked}, but {what} states {stated}: take clip.activation={stated}, or leave it out"
        )
    return stated or asked


def filled(weights: Mapping[str, Tensor], activation: str, heads: tuple[int, int] | None = None) -> nn.Module:
    """OpenAI's model with these weights, of the sizes that their shapes give.

    Not by `clip.load`, which rounds to half precision and knows only one activation, hidden width and width of head.

    Args:
        heads: of attention, in the image and the text tower. None: OpenAI's rule.
    """
    (width, _, patch, _), text_width = weights["visual.conv1.weight"].shape, len(weights["ln_final.weight"])
    if heads is None and width > WIDEST:
        raise UserError(
            f"clip.weights: an image tower of width {width} is none of OpenAI's, and a state dict does not say how "
            "many heads it has; load it by clip.source=open_clip, or from Hugging Face's folder with its config.json"
        )
    heads = heads or (width // HEAD, text_width // HEAD)
    depth, text_depth = (
        1 + max(int(key[len(tower) :].split(".")[0]) for key in weights if key.startswith(tower))
        for tower in ("visual.transformer.resblocks.", "transformer.resblocks.")
    )
    grid = round((len(weights["visual.positional_embedding"]) - 1) ** 0.5)
    context, vocabulary = len(weights["positional_embedding"]), len(weights["token_embedding.weight"])
    embedding = weights["text_projection"].shape[1]
    model = clip.model.CLIP(
        embedding, grid * patch, 0, width, patch, context, vocabulary, text_width, heads[1], text_depth
    )
    model.visual.transformer = clip.model.Transformer(width, depth, heads[0])
    for name, block in model.named_modules():
        if isinstance(block, clip.model.ResidualAttentionBlock):
            hidden = len(weights[f"{name}.mlp.c_fc.bias"])
            if hidden != block.mlp.c_fc.out_features:
                size = block.mlp.c_fc.in_features
                block.mlp.c_fc, block.mlp.c_proj = nn.Linear(size, hidden), nn.Linear(hidden, size)
            if activation == "gelu":
                block.mlp.gelu = nn.GELU()
    own, found = model.state_dict().keys(), weights.keys() - UNUSED
    if own != found:
        lack, extra = sorted(own - found), sorted(found - own)
        raise ValueError(f"it lacks {lack[0]}" if lack else f"it has {extra[0]}, which OpenAI's CLIP has not")
    model.load_state_dict({key: weights[key] for key in own})
    return model.eval()


def activation_of(model: nn.Module) -> str:
    """The activation that a CLIP computes with, in both towers."""
    names = {}
    for tower in (model.visual.transformer, model.transformer):
        layer = tower.resblocks[0].mlp.gelu
        plain = isinstance(layer, nn.GELU) and layer.approximate == "none"
        names["quick_gelu" if type(layer).__name__ == "QuickGELU" else "gelu" if plain else str(layer)] = True
    return " and ".join(names)


def json_of(path: Path) -> dict:
    """The content of a JSON file, empty where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({first_line(error)})") from None


def words(error: Exception) -> str:
    """An exception's message in one line, shortened."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


@contextmanager
def quiet() -> Iterator[None]:
    """Without other packages' warnings and log lines."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
