"""Frozen CLIP: one copy of the weights that serves as text encoder, image encoder and prompted mapper."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ratlip import clips
from ratlip import device as devices
from ratlip.clips.files import END_OF_TEXT, HEAD, MEAN, STD, activation_of, clip
from ratlip.errors import UserError, first_line

# What OpenAI's models compute with, beside their weights and a head for every 64 of their width.
OPENAI = {
    "activation": "quick_gelu",
    "mean": [round(x, 6) for x in MEAN],
    "std": [round(x, 6) for x in STD],
    "resize": "bicubic",
}
CUT_BATCH = 256  # captions tokenized at a time
OTHERWISE = "is built otherwise than OpenAI's CLIP, which is all that is read here"
TOLERANCE = 1e-3  # of our towers and the model's own, largest difference over largest value; 1e-6 is usual in float32


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
        mean, std: of the three colours in [0, 1], by which its images are normalised.
        resize: "bicubic" or "bilinear", with the standard input.
        name: where it is from, for people.
    """

    def __init__(
        self,
        model: nn.Module,
        feature_blocks: Sequence[int] | None = None,
        prompt_blocks: Sequence[int] | None = None,
        preprocess: str = "standard",
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        resize: str = "bicubic",
        name: str = "CLIP",
    ):
        super().__init__()
        self.name = name
        self.clip = model.float().eval().requires_grad_(False)
        visual = model.visual
        if not hasattr(visual, "class_embedding"):
            raise UserError("clip.weights: this CLIP has a ResNet image tower; a ViT such as ViT-B/32 is needed")
        if visual.conv1.kernel_size[0] != visual.conv1.kernel_size[1] or not _is_square(visual.positional_embedding):
            raise UserError("clip.weights: this CLIP sees pictures or patches that are not square")
        self.width = visual.conv1.out_channels
        self.patch = visual.conv1.kernel_size[0]
        self.grid = round((len(visual.positional_embedding) - 1) ** 0.5)  # patches along one side
        self.resolution = self.grid * self.patch  # pixels along one side
        self.depth = len(visual.transformer.resblocks)
        self.embedding_dim = visual.proj.shape[1]
        self.context_length, self.text_width = model.positional_embedding.shape
        self.feature_blocks = _blocks(
            "clip.feature_blocks", feature_blocks, default_feature_blocks(self.depth), self.depth
        )
        self.prompt_blocks = _blocks("clip.prompt_blocks", prompt_blocks, default_prompt_blocks(self.depth), self.depth)
        self.preprocess = preprocess
        self.products = "linear"  # how matrix products are computed; ratlip.choices sets what is fastest here
        heads = [tower.resblocks[0].attn.num_heads for tower in (visual.transformer, model.transformer)]
        self.settings = {
            "activation": activation_of(model),
            "heads": heads,  # of the image and the text tower
            **{name: [round(x, 6) for x in values] for name, values in (("mean", mean), ("std", std))},
            "resize": resize,
        }
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def shape(self) -> dict[str, int]:
        """What networks built on this CLIP depend on."""
        return {"embedding": self.embedding_dim, "width": self.width, "grid": self.grid, "depth": self.depth}

    @cached_property
    def identity(self) -> dict:
        """Which CLIP this is: its `shape`, a checksum of both towers' weights, whatever file they came in, and the
        `settings` that decide what it computes from them. Without the checksum where there are only shapes."""
        weights = {key: value for key, value in self.clip.state_dict().items() if not key.startswith("logit_")}
        digest = hashlib.sha256()
        for key in sorted(weights):
            if weights[key].is_meta:
                return {**self.shape, **self.settings}
            digest.update(key.encode())
            digest.update(weights[key].cpu().contiguous().numpy())
        return {**self.shape, **self.settings, "checksum": digest.hexdigest()}

    def unlike_openai(self, image: bool) -> str:
        """In words, how the image or the text tower computes otherwise than OpenAI's would with these weights; empty
        where it does not. It tells caches apart that the weights alone do not."""
        tower, width = (0, self.width) if image else (1, self.text_width)
        own = {**self.settings, "heads": self.settings["heads"][tower]}
        openai = {**OPENAI, "heads": width // HEAD}
        names = ["activation", "heads", *(("mean", "std", "resize") if image else ())]
        return ", ".join(f"{name} {own[name]}" for name in names if own[name] != openai[name])

    def train(self, mode: bool = True) -> "FrozenClip":
        """Stays in eval mode whatever is asked."""
        return super().train(False)

    @property
    def limit(self) -> str:
        """How long a caption it reads, in words."""
        return f"{self.context_length} tokens that CLIP reads"

    def tokenize(self, captions: Sequence[str], whole: bool = False) -> Tensor:
        """Captions -> token ids (B, context length), int64; longer captions are cut, `whole` or not."""
        return clip.tokenize(list(captions), context_length=self.context_length, truncate=True).long()

    def cut(self, captions: Sequence[str], whole: bool = False) -> list[int]:
        """Numbers of the captions that `tokenize` cuts: of which one token more than it reads would be filled."""
        # A token is a byte or more, and two mark the ends: most captions are too short for the tokenizer to be asked.
        longer = [n for n, caption in enumerate(captions) if len(caption.encode()) > self.context_length - 2]
        found = []
        for batch in (longer[i : i + CUT_BATCH] for i in range(0, len(longer), CUT_BATCH)):
            tokens = clip.tokenize([captions[n] for n in batch], context_length=self.context_length + 1, truncate=True)
            found += [n for n, filled in zip(batch, tokens[:, -1].ne(0).tolist(), strict=True) if filled]
        return found

    def check(self, captions: Sequence[str], place: Callable[[int], str]) -> None:
        """Nothing: CLIP reads any text."""

    def encode(self, tokens: Tensor) -> Tensor:
        """Token ids of `tokenize` -> sentence embeddings (B, E), on CLIP's device."""
        return self.text(devices.send(tokens, self.mean.device))[0]

    def add_to(self, digest) -> None:
        """Add all that its sentence embeddings depend on, besides the captions, to a hash of hashlib."""
        for name, weight in self.clip.state_dict().items():
            if not name.startswith("visual."):
                digest.update(weight.cpu().numpy().tobytes())
        digest.update(self.unlike_openai(image=False).encode())

    def text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Text encoder: token ids (B, L) -> sentence embedding (B, E), token features (B, L, text width).

        The sentence embedding is the projected feature of the end-of-text token, not normalised; the token
        features are taken after `ln_final` and are not projected.
        """
        model = self.clip
        x = model.token_embedding(tokens) + model.positional_embedding[: tokens.shape[1]]  # (B, L, W)
        for block in model.transformer.resblocks:
            x = transformer_block(block, x, causal=True, linear=self.linear)
        words = model.ln_final(x)
        end_of_text = words[torch.arange(len(tokens), device=tokens.device), tokens.argmax(dim=1)]  # the largest id
        return end_of_text @ model.text_projection, words

    def drop_text_tower(self) -> None:
        """Free the text encoder's memory, where every caption there is has been encoded; `text` is gone then."""
        self.identity  # noqa: B018 (kept from here on: it needs all the weights)
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

    def regions(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> the last block's patch tokens, normalised and projected as the class token
        is (B, E, g, g), and the embedding (B, E)."""
        visual = self.clip.visual
        tokens = visual.ln_post(self._run(self._patches(images), range(self.depth))[0]) @ visual.proj
        return self._to_map(tokens[:, 1:]), tokens[:, 0]

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
            images = F.interpolate(
                images.float(), size, mode=self.settings["resize"], antialias=True, align_corners=False
            )
        return (images - self.mean) / self.std

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """F.linear, in the form that `products` names."""
        return PRODUCTS[self.products](x, weight, bias)

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
            tokens = torch.cat([x, prompts[i][:, None]], dim=1) if i in prompts else x
            x = transformer_block(block, tokens, wanted, linear=self.linear)
            if i in self.feature_blocks:
                maps.append(self._to_map(x[:, 1:]))
        return x, maps

    def _to_map(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # (B, W, g, g)


def transformer_block(
    block: nn.Module,
    x: Tensor,
    wanted: slice = slice(None),
    causal: bool = False,
    linear: Callable[..., Tensor] = F.linear,
) -> Tensor:
    """One pre-norm block over x (B, L, W), with CLIP's weights, for the tokens `wanted` of it; attention without
    storing the (L, L) matrix. `linear`: F.linear, in whichever form."""
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
    return _add_mlp(x, block.ln_2(x), block.mlp, linear)


def as_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of x (B, L, I), weight (O, I) and bias (O,) -> (B, L, O), on a CPU in full precision as a 1x1
    convolution. That PyTorch gives to oneDNN, and products to MKL: which is faster differs between processors."""
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):  # oneDNN's in either form
        return F.linear(x, weight, bias)
    return F.conv2d(x.transpose(1, 2).unsqueeze(2), weight[:, :, None, None], bias).squeeze(2).transpose(1, 2)


PRODUCTS = {"linear": F.linear, "convolution": as_convolution}  # forms of clip.products; the published one first


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention of q, k, v (B, heads, L, d) -> (B, heads, L, d)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not causal:
        # PyTorch's fused attention takes several times as long backwards here, and is not faster forwards.
        return (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(3) @ v
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _add_mlp(x: Tensor, normed: Tensor, mlp: nn.Module, linear: Callable[..., Tensor]) -> Tensor:
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


def _is_square(positions: Tensor) -> bool:
    """Whether positions (1 + g*g, W) are of a class token and a square grid."""
    return math.isqrt(len(positions) - 1) ** 2 == len(positions) - 1


def load_clip(weights: str, source: str = "openai", activation: str | None = None, **towers) -> FrozenClip:
    """Load a CLIP on the CPU, and see that our towers compute what its own do.

    Args:
        weights, source, activation: as `ratlip.clips.read` takes them.
        towers: further arguments of FrozenClip.

    Raises:
        UserError: no such file, not a CLIP, a download that failed, no or another activation, or a CLIP that is built
            otherwise than OpenAI's.
    """
    found = clips.read(weights, source, activation)
    vocabulary = len(found.model.token_embedding.weight)
    if vocabulary != END_OF_TEXT + 1:
        raise UserError(f"clip.weights: {weights} has another tokenizer than OpenAI's: {vocabulary} words")
    own = FrozenClip(found.model, mean=found.mean, std=found.std, resize=found.resize, name=weights, **towers)
    try:
        differs = _difference(own)
    except (AttributeError, RuntimeError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"clip.weights: {weights} {OTHERWISE} ({first_line(error)})") from None
    if differs:
        raise UserError(f"clip.weights: {weights} {OTHERWISE}: {differs}")
    return own


@torch.no_grad()
def _difference(clip: FrozenClip) -> str:
    """How far our towers are from the model's own encode_image and encode_text, in words; empty within TOLERANCE."""
    random = torch.Generator().manual_seed(0)  # not the one that draws the networks
    images = torch.rand(1, 3, clip.resolution, clip.resolution, generator=random) * 2 - 1
    tokens = torch.randint(1, END_OF_TEXT - 1, (2, clip.context_length), generator=random)
    tokens[:, 0], tokens[0, -1] = END_OF_TEXT - 1, END_OF_TEXT  # the one fills its length, the other ends before
    tokens[1, clip.context_length // 2 :] = 0
    tokens[1, clip.context_length // 2] = END_OF_TEXT
    for name, ours, theirs in (
        ("images", clip.image(images)[1], clip.clip.encode_image(clip.clip_input(images))),
        ("captions", clip.text(tokens)[0], clip.clip.encode_text(tokens)),
    ):
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        if not error < TOLERANCE:  # a NaN too
            return f"its own embeddings of {name} differ by {error:.1%}"
    return ""


def require_same(clip: FrozenClip, then: Mapping, what: str, insist: bool) -> str:
    """Compare a CLIP with the one that a checkpoint was trained with.

    Args:
        then: the `identity` that was stored, or as much of it as is known. {}: no CLIP matters to it.
        what: the checkpoint, for messages.
        insist: take another CLIP of the same shapes all the same.

    Returns:
        what is to be said of it, or an empty text.

    Raises:
        UserError: other shapes; another CLIP, unless `insist`.
    """
    if not then:
        return ""
    if any(then.get(key) != value for key, value in clip.shape.items()):
        shapes = [", ".join(f"{key} {found.get(key)}" for key in clip.shape) for found in (then, clip.shape)]
        raise UserError(f"{what} was trained with a CLIP of {shapes[0]}; clip.weights is one of {shapes[1]}")
    now = clip.identity if "checksum" in then else {**clip.shape, **clip.settings}
    other = [
        f"{key} {_short(then[key])}, here {_short(now[key])}" for key in now if then.get(key, now[key]) != now[key]
    ]
    if other and not insist:
        raise UserError(
            f"{what} was trained with another CLIP ({'; '.join(other)}): set clip.weights (and clip.source, "
            "clip.activation) to that one; clip.insist=true takes this one all the same"
        )
    if other:
        return f"another CLIP than it was trained with, as clip.insist says ({'; '.join(other)})"
    known = "checksum" in then
    return "" if known else "which CLIP it was trained with is not stored in it; only shapes could be compared"


def trained_with(content: Mapping) -> dict:
    """What a checkpoint's content says about its CLIP. Before checksums were stored, normalisation was always OpenAI's,
    and whatever came by clip.source=openai was computed with QuickGELU."""
    then = dict(content["clip"] or {})
    if "activation" in then or not then:
        return then
    before = {key: OPENAI[key] for key in ("mean", "std", "resize")}
    if content["config"].get("clip.source", "openai") == "openai":
        before["activation"] = OPENAI["activation"]
    return {**then, **before}


def _short(value: object) -> str:
    return value[:8] if isinstance(value, str) and len(value) == 64 else str(value)
