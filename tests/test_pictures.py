"""Rounding to 8 bits; captioned grids, their size, captions that are never cut, any script; filmstrip and curves."""

import unicodedata

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from helpers import fixture_input
from PIL import Image, features

from ratlip import lettering
from ratlip.pictures import (
    DIMMED,
    MIN_CELL,
    TITLE_WIDTH,
    attention_grid,
    captioned_grid,
    curves,
    filmstrip,
    save_pictures,
    to_pictures,
)

SHORT = "a photo"
CAPTION = "a small blue heart at the top left on a yellow background"
LONG = "this small bird has a white crown, wings with some brown, and a short yellow beak " * 4
CAPITALS = "A WOMAN AND A MAN WHO WARM A MUG OF MAMMOTH MILK FOR MOM"
ONE_WORD = "unbelievably" * 8


def white(count: int, side: int = 64) -> torch.Tensor:
    return torch.ones(count, 3, side, side)


def ink(grid) -> np.ndarray:
    """Which pixels are dark, where all pictures are white."""
    return np.array(grid.convert("L")) < 200


def test_to_pictures_clamps_and_rounds():
    levels = [-5.0, -1.0, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 0.1, 1 - 0.6 / 127.5, 1 - 0.4 / 127.5, 1.0, 3.0]
    images = torch.tensor(levels).repeat(2, 3, 4, 1)
    images[1, 2] = -1  # no blue in the second
    pictures = to_pictures(images.requires_grad_())
    assert [(p.size, p.mode) for p in pictures] == [((9, 4), "RGB")] * 2
    assert np.array(pictures[0])[1, :, 0].tolist() == [0, 0, 0, 1, 140, 254, 255, 255, 255]
    assert not np.array(pictures[1])[..., 2].any() and np.array(pictures[1])[..., 0].any()


def test_pictures_as_dfgan_saves_them(dfgan_answers):
    """It cuts levels off where ours are rounded: what ours gives of a picture half a level darker."""
    image = fixture_input("image", 2, 3, 256, 256).tanh()[:1]
    found = np.asarray(to_pictures(image - 1 / 255)[0])
    assert np.array_equal(found[::17, ::17], dfgan_answers["png.u8"])


def test_to_pictures_gives_back_every_level():
    picture = torch.arange(256).repeat(3, 1, 1).float() / 127.5 - 1
    assert np.array(to_pictures(picture[None])[0])[0, :, 1].tolist() == list(range(256))


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (6, 3, 2), (7, 3, 3), (2, 4, 1)])
def test_grid_size(count, columns, rows):
    single = captioned_grid(white(1), [CAPTION], 1)
    grid = captioned_grid(white(count), [CAPTION] * count, columns)
    assert grid.size == (columns * single.width, rows * single.height)
    assert single.width >= MIN_CELL and single.height > MIN_CELL


@pytest.mark.parametrize(("side", "factor"), [(8, 16), (64, 2), (100, 2), (128, 1), (256, 1)])
def test_pictures_are_enlarged_by_whole_factors(side, factor):
    images = torch.rand(1, 3, side, side) * 2 - 1
    grid = np.array(captioned_grid(images, [SHORT], 1))
    expected = np.array(to_pictures(images)[0]).repeat(factor, 0).repeat(factor, 1)
    border = (grid.shape[1] - side * factor) // 2
    assert np.array_equal(grid[border : border + side * factor, border : border + side * factor], expected)


def test_pictures_and_captions_stand_in_their_cells():
    images = white(4)
    images[2] = -1
    grid = np.array(captioned_grid(images, ["", "", "", SHORT], 2).convert("L")) < 200
    height, width = 128 + 10, grid.shape[1] // 2  # the first row has no captions
    assert not grid[:height].any() and grid.shape[0] > 2 * height
    left, right = grid[height:, :width], grid[height:, width:]
    assert left.sum() == 128 * 128  # the black picture and nothing else
    assert 30 < right.sum() < 2000 and not right[: 128 + 4].any()  # its caption, below the picture


def test_titles_stand_left_of_their_rows():
    plain, titled = (captioned_grid(white(4), [SHORT] * 4, 2, titles) for titles in ((), ("real", "averaged, noise 1")))
    assert titled.size == (plain.width + TITLE_WIDTH, plain.height)
    assert np.array_equal(ink(titled)[:, TITLE_WIDTH:], ink(plain))
    first, second = np.split(ink(titled)[:, :TITLE_WIDTH], 2)
    assert 10 < first.sum() < second.sum()
    assert not first[:, :2].any() and not second[:, -2:].any()


@pytest.mark.parametrize("side", [64, 128, 256])
@pytest.mark.parametrize("caption", [SHORT, CAPTION, LONG, CAPTION.upper(), CAPITALS, ONE_WORD, "m" * 50, "W" * 50])
def test_captions_are_never_cut(caption, side):
    grid = ink(captioned_grid(white(1, side), [caption], 1))
    assert grid.any()
    assert not grid[:, -2:].any(), "runs over the right border of its cell"
    assert not grid[:, :1].any() and not grid[-2:].any()


def test_longer_captions_take_more_lines_and_lose_no_ink():
    heights, amounts = [], []
    for repeat in (1, 2, 4):
        grid = captioned_grid(white(1), [" ".join([CAPTION] * repeat)], 1)
        heights.append(grid.height)
        amounts.append(ink(grid).sum())
    assert heights[0] < heights[1] < heights[2]
    for repeat, amount in zip((2, 4), amounts[1:], strict=True):
        assert amount == pytest.approx(repeat * amounts[0], rel=0.1)


def test_a_row_is_as_tall_as_its_longest_caption_needs():
    tall, short = captioned_grid(white(1), [LONG], 1), captioned_grid(white(1), [SHORT], 1)
    mixed = captioned_grid(white(4), [SHORT, LONG, SHORT, SHORT], 2)
    assert mixed.height == tall.height + short.height
    assert np.array_equal(ink(mixed)[: tall.height, tall.width :], ink(tall))
    assert np.array_equal(ink(mixed)[tall.height :, : tall.width], ink(short))


HAN = "黄色背景左上角有一个小小的蓝色心形非常好看"
ARABIC, HEBREW = "قلب أزرق صغير في أعلى اليسار", "לב כחול קטן בפינה"


@pytest.fixture
def fonts(tmp_path, monkeypatch):
    """fonts(*texts): makes this machine's fonts one for each text, all of whose letters are black boxes in it."""

    def fonts(*texts: str) -> None:
        paths = []
        for text in texts:
            names = [".notdef", *(f"u{ord(letter):04X}" for letter in text)]
            pen = TTGlyphPen(None)
            for place, point in enumerate(((100, 0), (100, 800), (900, 800), (900, 0))):
                (pen.lineTo if place else pen.moveTo)(point)
            pen.closePath()
            builder, box = FontBuilder(1000, isTTF=True), pen.glyph()
            builder.setupGlyphOrder(names)
            builder.setupCharacterMap({ord(letter): name for letter, name in zip(text, names[1:], strict=True)})
            builder.setupGlyf(dict.fromkeys(names, box))
            builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 100)))
            builder.setupHorizontalHeader(ascent=900, descent=-200)
            builder.setupNameTable({"familyName": "Boxes", "styleName": "Regular"})
            builder.setupPost()
            paths.append(str(tmp_path / f"{len(paths)}-Regular.ttf"))
            builder.save(paths[-1])
        (tmp_path / "damaged.ttf").write_text("no font")
        found = [str(tmp_path / "damaged.ttf"), *paths]
        monkeypatch.setattr(lettering.font_manager, "findSystemFonts", lambda: found)
        forget()

    def forget() -> None:
        lettering.told.clear()
        lettering._coverage.cache_clear()
        lettering._font_of.cache_clear()

    yield fonts
    monkeypatch.undo()
    forget()


def test_a_font_is_looked_up_for_each_script(fonts, capsys):
    """Boxes of 9.6 x 9.6 pixels for the letters that only the machine's fonts have, the other letters as ever."""
    fonts("".join(dict.fromkeys(HAN)), "ሰላም")
    han, amharic = ink(captioned_grid(white(1), ["黄色"], 1)), ink(captioned_grid(white(1), ["ሰላ"], 1))
    assert han.sum() == pytest.approx(2 * 9.6**2, rel=0.15) and np.array_equal(han, amharic)
    mixed = ink(captioned_grid(white(1), ["heart 黄色"], 1))
    plain = ink(captioned_grid(white(1), ["heart"], 1))
    assert mixed.sum() == pytest.approx(han.sum() + plain.sum(), rel=0.05)
    assert capsys.readouterr().out == ""


def test_what_no_font_has_is_said_once(fonts, capsys):
    fonts("ሰላም")
    for _ in range(2):
        assert ink(captioned_grid(white(2), [HAN, "한국어 ሰላም"], 2)).sum() > 100  # boxes
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all("apt-get install fonts-noto-cjk" in line for line in said)
    assert "CJK characters such as '黄色背景左'" in said[0] and "HANGUL" in said[1]


def test_han_is_wrapped_between_characters_and_never_cut(fonts):
    """12-pixel characters below a picture of 128: ten in a line, though there is no space."""
    fonts("".join(dict.fromkeys(HAN)) + "。")
    assert [len(line.runs[0][0]) for line in lettering.wrap(HAN, 128)] == [10, 10, 1]
    assert [len(line.runs[0][0]) for line in lettering.wrap(HAN[:10] + "。" + HAN, 128)][:2] == [9, 10]  # not before 。
    grid = ink(captioned_grid(white(1), [HAN * 3], 1))
    assert not grid[:, -2:].any() and not grid[:, :1].any() and not grid[-2:].any()
    assert grid.sum() == pytest.approx(len(HAN) * 3 * 9.6**2, rel=0.15)


def test_marks_stay_with_their_letters():
    for word in ("e\u0301" * 40, "\u05d1\u05bc" * 60):  # é and a Hebrew letter with its dot, as two characters each
        for line in lettering.wrap(word, 128):
            assert unicodedata.category(line.runs[0][0][0])[0] == "L" and len(line.runs[0][0]) % 2 == 0


@pytest.mark.skipif(not features.check("raqm"), reason="Pillow has no Raqm here, and lettering says so")
@pytest.mark.parametrize("text", [ARABIC, HEBREW])
def test_right_to_left_is_drawn_right_to_left(text):
    """The first word of the line stands at its right end; Arabic letters are joined, so that a word is narrower."""
    words = text.split()[:2]
    line = ink(captioned_grid(white(1, 256), [" ".join(words)], 1))
    last = ink(captioned_grid(white(1, 256), [words[1]], 1))
    width = np.flatnonzero(last.any(axis=0)).max()
    assert np.array_equal(line[:, :width], last[:, :width]) and line[:, width + 2 :].any()
    if text is ARABIC:
        apart = sum(lettering.wrap(letter, 256)[0].runs[0][1].getlength(letter) for letter in words[0])
        assert lettering.width_of(words[0]) < 0.9 * apart


def test_right_to_left_across_fonts(fonts):
    """A line that begins from right to left has its runs of other fonts left of their predecessors."""
    fonts("黄")
    (line,) = lettering.wrap(f"{HEBREW.split()[0]} 黄", 256)
    assert [run.strip() for run, _ in line.runs] == ["黄", HEBREW.split()[0]]


def test_without_fribidi_it_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(lettering.features, "check", lambda name: False)
    lettering.told.discard("raqm")
    for text in (SHORT, HEBREW, ARABIC):
        lettering.wrap(text, 128)
    assert capsys.readouterr().out.count("libfribidi0") == 1
    lettering.told.discard("raqm")


def test_saved_pictures_are_the_tensors(tmp_path):
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    paths = save_pictures(images, tmp_path / "new" / "folder", "bird", "a bird, größer")
    assert [path.name for path in paths] == ["bird_0.png", "bird_1.png"]
    assert [path.with_suffix(".txt").read_text("utf-8") for path in paths] == ["a bird, größer\n"] * 2
    assert len(list(paths[0].parent.iterdir())) == 4
    for path, picture in zip(paths, to_pictures(images), strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(picture))


@pytest.mark.parametrize("side", [64, 256])
def test_filmstrip_is_one_row_of_each_grid(side):
    """Grids of three rows by two columns whose second row is grey, darker from grid to grid."""
    grids, levels = {}, (0.8, 0.2, -0.6)
    for number, level in enumerate(levels):
        images = white(6, side)
        images[2:4] = level
        grids[f"epoch {number}"] = captioned_grid(images, [""] * 4 + [CAPTION, SHORT], 2, ["real", "averaged", "raw"])
    strip = np.array(filmstrip(grids, side, rows=3, row=1).convert("L"))
    shown = max(side, 128)
    for number, level in enumerate(levels):
        for column in range(2):
            top, left = number * (shown + 10) + 4, TITLE_WIDTH + column * (shown + 8) + 4
            frame = strip[top : top + shown, left : left + shown]
            assert (frame == round((level + 1) * 127.5)).all(), (number, column)
        assert (strip[number * (shown + 10) :][: shown + 6, :TITLE_WIDTH] < 200).any()  # its title
    captions = np.array(grids["epoch 0"].convert("L"))[3 * (shown + 10) - 4 :, TITLE_WIDTH:]
    assert (captions < 200).any() and np.array_equal(strip[-len(captions) :, TITLE_WIDTH:], captions)


def test_curves_show_every_loss_and_each_score_itself(tmp_path):
    steps = range(10, 1010, 10)
    losses = ("loss_d/real", "loss_d/fake", "loss_d/mismatched", "loss_d/ma_gp", "loss_g/adversarial")
    scalars = {tag: [(step, number + 1 / step) for step in steps] for number, tag in enumerate(losses)}
    for tag in ("scores/fd_clip", "scores/fd_clip/half", "scores/images", "scores/seconds", "scores/clip_score"):
        scalars[tag] = [(0, 3.0), (1000, 1.0)]
    figure = curves(scalars)
    shown = {axes.get_title(): axes for axes in figure.axes}
    assert list(shown) == ["discriminator", "generator", "fd clip", "clip score"]
    assert [text.get_text() for text in shown["discriminator"].get_legend().get_texts()] == [
        "real", "fake", "mismatched", "ma gp"
    ]  # fmt: skip
    assert shown["fd clip"].lines[0].get_ydata().tolist() == [3.0, 1.0]
    figure.savefig(tmp_path / "curves.png")
    assert np.asarray(Image.open(tmp_path / "curves.png").convert("L")).std() > 5
    assert curves({}).axes == []


@pytest.mark.parametrize("side", [64, 256])
def test_attention_lights_what_read_a_word(side, monkeypatch):
    """The left half read "red", the right half "ring"; one stage more reads both everywhere; padding is not shown."""
    written = []
    monkeypatch.setattr(lettering, "wrap", lambda text, width: written.append(text) or [])
    halves = torch.zeros(4, 16, 16)
    halves[0, :, :8] = halves[1, :, 8:] = 1
    both = torch.zeros(4, 32, 32)
    both[:2] = torch.tensor([0.75, 0.25])[:, None, None]
    grid = attention_grid(torch.ones(3, side, side), [halves, both], ["red", "ring"], "a red ring")
    assert written[:6] == ["a red ring", "red 50%", "ring 50%", "a red ring", "red 75%", "ring 25%"]
    assert written[6:] == ["reading at 16 px", "reading at 32 px"]
    levels, cell = np.array(grid)[..., 1], MIN_CELL + 8
    assert grid.size == (TITLE_WIDTH + 3 * cell, 2 * (MIN_CELL + 10))

    def at(row: int, column: int, share: float) -> int:
        """Level in a cell, at a share of its width."""
        return int(levels[row * (MIN_CELL + 10) + 60, TITLE_WIDTH + column * cell + 4 + int(share * MIN_CELL)])

    dim = round(255 * DIMMED)
    assert [at(0, column, share) for column in range(3) for share in (0.1, 0.9)] == [255, 255, 255, dim, dim, 255]
    assert [at(1, column, share) for column in range(3) for share in (0.1, 0.9)] == [255, 255, 255, 255, 119, 119]
