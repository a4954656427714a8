"""Colours: profiles of training pictures, against numbers worked out by hand and Pillow's own conversion; and pictures
to be scored, against what torch-fidelity reads."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from torch_fidelity.datasets import ImagesPathDataset

from ratlip.data.layouts import decode, open_plain

SRGB = ImageCms.createProfile("sRGB")
P3 = {"r": (0.51512, 0.24120, -0.00105), "g": (0.29198, 0.69225, 0.04189), "b": (0.15710, 0.06657, 0.78407)}  # at D50
P3_TO_SRGB = np.array([[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]])  # linear light
REC709 = {"r": (0.43607, 0.22249, 0.01392), "g": (0.38515, 0.71687, 0.09708), "b": (0.14307, 0.06061, 0.71410)}
XYZ_TO_SRGB = np.array([[3.1339, -1.6169, -0.4906], [-0.9788, 1.9161, 0.0335], [0.0719, -0.2290, 1.4052]])  # D50


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def profile(space: bytes, kind: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ") -> bytes:
    """An ICC profile of version 2 with these tags."""
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249),
        **tags,
    }
    offset, table, data = 132 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += struct.pack(">4sII", name, offset + len(data), len(content))
        data += content
    header = struct.pack(">I4xI4s4s4s12x4s28x", offset + len(data), 0x02100000, kind, space, connection, b"acsp")
    header += fixed(0.9642, 1, 0.8249)
    return header + bytes(128 - len(header)) + struct.pack(">I", len(tags)) + table + data


def rgb_profile(curve: bytes = gamma(2.2), primaries: dict = P3) -> bytes:
    colours = {f"{name}XYZ".encode(): b"XYZ \0\0\0\0" + fixed(*xyz) for name, xyz in primaries.items()}
    return profile(b"RGB ", b"mntr", {**colours, **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)})


def cmyk_profile(lab_of_cyan: tuple[int, int, int]) -> bytes:
    """One ink at a time: cyan looks like that, all other inks and mixtures black, paper white."""
    corners = [(0, 128, 128)] * 16  # L of 255 is 100; 128 is no colour
    corners[0b0000], corners[0b1000] = (255, 128, 128), lab_of_cyan
    straight = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += straight * 4 + b"".join(map(bytes, corners)) + straight * 3
    return profile(b"CMYK", b"prtr", {b"A2B0": table}, b"Lab ")


def encoded(linear: np.ndarray) -> np.ndarray:
    """sRGB's levels of linear light in [0, 1]."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def saved(image: Image.Image, kind: str = "PNG", **options) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    buffer.seek(0)
    return buffer


def chart(mode: str = "RGB") -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(levels).resize((32, 32), Image.Resampling.BILINEAR).convert(mode)


def as_pillow_converts(image: Image.Image, icc: bytes) -> np.ndarray:
    return np.asarray(ImageCms.profileToProfile(image, io.BytesIO(icc), SRGB, outputMode="RGB"), int)


@pytest.mark.parametrize("colour", [(150, 120, 100), (90, 140, 120), (200, 200, 200), (20, 40, 60)])
def test_display_p3_by_hand(colour):
    found = decode(saved(Image.new("RGB", (8, 8), colour), icc_profile=rgb_profile()))
    expected = encoded(P3_TO_SRGB @ (np.array(colour) / 255) ** 2.2)
    assert np.abs(np.array(found.getpixel((3, 3))) - expected).max() <= 1.5


def test_grey_by_hand():
    grey = profile(b"GRAY", b"mntr", {b"kTRC": gamma(1.0)})
    found = np.asarray(decode(saved(Image.fromarray(np.array([[0, 64, 128, 255]], np.uint8)), icc_profile=grey)), int)
    assert np.abs(found - encoded(np.array([0, 64, 128, 255]) / 255)[None, :, None]).max() <= 1
    sixteen = Image.fromarray(np.array([[0, 64, 128, 255]], np.uint16) * 257)
    assert np.array_equal(np.asarray(decode(saved(sixteen, icc_profile=grey)), int), found)


def test_inks_and_lab_by_hand():
    lab = (153, 128 - 30, 128 - 40)  # 60, -30, -40: a blue that screens have
    icc = cmyk_profile(lab)
    light, green_red, blue_yellow = 60, -30, -40
    y = (light + 16) / 116
    xyz = np.array([y + green_red / 500, y, y - blue_yellow / 200]) ** 3 * (0.9642, 1, 0.8249)
    expected = encoded(XYZ_TO_SRGB @ xyz)
    for kind in ("TIFF", "JPEG"):
        inks = Image.new("CMYK", (16, 8), (255, 0, 0, 0))
        inks.paste((0, 0, 0, 0), (8, 0, 16, 8))
        found = decode(saved(inks, kind, icc_profile=icc, **({"quality": 100} if kind == "JPEG" else {})))
        assert np.abs(np.array(found.getpixel((2, 4))) - expected).max() <= 3, kind
        assert min(found.getpixel((14, 4))) >= 253
    found = decode(saved(Image.new("LAB", (8, 8), lab), "TIFF"))
    assert np.abs(np.array(found.getpixel((2, 2))) - expected).max() <= 3


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA"])
@pytest.mark.parametrize("turned", [False, True])
def test_all_modes_as_pillow_converts(mode, turned):
    image, icc, options = chart(mode), rgb_profile(), {}
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize((32, 32)))
    if turned:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    found = decode(saved(image, icc_profile=icc, **options))
    expected = as_pillow_converts(image.convert("RGB"), icc)
    if mode in ("RGBA", "LA"):
        alpha = np.asarray(image.getchannel("A"), int)[..., None] / 255
        expected = expected * alpha + 255 * (1 - alpha)
    expected = np.rot90(expected, -1) if turned else expected
    assert found.mode == "RGB" and "icc_profile" not in found.info
    assert np.abs(np.asarray(found, int) - expected).max() <= (1 if mode in ("RGBA", "LA") else 0)
    assert np.abs(expected - np.asarray(decode(saved(image, **options)), int)).max() > 20 or mode in ("1", "L", "LA")


def test_srgb_profiles_change_nothing():
    """Pillow's own, and one with its curve in a table, as other programs write it; but gamma 2.2 is not sRGB."""
    levels = np.linspace(0, 1, 1024)
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    curve = b"curv\0\0\0\0" + struct.pack(">I1024H", 1024, *(65535 * linear).round().astype(int))
    pillows, tables = ImageCms.ImageCmsProfile(SRGB).tobytes(), rgb_profile(curve, REC709)
    for kind, options in (("PNG", {}), ("JPEG", {"quality": 90})):
        plain = np.asarray(decode(saved(chart(), kind, **options)))
        for icc in (pillows, tables):
            assert np.array_equal(np.asarray(decode(saved(chart(), kind, icc_profile=icc, **options))), plain)
        other = decode(saved(chart(), kind, icc_profile=rgb_profile(gamma(2.2), REC709), **options))
        assert not np.array_equal(np.asarray(other), plain)


@pytest.mark.parametrize(
    "icc",
    [b"no profile", rgb_profile()[:200], cmyk_profile((0, 0, 0)), profile(b"GRAY", b"mntr", {b"kTRC": gamma(1.0)}),
     profile(b"RGB ", b"mntr", {})],
    ids=["text", "cut", "cmyk", "grey", "empty"],
)  # fmt: skip
def test_a_profile_of_no_use_leaves_the_colours(icc):
    found = decode(saved(chart(), icc_profile=icc))
    assert np.array_equal(np.asarray(found), np.asarray(chart()))
    assert found.info["icc_profile"] == icc  # by which the check of a data set tells


def unusual(folder: Path) -> list[Path]:
    """Pictures that most programs read otherwise than they are meant."""
    turned = Image.Exif()
    turned[0x0112] = 6
    clear = chart("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((32, 32)))
    sixteen = Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64)
    frames = [chart(), chart().rotate(90)]
    for name, image, options in (
        ("profile.png", chart(), {"icc_profile": rgb_profile()}),
        ("profile.jpg", chart(), {"icc_profile": rgb_profile()}),
        ("turned.jpg", chart(), {"exif": turned}),
        ("rgba.png", clear, {}),
        ("la.png", clear.convert("LA"), {}),
        ("palette.png", chart("P"), {"transparency": chart("P").getpixel((0, 0))}),
        ("grey.png", chart("L"), {"transparency": 90}),
        ("sixteen.png", sixteen, {}),
        ("one.png", chart("1"), {}),
        ("inks.jpg", chart("CMYK"), {}),
        ("frames.webp", frames[0], {"save_all": True, "append_images": frames[1:], "lossless": True}),
        ("frames.png", frames[0], {"save_all": True, "append_images": frames[1:]}),
        ("frames.gif", frames[0], {"save_all": True, "append_images": frames[1:]}),
    ):
        image.save(folder / name, **options)
    frames[0].save(folder / "frames.mpo.jpg", "MPO", save_all=True, append_images=frames[1:])
    return sorted(folder.iterdir())


def test_pictures_to_be_scored_are_read_as_torch_fidelity_reads_them(tmp_path):
    paths = unusual(tmp_path)
    theirs = ImagesPathDataset(list(map(str, paths)))
    differ = []
    for number, path in enumerate(paths):
        found = np.asarray(open_plain(path))
        assert np.array_equal(found, theirs[number].permute(1, 2, 0).numpy()), path.name
        differ += [path.name] if not np.array_equal(found, np.asarray(decode(path))) else []
    # What training reads of them is another matter, and so it should be.
    meant = {"profile.png", "profile.jpg", "turned.jpg", "rgba.png", "la.png", "palette.png", "grey.png"}
    assert meant <= set(differ) <= meant | {"sixteen.png"}
