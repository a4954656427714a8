"""The captioned grids: their size, captions that are wrapped and never cut, and rounding to 8 bits."""

import numpy as np
import pytest
import torch

from ratlip.monitor import MIN_CELL, captioned_grid, to_pictures

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
    height, width = (side // 2 for side in grid.shape)
    assert not grid[:height].any()
    left, right = grid[height:, :width], grid[height:, width:]
    assert left.sum() == 128 * 128  # the black picture and nothing else
    assert 30 < right.sum() < 2000 and not right[: 128 + 4].any()  # its caption, below the picture


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


def test_all_cells_are_as_tall_as_the_longest_caption_needs():
    tall, mixed = captioned_grid(white(1), [LONG], 1), captioned_grid(white(4), [SHORT, LONG, SHORT, SHORT], 2)
    assert mixed.height == 2 * tall.height
    cells = ink(mixed).reshape(2, tall.height, 2, tall.width)
    assert np.array_equal(cells[0, :, 1], ink(tall))
    assert cells[0, :, 0].sum() == cells[1, :, 0].sum() == cells[1, :, 1].sum() < cells[0, :, 1].sum()
