"""Data sets made for LAFITE: folders and zips, their captions, and the features in their tables."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from easydict import EasyDict
from PIL import Image

from ratlip.data import lafite
from ratlip.data.inventory import cache_folder, take_stock
from ratlip.data.layouts import open_image
from ratlip.errors import UserError

NAMES = [f"{number // 100000:05d}/img{number:08d}.png" for number in (0, 1, 2, 5, 7, 8, 12, 100003, 100004, 100007)]


@pytest.fixture
def made(tmp_path, small_clip):
    """made(captions=False, zipped=False, **table): a data set of ten pictures, with features of the small CLIP."""

    def made(captions: bool = False, zipped: int | None = None, **table: object) -> EasyDict:
        folder, rng = tmp_path / "made", np.random.default_rng(0)
        pictures = {name: rng.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1) for name in NAMES}
        images = torch.from_numpy(np.stack(list(pictures.values()))).permute(0, 3, 1, 2) / 127.5 - 1
        own = small_clip.image(images)[1].tolist()
        text = [[name, rng.standard_normal((1 + n % 3, 64)).tolist()] for n, name in enumerate(NAMES)]
        content = {
            "labels": None,
            lafite.IMAGE: [list(pair) for pair in zip(NAMES, own, strict=True)],
            lafite.TEXT: text,
        }
        for name, picture in pictures.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / name)
            if captions:
                (folder / name).with_suffix(".txt").write_text(f"picture {name}\n\nanother\n")
        (folder / "dataset.json").write_text(json.dumps(content | table))
        place = folder
        if zipped is not None:
            place = tmp_path / "made.zip"
            with zipfile.ZipFile(place, "w", zipped) as archive:
                for path in sorted(folder.rglob("*.*")):
                    archive.write(path, path.relative_to(folder))
        return EasyDict(layout="lafite", dir=str(place), test_dir=None, num_workers=0)

    return made


@pytest.mark.parametrize("zipped", [None, zipfile.ZIP_STORED])
@pytest.mark.parametrize("captions", [False, True])
def test_pictures_and_captions(made, capsys, captions, zipped, tmp_path):
    data = made(captions, zipped)
    stocks = {split: take_stock(data, split) for split in ("train", "test")}
    said = "text files beside them" if captions else "none, but their features in dataset.json"
    assert f"10 pictures of a data set made for LAFITE; captions: {said}" in capsys.readouterr().out
    assert [len(stock.items) for stock in stocks.values()] == [9, 1]
    items = sorted(stocks["train"].items + stocks["test"].items, key=lambda item: item.key)
    assert [f"{item.key}.png" for item in items] == NAMES
    assert not [problem for stock in stocks.values() for problem in stock.problems]
    for item in items:
        assert item.captions == ([f"picture {item.key}.png", "another"] if captions else [])
        assert np.array_equal(
            np.asarray(open_image(item)), np.asarray(Image.open(tmp_path / "made" / f"{item.key}.png"))
        )


@pytest.mark.parametrize("zipped", [None, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("chunk", [7, 2**20])
def test_features(made, zipped, chunk, monkeypatch):
    """Read in pieces of any length, from the table and then from the cache; of any items in their order."""
    monkeypatch.setattr(lafite, "CHUNK", chunk)
    data = made(zipped=zipped)
    content = json.loads((Path(data.dir).parent / "made" / "dataset.json").read_text())
    place, cache = Path(data.dir), cache_folder(data)
    for features in (lafite.read_features(place, cache), lafite.read_features(place, cache)):
        assert [f"{key}.png" for key in features.keys] == NAMES
        assert torch.equal(features.image, torch.tensor([own for _, own in content[lafite.IMAGE]]))
        assert torch.equal(features.text, torch.tensor([row for _, rows in content[lafite.TEXT] for row in rows]))
        assert features.starts.tolist() == np.cumsum([0] + [1 + n % 3 for n in range(10)]).tolist()
    assert len(list(cache.glob("lafite_*.pt"))) == 1
    items = take_stock(made(), "train").items[::-2]
    own = lafite.of_items(features, items, place)
    for number, item in enumerate(items):
        name, there = f"{item.key}.png", NAMES.index(f"{item.key}.png")
        assert own.keys[number] == item.key and torch.equal(own.image[number], features.image[there])
        rows = own.text[own.starts[number] : own.starts[number + 1]]
        assert torch.equal(rows, torch.tensor(dict(content[lafite.TEXT])[name]))


def test_features_are_bound_to_their_clip(made, small_clip):
    data = made()
    items, place = take_stock(data, "train").items, Path(data.dir)
    features = lafite.of_items(lafite.read_features(place, cache_folder(data)), items, place)
    lafite.require_same_clip(features, items, small_clip, place)
    with pytest.raises(UserError, match=r"are of another CLIP than clip\.weights \(mean cosine -?0\.\d\d\)"):
        turned = features._replace(image=features.image.roll(1, 1))
        lafite.require_same_clip(turned, items, small_clip, place)
    with pytest.raises(UserError, match=r"features 63 long, clip\.weights makes 64"):
        lafite.require_same_clip(features._replace(image=features.image[:, 1:]), items, small_clip, place)
    with pytest.raises(UserError, match="has no clip_img_features, by which it could be told"):
        lafite.require_same_clip(features._replace(image=None), items, small_clip, place)


@pytest.mark.parametrize(
    "table, said",
    [
        ({lafite.IMAGE: None, lafite.TEXT: None}, "it holds no features"),
        ({lafite.IMAGE: [["a.png", [1.0, 2.0]]]}, "it holds features of 2 lengths"),
        ({lafite.IMAGE: [["a.png", "x"]]}, r"clip_img_features: expected \[name, numbers\], not \['a.png', 'x'\]"),
        ({lafite.IMAGE: [["a.png", [float("nan")]]]}, r"clip_img_features: expected \[name, numbers\]"),
        ({lafite.TEXT: [[1, 2, 3]]}, "clip_txt_features: expected"),
    ],
)
def test_tables_that_are_refused(made, table, said, tmp_path):
    with pytest.raises(UserError, match=rf"dataset\.json.*{said}"):
        lafite.read_features(Path(made(**table).dir), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"labels"', '{"clip_img_features": [["a.png", [1, 2', '{"clip_img_features": [1']
)
def test_tables_that_are_cut_short(made, text, tmp_path):
    place = Path(made().dir)
    (place / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=r"dataset\.json: (not|clip_img)"):
        lafite.read_features(place, tmp_path / "cache")


def test_what_else_is_refused(made, tmp_path):
    data = made(zipped=zipfile.ZIP_DEFLATED)
    lost = take_stock(data, "train").lost
    assert len(lost) == 10 and "is compressed within the zip; unpack it" in lost[0].message
    (tmp_path / "made" / "dataset.json").unlink()
    data.dir = str(tmp_path / "made")
    with pytest.raises(UserError, match="is no folder or zip made for LAFITE: it has no dataset.json"):
        take_stock(data, "train")
    data.dir = str(tmp_path / "broken.zip")
    Path(data.dir).write_bytes(b"PK not")
    with pytest.raises(UserError, match=r"broken\.zip: not a zip, or cut short"):
        take_stock(data, "train")
    data = made(captions=True)
    (tmp_path / "made" / NAMES[3]).with_suffix(".txt").write_text("\n")
    (problem,) = take_stock(data, "train").problems
    assert problem.kind == "missing captions" and problem.lost and "img00000005.txt" in problem.message
    with pytest.raises(UserError, match="has no features of 00000/img00000001"):
        features = lafite.read_features(tmp_path / "made", tmp_path / "cache")
        items = take_stock(data, "train").items
        lafite.of_items(
            features._replace(keys=["x"] * 10), [i for i in items if i.key.endswith("1")], tmp_path / "made"
        )
