"""Text and names as people have them: which encoding bytes are in, and which spellings mean the same file."""

import codecs
import os
import re
import unicodedata
from pathlib import Path

from ratlip.errors import UserError

MARKS = {  # the longer ones first: UTF-16's begins UTF-32's
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
CONTROL = re.compile(r"[\x01-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufffe\uffff]")  # white space and NUL are not among them
NO_TEXT = "no text in UTF-8, UTF-16 or Windows-1252; write it anew as UTF-8"
MOST_CONTROL = 0.1  # share of a text's characters; with more of them it is something else


def decode_text(content: bytes) -> str:
    """A file's bytes as text: by their byte order mark; without one UTF-8, UTF-16 (a NUL in every letter), and what
    is neither as Windows-1252, of which Latin-1's letters are a part.

    Raises:
        ValueError: it is no text: NUL bytes, or control characters all over.
    """
    if content.isascii() and b"\0" not in content:  # most of all, and sooner
        text = content.decode("ascii")
    else:
        encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), None)
        text = content.decode(encoding or _unmarked(content))
    if "\0" in text or len(CONTROL.findall(text)) > MOST_CONTROL * len(text):
        raise ValueError("no text")
    return text


def _unmarked(content: bytes) -> str:
    if b"\0" in content:
        first, second = content[::2].count(0), content[1::2].count(0)  # of each pair of bytes
        if second > len(content) // 20 and not first:
            return "utf-16-le"
        if first > len(content) // 20 and not second:
            return "utf-16-be"
    for encoding in ("utf-8", "cp1252"):
        try:
            content.decode(encoding)
            return encoding
        except UnicodeDecodeError:
            continue
    return "latin-1"


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        UserError: it holds no text; named with its path.
    """
    try:
        return decode_text(path.read_bytes())
    except ValueError:
        raise UserError(f"{path}: {NO_TEXT}") from None


def lines_of(text: str) -> list[str]:
    """A text's lines without white space around them, empty ones left out; those of Unix, Windows and old Macs."""
    lines = (line.strip().strip("\ufeff\x1a").strip() for line in re.split(r"[\r\n]+", text))
    return [line for line in lines if line]


def read_captions(content: bytes) -> list[str]:
    """The captions in a text file's bytes, one a line; empty lines do not count. What is no text holds none."""
    try:
        return lines_of(decode_text(content))
    except ValueError:
        return []


def why_none(content: bytes) -> str:
    """What to say of bytes in which there is no caption."""
    try:
        decode_text(content)
        return "holds no caption"
    except ValueError:
        return NO_TEXT


def whole(text: str) -> str:
    """A text that can be encoded: halves of characters, as JSON can have them, are joined or replaced."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def readable(name: str) -> str:
    """A file's name that can be encoded and shown: bytes that are not UTF-8 are read as a text's would be."""
    try:
        name.encode()
        return name
    except UnicodeEncodeError:
        pass
    try:
        content = os.fsencode(name)
        return content.decode(_unmarked(content))
    except UnicodeEncodeError:  # no name of a file, but one from a table
        return whole(name)


def canonical(name: str) -> str:
    """What all spellings of a file's name have in common. Macs write accents as characters of their own (NFD), others
    as one with the letter (NFC); and names that are not UTF-8 are met by lists that are."""
    return name if name.isascii() else unicodedata.normalize("NFC", readable(name))


def existing(path: Path) -> Path:
    """The file that a path means, in whichever spelling it is there; the path itself where there is none."""
    if str(path).isascii() or path.exists():
        return path
    name = readable(str(path))
    spellings = [unicodedata.normalize(form, name) for form in ("NFC", "NFD")]
    spellings += [os.fsdecode(spelling.encode("cp1252", "replace")) for spelling in spellings[:1]]
    return next((other for other in map(Path, spellings) if other.exists()), path)
