"""The demo data set: its splits, its captions read back, its pictures, and the folder it writes."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from ratlip.data import demo
from ratlip.data.layouts import open_image, read_items

KINDS = (("images", "png"), ("text", "txt"))
BLUE_HEART = demo.Attributes(
    demo.SHAPES.index("heart"),
    demo.COLOURS.index("blue"),
    demo.SIZES.index("small"),
    demo.POSITIONS.index("top left"),
    demo.BACKGROUNDS.index("yellow"),
)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The whole data set, written once."""
    root = tmp_path_factory.mktemp("demo") / "deep" / "demo"
    demo.write(root)
    return root


def random_attributes(rng: np.random.Generator, count: int) -> list[demo.Attributes]:
    return [demo.Attributes(*(int(rng.integers(len(values))) for values in demo.VALUES)) for _ in range(count)]


def files(root: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(root.rglob("*"))}


def test_values_and_splits():
    assert [len(values) for values in demo.VALUES] == [8, 8, 2, 9, 4]
    assert all(len(set(values)) == len(values) for values in demo.VALUES)
    train, test = demo.splits()
    assert (len(train), len(test)) == (4000, 500)
    assert len({*train, *test}) == 4500  # all distinct, and no test combination is trained on
    for split in (train, test):
        for field, values in enumerate(demo.VALUES):
            assert {attributes[field] for attributes in split} == set(range(len(values)))
    assert demo.splits() == (train, test)


def test_captions_parse_back():
    """400 random combinations, each in all eight templates with words drawn from the synonyms."""
    rng = np.random.default_rng(0)
    for attributes in random_attributes(rng, 400):
        lines = demo.captions(attributes, rng, len(demo.TEMPLATES))
        assert len(set(lines)) == len(demo.TEMPLATES)
        for line in lines:
            assert demo.parse_caption(line) == attributes, line
            assert demo.parse_caption(line.upper()) == attributes, line


def test_every_synonym_parses_in_every_template():
    canonical = demo.Attributes(*(values[0] for values in demo.VALUES))
    for field, values in enumerate(demo.VALUES):
        name = demo.Attributes._fields[field]
        for (number, value), template in itertools.product(enumerate(values), demo.TEMPLATES):
            for word in demo.PLACES.get(value) or demo.SYNONYMS.get(value, (value,)):
                said = {**canonical._asdict(), "position": "at the top left", name: word}
                assert demo.parse_caption(template.format(**said))[field] == number, (template, word)


def test_captions_use_all_templates_all_words_and_the_right_article():
    rng = np.random.default_rng(1)
    text = "\n".join(line for a in random_attributes(rng, 600) for line in demo.captions(a, rng, 5))
    for word in itertools.chain(*demo.SYNONYMS.values(), *demo.PLACES.values(), demo.COLOURS, demo.BACKGROUNDS):
        assert re.search(rf"\b{word}\b", text), word
    assert re.search(r"\ban orange\b", text) and not re.search(r"\ba (orange|[aeiou])", text)


@pytest.mark.parametrize(
    "caption",
    [
        "a small blue heart at the top left on a yellow background",
        "A SMALL BLUE HEART AT THE TOP LEFT ON A YELLOW BACKGROUND",
        "On a yellow background: top left, a heart, small and blue.",
        "yellow background; heart, tiny, blue, upper left!",
        "  a little   blue\theart in the top-left corner against yellow ",
        "the background is yellow, the heart at the left of the top is blue and small",
        "in the upper left of a yellow canvas a small heart in blue",
        "a small blue heart, top left, on a background of yellow",
    ],
)
def test_free_wording(caption):
    assert demo.parse_caption(caption) == BLUE_HEART


@pytest.mark.parametrize(
    ("caption", "problem"),
    [
        ("a small blue at the top left on a yellow background", "no shape"),
        ("a small blue heart and ring at the top left on a yellow background", r"more than one shape \(heart, ring\)"),
        ("a small heart at the top left on a yellow background", "no colour"),
        ("a small red and blue heart at the top left on yellow", r"more than one colour \(red, blue\)"),
        ("a blue heart at the top left on a yellow background", "no size"),
        ("a small huge blue heart at the top left on a yellow background", r"more than one size \(small, large\)"),
        ("a small blue heart on a yellow background", "no position"),
        ("a small blue heart at the top and bottom on a yellow background", "more than one position"),
        ("a small blue heart between left and right on a yellow background", "more than one position"),
        ("a small blue heart at the top left", "no background"),
        ("a small blue yellow heart at the top left", "no background"),
        ("a white background, a small blue heart at the top left on yellow", "more than one background"),
        ("a small blue heart at the top left on a purple background", "background"),
        ("", "no shape"),
    ],
)
def test_bad_captions_name_the_attribute(caption, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        demo.parse_caption(caption)
    assert repr(caption) in str(caught.value)


def test_render_is_seeded_and_each_picture_differs():
    attributes = [BLUE_HEART] * 3
    pictures = demo.render(attributes, np.random.default_rng(3))
    assert pictures.shape == (3, 64, 64, 3) and pictures.dtype == np.uint8
    assert np.array_equal(pictures, demo.render(attributes, np.random.default_rng(3)))
    assert not np.array_equal(pictures, demo.render(attributes, np.random.default_rng(4)))
    assert not np.array_equal(pictures[0], pictures[1])


def test_objects_are_never_cut():
    """At the largest radius and the outermost places that `render` draws, the border is hardly touched."""
    shapes, radius = np.arange(len(demo.SHAPES)), demo.RADII.max() * 1.04
    whole = demo.shape_mask(shapes, 32.0, 32.0, radius)
    assert (whole.sum((1, 2)) > 0.3 * (2 * radius) ** 2).all()
    low, high = demo.CELLS.min() - 1.5, demo.CELLS.max() + 1.5
    for x, y in itertools.product((low, high), repeat=2):
        masks = demo.shape_mask(shapes, x, y, radius)
        assert max(masks[:, [0, -1]].max(), masks[:, :, [0, -1]].max()) < 0.5  # half a pixel, at a point's tip
        np.testing.assert_allclose(masks.sum((1, 2)), whole.sum((1, 2)), rtol=1e-2)


def test_objects_lie_near_their_cell_in_their_size_and_colours():
    combinations = [demo.Attributes(*c) for c in itertools.product(range(8), (0, 5), range(2), range(9), range(4))]
    pictures = demo.render(combinations, np.random.default_rng(5)).astype(float)
    for attributes, picture in zip(combinations, pictures, strict=True):
        back = picture[0, 0]
        assert np.abs(back - demo.BACKGROUND_RGB[attributes.background]).max() <= 5
        differs = np.abs(picture - back).max(2)
        differs = differs > differs.max() / 2
        rows, columns = np.flatnonzero(differs.any(1)), np.flatnonzero(differs.any(0))
        radius = demo.RADII[attributes.size]
        for place, cell in ((rows, attributes.position // 3), (columns, attributes.position % 3)):
            assert abs((place[0] + place[-1] + 1) / 2 - demo.CELLS[cell]) < 3.5, attributes
            assert 0.6 * radius < (place[-1] - place[0] + 1) / 2 < 1.05 * 1.04 * radius + 1, attributes
        # Some pixels are the object's own colour, without the background's.
        assert (np.abs(picture - demo.COLOUR_RGB[attributes.colour]).max(2) <= 5).sum() >= 40, attributes


def test_colours_are_far_apart():
    palette = np.concatenate([demo.COLOUR_RGB, demo.BACKGROUND_RGB]).astype(float)
    for one, other in itertools.combinations(palette, 2):
        assert np.linalg.norm(one - other) >= 100


def test_unknown_shapes_are_refused():
    for shape in (-1, 8):
        with pytest.raises(ValueError, match="shape index"):
            demo.shape_mask(np.array([0, shape]), 32.0, 32.0, 10.0)


@pytest.mark.parametrize(("split", "number"), [("train", 0), ("test", 1)])
def test_written_folder_is_the_demo_layout(written, split, number):
    combinations = demo.splits()[number]
    items, problems = read_items("demo", written, split)
    assert problems == []
    assert [item.key for item in items] == [f"{split}/{i:05}" for i in range(len(combinations))]
    for item, attributes in zip(items, combinations, strict=True):
        assert len(item.captions) == len(set(item.captions)) == demo.CAPTIONS_PER_PICTURE
        assert {demo.parse_caption(caption) for caption in item.captions} == {attributes}
    for item, attributes in list(zip(items, combinations, strict=True))[::97]:
        picture = open_image(item)
        assert picture.size == (64, 64) and picture.mode == "RGB"
        assert np.abs(np.array(picture)[0, 0] - demo.BACKGROUND_RGB[attributes.background]).max() <= 5
        Image.open(item.image).verify()


def test_write_leaves_nothing_beside_and_does_nothing_when_there(written, tmp_path):
    assert list(written.parent.iterdir()) == [written]
    assert sorted(p.name for p in written.iterdir()) == ["images", "test.txt", "text", "train.txt"]
    before = files(written)
    demo.write(written)
    assert files(written) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("mine")
    demo.write(tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["note.txt"]


def test_an_interrupted_write_leaves_nothing_and_wrote_the_same_bytes(written, tmp_path):
    root = tmp_path / "data" / "demo"
    script = (
        "import signal, sys; from pathlib import Path; from ratlip.data import demo\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background\n"
        "demo.write(Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "code")}
    with subprocess.Popen([sys.executable, "-c", script, root], env=environment, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("data/*/text/train/00200.txt")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        assert not root.exists()
        (partial,) = (tmp_path / "data").iterdir()
        for name in (f"{kind}/train/{i:05}.{suffix}" for kind, suffix in KINDS for i in (0, 150)):
            assert (partial / name).read_bytes() == (written / name).read_bytes(), name
        process.send_signal(signal.SIGINT)
        assert b"KeyboardInterrupt" in process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert list((tmp_path / "data").iterdir()) == []
