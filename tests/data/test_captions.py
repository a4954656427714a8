"""The caption table: mismatched captions that never fit the image, and the cache of sentence embeddings."""

import copy
import errno
import fcntl
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import relative_error

from ratlip import checkpoint
from ratlip.data.captions import EMBED_BATCH, CaptionTable, embed
from ratlip.encoders.clip_towers import FrozenClip

BIRDS = [["a red bird", "a bird"], ["a green bird"], ["a bird", "a blue bird", "a bird in a tree"]]


def random_table(rng: np.random.Generator, images: int, words: int) -> CaptionTable:
    """Images of 1 to 3 captions out of few, so that many are shared."""
    return CaptionTable([[f"caption {rng.integers(words)}" for _ in range(rng.integers(1, 4))] for _ in range(images)])


def assert_mismatched(table: CaptionTable, images: np.ndarray, rows: np.ndarray) -> None:
    found = table.mismatched(images, rows)
    assert found.shape == rows.shape
    for image, row in zip(images, found, strict=True):
        assert table.texts[row] not in table.own(image)


def test_rows_and_images():
    table = CaptionTable(BIRDS)
    assert [table.own(image) for image in range(3)] == BIRDS
    drawn = np.array([table.draw(np.array([2, 0, 1]), np.random.default_rng(seed)) for seed in range(60)])
    assert [set(column) for column in drawn.T] == [{3, 4, 5}, {0, 1}, {2}]


def test_mismatched_is_the_next_of_the_batch_where_that_fits():
    table = CaptionTable([[f"{image} {i}" for i in range(3)] for image in range(20)])
    images = np.array([4, 9, 17, 0, 3])
    rows = table.draw(images, np.random.default_rng(0))
    assert np.array_equal(table.mismatched(images, rows), np.roll(rows, -1))


def test_mismatched_skips_captions_that_are_also_this_images():
    table = CaptionTable(BIRDS)
    # Image 0 draws "a red bird", 2 draws "a bird", which is 0's too, and 1 "a green bird".
    assert table.mismatched(np.array([0, 2, 1]), np.array([0, 3, 2])).tolist() == [2, 2, 0]


@pytest.mark.parametrize("batch", [2, 3, 8])
def test_mismatched_never_fits(batch):
    rng = np.random.default_rng(batch)
    for _ in range(150):
        table = random_table(rng, images=12, words=8)
        images = rng.permutation(12)[:batch]
        assert_mismatched(table, images, table.draw(images, rng))


def test_batches_of_images_with_identical_captions():
    table = CaptionTable([["a bird", "one bird"], ["a bird", "one bird"], ["one bird", "a bird"], ["a flower"]])
    for images in ([0, 1], [2, 0], [0, 1, 2]):
        rows = np.array([table.starts[image] for image in images])
        assert_mismatched(table, np.array(images), rows)
        assert set(table.mismatched(np.array(images), rows)) == {6}  # none in the batch: the flower


def test_no_mismatch_exists():
    assert CaptionTable([["a bird"], ["a bird", "a bird"], ["a bird"]]).without_mismatch() == 0
    assert CaptionTable([["a bird"], ["a bird", "a bird", "a flower"], ["a flower"]]).without_mismatch() == 1
    assert CaptionTable([["a bird", "a bird"], ["a flower"]]).without_mismatch() is None


class CountingList(list):
    """A list that counts how often an entry is looked up."""

    looks = 0

    def __getitem__(self, place):
        self.looks += 1
        return super().__getitem__(place)


def test_mismatched_looks_at_few_captions_of_a_large_table():
    table = CaptionTable([[f"{image} {i}" for i in range(5)] for image in range(40_000)])
    images = np.random.default_rng(0).permutation(40_000)[:64]
    rows = table.draw(images, np.random.default_rng(0))
    table.texts = CountingList(table.texts)
    table.mismatched(images, rows)
    assert table.texts.looks <= 2 * len(images)  # each image's own captions, and one other


@torch.no_grad()
def test_embeddings_are_clips_own_in_the_order_of_the_rows(small_clip):
    texts = [f"{i % 300} birds" for i in range(310)]  # 10 of them twice, and more than are encoded at a time
    assert 300 > EMBED_BATCH
    sentences = embed(CaptionTable([texts[:7], texts[7:]]), small_clip)
    assert sentences.shape == (310, small_clip.embedding_dim) and sentences.dtype == torch.float32
    assert torch.equal(sentences[:10], sentences[300:])
    some = [0, 3, 9, 10, 99, 255, 256, 299, 305]
    expected = small_clip.clip.encode_text(small_clip.tokenize([texts[row] for row in some]))
    assert relative_error(sentences[some], expected) < 1e-5


def test_cache_is_read_and_left_alone(small_clip, tmp_path):
    table = CaptionTable(BIRDS)
    plain = embed(table, small_clip)
    assert list(tmp_path.iterdir()) == []
    first = embed(table, small_clip, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert torch.equal(first, plain)
    assert torch.equal(embed(table, small_clip, tmp_path / "cache"), plain)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    checkpoint.save({"sentences": plain + 1}, path)  # what stands there is what is used
    assert torch.equal(embed(table, small_clip, tmp_path / "cache"), plain + 1)


def test_an_interruption_costs_one_batch(small_clip, tmp_path, monkeypatch):
    table = CaptionTable([[f"{i} birds"] for i in range(2 * EMBED_BATCH + 9)])
    plain, seen, text = embed(table, small_clip), [], small_clip.text

    def stops(tokens: torch.Tensor):
        seen.append(len(tokens))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return text(tokens)

    monkeypatch.setattr(small_clip, "text", stops)
    with pytest.raises(KeyboardInterrupt):
        embed(table, small_clip, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".rows"]  # and nothing that would be taken for the whole
    found = embed(table, small_clip, tmp_path)
    assert torch.equal(found, plain)
    assert seen == [EMBED_BATCH, EMBED_BATCH, EMBED_BATCH, 9]
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:1000])  # damaged: made again
    assert torch.equal(embed(table, small_clip, tmp_path), plain) and len(seen) == 7


def test_two_runs_that_begin_together(small_clip, tmp_path):
    """One encodes, the other waits and reads; neither takes the other's file away."""
    table = CaptionTable([[f"{i} birds"] for i in range(3 * EMBED_BATCH)])
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: embed(table, small_clip, tmp_path), range(4)))
    assert all(torch.equal(one, found[0]) for one in found)
    assert torch.equal(found[0], embed(table, small_clip))
    assert [path.suffix for path in tmp_path.iterdir()] == [".pt"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_runs_that_begin_together_without_locks(small_clip, tmp_path, monkeypatch, number):
    """As on file systems that have none: all encode, and none harms another's file."""
    asked = []

    def flock(file, operation):
        asked.append(operation)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    table = CaptionTable([[f"{i} birds"] for i in range(3 * EMBED_BATCH)])
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: embed(table, small_clip, tmp_path), range(3)))
    assert len(asked) == 3 and all(torch.equal(one, embed(table, small_clip)) for one in found)
    assert [path.suffix for path in tmp_path.iterdir()] == [".pt"]


def test_rows_that_never_reached_the_disk_are_encoded_again(small_clip, tmp_path):
    """After a power cut a file may be as long as was written, but hold zeros; or another run has begun behind."""
    table = CaptionTable([[f"{i} birds"] for i in range(3 * EMBED_BATCH)])
    whole = embed(table, small_clip, tmp_path)
    (path,) = tmp_path.iterdir()
    order = np.argsort([f"{i} birds" for i in range(3 * EMBED_BATCH)])
    rows = whole[order].numpy().copy()
    rows[EMBED_BATCH + 9 : 2 * EMBED_BATCH] = 0
    path.unlink()
    rows.tofile(path.with_suffix(".rows"))
    assert torch.equal(embed(table, small_clip, tmp_path), whole)


def test_other_captions_and_other_clips_never_share_a_file(small_clip, tmp_path):
    def new_file(table: CaptionTable, clip: FrozenClip) -> torch.Tensor:
        before = set(tmp_path.iterdir())
        sentences = embed(table, clip, tmp_path)
        assert len(set(tmp_path.iterdir()) - before) == 1
        return sentences

    table = CaptionTable(BIRDS)
    first = new_file(table, small_clip)
    new_file(CaptionTable([["a red bird", "a bird"]]), small_clip)
    reordered = new_file(CaptionTable(BIRDS[::-1]), small_clip)
    assert torch.equal(reordered[[4, 5, 3, 0, 1, 2]], first)
    other = copy.deepcopy(small_clip)
    with torch.no_grad():
        other.clip.transformer.resblocks[1].mlp.c_fc.bias[0] += 1  # one number of the text tower
    assert not torch.equal(new_file(table, other), first)
    assert torch.equal(embed(table, small_clip, tmp_path), first)
