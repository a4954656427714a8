"""DAMSM's losses against the released numbers, and what masks and neighbours do to them."""

import pytest
import torch
from helpers import family_fixtures, fixture_input, relative_error

from ratlip.encoders.damsm_losses import attention, damsm_losses, sentence_scores, word_scores

LENGTHS = (7, 5, 2)


@pytest.fixture(scope="module")
def answers():
    return family_fixtures("attngan")


@pytest.fixture
def pairs() -> list[torch.Tensor]:
    """Regions, codes, words, which of these are real, sentences: of three pairs, in float64."""
    regions, words = (0.3 * fixture_input(name, *shape).double() for name, shape in
                      (("regions", (3, 256, 17, 17)), ("words3", (3, 256, 7))))  # fmt: skip
    real = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    words = words * real[:, None]
    codes, sentences = (fixture_input(name, 3, 256).double() for name in ("code", "sent3"))
    return [regions, codes, words, real, sentences]


def test_scores_attention_and_losses_are_the_released_ones(pairs, answers):
    regions, codes, words, real, sentences = pairs
    assert relative_error(word_scores(regions.flatten(2), words, real), answers["damsm.word_scores"]) < 1e-6
    assert relative_error(sentence_scores(codes, sentences), answers["damsm.sent_scores"]) < 1e-6
    maps = attention(regions.flatten(2), words, real).unflatten(3, (17, 17))
    assert relative_error(maps[0, 0, :, ::4, ::4], answers["damsm.attention0.slice"]) < 1e-6
    assert relative_error(maps[2, 2, :2, ::4, ::4], answers["damsm.attention2.slice"]) < 1e-6
    for key, classes in (("damsm.loss", torch.tensor([4, 9, 4])), ("damsm.loss.nomask", None)):
        found = torch.stack(list(damsm_losses(*pairs, classes).values()))
        assert relative_error(found, answers[key]) < 1e-6
    single = [values if values.dtype == torch.bool else values.float() for values in pairs]
    assert relative_error(torch.stack(list(damsm_losses(*single).values())), answers["damsm.loss.nomask"]) < 1e-5


def test_gradients_are_the_released_ones(pairs, answers):
    regions, codes, words, _, sentences = (values.requires_grad_(values.is_floating_point()) for values in pairs)
    torch.stack(list(damsm_losses(*pairs, torch.tensor([4, 9, 4])).values())).sum().backward()
    for key, norms in (
        ("regions", regions.grad.flatten(1).norm(dim=1)),
        ("words", words.grad.norm(dim=1)),
        ("code", codes.grad.norm(dim=1)),
        ("sent", sentences.grad.norm(dim=1)),
    ):
        assert relative_error(norms, answers[f"damsm.grad.{key}"]) < 1e-5
    assert not words.grad[2, :, 2:].any()  # behind the end


def test_what_lies_behind_a_captions_end_has_no_part(pairs):
    """Nor has the length to which captions are filled up, or precision below the losses' own."""
    expected = damsm_losses(*pairs)
    regions, codes, words, real, sentences = pairs
    longer = torch.cat([words, torch.randn(3, 256, 4, dtype=torch.float64)], dim=2)
    found = damsm_losses(regions, codes, longer, torch.cat([real, torch.zeros(3, 4, dtype=torch.bool)], 1), sentences)
    for name, value in expected.items():
        assert relative_error(found[name], value) < 1e-9
    with torch.autocast("cpu", torch.bfloat16):
        inside = damsm_losses(regions.float(), codes.float(), words.float(), real, sentences.float())
    assert all(relative_error(inside[name], value) < 1e-5 for name, value in expected.items())
