"""Where the images, captions and splits of each supported data set lie on disk."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps
from tqdm import tqdm

from ratlip import checkpoint, distributed
from ratlip.data import demo
from ratlip.data.folder import read_folder
from ratlip.data.items import Item, Problem
from ratlip.errors import UserError, first_line
from ratlip.paths import full
from ratlip.text import existing, read_captions, read_text, why_none

MAX_PIXELS = 64_000_000  # of an image; larger ones would take hundreds of megabytes in each worker
MAX_PROPORTION = 32  # longer to shorter side; the shorter one is resized to what training needs, however long the other
DECODING = 2  # version of `decode`: where it gives other pixels than before, what was made from them is made anew
PROFILED = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab ": "LAB"}  # a profile's colour space: Pillow's mode
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
ROUNDING = 2  # levels of 255; a profile that moves no colour further is sRGB, written by another program

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # decode refuses earlier than Pillow warns


@dataclass(frozen=True)
class Layout:
    """Paths below the data folder; {key} is the item's key, {stem} the key up to its first dot."""

    image: str | tuple[str, ...]  # of several, as programs differ, the first whose folder is there
    text: str = "text/{stem}.txt"
    keys: tuple[str, ...] = ("{split}/filenames.pickle",)  # the first that is there
    subsets: dict[str, str] = field(default_factory=dict)  # what {subset} stands for in each split
    boxes: str | None = None

    def image_in(self, root: Path) -> str:
        """The form of `image` that this data set has."""
        forms = (self.image,) if isinstance(self.image, str) else self.image
        for form in forms:
            for subset in self.subsets.values() or ("",):
                if (root / form.format(key="a", stem="a", subset=subset)).parent.is_dir():
                    return form
        return forms[0]


# Where there are several forms: GALIP's and RATLIP's, DF-GAN's, RAT-GAN's.
LAYOUTS = {
    "bird": Layout("CUB_200_2011/images/{key}.jpg", "text/{key}.txt", boxes="CUB_200_2011"),
    "flower": Layout(
        ("images/{key}", "oxford-102-flowers/images/{stem}.jpg", "jpg/{stem}.jpg"),
        keys=("{split}/filenames.pickle", "flower_cat_dic.pkl", "../flower_cat_dic.pkl"),
    ),
    "face": Layout(("images/{key}.jpg", "image/CelebA-HQ-img/{key}.jpg"), "text/{key}.txt"),
    "coco": Layout(
        ("images/{subset}/jpg/{key}.jpg", "images/{subset}/{key}.jpg", "images/{key}.jpg"),
        "text/{key}.txt",
        subsets={"train": "train2014", "test": "val2014"},
    ),
}


def read_items(layout_name: str, root: Path, split: str) -> tuple[list[Item], list[Problem]]:
    """The captioned images of a split, and what is wrong with those that cannot be used; no image is opened.

    Args:
        layout_name: a key of LAYOUTS; "folder"; or "demo", which is such a folder and is made here where it is missing.
        root: the data set's folder. split: "train" or "test".

    Raises:
        UserError: a missing folder, key list or box file, named with its path.
    """
    if layout_name == "demo":
        demo.write(root)
    if not root.is_dir():
        raise UserError(f"data.dir: no folder {full(root)}; README.md says where each data set comes from")
    if layout_name in ("demo", "folder"):
        return read_folder(root, split)
    layout = LAYOUTS[layout_name]
    place_of_keys, keys = _pickled_keys(root, layout, split)
    boxes = _read_boxes(root / layout.boxes) if layout.boxes else {}
    items, problems, seen = [], [], set()
    if split not in place_of_keys.parts:
        line = f"{place_of_keys}: lists pictures for training and testing alike; scores are of training pictures"
        problems.append(Problem("one list", line, lost=False))
    image = layout.image_in(root)
    for key in tqdm(keys, f"{split} captions", unit="file", leave=False, disable=distributed.rank() > 0 or None):
        names = {"key": key, "stem": key.split(".")[0], "split": split, "subset": layout.subsets.get(split, split)}
        path, text = (existing(root / place.format(**names)) for place in (image, layout.text))
        if key in seen:
            problems.append(Problem("key twice", f"{root}: {split} lists {key!r} twice; used once", lost=False))
        elif key.startswith("/") or ".." in Path(key).parts:
            problems.append(Problem("key outside", f"{root}: {split} lists {key!r}, which leaves the folder"))
        elif not path.is_file():
            problems.append(Problem("missing image", f"{path}: missing, but {split} lists {key!r}"))
        elif not text.is_file():
            problems.append(Problem("missing captions", f"{text}: no such caption file"))
        elif not (captions := read_captions(text.read_bytes())):
            problems.append(Problem("empty captions", f"{text}: {why_none(text.read_bytes())}"))
        elif layout.boxes and key not in boxes:
            problems.append(Problem("missing box", f"{root / layout.boxes}/bounding_boxes.txt: no box for {key}"))
        else:
            items.append(Item(key, path, captions, boxes.get(key)))
        seen.add(key)
    return items, problems


def read_bytes(item: Item) -> bytes:
    """The image file of an item, or its part of a file that holds many."""
    start, length = item.span or (0, -1)
    with open(item.image, "rb") as file:
        file.seek(start)
        return file.read(length)


def open_image(item: Item, content: bytes | None = None) -> Image.Image:
    """The RGB picture of an item; birds are cropped around their bounding box, as in the published work.

    Args:
        content: the image's bytes, where they have been read.

    Raises:
        UserError: names the file of an image that cannot be used.
    """
    with _naming(item.place):
        if content is None and item.span is not None:
            content = read_bytes(item)
        image = decode(item.image if content is None else BytesIO(content))
        return image if item.box is None else _crop_around(image, *item.box)


def open_plain(path: Path) -> Image.Image:
    """A picture to be scored as torch-fidelity reads it, and most programs that score: Pillow's own conversion to RGB.

    Colour profiles, EXIF's turning and transparency are passed over, other than by `decode`.

    Raises:
        UserError: names the file of a picture that cannot be used.
    """
    with _naming(str(path)), Image.open(path) as image:
        _check_pixels(image)
        return image.convert("RGB")


def decode(file: Path | BytesIO) -> Image.Image:
    """An image file as 8-bit RGB in sRGB's colours: converted as its colour profile says, turned as its EXIF data says,
    16-bit levels scaled, transparency over white; the first of several frames.

    A profile that cannot be used stays under "icc_profile" in the picture's `info`; the colours are then taken as sRGB.

    Raises ValueError for more than MAX_PIXELS or MAX_PROPORTION, before any pixel is decoded, and whatever Pillow
    raises.
    """
    with Image.open(file) as image:
        _check_pixels(image)
        if max(image.size) > MAX_PROPORTION * min(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels are too long a strip; cut it")
        image = ImageOps.exif_transpose(image)
        profile = image.info.get("icc_profile")
        if image.mode.startswith("I"):  # 16-bit grey, which convert would cut off at 255
            levels = np.asarray(image).clip(0, 65535).astype(np.float32) / 257
            image = Image.fromarray(levels.round().astype(np.uint8))
        alpha = None
        if image.has_transparency_data:
            image = image.convert("LA" if image.mode == "L" else "RGBA")
            alpha = image.getchannel("A")
            image = image.convert(image.mode.removesuffix("A"))
        image = _in_srgb(image, profile)
        if alpha is None:
            return image
        useless = image.info
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        image.info = useless
        return image


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Whatever is wrong with a picture becomes a UserError that names its place."""
    try:
        yield
    except Exception as error:  # on broken files Pillow's decoders fail in any way
        raise UserError(f"{place}: cannot be decoded ({first_line(error)})") from None


def _check_pixels(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}; shrink it")


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An image without transparency as RGB, its colours as `profile` means them; `info` keeps one that is of no use."""
    if image.mode == "LAB":  # states its colours by itself; convert knows no way from it
        profile = _lab_profile()
    useless = {}
    try:
        if profile is not None:
            mode, transform = _srgb_transform(profile)
            if (mode == "RGB" and image.mode not in ("CMYK", "LAB")) or (mode == "L" and image.mode == "1"):
                image = image.convert(mode)
            if image.mode != mode:
                raise ValueError(f"a profile of {mode} in a picture of {image.mode}")
            if transform is not None:
                image = ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, OSError, ValueError):
        useless = {"icc_profile": profile}
    image = image.convert("RGB")
    image.info = useless
    return image


@lru_cache(64)
def _srgb_transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode of the pictures that a profile is for, and what converts them to sRGB; None where nothing is to be done.

    Raises what Pillow does for a broken profile, and ValueError for one of another kind of colours.
    """
    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    mode = PROFILED.get(source.profile.xcolor_space)
    if mode is None:
        raise ValueError(f"no use for a profile of {source.profile.xcolor_space}")
    transform = ImageCms.buildTransform(source, SRGB, mode, "RGB")  # perceptual, as Pillow's profileToProfile
    if mode in ("RGB", "L"):
        steps = np.linspace(0, 255, 18).round().astype(np.uint8)
        grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(18, -1, 3) if mode == "RGB" else steps[None]
        colours = Image.fromarray(grid)
        moved = np.asarray(ImageCms.applyTransform(colours, transform), int) - np.asarray(colours.convert("RGB"), int)
        if np.abs(moved).max() <= ROUNDING:
            return mode, None
    return mode, transform


@lru_cache(1)
def _lab_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def _crop_around(image: Image.Image, x: float, y: float, width: float, height: float) -> Image.Image:
    radius = int(0.75 * max(width, height))
    centre_x, centre_y = int(x + width / 2), int(y + height / 2)
    left, top = max(0, centre_x - radius), max(0, centre_y - radius)
    right, bottom = min(image.width, centre_x + radius), min(image.height, centre_y + radius)
    if left >= right or top >= bottom:
        raise ValueError(f"its bounding box {x:g} {y:g} {width:g} {height:g} holds nothing of it")
    return image.crop((left, top, right, bottom))


def _pickled_keys(root: Path, layout: Layout, split: str) -> tuple[Path, list[str]]:
    """The file that lists the keys of a split, and the keys."""
    places = [root / place.format(split=split) for place in layout.keys]
    path = next((place for place in places if place.is_file()), places[0])
    try:
        keys = checkpoint.read_pickle(path)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; it lists the keys of the {split} split") from None
    if isinstance(keys, dict):
        keys = keys.get("img")  # as RAT-GAN's flower_cat_dic.pkl has them, beside the classes
    if not isinstance(keys, list | tuple) or not all(isinstance(key, str) for key in keys):
        raise UserError(f"{path}: expected a list of strings")
    return path, [key.strip() for key in keys]


def read_classes(layout_name: str, root: Path, split: str) -> dict[str, int]:
    """The class of each key of a split, from its class_info.pickle; {}: there is none.

    Raises:
        UserError: it does not fit the list.
    """
    path = root / split / "class_info.pickle"
    if layout_name not in LAYOUTS or not path.is_file():
        return {}
    _, keys = _pickled_keys(root, LAYOUTS[layout_name], split)
    classes = checkpoint.read_pickle(path)
    try:
        return dict(zip(keys, map(int, classes), strict=True))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: expected a class, a number, for each of {len(keys):,} keys ({error})") from None


def _read_boxes(folder: Path) -> dict[str, tuple[float, float, float, float]]:
    """CUB's bounding boxes by key, from its images.txt (id path) and bounding_boxes.txt (id x y width height), the
    numbers cut to whole ones as AttnGAN's program and those after it read them."""
    path = folder / "bounding_boxes.txt"
    keys = {number: re.sub(r"\.\w+$", "", name) for number, name in _numbered_lines(folder / "images.txt").items()}
    boxes = {}
    for number, numbers in _numbered_lines(path).items():
        try:
            x, y, width, height = (float(int(float(number))) for number in numbers.split())
        except (ValueError, OverflowError):
            raise UserError(f"{path}: image {number}: expected x y width height, not {numbers!r}") from None
        boxes[keys.get(number)] = (x, y, width, height)
    return boxes


def _numbered_lines(path: Path) -> dict[str, str]:
    """What stands after the number that begins each line, by that number."""
    if not path.is_file():
        raise UserError(f"{path}: missing; it comes with CUB-200-2011")
    lines = (line.strip().partition(" ") for line in read_text(path).splitlines() if line.strip())
    return {number: rest.strip() for number, _, rest in lines}
