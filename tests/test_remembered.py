"""The training pictures nearest to others: copies are found, and the sheet shows them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, TINY_RUN
from PIL import Image

from ratlip import config, remembered
from ratlip.data.inventory import usable_items
from ratlip.data.loader import TestImages, to_floats
from ratlip.metrics.features import ClipSpace


@pytest.fixture
def settings(demo_folder, clip_file):
    few = ("data.layout=folder", f"data.dir={demo_folder}", f"clip.weights={clip_file}", "eval.batch_size=5")
    return config.load("cfg/demo.yml", [*TINY_RUN, *few])


@pytest.mark.parametrize("flip", [False, True])
def test_copies_and_mirrored_copies_are_found(settings, small_clip, flip):
    """Copies with a little noise; and mirrored ones, where training mirrors."""
    settings.data.flip = flip
    items = usable_items(settings, "train")
    images = torch.stack([TestImages(items, 64)[number][0] for number in (7, 2, 11)])
    images = to_floats(images) + 0.02 * torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    by_clip, by_pixels = remembered.find(settings, ClipSpace(settings, small_clip), images, items)
    assert by_pixels.numbers.tolist() == [7, 2, 11]
    assert by_pixels.values.tolist() == [pytest.approx(0.02, rel=0.05)] * 3
    mirrored = remembered.find(settings, ClipSpace(settings, small_clip), images.flip(-1), items)
    found_mirrored = mirrored[1].numbers.tolist() == [7, 2, 11] and bool((mirrored[1].values < 0.03).all())
    assert found_mirrored == flip

    units, every = (
        F.normalize(small_clip.image(some)[1], dim=1)
        for some in (images, to_floats(torch.stack([TestImages(items, 64)[n][0] for n in range(12)])))
    )
    cosines = units @ every.T
    if flip:
        turned = to_floats(torch.stack([TestImages(items, 64)[n][0] for n in range(12)])).flip(-1)
        cosines = torch.maximum(cosines, units @ F.normalize(small_clip.image(turned)[1], dim=1).T)
    assert torch.allclose(by_clip.values, cosines.max(1).values, atol=1e-5)
    assert by_clip.numbers.tolist() == cosines.argmax(1).tolist()


@pytest.mark.parametrize("what", ["checkpoint", "--images", "--real"])
def test_the_sheet_is_part_of_an_evaluation(what, demo_folder, tmp_path, call):
    words = ["cfg/demo.yml", "data.layout=folder", f"data.dir={demo_folder}", f"log.dir={tmp_path}/logs",
             "train.device=cpu", "train.precision=fp32", "eval.samples=6", "eval.metrics=[clip_score]"]  # fmt: skip
    more = {"checkpoint": [ROOT / "assets/demo/generator.pth"], "--images": ["--images", tmp_path / "drawn"]}
    (tmp_path / "drawn").mkdir()
    for number, size in enumerate([(64, 64), (30, 40)]):
        Image.fromarray(np.full((*size, 3), 200, np.uint8)).save(tmp_path / "drawn" / f"{number}.png")
    result = call("test.py", *words, *more.get(what, [what]), "--nearest")
    assert result.returncode == 0, result.stderr
    (path,) = (tmp_path / "logs").rglob("nearest.png")
    with Image.open(path) as sheet:
        assert sheet.width == 3 * remembered.ACROSS * (128 + 8) and np.asarray(sheet).std() > 20
    count = 2 if what == "--images" else 6
    assert f"nearest of 12 training pictures, in the median of {count}: cosine" in result.stdout
    assert "of 6 test pictures: cosine" in result.stdout


def test_numbers_are_spread():
    assert remembered.spread(3) == [0, 1, 2]
    assert len(set(remembered.spread(1000))) == remembered.SHOWN and max(remembered.spread(1000)) > 980
