"""The folder layout as people's folders are: forms of captions, links, hidden files, encodings, names; and its cost."""

import csv
import io
import json
import os
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_refused, run
from PIL import Image

from ratlip.data.files import find_pictures, picture_suffixes
from ratlip.data.layouts import decode, read_items
from ratlip.text import canonical, decode_text

COUNT = 24
SPLITS = ("train", "test")
LATIN = "caf\xe9".encode("latin-1")
TEXTS = {f"{i:03}.png": [f"a plain square of shade {i}", f"shade {i}, a square, say"] for i in range(COUNT)}


def write(path: Path | bytes, content: bytes | str) -> None:
    path = Path(os.fsdecode(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def encoded(number: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (8 * number % 256, 255 - 8 * number % 256, 90)).save(buffer, kind)
    return buffer.getvalue()


def pictures(folder: Path, names=tuple(TEXTS)) -> None:
    for number, name in enumerate(names):
        write(folder / name, encoded(number))


def plain(root: Path, count: int = COUNT) -> Path:
    """images/ and text/, a caption each."""
    for number in range(count):
        write(root / f"images/{number:03}.png", encoded(number))
        write(root / f"text/{number:03}.txt", f"picture {number}\n")
    return root


@pytest.fixture
def words(data_words):
    """words(root, *more): a configuration of the folder, and overrides."""
    return lambda root, *more: data_words(root, "eval.metrics=[fd_clip]", *more)


def read(root: Path, layout: str = "folder") -> tuple[dict[str, list[str]], dict[str, list[str]], list]:
    """The captions of all pictures by their paths below the folder, the keys of each split, and the problems."""
    captions, keys, problems = {}, {}, []
    for split in SPLITS:
        items, wrong = read_items(layout, root, split)
        captions.update({str(item.image.relative_to(root)): item.captions for item in items})
        keys[split] = [item.key for item in items]
        problems += wrong
    return captions, keys, problems


def row(printed: str, name: str) -> list[str]:
    (line,) = (line for line in printed.splitlines() if line.startswith(f"{name}  "))
    return line.removeprefix(name).split()


# The forms, each as the program that it comes from writes it; all say TEXTS.


def csv_of(header: list[str], rows) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()


def jsonl(names, key: str = "text", prefix: str = "") -> str:
    return "".join(json.dumps({"file_name": prefix + name, key: TEXTS[name]}) + "\n" for name in names)


def coco(names, prefix: str = "") -> str:
    images = [{"id": 7 * i, "file_name": prefix + name} for i, name in enumerate(names)]
    notes = [{"image_id": 7 * i, "id": i, "caption": text} for i, name in enumerate(names) for text in TEXTS[name]]
    return json.dumps({"info": {}, "images": images, "annotations": notes})


ALL = list(TEXTS)
TRAIN, TEST = ALL[:-5], ALL[-5:]
PAIRS = [(name, text) for name, own in TEXTS.items() for text in own]
FORMS = {  # where the pictures are, other files, what is said, and whether there is a split of its own
    "text": ("images", {f"text/{n[:3]}.txt": "\r\n".join(t) for n, t in TEXTS.items()}, "captions in text/", False),
    "beside": ("images", {f"images/{n[:3]}.txt": "\n".join(t) for n, t in TEXTS.items()}, "beside them", False),
    "beside, no images/": ("deep", {f"deep/{n[:3]}.TXT": "\n".join(t) for n, t in TEXTS.items()}, "beside them", False),
    "beside, whole name": (".", {f"{n}.txt": "\n".join(t) for n, t in TEXTS.items()}, "beside them", False),
    "kohya": (".", {f"{n[:3]}.caption": "\n".join(t) for n, t in TEXTS.items()}, "beside them", False),
    "jsonl": ("images", {"images/metadata.jsonl": jsonl(ALL)}, "images/metadata.jsonl", False),
    "jsonl, paths": ("images", {"metadata.jsonl": jsonl(ALL, "caption", "images/")}, "metadata.jsonl", False),
    "jsonl, Windows": ("images/a", {"metadata.jsonl": jsonl(ALL, "captions", "a\\")}, "metadata.jsonl", False),
    "csv": (".", {"metadata.csv": csv_of(["file_name", "n", "text"], ((n, 1, t) for n, t in PAIRS))}, "csv", False),
    "csv, lists": (".", {"metadata.csv": csv_of(["file_name", "text"], ((n, json.dumps(t)) for n, t in TEXTS.items()))},
                   "metadata.csv", False),
    "Kaggle's Flickr8k": ("Images", {"captions.txt": csv_of(["image", "caption"], PAIRS)}, "captions.txt", False),
    "csv without quotes": ("images", {"captions.csv": "image,caption\n" + "".join(f"{n},{t}\n" for n, t in PAIRS)},
                           "captions.csv", False),
    "Excel's csv": ("images", {"captions.csv": "\ufeffimage;caption\r\n" + "".join(f"{n};{t}\r\n" for n, t in PAIRS)},
                    "captions.csv", False),
    "Kaggle's Flickr30k": ("flickr30k_images", {"results.csv": "image_name| comment_number| comment\n" + "".join(
        f"{n}| {k}| {t}\n" for n, own in TEXTS.items() for k, t in enumerate(own))}, "results.csv", False),
    "tokens": ("Flicker8k_Dataset", {
        "Flickr8k_text/Flickr8k.token.txt": "".join(
            f"{n}#{k}\t{t}\n" for n, own in TEXTS.items() for k, t in enumerate(own)),
        "Flickr8k_text/Flickr8k.lemma.token.txt": "".join(f"{n}#0\tlemma\n" for n in TEXTS),
    }, "Flickr8k_text/Flickr8k.token.txt", False),
    "COCO, one": ("images", {"captions_train2017.json": coco(ALL)}, "captions_train2017.json", False),
    "COCO": ("train2017", {"annotations/captions_train2017.json": coco(TRAIN),
                           "annotations/captions_val2017.json": coco(TEST)}, "captions_val2017.json", True),
    "splits": ("split", {"train/metadata.jsonl": jsonl(TRAIN), "validation/metadata.jsonl": jsonl(TEST)},
               "train/metadata.jsonl, validation/metadata.jsonl", True),
}  # fmt: skip


def build(root: Path, form: str) -> Path:
    folder, files, *_ = FORMS[form]
    if folder == "split":
        pictures(root / "train", TRAIN)
        pictures(root / "validation", TEST)
    else:
        pictures(root / folder)
    for name, content in files.items():
        write(root / name, content)
    return root


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_captions(form, tmp_path, capsys):
    root = build(tmp_path / "data", form)
    captions, keys, problems = read(root)
    assert {Path(path).name: own for path, own in captions.items()} == TEXTS
    assert [problem for problem in problems if problem.kind != "left out"] == []
    assert not set(keys["train"]) & set(keys["test"]) and len(keys["train"]) + len(keys["test"]) == COUNT
    (said,) = capsys.readouterr().out.splitlines()  # once, not with each split
    assert said.startswith(f"{root}: {COUNT} pictures, captions ") and FORMS[form][2] in said
    names = {split: {Path(key).stem + ".png" for key in keys[split]} for split in SPLITS}
    assert len(names["test"]) == 5 if FORMS[form][3] else len(names["test"]) == 2
    assert not FORMS[form][3] or names["test"] == set(TEST)


@pytest.mark.parametrize("form", ["beside", "jsonl", "Kaggle's Flickr8k", "tokens", "COCO"])
def test_prepare_reads_forms(form, tmp_path, words, call):
    result = call("prepare.py", *words(build(tmp_path / "data", form), "eval.metrics=[clip_score]"))
    assert result.returncode == 0, result.stderr
    counts = [COUNT - 5, 5] if FORMS[form][3] else [COUNT - 2, 2]
    assert row(result.stdout, "images") == [str(count) for count in counts]
    assert row(result.stdout, "captions") == [str(2 * count) for count in counts]


def test_lists_split_any_form(tmp_path, capsys):
    """Keys as people list them: with a suffix, with images/ before them, with Windows' slashes."""
    root = build(tmp_path, "jsonl, Windows")
    pictures(root / "images/a", ["unlisted.png"])
    lines = [f"a\\{name}" if number % 2 else f"images/a/{name[:3]}" for number, name in enumerate(TRAIN)]
    write(root / "train.txt", "\n".join(lines))
    write(root / "test.txt", "\n".join(f"a/{name}" for name in TEST))
    _, keys, problems = read(root)
    assert keys == {"train": [f"a/{n[:3]}" for n in TRAIN], "test": [f"a/{n[:3]}" for n in TEST]} and not problems
    assert "in neither split: 1 picture (1 .png): images/a/unlisted.png" in capsys.readouterr().out


def test_of_several_forms_the_first_is_read_and_the_others_named(tmp_path, capsys):
    root = build(build(build(tmp_path, "tokens"), "jsonl"), "beside")
    expected = "captions in images/metadata.jsonl; not read: Flickr's tokens, captions beside them"
    captions, *_ = read(root)
    assert captions["images/000.png"] == TEXTS["000.png"] and expected in capsys.readouterr().out
    write(root / "text/000.txt", "from text/")
    captions, _, problems = read(root)
    assert captions == {"images/000.png": ["from text/"]}
    assert {problem.kind for problem in problems} == {"missing captions"}
    assert "captions in text/; not read: metadata.jsonl, Flickr's tokens" in capsys.readouterr().out


def test_a_jpg_and_a_png_of_one_name(tmp_path):
    """Text files cannot tell them apart: the commoner suffix is used, as before. A table can."""
    root = plain(tmp_path / "text", 3)
    for suffix in ("gif", "jpg"):
        write(root / f"images/001.{suffix}", encoded(1))
    captions, _, problems = read(root)
    assert set(captions) == {"images/000.png", "images/001.jpg", "images/002.png"}
    assert [problem.kind for problem in problems] == ["key twice"] * 2 and not any(p.lost for p in problems)
    root = tmp_path / "table"
    names = ["a.jpg", "a.png", "b.png", "c.png"]
    pictures(root / "images", names)
    write(root / "metadata.csv", "file_name,text\n" + "".join(f"{name},the {name}\n" for name in names))
    captions, keys, problems = read(root)
    assert captions == {f"images/{name}": [f"the {name}"] for name in names} and not problems
    assert sorted(keys["train"] + keys["test"]) == ["a.jpg", "a.png", "b", "c"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("metadata.jsonl", '{"file_name": "000.png", "text": "a"\n', "metadata.jsonl, line 1: no JSON"),
        ("metadata.jsonl", "[1]\n", "metadata.jsonl, line 1: no JSON object"),
        ("metadata.jsonl", '\n{"file_name": "000.png", "label": 3}\n', "line 2: no text or caption; it has file_name"),
        ("metadata.jsonl", '{"text": "a"}\n', "line 1: no file_name; it has text"),
        ("metadata.jsonl", '{"file_name": "gone.png", "text": "a"}\n', "line 1: there is no picture gone.png"),
        ("metadata.jsonl", '{"file_name": "../../etc/x.png", "text": "a"}', "there is no picture ../../etc/x.png"),
        ("metadata.jsonl", '{"file_name": "000.png", "text": " "}\n', "line 1: no caption of images/000.png"),
        ("metadata.jsonl", '{"file_name": "000.png", "text": null}\n', "line 1: no caption of images/000.png"),
        ("metadata.csv", "file_name,x,text\n000.png,a\n", "metadata.csv, line 2: 2 cells, where the header has 3"),
        ("metadata.csv", "file_name,text\n,a\n", "metadata.csv, line 2: no name of a picture"),
        ("captions.txt", "image,caption\n000.png,\n", "captions.txt, line 2: no caption of images/000.png"),
        ("x.token", "000.png#0 a caption\n", "x.token, line 1: expected name#number, a tab"),
        ("captions_val.json", '{"images": [], "annotations": [{"image_id": 3, "caption": "x"}]}', "its image_id 3 is"),
        ("captions_val.json", '{"images": [{"id": 1, "file_name": "000.png"}]}', "no caption of images/000.png"),
    ],
)
def test_bad_rows_are_named(name, content, expected, tmp_path, capsys):
    """And cost no more than their own picture."""
    pictures(tmp_path / "images", ["000.png", "001.png", "002.png"])
    good = {"metadata.jsonl": '\n{"file_name": "001.png", "text": "good"}\n{"file_name": "002.png", "text": "good"}\n'}
    good |= {
        "metadata.csv": "001.png,good,good\n002.png,good,good\n" if ",x," in content else "001.png,good\n002.png,good"
    }
    good |= {"captions.txt": "001.png,good\n002.png,good\n", "x.token": "001.png#0\tgood\n002.png#0\tgood\n"}
    if name == "captions_val.json":
        whole = json.loads(content)
        whole["images"] += [{"id": 11, "file_name": "001.png"}, {"id": 12, "file_name": "002.png"}]
        notes = whole.get("annotations", []) + [{"image_id": i, "caption": "good"} for i in (11, 12)]
        content = json.dumps({**whole, "annotations": notes})
    write(tmp_path / name, content + good.get(name, ""))
    captions, _, problems = read(tmp_path)
    assert captions == {"images/001.png": ["good"], "images/002.png": ["good"]}
    assert any(f"{tmp_path}/{name}" in problem.message and expected in problem.message for problem in problems)
    assert any(problem.lost for problem in problems)  # the picture 000.png


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("captions.txt", b"000.png a caption\n", ["captions.txt, line 1", "image,caption", "'000.png a caption'"]),
        ("metadata.csv", b"id,label\n1,2\n", ["metadata.csv, line 1", "file_name,text"]),
        ("captions_x.json", b"{", ["captions_x.json", "no JSON"]),
        ("captions_x.json", b'{"000.png": "a"}', ["captions_x.json", "not as COCO's captions are", "images"]),
        ("metadata.jsonl", b"\x89PNG\0\0\0\r", ["metadata.jsonl", "no text"]),
        ("labels.json", b"{}", ["3 pictures and no captions", "1 file (1 .json): labels.json", "--captions-from-fold"]),
    ],
)
def test_tables_that_are_none_are_one_line(name, content, parts, tmp_path, words, call):
    pictures(tmp_path / "data/images", ["000.png", "001.png", "002.png"])
    write(tmp_path / "data" / name, content)
    assert_refused(call("prepare.py", *words(tmp_path / "data")), *parts)


def test_a_bare_name_means_one_picture_only(tmp_path):
    """001.png alone is in two folders; with its folder it is one of them, and of another folder it is none."""
    pictures(tmp_path, ["cats/001.png", "dogs/001.png", "dogs/002.png", "owls/003.png"])
    rows = {"cats/001.png": "cat", "001.png": "which", "002.png": "dog", "cats/003.png": "an owl is no cat"}
    lines = [json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows.items()]
    write(tmp_path / "metadata.jsonl", "".join(lines))
    captions, _, problems = read(tmp_path)
    assert captions == {"cats/001.png": ["cat"], "dogs/002.png": ["dog"]}
    assert {p.message.split(": ")[-1] for p in problems if p.kind == "missing image"} == {
        "there is no picture 001.png", "there is no picture cats/003.png"
    }  # fmt: skip


def test_classes_without_captions(tmp_path, words, call):
    """The refusal names a command, which works as it is printed."""
    root = tmp_path / "data"
    for kind in ("001.Black_footed_Albatross", "owls", "two words"):
        pictures(root / "images" / kind, ALL[:8])
    refused = call("prepare.py", *words(root))
    assert_refused(refused, str(root), "24 pictures and no captions", "prepare.sh CONFIG.yml --captions-from-folders")
    option = ["--captions-from-folders", "a photo of a {}"]
    assert option[0] in refused.stderr and f'"{option[1]}"' in refused.stderr
    result = call("prepare.py", *words(root), *option)
    assert result.returncode == 0 and f"captions            {root}/metadata.jsonl" in result.stdout, result.stderr
    captions, keys, problems = read(root)
    assert not problems and len(keys["test"]) == 2
    assert {text for own in captions.values() for text in own} == {
        "a photo of a Black footed Albatross", "a photo of an owls", "a photo of a two words"
    }  # fmt: skip
    assert captions["images/owls/000.png"] == ["a photo of an owls"]
    assert call("prepare.py", *words(root)).returncode == 0
    assert_refused(call("prepare.py", *words(root), *option), "has captions already", "metadata.jsonl")
    (root / "metadata.jsonl").unlink()
    assert_refused(call("prepare.py", *words(root), option[0], "a photo"), "'a photo' has no {}")
    assert_refused(call("prepare.py", *words(root, "data.layout=face"), *option), "data.layout is face")
    pictures(root / "images", ["loose.png"])
    assert_refused(call("prepare.py", *words(root), *option), "in no folder", "loose.png")


# Links, hidden files, suffixes


def test_links_are_followed_loops_end_and_dead_ones_are_named(tmp_path, words, call):
    store, root = plain(tmp_path / "store"), tmp_path / "data"
    for part in ("images", "text"):
        (root / part).mkdir(parents=True)
        (root / part / "far").symlink_to(store / part)
    (root / "images/one.png").symlink_to(store / "images/000.png")
    write(root / "text/one.txt", "one more")
    (store / "images/up").symlink_to(root)  # a loop through the linked folder
    (root / "images/round").symlink_to(root / "images")
    (root / "images/self").symlink_to("self")
    (root / "images/gone").symlink_to(tmp_path / "nowhere")
    captions, _, problems = read(root)
    assert len(captions) == COUNT + 1 and captions["images/one.png"] == ["one more"]
    named = {Path(problem.message.split(": ")[0]).name: problem for problem in problems}
    assert set(named) == {"up", "round", "self", "gone"}
    assert {name for name, problem in named.items() if problem.lost} == {"self", "gone"}
    for name in ("self", "gone"):
        (root / "images" / name).unlink()
    result = call("prepare.py", *words(root, "eval.metrics=[clip_score]"))
    assert result.returncode == 0 and row(result.stdout, "images") == [str(COUNT - 1), "2"], result.stderr


def test_hidden_files_are_passed_over_and_counted(tmp_path, words, call):
    root = plain(tmp_path / "data")
    for name in ("images/._000.png", "text/._000.txt", "images/.DS_Store", "images/Thumbs.db"):
        write(root / name, b"\0\5\x16\7")
    for name in (".ipynb_checkpoints/000-checkpoint.png", "__MACOSX/000.png", "@eaDir/000.png"):
        write(root / "images" / name, encoded(0))
    result = call("prepare.py", *words(root, "eval.metrics=[clip_score]"))
    assert result.returncode == 0 and row(result.stdout, "problems") == ["0", "0"], result.stdout
    assert f"{COUNT} pictures, captions in text/; 7 hidden files or folders passed over" in result.stdout
    assert len(find_pictures(root / "images")) == COUNT


KINDS = {"jfif": "JPEG", "gif": "GIF", "TIF": "TIFF", "avif": "AVIF", "JPEG": "JPEG", "ppm": "PPM", "tga": "TGA",
         "jp2": "JPEG2000", "ico": "ICO"}  # fmt: skip


def test_every_suffix_is_read_or_named(tmp_path, words, call):
    root = plain(tmp_path / "data")
    there = {suffix: kind for suffix, kind in KINDS.items() if f".{suffix.lower()}" in picture_suffixes()}
    assert set(KINDS) - set(there) <= {"avif"}  # which Pillow has from 11.3 on
    for number, (suffix, kind) in enumerate(there.items()):
        write(root / f"images/x/{number}.{suffix}", encoded(number, kind))
        write(root / f"text/x/{number}.txt", f"a picture {number}")
    for name in ("a.mp4", "b.heic", "deep/c.mp4", "notes.pdf", "drawing.eps", "README"):
        write(root / "images" / name, "no picture")
    result = call("prepare.py", *words(root, "eval.metrics=[clip_score]"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert sum(map(int, row(result.stdout, "images"))) == COUNT + len(there)
    for name in ("a.mp4", "b.heic", "deep/c.mp4", "notes.pdf", "drawing.eps", "README"):
        assert sum(line.startswith(f"left out  {root}/images/{name}: ") for line in result.stdout.splitlines()) == 1
    assert row(result.stdout, "problems") == ["6", "0"]
    result = call("train.py", *words(root, "train.max_epoch=1"))
    assert result.returncode == 0, result.stderr
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("left out: "))
    assert "6 files (2 .mp4, " in line and "README" in line and "prepare.sh" in line
    result = call("test.py", *words(root), "--images", root / "images", "--against", root / "images")
    assert result.returncode == 0 and row(result.stdout, "images") == [str(COUNT + len(there))], result.stderr
    assert "left out: 6 files (2 .mp4" in result.stdout


def test_of_many_frames_the_first_is_the_picture(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    for suffix in ("gif", "tiff", "webp", "png"):
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
        assert np.abs(np.asarray(decode(tmp_path / f"a.{suffix}"), int) - (250, 0, 0)).max() < 8


# Encodings and names

WRITTEN = {
    "utf-8": "utf-8", "utf-8 marked": "utf-8-sig", "utf-16": "utf-16", "utf-16 big": "utf-16-be",
    "utf-16 little": "utf-16-le", "utf-32": "utf-32", "Windows": "cp1252",
}  # fmt: skip


@pytest.mark.parametrize("encoding", WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize("form", ["text", "jsonl", "Kaggle's Flickr8k", "tokens", "COCO, one", "lists"])
def test_encodings(encoding, form, tmp_path):
    """Every text that people write, in every encoding: "café" in captions and key lists."""
    root = build(tmp_path, "text" if form == "lists" else form)
    for path in root.rglob("*"):
        if path.is_file() and path.suffix in (".txt", ".jsonl", ".json"):
            path.write_bytes(path.read_text().replace("square", "“café”").encode(encoding))
    if form == "lists":
        pictures(root / "images", ["café.png"])
        write(root / "text/café.txt", "a caption")
        write(root / "train.txt", "café\r\n000\r\n".encode(encoding))
        write(root / "test.txt", "001\r\n002\r\n".encode(encoding))
        _, keys, problems = read(root)
        assert keys == {"train": ["café", "000"], "test": ["001", "002"]} and not problems
        return
    captions, _, problems = read(root)
    assert [problem for problem in problems if problem.kind != "left out"] == []
    assert {Path(path).name: own for path, own in captions.items()} == {
        name: [text.replace("square", "“café”") for text in own] for name, own in TEXTS.items()
    }


NO_TEXTS = {
    "NUL": b"\0\1\2\3\4\5\6\7",
    "a picture": encoded(0),
    "UTF-16 and more": "a bird".encode("utf-16") + b"x",
    "cut UTF-16": b"\xff\xfe\0",
    "control characters": bytes(range(1, 32)) * 3,
}


@pytest.mark.parametrize("content", NO_TEXTS.values(), ids=NO_TEXTS)
def test_what_is_no_text_is_no_caption(content, tmp_path):
    root = plain(tmp_path, 4)
    write(root / "text/002.txt", content)
    captions, _, problems = read(root)
    assert len(captions) == 3
    (problem,) = problems
    assert problem.message.startswith(f"{root}/text/002.txt: no text in UTF-8") and problem.lost
    with pytest.raises(ValueError):
        decode_text(content)


def test_key_lists_that_are_no_text(tmp_path, words, call):
    root = plain(tmp_path / "data")
    write(root / "train.txt", encoded(0))
    write(root / "test.txt", "000\n001\n")
    for script in ("prepare.py", "train.py"):
        assert_refused(call(script, *words(root)), f"{root}/train.txt", "no text")


def test_a_configuration_in_utf_16(tmp_path, words, call):
    """As PowerShell's > writes it."""
    arguments = words(plain(tmp_path / "data"), "eval.metrics=[clip_score]")
    path = Path(arguments[0])
    path.write_bytes(path.read_text().encode("utf-16"))
    assert call("prepare.py", *arguments).returncode == 0
    path.write_bytes(encoded(0))
    assert_refused(call("prepare.py", *arguments), str(path))


FORMS_OF_NAMES = {"NFC": lambda name: unicodedata.normalize("NFC", name).encode(),
                  "NFD": lambda name: unicodedata.normalize("NFD", name).encode(),
                  "Latin-1": lambda name: name.encode("latin-1")}  # fmt: skip


@pytest.mark.parametrize("of_captions", FORMS_OF_NAMES)
@pytest.mark.parametrize("of_pictures", FORMS_OF_NAMES)
@pytest.mark.parametrize("form", ["text", "table", "lists"])
def test_spellings_of_a_name_meet(form, of_pictures, of_captions, tmp_path):
    image, text = FORMS_OF_NAMES[of_pictures], FORMS_OF_NAMES[of_captions]
    names = [f"é/café {i}" for i in range(4)]
    folder = os.fsencode(tmp_path)
    for number, name in enumerate(names):
        write(folder + b"/images/" + image(name) + b".png", encoded(number))
        if form != "table":
            write(folder + b"/text/" + text(name) + b".txt", f"picture {number}")
    if form == "table":
        lines = [text(name) + f".png#0\tpicture {number}\n".encode() for number, name in enumerate(names)]
        write(tmp_path / "x.token", b"".join(lines))
    if form == "lists":
        write(tmp_path / "train.txt", text(names[0]) + b"\n" + text(names[2]))
        write(tmp_path / "test.txt", text(names[1]) + b"\n" + text(names[3]))
    captions, keys, problems = read(tmp_path)
    assert not problems and sorted(sum(captions.values(), [])) == [f"picture {i}" for i in range(4)]
    assert {canonical(key) for own in keys.values() for key in own} == set(names)
    json.dumps(keys, ensure_ascii=False).encode()  # keys can be written anywhere


def test_two_files_of_one_name_in_two_spellings(tmp_path):
    root = plain(tmp_path, 3)
    for form in ("NFC", "NFD"):
        write(root / f"images/{unicodedata.normalize(form, 'é')}.png", encoded(0))
    write(root / "text/é.txt", "one of them")
    captions, _, problems = read(root)
    assert len(captions) == 4
    (problem,) = problems
    assert problem.kind == "key twice" and not problem.lost


def test_pickled_layouts_meet_other_spellings(tmp_path):
    import pickle

    for form, number in (("NFC", 0), ("NFD", 1)):
        write(tmp_path / f"images/{unicodedata.normalize(form, f'é{number}')}.jpg", encoded(number))
        write(tmp_path / f"text/{unicodedata.normalize(form, f'é{number}')}.txt", "a caption")
    write(os.fsencode(tmp_path) + b"/images/\xe92.jpg", encoded(2))
    write(os.fsencode(tmp_path) + b"/text/\xe92.txt", "a caption")
    write(tmp_path / "train/filenames.pickle", pickle.dumps(["é0", "é1", "é2"]))
    items, problems = read_items("face", tmp_path, "train")
    assert len(items) == 3 and not problems


def latin1(root: Path) -> Path:
    """A folder all of whose names are Latin-1 bytes: a zip packed on Windows."""
    plain(root)
    for part in ("images", "text"):
        for path in list((root / part).iterdir()):
            path.rename(os.fsdecode(os.fsencode(root / part) + b"/" + LATIN + os.fsencode(path.name)))
    return root


def test_names_that_are_not_utf_8_work_everywhere(tmp_path, words, call):
    """Of the pictures, and of the folder that they are in."""
    root = latin1(tmp_path / os.fsdecode(LATIN))
    folder = root / "images"
    for script, *more in (
        ["prepare.py", "--resize"],
        ["train.py"],
        ["train.py", "train.resume=auto", "train.max_epoch=2"],
        ["test.py", "--images", folder, "--against", folder],
    ):
        result = call(script, *words(tmp_path), f"data.dir={root}", *more)
        assert result.returncode == 0 and "Traceback" not in result.stderr, (script, result.stderr)
    assert row(result.stdout, "images") == [str(COUNT)]


@pytest.mark.parametrize("language", ["C", "en_US.ISO-8859-1"])
def test_names_that_a_terminal_cannot_show_are_named(language, tmp_path, words):
    root = latin1(tmp_path / "data")
    next((root / "text").iterdir()).unlink()
    write(root / "images/一只鸟.heic", "x")
    environment = {"LC_ALL": language, "LANG": language, "CUDA_VISIBLE_DEVICES": ""}
    refused = run("prepare.py", *words(root), environment=environment, errors="replace")
    assert_refused(refused, "items cannot be used")
    assert "missing captions  " in refused.stdout and "left out  " in refused.stdout


# Cost


@pytest.mark.parametrize("form", ["text", "table"])
def test_listing_grows_in_proportion(form, tmp_path):
    """16 times the pictures take 16 times the processor time; work that grows with the square would take 100 times."""
    seconds = []
    for count in (500, 8000):
        for number in range(count):
            write(tmp_path / f"{count}/images/{number % 7}/{number}.png", b"")
            if form == "text":
                write(tmp_path / f"{count}/text/{number % 7}/{number}.txt", b"a caption")
        if form == "table":
            lines = (json.dumps({"file_name": f"{i % 7}/{i}.png", "text": "x"}) + "\n" for i in range(count))
            write(tmp_path / f"{count}/metadata.jsonl", "".join(lines))
        times = []
        for _ in range(3):
            started = time.process_time()
            items, problems = read_items("folder", tmp_path / str(count), "train")
            times.append(time.process_time() - started)
        assert len(items) == 0.9 * count and not problems
        seconds.append(min(times))
    assert seconds[1] < 3 * 16 * seconds[0]


def test_plain_files_are_not_asked_for_one_by_one(tmp_path, monkeypatch):
    """On a network drive each stat is a trip: scandir has told what they are."""
    root, asked = plain(tmp_path, 60), []
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda path, *a, **k: asked.append(path) or real(path, *a, **k))
    read_items("folder", root, "train")
    assert len(asked) < 15
