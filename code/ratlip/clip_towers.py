"""Frozen CLIP: one copy of the weights that serves as text encoder, image encoder and prompted mapper."""

import math
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ratlip.errors import UserError, first_line

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # clip imports pkg_resources, which warns of its end
    import clip

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, RGB in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)


class FrozenClip(nn.Module):
    """The three towers over one OpenAI CLIP with a ViT (Radford et al. 2021, arXiv 2103.00020).

    Depth, width, patch grid and embedding size are read from the model. Its parameters never take a gradient;
    gradients do flow through it to images, feature maps and prompts.

    Args:
        model: a `clip.model.CLIP` with a vision transformer. It is turned to float32 and frozen in place.
        feature_blocks: vision blocks, counted from 0, whose patch tokens the discriminator reads. None takes
            the released (1, 4, 8) of 12, scaled to the depth.
        prompt_blocks: vision blocks that get a prompt when used as mapper. None: the released 1..8 of 12, scaled.
        preprocess: "standard" (antialiased bicubic, CLIP's normalisation) or "released" (nearest, and the range
            mapped twice, as the published GALIP and RATLIP numbers were made).
    """

    def __init__(
        self,
        model: nn.Module,
        feature_blocks: Sequence[int] | None = None,
        prompt_blocks: Sequence[int] | None = None,
        preprocess: str = "standard",
    ):
        super().__init__()
        self.clip = model.float().eval().requires_grad_(False)
        visual = model.visual
        if not hasattr(visual, "class_embedding"):
            raise UserError("clip.weights: this CLIP has a ResNet image tower; a ViT such as ViT-B/32 is needed")
        self.width = visual.conv1.out_channels
        self.patch = visual.conv1.kernel_size[0]
        self.grid = round((len(visual.positional_embedding) - 1) ** 0.5)  # patches along one side
        self.resolution = self.grid * self.patch  # pixels along one side
        self.depth = len(visual.transformer.resblocks)
        self.embedding_dim = visual.proj.shape[1]
        self.context_length = len(model.positional_embedding)
        self.feature_blocks = _blocks(
            "clip.feature_blocks", feature_blocks, default_feature_blocks(self.depth), self.depth
        )
        self.prompt_blocks = _blocks("clip.prompt_blocks", prompt_blocks, default_prompt_blocks(self.depth), self.depth)
        self.preprocess = preprocess
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    @property
    def shape(self) -> dict[str, int]:
        """What networks built on this CLIP depend on."""
        return {"embedding": self.embedding_dim, "width": self.width, "grid": self.grid, "depth": self.depth}

    def train(self, mode: bool = True) -> "FrozenClip":
        """Stays in eval mode whatever is asked."""
        return super().train(False)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Captions -> token ids (B, context length), int64; longer captions are cut."""
        return clip.tokenize(list(captions), context_length=self.context_length, truncate=True).long()

    def cuts(self, captions: Sequence[str]) -> list[bool]:
        """Whether `tokenize` cuts each caption: whether one token more than it reads would be filled."""
        longer = clip.tokenize(list(captions), context_length=self.context_length + 1, truncate=True)
        return longer[:, -1].ne(0).tolist()

    def text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Text encoder: token ids (B, L) -> sentence embedding (B, E), token features (B, L, text width).

        The sentence embedding is the projected feature of the end-of-text token, not normalised; the token
        features are taken after `ln_final` and are not projected.
        """
        model = self.clip
        x = model.token_embedding(tokens) + model.positional_embedding[: tokens.shape[1]]  # (B, L, W)
        for block in model.transformer.resblocks:
            x = transformer_block(block, x, causal=True)
        words = model.ln_final(x)
        end_of_text = words[torch.arange(len(tokens), device=tokens.device), tokens.argmax(dim=1)]  # the largest id
        return end_of_text @ model.text_projection, words

    def drop_text_tower(self) -> None:
        """Free the text encoder's memory, where every caption there is has been encoded; `text` is gone then."""
        for name in ("transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection"):
            delattr(self.clip, name)

    def image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Image encoder: images (B, 3, H, W) in [-1, 1] -> feature maps (B, N, W, g, g), embedding (B, E).

        N is the number of `feature_blocks`, W the tower's width, g its patch grid. The embedding is not normalised.
        """
        class_token = slice(0, 1)  # all that the embedding is made of
        tokens, maps = self._run(self._patches(images), range(self.depth), class_token)
        visual = self.clip.visual
        return torch.stack(maps, dim=1), visual.ln_post(tokens[:, 0]) @ visual.proj

    def feature_maps(self, images: Tensor) -> Tensor:
        """The feature maps of `image` alone; blocks above the last one that is read do not run."""
        return torch.stack(self._run(self._patches(images), range(self.feature_blocks[-1] + 1))[1], dim=1)

    def mapper(self, features: Tensor, prompts: Tensor) -> Tensor:
        """Prompted mapper (GALIP, arXiv 2301.12959): features (B, W, g, g) in place of patch embeddings,
        prompts (B, len(prompt_blocks), W) -> patch tokens of the last block (B, W, g, g)."""
        patches = features.flatten(2).transpose(1, 2)  # (B, g*g, W)
        prompted = dict(zip(self.prompt_blocks, prompts.unbind(1), strict=True))
        tokens, _ = self._run(patches, range(self.depth), slice(1, 1 + self.grid**2), prompted)
        return self._to_map(tokens)

    def clip_input(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> what enters the image tower (B, 3, R, R)."""
        images = images * 0.5 + 0.5
        size = (self.resolution, self.resolution)
        if self.preprocess == "released":
            return ((F.interpolate(images, size, mode="nearest") + 1) * 0.5 - self.mean) / self.std
        if images.shape[-2:] != size:  # in float32: CPUs have no antialiasing in bfloat16
            images = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False)
        return (images - self.mean) / self.std

    def _patches(self, images: Tensor) -> Tensor:
        return self.clip.visual.conv1(self.clip_input(images)).flatten(2).transpose(1, 2)  # (B, g*g, W)

    def _run(
        self, patches: Tensor, blocks: range, last: slice | None = None, prompts: dict[int, Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Patch embeddings (B, g*g, W) -> tokens (B, 1 + g*g, W) after `blocks`, of the last one only the slice `last`,
        and maps of the feature blocks among them."""
        visual, prompts, maps = self.clip.visual, prompts or {}, []
        class_token = visual.class_embedding.expand(len(patches), 1, -1)
        x = visual.ln_pre(torch.cat([class_token, patches], dim=1) + visual.positional_embedding)
        for i in blocks:
            block = visual.transformer.resblocks[i]
            wanted = slice(0, 1 + self.grid**2)  # not the prompt
            if last and i == blocks[-1] and i not in self.feature_blocks:
                wanted = last
            x = transformer_block(block, torch.cat([x, prompts[i][:, None]], dim=1) if i in prompts else x, wanted)
            if i in self.feature_blocks:
                maps.append(self._to_map(x[:, 1:]))
        return x, maps

    def _to_map(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # (B, W, g, g)


def transformer_block(block: nn.Module, x: Tensor, wanted: slice = slice(None), causal: bool = False) -> Tensor:
    """One pre-norm block over x (B, L, W), with CLIP's weights, for the tokens `wanted` of it; attention without
    storing the (L, L) matrix."""
    attention, normed = block.attn, block.ln_1(x)
    width = x.shape[-1]
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    q = linear(normed[:, wanted], weight[:width], bias[:width])
    kv = linear(normed, weight[width:], bias[width:])
    q, k, v = (
        part.unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for part in (q, *kv.chunk(2, dim=2))
    )  # each (B, heads, L, W / heads)
    attended = _attend(q, k, v, causal).transpose(1, 2).flatten(2)
    x = x[:, wanted] + linear(attended, attention.out_proj.weight, attention.out_proj.bias)
    return _add_mlp(x, block.ln_2(x), block.mlp)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of x (B, L, I), weight (O, I) and bias (O,) -> (B, L, O)."""
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    # As a 1x1 convolution, which PyTorch gives to oneDNN. Products in float32 go to MKL, which takes more than twice as
    # long on AMD's processors.
    return F.conv2d(x.transpose(1, 2).unsqueeze(2), weight[:, :, None, None], bias).squeeze(2).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention of q, k, v (B, heads, L, d) -> (B, heads, L, d)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not causal:
        # PyTorch's fused attention takes several times as long backwards here, and is not faster forwards.
        return (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(3) @ v
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _add_mlp(x: Tensor, normed: Tensor, mlp: nn.Module) -> Tensor:
    """x + mlp(normed), all (B, L, W)."""
    if type(mlp.gelu).__name__ != "QuickGELU":
        return x + mlp(normed)
    # QuickGELU h * sigmoid(1.702 h) is silu(1.702 h) / 1.702: one pass over the hidden layer in place of three, and one
    # in place of four back. The factors go to what is smaller than it, before and after.
    hidden = F.silu(linear(normed * 1.702, mlp.c_fc.weight, mlp.c_fc.bias * 1.702))
    return torch.add(x + mlp.c_proj.bias, linear(hidden, mlp.c_proj.weight), alpha=1 / 1.702)


def default_feature_blocks(depth: int) -> tuple[int, ...]:
    """Blocks 1, 4, 8 of 12, at the same relative depth in a tower of `depth` blocks: 0, 1, 2 of 4."""
    return tuple(sorted({math.ceil(depth * last / 12) - 1 for last in (2, 5, 9)}))


def default_prompt_blocks(depth: int) -> tuple[int, ...]:
    """Blocks 1..8 of 12: all but the first, up to three quarters of the depth (at least one of two)."""
    return tuple(range(1, max(depth * 9 // 12, min(depth, 2))))


def _blocks(key: str, asked: Sequence[int] | None, default: tuple[int, ...], depth: int) -> tuple[int, ...]:
    if asked is None:
        return default
    if not asked or list(asked) != sorted(set(asked)) or not all(0 <= i < depth for i in asked):
        raise UserError(f"{key}: {list(asked)} must be increasing block numbers from 0 to {depth - 1} of this CLIP")
    return tuple(asked)


def load_clip(weights: str, source: str = "openai", **towers) -> FrozenClip:
    """Load a CLIP on the CPU.

    Args:
        weights: for "openai" a model name that `clip` can download ("ViT-B/32"), or a path to OpenAI's archive or
            to a state dict; for "open_clip" an architecture and a tag or path ("ViT-B-32:laion2b_s34b_b79k").
        source: "openai" or "open_clip".
        towers: further arguments of FrozenClip.

    Raises:
        UserError: no such file, not a CLIP, or a download that failed.
    """
    model = _load_open_clip(weights) if source == "open_clip" else _load_openai(weights)
    return FrozenClip(model, **towers)


def _load_openai(weights: str) -> nn.Module:
    if weights not in clip.available_models() and not Path(weights).is_file():
        raise UserError(
            f"clip.weights: no file {weights!r}, and no CLIP of that name; "
            f"give a path or one of {', '.join(clip.available_models())}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit.load is deprecated; OpenAI's archives are in that format
            return clip.load(weights, device="cpu", jit=False)[0]
    except (RuntimeError, KeyError, AttributeError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"clip.weights: {weights} is not a CLIP checkpoint ({first_line(error)})") from None
    except OSError as error:
        raise UserError(
            f"clip.weights: {weights} could not be downloaded ({first_line(error)}); "
            "fetch the file elsewhere and set clip.weights to its path"
        ) from None


def _load_open_clip(weights: str) -> nn.Module:
    try:
        import open_clip
    except ImportError:
        raise UserError("clip.source: open_clip is not installed; run: python -m pip install open_clip_torch") from None
    architecture, _, pretrained = weights.partition(":")
    try:
        return open_clip.create_model(architecture, pretrained=pretrained or None, require_pretrained=True)
    except (RuntimeError, OSError, KeyError) as error:
        raise UserError(f"clip.weights: open_clip cannot load {weights} ({first_line(error)})") from None
