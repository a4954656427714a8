"""Reference statistics on disk: what is read back, and what is refused."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ratlip.data import loader
from ratlip.data.layouts import Item
from ratlip.errors import UserError
from ratlip.metrics import reference

CPU = torch.device("cpu")
FACTS = {"protocol": "mean colour", "weights": "12345678", "count": 7, "pictures": "all"}


class MeanColour:
    """A feature space of three dimensions."""

    name, statistics, dim, checksum, protocol = "colour", "fd_colour", 3, "12345678", "mean colour"

    def __init__(self, keeps_features: bool):
        self.keeps_features = keeps_features

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


@pytest.fixture
def items(tmp_path) -> list[Item]:
    rng = np.random.default_rng(0)
    for i in range(7):
        Image.fromarray(rng.integers(0, 256, (20 + i, 24, 3), np.uint8)).save(tmp_path / f"{i}.png")
    return [Item(str(i), tmp_path / f"{i}.png", ["a"]) for i in range(7)]


@pytest.mark.parametrize("keeps", [False, True])
def test_measured_saved_and_read_back(items, tmp_path, keeps):
    space, path = MeanColour(keeps), tmp_path / "stats" / "colour.npz"
    pictures = loader.Pictures([item.image for item in items])  # of seven sizes
    before = torch.random.get_rng_state()
    found = reference.measure(pictures, space, CPU, 3, 0, "here")
    assert torch.equal(torch.random.get_rng_state(), before)
    colours = np.stack([loader.to_floats(pictures[i][0]).mean((1, 2)).numpy() for i in range(7)]).astype(np.float64)
    np.testing.assert_allclose(found.gaussian.mean, colours.mean(0), atol=1e-6)
    np.testing.assert_allclose(found.gaussian.covariance, np.cov(colours.T), atol=1e-6)

    reference.save(path, found, space, "mean colour", "all")
    assert not list(path.parent.glob("*.partial"))
    again = reference.load(path, space, CPU, FACTS)
    assert torch.equal(again.gaussian.mean, found.gaussian.mean) and again.count == 7
    assert torch.equal(again.gaussian.covariance, found.gaussian.covariance)
    if keeps:
        np.testing.assert_allclose(again.features, colours, atol=1e-6)
    assert str(path) in again.source and "7 pictures" in again.source


def good(**changes) -> dict[str, np.ndarray]:
    return {"mu": np.zeros(3), "sigma": np.eye(3), **FACTS, **changes}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (good(weights="00000000"), "its weights is 00000000, but this needs 12345678"),
        (good(protocol="other"), "its protocol is other, but this needs mean colour"),
        (good(count=8), "its count is 8"),
        (good(pictures="fewer"), "its pictures is fewer"),
        (good(mu=np.zeros(4)), r"its mu is \(4,\), \(3,\) was expected"),
        (good(sigma=np.full((3, 3), np.nan)), "sigma holds what is no finite number"),
        (good(mu=np.array(["a", "b", "c"])), "mu holds what is no finite number"),
        (good(weights=np.zeros(2)), "its weights is"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "not written by this program: it has no count, pictures, protocol"),
        ({"m": np.zeros(3), "s": np.eye(3)}, "it holds m, s, not mu and sigma"),
        (good(mu=np.array([{}, {}, {}])), "cannot be read as statistics"),
    ],
)
def test_mismatched_and_foreign_files_are_refused(tmp_path, content, reason):
    np.savez(tmp_path / "found.npz", **content)
    with pytest.raises(UserError, match=rf"found\.npz.*{reason}"):
        reference.load(tmp_path / "found.npz", MeanColour(False), CPU, FACTS)


def test_a_file_without_features_is_refused_where_they_are_needed(tmp_path):
    np.savez(tmp_path / "found.npz", **good())
    with pytest.raises(UserError, match="it has no features"):
        reference.load(tmp_path / "found.npz", MeanColour(True), CPU, FACTS)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut short"])
def test_files_that_are_no_npz_are_refused(tmp_path, content):
    (tmp_path / "found.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"found\.npz: cannot be read as statistics"):
        reference.load(tmp_path / "found.npz", MeanColour(False), CPU, FACTS)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(UserError, match=r"array\.npy: cannot be read as statistics"):
        reference.load(tmp_path / "array.npy", MeanColour(False), CPU, FACTS)


def test_a_released_file_needs_mu_and_sigma_only(tmp_path):
    path = tmp_path / "released.npz"
    np.savez(path, mu=np.arange(3.0), sigma=np.eye(3))
    found = reference.load(path, MeanColour(False), CPU, FACTS, bare=True)
    assert found.count is None and found.gaussian.mean.tolist() == [0, 1, 2]
    np.savez(path, **good(weights="00000000"))  # one that says more must say the right thing
    with pytest.raises(UserError, match="its weights is"):
        reference.load(path, MeanColour(False), CPU, FACTS, bare=True)


def test_fingerprint_follows_what_the_pictures_hold():
    items = [Item(f"{i}", Path(f"{i}.png"), ["a"], content=f"hash {i}") for i in range(3)]
    found = reference.fingerprint(items)
    renamed = [replace(item, key="other", image=Path("elsewhere.jpg"), captions=["b"]) for item in items]
    assert reference.fingerprint(renamed) == found
    for other in (items[:-1], items[::-1], [*items[:2], replace(items[2], content="hash 4")],
                  [*items[:2], replace(items[2], box=(0.0, 0.0, 1.0, 1.0))]):  # fmt: skip
        assert reference.fingerprint(other) != found
    with pytest.raises(ValueError, match="take_stock"):
        reference.fingerprint([Item("0", Path("0.png"), ["a"])])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (good(), ""),
        (good(pictures="0123456789abcdef"), "of an earlier version, which went by the pictures' sizes"),
        (good(pictures="content:other"), "of other pictures"),
        (good(weights="00000000"), "its weights is 00000000, but this needs 12345678"),
        (good(count=8), "its count is 8, but this needs 7"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, ""),  # of another program: nothing to replace
        (None, ""),  # damaged: nor that
    ],
)
def test_what_is_made_anew(tmp_path, content, reason):
    (tmp_path / "found.npz").write_bytes(b"PK cut short")
    if content:
        np.savez(tmp_path / "found.npz", **content)
    assert reference.outdated(tmp_path / "found.npz", FACTS) == reason


def test_an_unwritable_place_is_named(items, tmp_path):
    (tmp_path / "stats").write_text("a file, not a folder")
    found = reference.Reference(SimpleNamespace(mean=torch.zeros(3), covariance=torch.eye(3)), 7, None, "")
    with pytest.raises(UserError, match="could not write .*stats"):
        reference.save(tmp_path / "stats" / "x.npz", found, MeanColour(False), "p", "all")


def test_enlarged_images_are_flips_and_small_shifts(items):
    images = loader.TestImages(items, 16)
    enlarged = loader.EnlargedTestImages(images, 4, most=0.125)
    assert len(enlarged) == 28
    original = images[2][0]
    assert torch.equal(enlarged[2][0], original) and torch.equal(enlarged[9][0], original.flip(-1))
    for copy, base in ((2, original), (3, original.flip(-1))):
        moved, number = enlarged[copy * 7 + 2]
        assert number == copy * 7 + 2 and torch.equal(moved, enlarged[number][0])
        padded = torch.nn.functional.pad(base[None], [2] * 4, mode="replicate")[0]
        places = [padded[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)]
        assert any(torch.equal(moved, place) for place in places)
