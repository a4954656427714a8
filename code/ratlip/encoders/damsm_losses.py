"""DAMSM: how well pictures and captions match, by words and regions and as wholes (AttnGAN, arXiv 1711.10485)."""

import torch
import torch.nn.functional as F
from torch import Tensor

GAMMA1, GAMMA2, GAMMA3 = 4.0, 5.0, 10.0  # sharpness of the attention, of the sum over words, of the matching
FLOOR = 1e-8  # of the product of two lengths, in a cosine


def attention(regions: Tensor, words: Tensor, real: Tensor) -> Tensor:
    """How much each word of each caption looks at each region of each picture (J, I, T, R); over R it adds up to 1.

    Args:
        regions: (J, D, R) of J pictures. words: (I, D, T) of I captions. real: (I, T) bool, False behind a caption's
            end; what such places look at is without meaning.
    """
    scores = torch.einsum("jdr,idt->jitr", regions, words)
    scores = scores.masked_fill(~real[None, :, :, None], -torch.inf)
    return (GAMMA1 * scores.softmax(2)).softmax(3)


def word_scores(regions: Tensor, words: Tensor, real: Tensor) -> Tensor:
    """Logits (J, I) of picture j and caption i: GAMMA3 log sum over its words of exp(GAMMA2 cos(word, what it looks
    at)). Arguments as for `attention`."""
    seen = torch.einsum("jitr,jdr->jidt", attention(regions, words, real), regions)
    cosines = cosine(seen, words[None])  # (J, I, T)
    return GAMMA3 * (GAMMA2 * cosines).masked_fill(~real, -torch.inf).logsumexp(2)


def sentence_scores(codes: Tensor, sentences: Tensor) -> Tensor:
    """Logits (J, I) of pictures' codes (J, D) and captions' sentences (I, D): GAMMA3 times their cosines."""
    return GAMMA3 * cosine(codes[:, :, None], sentences.T[None])


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosines along axis -2 of vectors of which one set is broadcast to the other's axes."""
    return (a * b).sum(-2) / (a.norm(dim=-2) * b.norm(dim=-2)).clamp_min(FLOOR)


def matching(logits: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross entropies of logits (B, B): each picture (row) is to pick its caption, each caption its picture.

    Args:
        classes: (B,) of the pictures; others of the same class are no wrong answer, and none at all.
    """
    own = torch.arange(len(logits), device=logits.device)
    if classes is not None:
        alike = (classes[:, None] == classes) & (own[:, None] != own)
        logits = logits.masked_fill(alike, -torch.inf)
    return F.cross_entropy(logits, own), F.cross_entropy(logits.T, own)


def damsm_losses(
    regions: Tensor, codes: Tensor, words: Tensor, real: Tensor, sentences: Tensor, classes: Tensor | None = None
) -> dict[str, Tensor]:
    """The four losses of B pairs, in float32 or better: {"w0", "w1", "s0", "s1"}, w of words, s of sentences; 0: of the
    pictures, 1: of the captions.

    Args:
        regions: (B, D, h, w). codes: (B, D). words: (B, D, T). real: (B, T) bool, False behind a caption's end.
        sentences: (B, D). classes: (B,), or None: each picture is of its own.
    """
    regions, codes, words, sentences = (
        values.to(torch.promote_types(values.dtype, torch.float32)) for values in (regions, codes, words, sentences)
    )
    with torch.autocast(regions.device.type, enabled=False):
        w0, w1 = matching(word_scores(regions.flatten(2), words, real), classes)
        s0, s1 = matching(sentence_scores(codes, sentences), classes)
    return {"w0": w0, "w1": w1, "s0": s0, "s1": s1}
