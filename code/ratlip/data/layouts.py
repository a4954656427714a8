"""Where the images, captions and splits of each supported data set lie on disk."""

import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ratlip.data import demo
from ratlip.errors import UserError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
MAX_PIXELS = 64_000_000  # of an image; larger ones would take hundreds of megabytes in each worker
SPLIT_SEED = 0  # of the 90/10 split of a folder that has no train.txt and test.txt


@dataclass(frozen=True)
class Item:
    """One captioned image. `box` is a bounding box (x, y, width, height) in pixels, for birds."""

    key: str
    image: Path
    captions: list[str]
    box: tuple[float, float, float, float] | None = None


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


def read_items(layout_name: str, root: Path, split: str) -> list[Item]:
    """All captioned images of a split.

    Args:
        layout_name: a key of LAYOUTS, or "demo", which is the folder layout and is made here where it is missing.
        root: the data set's folder. split: "train" or "test".

    Raises:
        UserError: a missing folder, key list, image or caption, named with its path.
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
    items = []
    for key in keys:
        names = {"key": key, "stem": key.split(".")[0], "split": split, "subset": layout.subsets.get(split, split)}
        image = images.get(key) if images is not None else root / layout.image.format(**names)
        if image is None or not image.is_file():
            raise UserError(f"{root / layout.image.format(**names)}: missing, but {split} lists {key!r}")
        captions = read_captions(root / layout.text.format(**names))
        if layout.boxes and key not in boxes:
            raise UserError(f"{root / layout.boxes}/bounding_boxes.txt: no box for {key}")
        items.append(Item(key, image, captions, boxes.get(key)))
    if not items:
        raise UserError(f"{root}: the {split} split is empty")
    return items


def read_captions(path: Path) -> list[str]:
    """The captions in a text file, one a line; empty lines do not count."""
    if not path.is_file():
        raise UserError(f"{path}: no such caption file")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    captions = [line.strip() for line in text.splitlines()]
    captions = [caption for caption in captions if caption]
    if not captions:
        raise UserError(f"{path}: holds no caption")
    return captions


def open_image(item: Item) -> Image.Image:
    """The RGB picture of an item; birds are cropped around their bounding box, as in the published work."""
    try:
        image = decode(item.image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{item.image}: cannot be decoded ({error})") from None
    if item.box is None:
        return image
    x, y, width, height = item.box
    radius = int(0.75 * max(width, height))
    centre_x, centre_y = int(x + width / 2), int(y + height / 2)
    return image.crop(
        (
            max(0, centre_x - radius),
            max(0, centre_y - radius),
            min(image.width, centre_x + radius),
            min(image.height, centre_y + radius),
        )
    )


def decode(path: Path) -> Image.Image:
    """An image file as 8-bit RGB: turned as its EXIF data says, 16-bit levels scaled, transparency over white.

    Raises ValueError for more than MAX_PIXELS, before any is decoded, and whatever Pillow raises.
    """
    with Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}; shrink it")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey, which convert would cut off at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


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


def _images_by_key(root: Path) -> dict[str, Path]:
    """Pictures below images/ by their path without suffix."""
    folder = root / "images"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in find_pictures(folder)}


def _folder_keys(root: Path, split: str, images: dict[str, Path]) -> list[str]:
    lists = {name: root / f"{name}.txt" for name in ("train", "test")}
    missing = [path for path in lists.values() if not path.is_file()]
    if len(missing) == 1:
        raise UserError(f"{missing[0]}: missing; give key lists for both splits, or for neither")
    listed = lists[split]
    if not missing:
        return [line.strip() for line in listed.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    keys = np.random.default_rng(SPLIT_SEED).permutation(sorted(images)).tolist()
    tests = max(1, round(len(keys) / 10))
    return sorted(keys[:tests] if split == "test" else keys[tests:])


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
