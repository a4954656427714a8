"""Each layout on a data set of a few pictures, built as its description says, and what is said of broken ones."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from easydict import EasyDict
from PIL import Image

from ratlip.data.inventory import usable_items
from ratlip.data.layouts import LAYOUTS, Item, decode, open_image, read_captions
from ratlip.errors import UserError

# key -> bounding box (x, y, width, height) in a picture of 40x30 pixels
BOXES = {
    "001.Black_footed_Albatross/Black_Footed_Albatross_0046_18": (12.0, 10.0, 10.0, 8.0),  # inside
    "001.Black_footed_Albatross/Black_Footed_Albatross_0009_34": (0.0, 0.0, 15.0, 9.0),  # touches top and left
    "002.Laysan_Albatross/Laysan_Albatross_0002_1027": (30.5, 21.5, 9.5, 8.5),  # touches bottom and right
    "002.Laysan_Albatross/Laysan_Albatross.v2": (0.0, 0.0, 40.0, 30.0),  # the whole picture
    "003.Sooty_Albatross/Sooty_Albatross_1": (35.0, 25.0, 12.0, 11.0),  # leaves the picture
    "003.Sooty_Albatross/Sooty_Albatross_2": (-4.0, 7.7, 9.3, 21.9),  # leaves it to the left
}
SPLIT = {"train": 4, "test": 2}  # how many of six keys
KEYS = {
    "bird": list(BOXES),
    "flower": [f"image_{i:05}.jpg" for i in range(6)],
    "face": [str(i) for i in range(6)],
    "coco": [f"COCO_{'train' if i < 4 else 'val'}2014_{i:012}" for i in range(6)],
}
IMAGES = {
    "bird": "CUB_200_2011/images/{key}.jpg",
    "flower": "images/{key}",
    "face": "images/{key}.jpg",
    "coco": "images/{subset}/jpg/{key}.jpg",
}
TEXTS = {"bird": "text/{key}.txt", "flower": "text/{stem}.txt", "face": "text/{key}.txt", "coco": "text/{key}.txt"}


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pixels(number: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    levels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(levels)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    """Lossless by default; Pillow goes by the content, not by the name."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def captions_of(number: int) -> list[str]:
    return [f"picture {number}, caption {i}" for i in range(1 + number % 3)]


def split_of(number: int) -> str:
    return "train" if number < SPLIT["train"] else "test"


def build(layout: str, root: Path, image: str | None = None) -> Path:
    """Six pictures in one of the layouts with pickled keys; `image`: where they lie, if not as in IMAGES."""
    lists = {"train": [], "test": []}
    for number, key in enumerate(KEYS[layout]):
        split = split_of(number)
        subset = {"train": "train2014", "test": "val2014"}[split]
        names = {"key": key, "subset": subset, "stem": key.split(".")[0]}
        write(root / (image or IMAGES[layout]).format(**names), encoded(pixels(number)))
        write(root / TEXTS[layout].format(**names), "\n".join(captions_of(number)) + "\n")
        lists[split].append(("", " ", "\t")[number % 3] + key + ("", "\n", " ", "\r\n")[number % 4])
    for split, keys in lists.items():
        write(root / split / "filenames.pickle", pickle.dumps(keys))
    if layout == "bird":
        rows = list(enumerate(BOXES.items(), 1))
        write(root / "CUB_200_2011/images.txt", "".join(f"{i} {key}.jpg\n" for i, (key, _) in rows))
        boxes = (f"{i} {' '.join(map(str, box))}\n" for i, (_, box) in reversed(rows))  # matched by id, not by line
        write(root / "CUB_200_2011/bounding_boxes.txt", "".join(boxes))
    return root


def build_folder(root: Path, keys: list[str]) -> Path:
    for number, key in enumerate(keys):
        write(root / "images" / f"{key}.png", encoded(pixels(number)))
        write(root / "text" / f"{key}.txt", "\n".join(captions_of(number)))
    return root


def read_items(layout: str, root: Path, split: str) -> list[Item]:
    """The items as training gets them."""
    data = {"layout": layout, "dir": str(root), "num_workers": 0, "enlarge": 1.0, "fit": "crop"}
    return usable_items(EasyDict(file="cfg/mine.yml", data=data, model={"imsize": 16}), split)


def refused(layout: str, root: Path, split: str, *parts: object) -> str:
    """The one-line UserError of reading a split; it holds every part."""
    with pytest.raises(UserError) as caught:
        read_items(layout, root, split)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, (part, message)
    return message


def test_all_layouts_are_tested():
    assert set(LAYOUTS) == set(KEYS)  # and tests/data/test_folder.py, test_parquet.py, test_shards.py


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("layout", "image"),
    [
        *((layout, IMAGES[layout]) for layout in ("flower", "face", "coco")),
        ("flower", "oxford-102-flowers/images/{stem}.jpg"),  # DF-GAN
        ("flower", "jpg/{stem}.jpg"),  # RAT-GAN
        ("face", "image/CelebA-HQ-img/{key}.jpg"),  # DF-GAN
        ("coco", "images/{subset}/{key}.jpg"),  # DF-GAN
        ("coco", "images/{key}.jpg"),  # RAT-GAN
    ],
)
def test_pickled_layouts(layout, image, split, tmp_path):
    items = read_items(layout, build(layout, tmp_path, image), split)
    expected = [number for number in range(6) if split_of(number) == split]
    assert [item.key for item in items] == [KEYS[layout][number] for number in expected]
    for item, number in zip(items, expected, strict=True):
        assert item.captions == captions_of(number)
        assert item.box is None
        assert np.array_equal(np.array(open_image(item)), np.array(pixels(number)))


@pytest.mark.parametrize("place", ["flower_cat_dic.pkl", "../flower_cat_dic.pkl"])
def test_ratgans_one_list_of_flowers(place, tmp_path, capsys):
    """Its repository has all of Oxford-102 in one file, for training and testing."""
    root = build("flower", tmp_path / "flower", "jpg/{stem}.jpg")
    for split in SPLIT:
        (root / split / "filenames.pickle").unlink()
    refused("flower", root, "train", root / "train/filenames.pickle")
    keys = [key.removesuffix(".jpg") for key in KEYS["flower"]]
    write(root / place, pickle.dumps({"img": keys, "cat": ["rose"] * 6}, protocol=2))
    for split in SPLIT:
        capsys.readouterr()
        assert [item.key for item in read_items("flower", root, split)] == keys
        assert "flower_cat_dic.pkl: lists pictures for training and testing alike" in capsys.readouterr().out
    write(root / place, pickle.dumps({"cat": keys}))
    refused("flower", root, "train", "flower_cat_dic.pkl", "expected a list of strings")


def test_birds_are_cropped_as_published(dfgan_answers):
    """Each picture's levels tell where in it they come from."""
    for (width, height, *box), (left, top, right, bottom) in zip(
        dfgan_answers["crop.in"].tolist(), dfgan_answers["crop.out"].tolist(), strict=True
    ):
        y, x = np.mgrid[:height, :width]
        whole = np.stack([x % 256, y % 256, 16 * (y // 256) + x // 256], 2).astype(np.uint8)
        item = Item("a", Path("a.png"), ["x"], tuple(map(float, box)))
        assert np.array_equal(open_image(item, encoded(Image.fromarray(whole))), whole[top:bottom, left:right])


@pytest.mark.parametrize("split", ["train", "test"])
def test_birds_are_cropped_around_their_boxes(split, tmp_path):
    items = read_items("bird", build("bird", tmp_path), split)
    expected = [number for number in range(6) if split_of(number) == split]
    assert [item.key for item in items] == [KEYS["bird"][number] for number in expected]
    for item, number in zip(items, expected, strict=True):
        x, y, w, h = map(int, BOXES[item.key])
        r, cx, cy = int(0.75 * max(w, h)), int(x + w / 2), int(y + h / 2)
        whole = np.array(pixels(number))
        part = whole[max(0, cy - r) : min(30, cy + r), max(0, cx - r) : min(40, cx + r)]
        assert part.size and np.array_equal(np.array(open_image(item)), part), item.key
        assert item.captions == captions_of(number)


def test_a_bird_by_hand(tmp_path):
    """Box (12, 10, 10, 8): half-side 7 around (17, 14), so columns 10 to 23 and rows 7 to 20."""
    item = read_items("bird", build("bird", tmp_path), "train")[0]
    assert np.array_equal(np.array(open_image(item)), np.array(pixels(0))[7:21, 10:24])


def test_keys_pickled_by_python_2(tmp_path):
    root = build("face", tmp_path)
    write(root / "train/filenames.pickle", b"(lp0\nS'3'\np1\naV1\np2\na.")
    assert [item.key for item in read_items("face", root, "train")] == ["3", "1"]


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP"])
def test_other_encodings_decode_as_pillow_does(kind, tmp_path):
    path = write(tmp_path / "picture.jpg", encoded(pixels(0), kind))
    assert np.array_equal(np.array(open_image(Item("a", path, ["x"]))), np.array(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "LA"])
def test_other_colour_modes_become_rgb(mode, tmp_path):
    image = pixels(0).convert(mode)
    opened = open_image(Item("a", write(tmp_path / "a.png", encoded(image)), ["x"]))
    assert opened.mode == "RGB" and opened.size == (40, 30)
    assert np.array_equal(np.array(opened), np.array(image.convert("RGB")))


def test_folder_with_lists(tmp_path):
    keys = ["a", "deep/b", "deep/er/c.with.dots", "d e"]
    root = build_folder(tmp_path, keys)
    (root / "images/d e.png").rename(root / "images/d e.JPG")
    write(root / "train.txt", "\ufeffdeep/er/c.with.dots\r\n\r\n  a \r\n")
    write(root / "test.txt", "d e\ndeep/b")
    for split, expected in (("train", [2, 0]), ("test", [3, 1])):
        items = read_items("folder", root, split)
        assert [item.key for item in items] == [keys[number] for number in expected]
        for item, number in zip(items, expected, strict=True):
            assert item.captions == captions_of(number)
            assert np.array_equal(np.array(open_image(item)), np.array(pixels(number)))


@pytest.mark.parametrize(("count", "tests"), [(20, 2), (2, 1), (34, 3)])
def test_folder_without_lists_keeps_a_tenth_for_testing(count, tests, tmp_path):
    keys = [f"class{i % 3}/{i}" for i in range(count)]
    root = build_folder(tmp_path, keys)
    found = {split: [item.key for item in read_items("folder", root, split)] for split in ("train", "test")}
    assert len(found["test"]) == tests
    assert sorted(found["train"] + found["test"]) == sorted(keys)
    for split, expected in found.items():
        assert [item.key for item in read_items("folder", root, split)] == expected
    if count == 34:
        assert found["test"] != sorted(keys)[:tests] and found["test"] != sorted(keys)[-tests:]  # drawn, not cut off


def test_one_list_alone_never_puts_training_pictures_in_the_test(tmp_path):
    root = build_folder(tmp_path, [str(i) for i in range(30)])
    write(root / "train.txt", "\n".join(str(i) for i in range(25)))
    for split in ("train", "test"):
        refused("folder", root, split, root / "test.txt")


@pytest.mark.parametrize("layout", [*KEYS, "folder"])
def test_missing_folder(layout, tmp_path):
    refused(layout, tmp_path / "nowhere", "train", tmp_path / "nowhere")


@pytest.mark.parametrize("layout", KEYS)
@pytest.mark.parametrize("missing", ["list", "image", "caption"])
def test_missing_files_are_named(layout, missing, tmp_path):
    root = build(layout, tmp_path)
    key = KEYS[layout][5]
    names = {"key": key, "subset": "val2014", "stem": key.split(".")[0]}
    name = {"list": "test/filenames.pickle", "image": IMAGES[layout], "caption": TEXTS[layout]}[missing]
    path = root / name.format(**names)
    path.unlink()
    refused(layout, root, "test", path)
    assert len(read_items(layout, root, "train")) == SPLIT["train"]


def test_missing_files_of_a_folder_are_named(tmp_path):
    root = build_folder(tmp_path, ["a", "deep/b"])
    write(root / "train.txt", "a\ndeep/gone\n")
    write(root / "test.txt", "deep/b\n")
    refused("folder", root, "train", root / "images/deep/gone")
    write(root / "train.txt", "a\ndeep/b\n")
    (root / "text/deep/b.txt").unlink()
    refused("folder", root, "train", root / "text/deep/b.txt")
    (root / "train.txt").write_text("\n")
    refused("folder", root, "train", root, "train split is empty")


def test_folder_without_pictures(tmp_path):
    write(tmp_path / "text/a.txt", "a caption")
    refused("folder", tmp_path, "train", tmp_path / "images")
    write(tmp_path / "images/notes.md", "no picture")
    refused("folder", tmp_path, "train", tmp_path / "images")


@pytest.mark.parametrize("content", [b"", b"\n \r\n\t\n", b"\xef\xbb\xbf\r\n"])
def test_empty_caption_files_are_named(content, tmp_path):
    root = build("face", tmp_path)
    path = write(root / "text/5.txt", content)
    refused("face", root, "test", path)


def test_box_files_in_utf_16(tmp_path):
    """As Windows writes them anew."""
    root = build("bird", tmp_path)
    expected = [item.box for item in read_items("bird", root, "train")]
    for name in ("images.txt", "bounding_boxes.txt"):
        path = root / "CUB_200_2011" / name
        path.write_bytes(path.read_text().encode("utf-16"))
    assert [item.box for item in read_items("bird", root, "train")] == expected


@pytest.mark.parametrize("name", ["images.txt", "bounding_boxes.txt"])
def test_missing_box_files_are_named(name, tmp_path):
    path = build("bird", tmp_path) / "CUB_200_2011" / name
    path.unlink()
    refused("bird", tmp_path, "train", path)


@pytest.mark.parametrize("lines", ["", "1 1 2 3 nothing", "1 1 2 3", "1", "1 1 2 3 4 5"])
def test_broken_boxes_name_their_file(lines, tmp_path):
    """A missing box, a word, three numbers, none, five: whichever it is, in place of the first bird's box."""
    path = build("bird", tmp_path) / "CUB_200_2011/bounding_boxes.txt"
    whole = path.read_text().splitlines()
    path.write_text("\n".join([*(line for line in whole if not line.startswith("1 ")), lines]))
    refused("bird", tmp_path, "train", path)


def test_a_bird_without_a_box_is_named(tmp_path):
    root = build("bird", tmp_path)
    path = root / "CUB_200_2011/images.txt"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if "Laysan_Albatross.v2" not in line))
    refused("bird", root, "train", root / "CUB_200_2011/bounding_boxes.txt", "Laysan_Albatross.v2")


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "header"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_undecodable_images_are_named(kind, damage, tmp_path):
    whole = encoded(pixels(0), kind)
    content = {"empty": b"", "text": b"hello\n", "cut": whole[: len(whole) // 2], "header": b"\0" * 8 + whole[8:]}
    path = write(tmp_path / "picture.jpg", content[damage])
    with pytest.raises(UserError, match="cannot be decoded") as caught:
        open_image(Item("a", path, ["x"]))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("content", [Trap(), ["0", Trap()], {"0": Trap()}])
def test_a_pickle_that_would_run_code_is_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = build("face", tmp_path / "data")
    path = write(root / "train/filenames.pickle", pickle.dumps(content))
    pickle.loads(pickle.dumps(content))
    assert os.path.isdir("executed")  # the trap works
    os.rmdir("executed")
    assert "mkdir" in refused("face", root, "train", path)
    assert not os.path.exists("executed")


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps("a string"),
        pickle.dumps({"0": "1"}),
        pickle.dumps([0, 1]),
        pickle.dumps(["0", None]),
        pickle.dumps([b"0"]),
        pickle.dumps(None),
        pickle.dumps(["0", "1"])[:-3],
        b"",
        b"0\n1\n2\n",
    ],
)
def test_a_pickle_that_is_no_list_of_strings_is_named(content, tmp_path):
    root = build("face", tmp_path)
    refused("face", root, "train", write(root / "train/filenames.pickle", content))


def test_an_empty_key_list(tmp_path):
    root = build("face", tmp_path)
    write(root / "train/filenames.pickle", pickle.dumps([]))
    refused("face", root, "train", root, "train split is empty")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"\xef\xbb\xbfone\r\ntwo\r\n", ["one", "two"]),
        (b"\n\n one \n\t\n\r\ntwo", ["one", "two"]),
        ("ein grüner Vogel\n一只鸟".encode(), ["ein grüner Vogel", "一只鸟"]),
        (b"caf\xe9 au lait\n", ["caf\xe9 au lait"]),  # Latin-1
        ("a \U0001f426\n".encode(), ["a \U0001f426"]),
        (b"the same\nthe same\n", ["the same", "the same"]),
    ],
)
def test_caption_files(content, expected):
    assert read_captions(content) == expected


def picture(image: Image.Image, folder: Path, suffix: str, **options) -> np.ndarray:
    """What `decode` gives for a saved image."""
    path = folder / f"picture{suffix}"
    image.save(path, **options)
    return np.asarray(decode(path)).astype(int)


def test_cmyk_becomes_rgb(tmp_path):
    image = pixels(0).convert("CMYK")
    assert (picture(image, tmp_path, ".tif") == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_shown_over_white(mode, tmp_path):
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 0 if mode == "P" else 128))
    if mode == "P":
        image = Image.new("P", (3, 1), 0)
        image.putpalette([0, 0, 0, 9, 9, 9])
        image.putpixel((1, 0), 1)
        image.putpixel((2, 0), 1)
        found = picture(image, tmp_path, ".png", transparency=1)
    else:
        found = picture(image.convert(mode), tmp_path, ".png")
    assert found[0, 0].tolist() == [0, 0, 0] and found[0, 1].tolist() == [255, 255, 255]
    assert found[0, 2].tolist() == ([255] * 3 if mode == "P" else [127] * 3)


def test_16_bit_levels_are_scaled(tmp_path):
    levels = np.array([[0, 257, 32896, 65535]], np.uint16)
    assert picture(Image.fromarray(levels), tmp_path, ".png")[0, :, 0].tolist() == [0, 1, 128, 255]


def test_exif_turns_the_image(tmp_path):
    image = Image.fromarray(np.array([[[250, 0, 0], [0, 0, 250]]], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    found = picture(image, tmp_path, ".png", exif=exif)
    assert found[:, 0].tolist() == [[250, 0, 0], [0, 0, 250]]


def test_smallest_and_too_large(tmp_path):
    assert picture(Image.new("RGB", (1, 1), (1, 2, 3)), tmp_path, ".png").tolist() == [[[1, 2, 3]]]
    Image.new("1", (12000, 12000)).save(tmp_path / "huge.png")
    with pytest.raises(UserError, match=r"huge\.png: cannot be decoded \(12000 x 12000 pixels"):
        open_image(Item("huge", tmp_path / "huge.png", ["x"]))
