"""Ours without one of its savings, for `speed.py --savings` to measure and for the tests to compare."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from ratlip import trainer
from ratlip.encoders import clip_towers
from ratlip.encoders.clip_towers import FrozenClip
from ratlip.models import attention, blocks
from ratlip.models.blocks import BatchNorm, Conv, GeneratorBlock
from ratlip.models.clip_gan.discriminator import Discriminator

# What is replaced below, as it is.
doubling_kernel, finish, forward = blocks.doubling_kernel, Conv.finish, GeneratorBlock.forward
transformer_block, feature_maps, running = clip_towers.transformer_block, FrozenClip.feature_maps, BatchNorm.running


def resize_then_convolve(x: Tensor, kernel: Tensor, bias: Tensor | None, size: int) -> Tensor:
    """3x3 convolution of the resized map, whatever the resizing."""
    return F.conv2d(blocks.resize(x, size), kernel, bias, padding=1)


def resize_at_entry(block: GeneratorBlock, x: list[Tensor], size: int, affines) -> list[Tensor]:
    """A generator block that resizes before all else, as the released one does; no doubling is left for its filters."""
    cut = blocks.pieces(x, block.conv1.conv.out_channels * size**2)
    return forward(block, [blocks.resize(piece, size) for piece in cut], size, affines)


def finish_with_running_norm(conv: Conv, x: Tensor, *norm: Tensor) -> Tensor:
    """What follows a convolution, with BatchNorm in eval mode done to the map."""
    if conv.bn is not None and not norm:
        norm = [blocks.shuffle(v) if conv.attention is not None else v for v in running(conv.bn)]
        norm = [v.to(x.dtype)[:, None, None] for v in norm]
    return finish(conv, x, *norm)


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention that stores its (L, L) matrices."""
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    if causal:
        scores = scores + torch.full_like(scores[0, 0], -torch.inf).triu(1)
    return scores.softmax(3) @ v


def mlp_with_quick_gelu(x: Tensor, normed: Tensor, mlp, linear) -> Tensor:
    """x + mlp(normed), QuickGELU as it is defined."""
    hidden = mlp.gelu(linear(normed, mlp.c_fc.weight, mlp.c_fc.bias))
    return x + linear(hidden, mlp.c_proj.weight, mlp.c_proj.bias)


def moments_by_autograd(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance as in `ratlip.models.moments`, differentiated by PyTorch."""
    mean = x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
    return mean, (x - mean[:, :, None, None]).square().mean((2, 3))


def maps_with_a_graph(clip: FrozenClip, images: Tensor) -> Tensor:
    """Feature maps whose gradient goes on to the images."""
    with torch.enable_grad():
        return feature_maps(clip, images.detach().requires_grad_())


def stay_trainable(discriminator: Discriminator, requires_grad: bool = True) -> Discriminator:
    """The generator's part of a step gives the discriminator gradients too; they are thrown away after it."""
    if requires_grad:
        discriminator.zero_grad()
    return discriminator


def encode_captions_too(clip: FrozenClip, images: Tensor) -> Tensor:
    """Feature maps, after as many captions have gone through the text tower."""
    clip.text(torch.ones(len(images), clip.context_length, dtype=torch.long, device=images.device))
    return feature_maps(clip, images)


class SeparateAdam(torch.optim.Adam):
    """PyTorch's default Adam, which cannot leave out a step that is not finite: there is none in what is measured."""

    def __init__(self, parameters, lr: float, betas: tuple[float, float], fused: bool):
        super().__init__(parameters, lr, betas)

    def step(self) -> None:
        self.found_inf = None
        super().step()


# For each saving: where it makes a difference, and which attributes of which objects to replace by what. A new saving
# needs an entry here; the tests and the command then take it up.
SAVINGS = {
    "sub-pixel": (("sample", "train"), [
        (blocks, "doubling_kernel", lambda weight: weight),
        (blocks, "resize_and_convolve", resize_then_convolve),
    ]),
    "early affines": (("sample", "train"), [(GeneratorBlock, "forward", resize_at_entry)]),  # sub-pixel goes with it
    "pieces": (("sample", "train"), [(blocks, "pieces", lambda x, elements: x)]),
    "channels-last": (("sample", "train"), [
        (torch, "channels_last", torch.contiguous_format),
        (blocks, "doubling_kernel", lambda weight: doubling_kernel(weight).contiguous()),
    ]),
    "CLIP's products": (("sample", "train"), [
        (FrozenClip, "linear", lambda clip, x, weight, bias=None: F.linear(x, weight, bias)),
    ]),
    "wanted tokens": (("sample", "train"), [
        (clip_towers, "transformer_block", lambda block, x, wanted=slice(None), causal=False, linear=F.linear:
            transformer_block(block, x, causal=causal, linear=linear)[:, wanted]),
    ]),
    "silu": (("sample", "train"), [(clip_towers, "_add_mlp", mlp_with_quick_gelu)]),
    "fused attention": (("sample", "train"), [(clip_towers, "_attend", attend_by_products)]),
    "kept memory": (("sample", "train"), []),  # speed.py does not keep it for this one
    "kept filters": (("sample",), [(Conv, "_filters", Conv._prepare)]),
    "folded norm": (("sample",), [
        (BatchNorm, "running", lambda norm: (torch.ones_like(norm.weight), torch.zeros_like(norm.bias))),
        (Conv, "finish", finish_with_running_norm),
    ]),
    "recomputing": (("train",), [
        (blocks, "recomputed", lambda function, tensors, elements: function(*tensors)),
    ]),
    "moments": (("train",), [(owner, "moments", moments_by_autograd) for owner in (blocks, attention)]),
    "no real graph": (("train",), [(FrozenClip, "feature_maps", maps_with_a_graph)]),
    "lower blocks": (("train",), [(FrozenClip, "feature_maps", lambda clip, images: clip.image(images)[0])]),
    "D frozen for G": (("train",), [(Discriminator, "requires_grad_", stay_trainable)]),
    "captions once": (("train",), [
        (FrozenClip, "feature_maps", encode_captions_too),
        (FrozenClip, "drop_text_tower", lambda clip: None),
    ]),
    "fused Adam": (("train",), [(trainer, "Adam", SeparateAdam)]),
}  # fmt: skip


@contextlib.contextmanager
def without(name: str) -> Iterator[None]:
    """Ours, made and used in this context, does without the saving of that name; "ours": with all of them."""
    with contextlib.ExitStack() as stack:
        for owner, attribute, replacement in [] if name == "ours" else SAVINGS[name][1]:
            stack.enter_context(mock.patch.object(owner, attribute, replacement))
        yield
