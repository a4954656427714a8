"""Where the images, captions and splits of each supported data set lie on disk."""

import pickle
import re
import warnings
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from ratlip import distributed
from ratlip.data import demo
from ratlip.errors import UserError, first_line

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
MAX_PIXELS = 64_000_000  # of an image; larger ones would take hundreds of megabytes in each worker
MAX_PROPORTION = 32  # longer to shorter side; the shorter one is resized to what training needs, however long the other
SPLIT_SEED = 0  # of the 90/10 split of a data set that has no lists, or no test shards

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # decode refuses earlier than Pillow warns


@dataclass(frozen=True, slots=True)
class Item:
    """One captioned image. `box` is a bounding box (x, y, width, height) in pixels, for birds."""

    key: str
    image: Path
    captions: list[str]
    box: tuple[float, float, float, float] | None = None
    span: tuple[int, int] | None = None  # the image's first byte and length, where `image` is a tar shard

    @property
    def place(self) -> str:
        """Where the image lies, for messages."""
        return str(self.image) if self.span is None else f"{self.image}: {Path(self.key).name}"


class Problem(NamedTuple):
    """Something wrong with one item of a data set."""

    kind: str
    message: str  # begins with the file
    lost: bool = True  # whether the item cannot be used


@dataclass(frozen=True)
class Layout:
    """Paths below the data folder; {key} is the item's key, {stem} the key up to its first dot."""

    image: str
    text: str = "text/{stem}.txt"
    keys: str = "{split}/filenames.pickle"
    subsets: dict[str, str] = field(default_factory=dict)  # what {subset} stands for in each split
    boxes: str | None = None


LAYOUTS = {
    "bird": Layout("CUB_200_2011/images/{key}.jpg", "text/{key}.txt", boxes="CUB_200_2011"),
    "flower": Layout("images/{key}"),
    "face": Layout("images/{key}.jpg", "text/{key}.txt"),
    "coco": Layout(
        "images/{subset}/jpg/{key}.jpg", "text/{key}.txt", subsets={"train": "train2014", "test": "val2014"}
    ),
    "folder": Layout("images/{key}.*", "text/{key}.txt", "{split}.txt"),
}


def read_items(layout_name: str, root: Path, split: str) -> tuple[list[Item], list[Problem]]:
    """The captioned images of a split, and what is wrong with those that cannot be used; no image is opened.

    Args:
        layout_name: a key of LAYOUTS, or "demo", which is the folder layout and is made here where it is missing.
        root: the data set's folder. split: "train" or "test".

    Raises:
        UserError: a missing folder, key list or box file, named with its path.
    """
    if layout_name == "demo":
        demo.write(root)
        layout_name = "folder"
    layout = LAYOUTS[layout_name]
    if not root.is_dir():
        raise UserError(f"data.dir: no folder {root}; README.md says where each data set comes from")
    images = _images_by_key(root) if layout_name == "folder" else None
    keys = _folder_keys(root, split, images) if images is not None else _pickled_keys(root, layout, split)
    boxes = _read_boxes(root / layout.boxes) if layout.boxes else {}
    items, problems, seen = [], [], set()
    for key in tqdm(keys, f"{split} captions", unit="file", leave=False, disable=distributed.rank() > 0 or None):
        names = {"key": key, "stem": key.split(".")[0], "split": split, "subset": layout.subsets.get(split, split)}
        path, text = root / layout.image.format(**names), root / layout.text.format(**names)
        if images is not None:
            path, *others = images.get(key, [path])
            problems += [Problem("key twice", f"{other}: the key of {path}, which is used", False) for other in others]
        if key in seen:
            problems.append(Problem("key twice", f"{root}: {split} lists {key!r} twice; used once", lost=False))
        elif key.startswith("/") or ".." in Path(key).parts:
            problems.append(Problem("key outside", f"{root}: {split} lists {key!r}, which leaves the folder"))
        elif not path.is_file():
            problems.append(Problem("missing image", f"{path}: missing, but {split} lists {key!r}"))
        elif not text.is_file():
            problems.append(Problem("missing captions", f"{text}: no such caption file"))
        elif not (captions := read_captions(text.read_bytes())):
            problems.append(Problem("empty captions", f"{text}: holds no caption"))
        elif layout.boxes and key not in boxes:
            problems.append(Problem("missing box", f"{root / layout.boxes}/bounding_boxes.txt: no box for {key}"))
        else:
            items.append(Item(key, path, captions, boxes.get(key)))
        seen.add(key)
    if images is not None and split == "train":
        problems += [
            Problem("captions without image", f"{path}: there is no image images/{key}.*", lost=False)
            for path in sorted((root / "text").rglob("*.txt"))
            if (key := path.relative_to(root / "text").with_suffix("").as_posix()) not in seen.union(images)
        ]
    return items, problems


def read_captions(content: bytes) -> list[str]:
    """The captions in a text file, one a line; empty lines do not count."""
    captions = [line.strip() for line in re.split(r"[\r\n]+", decode_text(content))]
    return [caption for caption in captions if caption]


def decode_text(content: bytes) -> str:
    """The text of a file. Not UTF-8: read as Latin-1."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def held_out(keys: list[str], split: str) -> list[str]:
    """A tenth of `keys` for the test split, the others for training: drawn, always the same."""
    drawn = np.random.default_rng(SPLIT_SEED).permutation(sorted(keys)).tolist()
    tests = max(1, round(len(drawn) / 10))
    return sorted(drawn[:tests] if split == "test" else drawn[tests:])


def open_image(item: Item) -> Image.Image:
    """The RGB picture of an item; birds are cropped around their bounding box, as in the published work.

    Raises:
        UserError: names the file of an image that cannot be used.
    """
    try:
        image = decode(item.image if item.span is None else BytesIO(_read_span(item.image, *item.span)))
        return image if item.box is None else _crop_around(image, *item.box)
    except Exception as error:  # on broken files Pillow's decoders fail in any way
        raise UserError(f"{item.place}: cannot be decoded ({first_line(error)})") from None


def decode(file: Path | BytesIO) -> Image.Image:
    """An image file as 8-bit RGB: turned as its EXIF data says, 16-bit levels scaled, transparency over white.

    Raises ValueError for more than MAX_PIXELS or MAX_PROPORTION, before any pixel is decoded, and whatever Pillow
    raises.
    """
    with Image.open(file) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}; shrink it")
        if max(image.size) > MAX_PROPORTION * min(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels are too long a strip; cut it")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey, which convert would cut off at 255
            levels = np.asarray(image).clip(0, 65535).astype(np.float32) / 257
            image = Image.fromarray(levels.round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def _read_span(path: Path, start: int, length: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(length)


def _crop_around(image: Image.Image, x: float, y: float, width: float, height: float) -> Image.Image:
    radius = int(0.75 * max(width, height))
    centre_x, centre_y = int(x + width / 2), int(y + height / 2)
    left, top = max(0, centre_x - radius), max(0, centre_y - radius)
    right, bottom = min(image.width, centre_x + radius), min(image.height, centre_y + radius)
    if left >= right or top >= bottom:
        raise ValueError(f"its bounding box {x:g} {y:g} {width:g} {height:g} holds nothing of it")
    return image.crop((left, top, right, bottom))


class _StringsUnpickler(pickle.Unpickler):
    """Builds plain containers of strings; anything that would import code is refused."""

    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"asks for {module}.{name}")


def _pickled_keys(root: Path, layout: Layout, split: str) -> list[str]:
    path = root / layout.keys.format(split=split)
    try:
        with open(path, "rb") as file:
            keys = _StringsUnpickler(file, encoding="latin-1").load()
    except FileNotFoundError:
        raise UserError(f"{path}: missing; it lists the keys of the {split} split") from None
    except Exception as error:  # a broken pickle can fail in any way
        raise UserError(f"{path}: not a pickled list of strings, refused ({error})") from None
    if not isinstance(keys, list | tuple) or not all(isinstance(key, str) for key in keys):
        raise UserError(f"{path}: expected a list of strings")
    return [key.strip() for key in keys]


def find_pictures(folder: Path) -> list[Path]:
    """The picture files below a folder, sorted."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise UserError(f"{folder}: no pictures ({', '.join(sorted(IMAGE_SUFFIXES))}) below it")
    return paths


def _images_by_key(root: Path) -> dict[str, list[Path]]:
    """Pictures below images/ by their path without suffix, of which there should be one each."""
    folder = root / "images"
    images: dict[str, list[Path]] = {}
    for path in find_pictures(folder):
        images.setdefault(path.relative_to(folder).with_suffix("").as_posix(), []).append(path)
    return images


def _folder_keys(root: Path, split: str, images: dict[str, list[Path]]) -> list[str]:
    lists = {name: root / f"{name}.txt" for name in ("train", "test")}
    missing = [path for path in lists.values() if not path.is_file()]
    if len(missing) == 1:
        raise UserError(f"{missing[0]}: missing; give key lists for both splits, or for neither")
    listed = lists[split]
    if not missing:
        return [line.strip() for line in listed.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    return held_out(list(images), split)


def _read_boxes(folder: Path) -> dict[str, tuple[float, float, float, float]]:
    """CUB's bounding boxes by key, from its images.txt (id path) and bounding_boxes.txt (id x y width height)."""
    path = folder / "bounding_boxes.txt"
    keys = {number: re.sub(r"\.\w+$", "", name) for number, name in _numbered_lines(folder / "images.txt").items()}
    boxes = {}
    for number, numbers in _numbered_lines(path).items():
        try:
            x, y, width, height = map(float, numbers.split())
        except ValueError:
            raise UserError(f"{path}: image {number}: expected x y width height, not {numbers!r}") from None
        boxes[keys.get(number)] = (x, y, width, height)
    return boxes


def _numbered_lines(path: Path) -> dict[str, str]:
    """What stands after the number that begins each line, by that number."""
    if not path.is_file():
        raise UserError(f"{path}: missing; it comes with CUB-200-2011")
    lines = (line.strip().partition(" ") for line in path.read_text().splitlines() if line.strip())
    return {number: rest.strip() for number, _, rest in lines}
