"""Reading the demo's attributes back from pixels: real, noisy, altered and meaningless pictures."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ratlip.data import demo
from ratlip.errors import UserError
from ratlip.metrics.caption_accuracy import CaptionAccuracy, read_attributes
from ratlip.metrics.metric import Scored

FIELDS = demo.Attributes._fields


def pictures(combinations: list[demo.Attributes], seed: int = 0) -> Tensor:
    levels = demo.render(combinations, np.random.default_rng(seed))
    return torch.from_numpy(levels).permute(0, 3, 1, 2).float() / 127.5 - 1


def scored(images: Tensor, captions: list[str]) -> Scored:
    return Scored(torch.arange(len(images)), images, captions, None)


def scores(images: Tensor, combinations: list[demo.Attributes], batch: int = 7) -> dict[str, float]:
    """Accuracy of images against captions of `combinations`, counted in uneven batches."""
    metric, rng = CaptionAccuracy(None, len(images)), np.random.default_rng(1)
    captions = [demo.captions(attributes, rng, 1)[0] for attributes in combinations]
    for i in range(0, len(images), batch):
        metric.update(scored(images[i : i + batch], captions[i : i + batch]))
    return metric.compute()


@pytest.fixture(scope="module")
def real() -> tuple[Tensor, Tensor]:
    """The 500 test pictures and what they show."""
    test = demo.splits()[1]
    return pictures(test), torch.tensor(test)


@pytest.mark.parametrize(("sigma", "least"), [(0.0, 0.99), (0.08, 0.95)])
def test_real_pictures(real, sigma, least):
    images, wanted = real
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    right = read_attributes(images + sigma * noise) == wanted
    shares = dict(zip(FIELDS, right.double().mean(0).tolist(), strict=True))
    assert all(share >= least for share in shares.values()), shares
    assert right.all(1).double().mean() >= least


def test_meaningless_pictures_get_some_attributes():
    random = torch.Generator().manual_seed(0)
    images = torch.cat(
        [
            torch.stack([torch.full((3, 64, 64), level) for level in (-1.0, -0.3, 0.0, 1.0, 7.0)]),
            torch.randn(5, 3, 64, 64, generator=random) * 10,
            torch.rand(5, 3, 64, 64, generator=random) * 2 - 1,
            torch.tensor([-1.0, 1.0]).repeat(3, 64, 32)[None],  # stripes
            torch.eye(64).expand(1, 3, 64, 64),  # one diagonal
            torch.zeros(1, 3, 64, 64).index_fill(3, torch.tensor([63]), 1.0),  # one edge
            torch.full((1, 3, 64, 64), float("nan")),
            torch.full((1, 3, 64, 64), float("inf")),
        ]
    )
    found = read_attributes(images)
    assert found.shape == (len(images), 5) and found.dtype == torch.int64
    assert (found >= 0).all() and (found < torch.tensor([len(values) for values in demo.VALUES])).all()
    assert read_attributes(images[:0]).shape == (0, 5)


def test_a_picture_is_read_the_same_in_any_batch(real):
    images, _ = real
    together = read_attributes(images[:70])  # more than are read at a time
    assert torch.equal(torch.cat([read_attributes(images[i : i + 1]) for i in range(60, 70)]), together[60:])


@pytest.mark.parametrize("field", range(len(FIELDS)))
def test_one_changed_attribute_scores_0_on_just_that_one(field):
    asked = demo.splits()[1][:24]
    count = len(demo.VALUES[field])
    drawn = [a._replace(**{FIELDS[field]: (a[field] + 1 + i % (count - 1)) % count}) for i, a in enumerate(asked)]
    found = scores(pictures(drawn), asked)
    expected = {f"caption_accuracy/{name}": float(name != FIELDS[field]) for name in FIELDS}
    assert found == {"caption_accuracy": 0.0, "caption_accuracy/standard_error": 0.0, **expected}


def test_shares_are_counted_over_batches_of_any_size():
    asked = demo.splits()[1][:20]
    drawn = [a._replace(colour=(a.colour + 1) % 8) if i < 3 else a for i, a in enumerate(asked)]
    drawn[2] = drawn[2]._replace(size=1 - drawn[2].size)
    expected = {"shape": 1.0, "colour": 17 / 20, "size": 19 / 20, "position": 1.0, "background": 1.0}
    for batch in (1, 6, 20):
        found = scores(pictures(drawn), asked, batch)
        assert found["caption_accuracy"] == pytest.approx(17 / 20)
        assert found["caption_accuracy/standard_error"] == pytest.approx((17 / 20 * 3 / 20 / 20) ** 0.5)
        assert {name: found[f"caption_accuracy/{name}"] for name in FIELDS} == pytest.approx(expected)


def test_larger_pictures_are_reduced_first():
    asked = demo.splits()[1][:20]
    large = pictures(asked).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert large.shape[-1] == 128
    assert scores(large, asked)["caption_accuracy"] == 1.0


def test_captions_without_all_attributes_are_refused():
    metric = CaptionAccuracy(None, 1)
    image = pictures(demo.splits()[1][:1])
    with pytest.raises(UserError, match="caption_accuracy: .*no colour"):
        metric.update(scored(image, ["a small heart at the top on white"]))
