"""What LAFITE makes of CLIP's features, and what CLIP sees of a picture."""

import zlib

import numpy as np
import pytest
import torch
from helpers import SALT, relative_error
from PIL import Image
from released_lafite import answers, inputs

from ratlip.clips.files import MEAN, STD
from ratlip.data.loader import crop
from ratlip.models.lafite import condition
from ratlip.models.lafite.condition import View, draw_view, seen


def test_released_conditions():
    real, draws = inputs("lafite64", 8, 64)
    uniform = np.random.RandomState(zlib.crc32(f"{SALT}:input.lafite64.coin".encode())).uniform(size=(8, 1))
    coin = torch.from_numpy(uniform.astype(np.float32))
    given = (real.text, real.features, draws.perturbation)
    for key, found in {
        "text": condition.from_text(real.text, draws.perturbation),
        "free": condition.from_image(real.features, draws.perturbation),
        "mix": condition.mixed(*given, coin, 0.5),
    }.items():
        assert relative_error(found[:, :64], answers()[f"64.cond.{key}"]) < 1e-5
        assert torch.allclose(found.norm(dim=1), torch.ones(8))
    assert torch.equal(condition.mixed(*given, coin, 0.005), condition.from_text(real.text, draws.perturbation))
    assert torch.equal(condition.mixed(*given, coin, 0.995), condition.from_image(real.features, draws.perturbation))


def test_conditions_do_not_depend_on_the_length_of_features():
    feature, noise = torch.randn(3, 8), torch.randn(3, 8)
    assert torch.allclose(
        condition.from_image(7 * feature, noise), condition.from_image(feature, 0.1 * noise), atol=1e-6
    )


def test_released_clip_input_of_a_data_sets_picture():
    """A picture cut and resized as the released data sets were made, and its view by CLIP."""
    random = np.random.RandomState(zlib.crc32(f"{SALT}:input.lafite.crop".encode()))
    small = random.randint(0, 256, (20, 30, 3)).astype(np.uint8)
    picture = Image.fromarray(small.repeat(16, 0).repeat(16, 1))
    square = crop(picture, min(picture.size), 0.5, 0.5).resize((256, 256), Image.Resampling.LANCZOS)
    pixels = np.asarray(square)
    assert np.array_equal(pixels[::15, ::15], answers()["data.crop"])
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    shown = (seen(image, 224, View(254, 1, 0)) + 1) / 2
    shown = (shown - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert relative_error(shown[0, :, ::27, ::27], answers()["data.clip_input"]) < 1e-5


@pytest.mark.parametrize(
    "size, whole, sides", [(256, False, (128, 255)), (256, True, (253, 255)), (64, False, (64, 64))]
)
def test_views_that_are_drawn(size, whole, sides):
    """As many as there can be, and all inside; a smaller picture anywhere in the white."""
    rng = np.random.default_rng(0)
    views = [draw_view(rng, size, 224, whole) for _ in range(4000)]
    found = {view.side for view in views}
    assert (min(found), max(found)) == sides
    for side, left, top in views:
        room = size - side if size > 224 else 224 - size
        assert 0 <= left < room and 0 <= top < room
    if size == 64:
        assert {view.left for view in views} == set(range(160)) == {view.top for view in views}


def test_what_clip_is_shown():
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    assert seen(image, 8, draw_view(np.random.default_rng(0), 8, 8)) is image
    padded = seen(image, 12, View(8, 3, 1))
    assert padded.shape == (2, 3, 12, 12)
    assert torch.equal(padded[:, :, 1:9, 3:11], image)
    assert padded.sum() == pytest.approx(float(image.sum()) + 2 * 3 * (144 - 64), rel=1e-5)
    square = seen(image, 4, View(4, 2, 3))
    assert torch.allclose(square, image[:, :, 3:7, 2:6], atol=1e-6)
    assert seen(image.bfloat16(), 4, View(6, 0, 1)).shape == (2, 3, 4, 4)
    x = image.clone().requires_grad_()
    seen(x, 12, View(8, 3, 1)).sum().backward()
    assert (x.grad == 1).all()


def test_semi_supervised_share():
    """A tenth of ten thousand items, by the released rule; all of them at a share of 1."""
    assert sum(not condition.lacks_caption(number, 10_000, 0.1) for number in range(10_000)) == 1001
    assert not any(condition.lacks_caption(number, 100, 1.0) for number in range(100))
