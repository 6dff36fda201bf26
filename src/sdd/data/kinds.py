"""The kinds of files that are read, by name, and those that are refused, by their first bytes."""

import re
from pathlib import Path
from typing import Literal

from sdd.errors import UserError

Kind = Literal["text", "json lines", "parquet", "dataset", "tokens"]
PACKED = (".gz", ".zst", ".zstd", ".bz2", ".xz")
_PLAIN: dict[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".json": "json lines",
}
KINDS: dict[str, Kind] = {
    **_PLAIN,
    **{suffix + packed: kind for suffix, kind in _PLAIN.items() for packed in PACKED},
    ".parquet": "parquet",
    ".npy": "tokens",
    ".bin": "tokens",
}
#: What a folder is searched for, in words.
TEXT_KINDS = f".txt, .md, .jsonl, .ndjson, each also as {', '.join(PACKED)}, and .parquet"

_UNPACK = "unpack it, and name what was inside"
_CONVERT = "save its text as .txt, .jsonl or .parquet"
_RENAME = "give it the name that says so"
# Bytes at an offset, what a file with them is, and what to do.
_SIGNS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"PK\x03\x04", "a zip archive or an office document", f"{_UNPACK}, or {_CONVERT}"),
    (0, b"PK\x05\x06", "an empty zip archive", "name another"),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (0, b"\x04\x22\x4d\x18", "packed by lz4", "unpack it"),
    (0, b"\x1f\x8b", "packed by gzip", f"{_RENAME}, .gz"),
    (0, b"\x28\xb5\x2f\xfd", "packed by zstandard", f"{_RENAME}, .zst"),
    (0, b"BZh", "packed by bzip2", f"{_RENAME}, .bz2"),
    (0, b"\xfd7zXZ\x00", "packed by xz", f"{_RENAME}, .xz"),
    (0, b"PAR1", "a parquet file", f"{_RENAME}, .parquet"),
    (0, b"ARROW1", "an arrow file", f"name the folder that save_to_disk wrote, or {_CONVERT}"),
    (0, b"\xff\xff\xff\xff", "an arrow stream", f"name the folder that save_to_disk wrote, or {_CONVERT}"),
    (0, b"\x93NUMPY", "a numpy array", f"token ids have the name .npy; of others, {_CONVERT}"),
    (0, b"%PDF-", "a PDF", _CONVERT),
    (0, b"\xd0\xcf\x11\xe0", "an office document", _CONVERT),
    (0, b"SQLite format 3\x00", "an SQLite database", _CONVERT),
    (0, b"\x89HDF", "an HDF5 file", _CONVERT),
    (0, b"\x7fELF", "a program", "name a text"),
    (0, b"MZ", "a program", "name a text"),
    (0, b"\x89PNG", "a picture", "name a text"),
    (0, b"\xff\xd8\xff", "a picture", "name a text"),
    (0, b"GIF8", "a picture", "name a text"),
)
_WIDE = ((b"\xff\xfe\x00\x00", "32"), (b"\x00\x00\xfe\xff", "32"), (b"\xff\xfe", "16"), (b"\xfe\xff", "16"))
# A tar of before 1988 has no sign.
_TAR = re.compile(r".*\.(tar(\.(gz|zstd?|bz2|xz))?|tgz|tbz2?|txz)", re.IGNORECASE | re.DOTALL)
_CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")


def suffix_of(path: Path) -> str:
    """The end of a name that says its kind, in lower case; empty if it says none."""
    name = path.name.lower()
    return next((suffix for suffix in KINDS if name.endswith(suffix)), "")


def kind_of(path: Path) -> Kind | None:
    """The kind that a file's name says; None if it says none."""
    return KINDS.get(suffix_of(path))


def refuse_other_kinds(path: Path, head: bytes) -> None:
    """Raise UserError for a file that is taken for text and is something else, with what it is and what to do.

    Args:
        path: its name, for the message and to recognise an archive.
        head: its first bytes, unpacked if its name says that it is packed.
    """
    if _TAR.fullmatch(path.name):
        raise UserError(f"{path} is a tar archive: {_UNPACK}")
    if not _is_odd(head):
        return
    for place, sign, what, advice in _SIGNS:
        if head.startswith(sign, place):
            raise UserError(f"{path} is {what}: {advice}")
    if bits := _wide_characters(head):
        raise UserError(f"{path} is UTF-{bits}, not UTF-8 text: convert it, iconv -f utf-{bits} -t utf-8 FILE > NEW")
    if b"\0" in head and not _is_utf8(head):
        raise UserError(f"{path} is binary and of no kind that is read: {_CONVERT}")


def _wide_characters(head: bytes) -> str:
    """The bits of a character, 16 or 32, of text that is not in UTF-8; empty if it may be."""
    marked = next((bits for mark, bits in _WIDE if head.startswith(mark)), "")
    if marked:
        return marked
    for first, bits in ((0, "16be"), (1, "16le")):  # without a mark, most Western letters have one byte 0
        zeros, others = head[first : 1 << 12 : 2], head[1 - first : 1 << 12 : 2]
        if len(zeros) > 3 and zeros.count(0) > 0.8 * len(zeros) and others.count(0) < 0.1 * len(zeros):
            return bits
    return ""


def _is_odd(head: bytes) -> bool:
    """Whether these bytes hold what text seldom does: control characters, or bytes that are not UTF-8."""
    return bool(_CONTROLS.search(head)) or not _is_utf8(head)


def _is_utf8(head: bytes) -> bool:
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data" and error.end == len(head) and len(head) - error.start < 4
    return True
