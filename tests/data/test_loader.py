"""Batches: each image once an epoch, the same for any number of processes and workers; crops and mirrors."""

import math
import pickle
import resource
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SALT, family_fixtures, relative_error
from PIL import Image

from ratlip.data import loader
from ratlip.data.captions import CaptionTable
from ratlip.data.layouts import Item, open_image, read_items
from ratlip.data.loader import (
    Draw,
    EpochBatches,
    TrainingImages,
    batch_size_for,
    crop,
    reduced,
    resize_shorter,
    to_bytes,
    to_floats,
    training_loader,
)
from ratlip.errors import UserError, line


def table(images: int) -> CaptionTable:
    return CaptionTable([[f"picture {i}, caption {j}" for j in range(1 + i % 3)] for i in range(images)])


def epoch(batches: EpochBatches, number: int) -> list[list[Draw]]:
    batches.epoch = number
    return list(batches)


def saved(folder: Path, number: int, size: tuple[int, int]) -> tuple[Item, np.ndarray]:
    """A picture of random pixels (width, height), and its levels."""
    levels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path = folder / f"{number}.png"
    Image.fromarray(levels).save(path)
    return Item(str(number), path, [f"picture {number}"]), levels


def levels_of(tensor: torch.Tensor) -> np.ndarray:
    """(3, H, W) bytes -> (H, W, 3)."""
    assert tensor.dtype == torch.uint8
    return tensor.permute(1, 2, 0).numpy()


def windows(levels: np.ndarray, side: int) -> dict[bytes, tuple[int, int]]:
    """All squares of a picture, with their left and top."""
    height, width, _ = levels.shape
    return {
        levels[top : top + side, left : left + side].tobytes(): (left, top)
        for top in range(height - side + 1)
        for left in range(width - side + 1)
    }


@pytest.mark.parametrize(("images", "size", "count"), [(23, 5, 4), (20, 5, 4), (7, 7, 1), (5, 2, 2)])
def test_an_epoch(images, size, count):
    captions = table(images)
    batches = EpochBatches(captions, size, seed=1)
    for number in (0, 3):
        drawn = epoch(batches, number)
        assert len(drawn) == len(batches) == count and {len(batch) for batch in drawn} == {size}
        flat = [draw for batch in drawn for draw in batch]
        assert len({draw.image for draw in flat}) == len(flat)  # no image twice
        for draw in flat:
            assert draw.epoch == number
            assert captions.starts[draw.image] <= draw.row < captions.starts[draw.image + 1]
            assert captions.texts[draw.mismatched_row] not in captions.own(draw.image)


def test_order_and_captions_belong_to_seed_and_epoch():
    captions = table(60)
    first = epoch(EpochBatches(captions, 6, seed=1), 0)
    assert epoch(EpochBatches(captions, 6, seed=1), 0) == first
    batches = EpochBatches(captions, 6, seed=1)
    assert list(batches) == list(batches) == first
    orders = [[draw.image for batch in first for draw in batch]]
    for seed, number in ((1, 1), (2, 0), (1, 2)):
        orders.append([draw.image for batch in epoch(EpochBatches(captions, 6, seed), number) for draw in batch])
    assert len({tuple(order) for order in orders}) == 4
    # An image's caption changes from one epoch to another.
    rows = [{d.image: d.row for batch in epoch(batches, number) for d in batch} for number in range(8)]
    assert {row[2] for row in rows} == {3, 4, 5}


def test_images_that_an_epoch_leaves_out_have_their_turn():
    batches = EpochBatches(table(7), 4, seed=0)
    seen = [{draw.image for batch in epoch(batches, number) for draw in batch} for number in range(8)]
    assert set().union(*seen) == set(range(7)) and all(len(own) == 4 for own in seen)


def test_processes_share_the_same_global_batches():
    captions = table(37)
    for number in (0, 1):
        alone = epoch(EpochBatches(captions, 8, seed=3), number)
        for world_size in (2, 4, 8):
            ranks = [epoch(EpochBatches(captions, 8, 3, rank, world_size), number) for rank in range(world_size)]
            for i, batch in enumerate(alone):
                shares = [set(drawn[i]) for drawn in ranks]
                assert [len(share) for share in shares] == [8 // world_size] * world_size
                assert set().union(*shares) == set(batch)


def test_mismatched_captions_are_the_most_similar_of_a_pool():
    # Embeddings on a circle, so that a caption's neighbours in the table are the most similar ones.
    captions = CaptionTable([[f"picture {i}", f"picture {i}, again"] for i in range(50)])
    angles = torch.linspace(0, 6.2, 100)
    sentences = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.rand(100, 1)

    def distances(pool: int) -> list[int]:
        drawn = [d for n in range(4) for b in epoch(EpochBatches(captions, 5, 1, 0, 1, pool, sentences), n) for d in b]
        assert all(captions.texts[draw.mismatched_row] not in captions.own(draw.image) for draw in drawn)
        return [min((d.row - d.mismatched_row) % 100, (d.mismatched_row - d.row) % 100) for d in drawn]

    # The nearest of n places at random on half a circle of 50 is 50 / (n + 1) away in the mean.
    for pool in (1, 4, 24):
        assert np.mean(distances(pool)) == pytest.approx(50 / (pool + 1), rel=0.25, abs=1)
    # Of very many it is the nearest that is not the image's own.
    assert max(distances(2000)) <= 2
    # The same for any number of processes.
    alone = epoch(EpochBatches(captions, 4, 3, 0, 1, 8, sentences), 0)
    ranks = [epoch(EpochBatches(captions, 4, 3, rank, 2, 8, sentences), 0) for rank in range(2)]
    assert [set(batch) for batch in alone] == [set(a) | set(b) for a, b in zip(*ranks, strict=True)]


def test_impossible_batches_are_refused():
    with pytest.raises(UserError, match="train.batch_size: 8 is larger than the 7"):
        batch_size_for(7, 8)
    with pytest.raises(UserError, match="train.batch_size: 6 .* 4 processes"):
        batch_size_for(7, 6, 4)
    with pytest.raises(UserError, match="2 training images or more, not 1"):
        batch_size_for(1)
    with pytest.raises(UserError, match="4 training images or more, one for each of 4 processes, not 3"):
        batch_size_for(3, None, 4)


def test_a_batch_size_that_nobody_set_follows_the_set():
    cases = [(2, 1, 2), (18, 1, 18), (63, 1, 63), (64, 1, 64), (9000, 1, 64), (18, 4, 16), (9000, 3, 63), (4, 4, 4)]
    for images, processes, expected in cases:
        assert batch_size_for(images, None, processes) == expected


def test_workers_change_nothing(tmp_path):
    items = [saved(tmp_path, number, (20 + number, 26))[0] for number in range(9)]
    captions = table(9)

    def passes(num_workers: int) -> list[loader.Batch]:
        batches = EpochBatches(captions, 4, seed=5)
        loading = training_loader(TrainingImages(items, 16, 1.2, True, seed=5), batches, num_workers, pin=False)
        collected = []
        for number in range(2):
            batches.epoch = number
            collected += list(loading)
        return collected

    alone, by_workers = passes(0), passes(2)
    assert len(alone) == len(by_workers) == 4
    for one, other in zip(alone, by_workers, strict=True):
        assert one.images.shape == (4, 3, 16, 16) and one.images.dtype == torch.uint8
        floats = loader.to_floats(one.images)
        assert floats.dtype == torch.float32 and floats.min() >= -1 and floats.max() <= 1
        assert one.rows.dtype == one.mismatched_rows.dtype == torch.int64
        for found, expected in zip(one, other, strict=True):
            assert torch.equal(found, expected)
    # The rows are those of the draws, and the epochs are not the same.
    batches = EpochBatches(captions, 4, seed=5)
    drawn = [draw for number in range(2) for batch in epoch(batches, number) for draw in batch]
    assert torch.cat([batch.rows for batch in alone]).tolist() == [draw.row for draw in drawn]
    assert torch.cat([batch.mismatched_rows for batch in alone]).tolist() == [draw.mismatched_row for draw in drawn]
    assert not torch.equal(alone[0].images, alone[2].images)


def test_without_augmentation_pictures_are_as_they_are(tmp_path):
    item, levels = saved(tmp_path, 0, (16, 16))
    images = TrainingImages([item], 16, 1.0, False, seed=0)
    for number in range(10):
        tensor, row, mismatched = images[Draw(number, 0, 4, 7)]
        assert np.array_equal(levels_of(tensor), levels) and (row, mismatched) == (4, 7)


def test_half_of_the_pictures_are_mirrored(tmp_path):
    item, levels = saved(tmp_path, 0, (16, 16))
    images = TrainingImages([item], 16, 1.0, True, seed=0)
    mirrored = []
    for number in range(200):
        found = levels_of(images[Draw(number, 0, 0, 0)][0])
        mirrored.append(np.array_equal(found, levels[:, ::-1]))
        assert mirrored[-1] or np.array_equal(found, levels)
    assert 70 <= sum(mirrored) <= 130


def test_crops_are_windows_that_reach_every_border(tmp_path):
    """Shorter side 20 = 16 * 1.25: nothing is resized, and the crop is any of 5 x 15 windows."""
    item, levels = saved(tmp_path, 0, (30, 20))
    places = windows(levels, 16)
    images = TrainingImages([item], 16, 1.25, False, seed=0)
    seen = {places[levels_of(images[Draw(number, 0, 0, 0)][0]).tobytes()] for number in range(600)}
    assert {left for left, _ in seen} == set(range(15)) and {top for _, top in seen} == set(range(5))


def test_a_crop_belongs_to_seed_epoch_and_image(tmp_path):
    first, levels = saved(tmp_path, 0, (30, 40))
    second = Item("1", first.image, ["the same picture again"])
    images = TrainingImages([first, second], 16, 1.5, True, seed=0)
    tensor = images[Draw(3, 0, 0, 0)][0]
    assert torch.equal(images[Draw(3, 0, 5, 6)][0], tensor)  # the captions play no part
    for other in (images[Draw(4, 0, 0, 0)], images[Draw(3, 1, 0, 0)]):
        assert not torch.equal(other[0], tensor)
    assert not torch.equal(TrainingImages([first], 16, 1.5, True, seed=1)[Draw(3, 0, 0, 0)][0], tensor)


@pytest.mark.parametrize(("size", "reduced"), [((60, 40), (30, 20)), ((40, 80), (20, 40)), ((10, 13), (20, 26))])
def test_the_shorter_side_is_resized_before_the_crop(size, reduced, tmp_path):
    item, levels = saved(tmp_path, 0, size)
    resized = np.array(Image.fromarray(levels).resize(reduced, Image.Resampling.BILINEAR))
    found = levels_of(TrainingImages([item], 16, 1.25, False, seed=0)[Draw(0, 0, 0, 0)][0])
    assert found.tobytes() in windows(resized, 16)


@pytest.mark.parametrize(
    ("size", "reduced", "corner"),
    [
        ((16, 16), (16, 16), (0, 0)),
        ((24, 16), (24, 16), (4, 0)),
        ((16, 22), (16, 22), (0, 3)),
        ((48, 32), (24, 16), (4, 0)),
        ((8, 10), (16, 20), (0, 2)),
    ],
)
def test_evaluation_cuts_the_centre(size, reduced, corner, tmp_path):
    item, levels = saved(tmp_path, 0, size)
    image, number = loader.TestImages([item, item], 16)[1]
    resized = np.array(Image.fromarray(levels).resize(reduced, Image.Resampling.BILINEAR))
    left, top = corner
    assert number == 1 and np.array_equal(levels_of(image), resized[top : top + 16, left : left + 16])


@pytest.mark.parametrize(
    ("size", "reduced", "corner"),
    [
        ((16, 16), (16, 16), (0, 0)),
        ((24, 16), (16, 11), (0, 2)),
        ((16, 32), (8, 16), (4, 0)),
        ((8, 10), (13, 16), (1, 0)),
    ],
)
def test_padding_keeps_the_whole_picture_on_the_colour_of_its_border(size, reduced, corner, tmp_path):
    levels = np.full((size[1], size[0], 3), (200, 30, 90), np.uint8)
    levels[size[1] // 3 : -(size[1] // 3), size[0] // 3 : -(size[0] // 3)] = (10, 250, 0)
    levels[0, : size[0] // 5] = 255  # a corner of another colour changes no median
    Image.fromarray(levels).save(tmp_path / "0.png")
    item = Item("0", tmp_path / "0.png", ["a"])
    expected = np.full((16, 16, 3), (200, 30, 90), np.uint8)
    resized = np.array(Image.fromarray(levels).resize(reduced, Image.Resampling.BILINEAR))
    left, top = corner
    expected[top : top + reduced[1], left : left + reduced[0]] = resized
    tested = levels_of(loader.TestImages([item], 16, "pad")[0][0])
    assert np.array_equal(tested, expected)
    assert np.array_equal(levels_of(TrainingImages([item], 16, 1.0, False, 0, "pad")[Draw(0, 0, 0, 0)][0]), tested)


def test_the_longest_strip_is_padded_at_its_final_size():
    """32 to 1, of which a square of the original's side would fill the memory."""
    found = np.array(loader.fitted(Image.new("RGB", (64, 2), (1, 2, 3)).resize((32_000, 1000)), 16, "pad"))
    assert found.shape == (16, 16, 3) and (found == (1, 2, 3)).all()


def test_a_padded_picture_is_enlarged_and_cropped_as_any_other(tmp_path):
    item, levels = saved(tmp_path, 0, (20, 10))
    square = np.array(loader.fitted(Image.fromarray(levels), 20, "pad"))
    assert np.array_equal(square[5:15], levels)
    places, images = windows(square, 16), TrainingImages([item], 16, 1.25, False, 0, "pad")
    assert all(levels_of(images[Draw(number, 0, 0, 0)][0]).tobytes() in places for number in range(20))


def test_lengths(tmp_path):
    items = [saved(tmp_path, number, (16, 16))[0] for number in range(3)]
    assert len(loader.TestImages(items, 16)) == len(TrainingImages(items, 16, 1.0, False, 0)) == 3


def test_bytes_become_the_numbers_that_they_stand_for():
    levels = torch.arange(256, dtype=torch.uint8)
    expected = np.arange(256, dtype=np.float32) / np.float32(127.5) - np.float32(1)
    assert np.array_equal(loader.to_floats(levels).numpy(), expected)
    assert torch.equal(loader.to_floats(loader.to_floats(levels)), torch.from_numpy(expected))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_makes_the_same_numbers():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(loader.to_floats(levels.cuda()).cpu(), loader.to_floats(levels))


@pytest.mark.parametrize(
    ("workers", "room", "expected"),
    [
        (4, math.inf, (4, 2)),
        (4, 1000, (4, 2)),  # ten batches: eight, one that is trained on, one that comes
        (4, 999, (4, 1)),
        (4, 600, (4, 1)),
        (4, 599, (3, 1)),
        (2, 599, (2, 1)),
        (1, 400, (1, 2)),
        (4, 300, (1, 1)),
        (4, 299, (0, None)),
        (4, 0, (0, None)),
        (0, math.inf, (0, None)),
    ],
)
def test_as_many_processes_load_as_there_is_room_for(workers, room, expected):
    assert loader.affordable(workers, 100, room) == expected


def test_room_is_shared_by_the_processes_of_a_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "SHARED", tmp_path)
    free = shutil.disk_usage(tmp_path).free
    assert loader.room() == pytest.approx(free * 7 / 8, rel=0.01)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert loader.room() == pytest.approx(free * 7 / 32, rel=0.01)
    monkeypatch.setattr(loader, "SHARED", tmp_path / "none")
    assert loader.room() == 0


def test_little_shared_memory_is_said_and_changes_nothing(tmp_path, monkeypatch, capsys):
    items = [saved(tmp_path, number, (20, 26))[0] for number in range(9)]
    found = {}
    for room in (math.inf, 3.5 * 3 * loader.PAGE, 100):
        monkeypatch.setattr(loader, "room", lambda room=room: room)
        batches = EpochBatches(table(9), 4, seed=5)  # of 4 * 3 * 16 * 16 bytes, a page, and two of numbers
        loading = training_loader(TrainingImages(items, 16, 1.2, True, seed=5), batches, 2, pin=False)
        found[loading.num_workers] = list(loading), capsys.readouterr().out
    assert list(found) == [2, 1, 0]
    assert not found[2][1] and found[1][1].startswith("1 of 2 processes load images, 1 batch each: /dev/shm has ")
    assert found[0][1].startswith("the training process loads images by itself: /dev/shm has ")
    for number in (0, 1):
        assert f"docker run --shm-size=1m); data.num_workers={number} asks for no more" in found[number][1]
        for one, other in zip(found[number][0], found[2][0], strict=True):
            assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_want_of_shared_memory_reaches_the_training(tmp_path):
    """A process may write no file as large as a batch: as where /dev/shm is full."""
    items = [saved(tmp_path, number, (64, 64))[0] for number in range(9)]
    batches = EpochBatches(table(9), 8, seed=5)
    loading = training_loader(TrainingImages(items, 64, 1, False, seed=5), batches, 1, pin=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        left = iter(loading)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(RuntimeError) as found:
        next(left)
    assert "no shared memory left" in line(found.value)


def test_an_image_is_tried_again(tmp_path, monkeypatch):
    item, levels = saved(tmp_path, 0, (16, 16))
    away = item.image.rename(tmp_path / "away")
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            away.rename(item.image)

    monkeypatch.setattr(loader.time, "sleep", sleep)
    images = TrainingImages([item], 16, 1.0, False, seed=0)
    assert np.array_equal(levels_of(images[Draw(0, 0, 4, 7)][0]), levels) and slept == list(loader.PAUSES[:3])
    item.image.unlink()
    with pytest.raises(UserError, match="0.png: cannot be decoded"):
        images[Draw(0, 0, 4, 7)]
    assert slept[3:] == list(loader.PAUSES)


@pytest.mark.parametrize(("side", "size"), [(256, 128), (256, 64), (64, 16), (299, 64), (50, 47), (17, 1), (64, 64)])
def test_reduced_as_pillow_does(side, size):
    levels = np.random.default_rng(side).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    levels[1] = (levels[1] > 127) * np.uint8(255)  # where rounding shows most
    found = reduced(torch.from_numpy(levels).permute(0, 3, 1, 2), size)
    for image, own in zip(levels, found, strict=True):
        expected = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
        assert np.array_equal(levels_of(own), expected)


def test_a_bird_in_three_sizes_as_attngan_reads_it(tmp_path):
    """From the box file to [-1, 1], the crop's place given."""
    random = np.random.RandomState(zlib.crc32(f"{SALT}:input.photo".encode()))
    key, cub = "001.Kind/Bird", tmp_path / "CUB_200_2011"
    for folder in (cub / "images/001.Kind", tmp_path / "text/001.Kind", tmp_path / "train"):
        folder.mkdir(parents=True)
    photo = Image.fromarray(random.randint(0, 256, (375, 500, 3)).astype(np.uint8))
    photo.save(cub / f"images/{key}.jpg", "PNG")  # whose pixels stay; its name is the layout's
    (tmp_path / f"text/{key}.txt").write_text("a bird")
    (cub / "images.txt").write_text(f"1 {key}.jpg")
    (cub / "bounding_boxes.txt").write_text("1 60.7 27.9 325.2 304.9")
    (tmp_path / "train/filenames.pickle").write_bytes(pickle.dumps([key]))
    ((item,), _) = read_items("bird", tmp_path, "train")
    picture = resize_shorter(open_image(item), int(256 * 76 / 64))
    shares = (40.5 / (picture.width - 255), 20.5 / (picture.height - 255))  # in the midst of those that mean 40, 20
    picture = to_bytes(crop(picture, 256, *shares))[None]
    fixtures = family_fixtures("attngan")
    for size, step in ((64, 5), (128, 9), (256, 17)):
        found = to_floats(reduced(picture, size))[0, :, ::step, ::step]
        assert relative_error(found, fixtures[f"data.{size}.slice"]) < 1e-5
