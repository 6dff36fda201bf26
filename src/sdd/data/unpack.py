"""The bytes of a file in blocks or lines, unpacked if its name says that it is packed."""

import gzip
import importlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from sdd.data.kinds import PACKED, refuse_other_kinds
from sdd.errors import UserError

BOM = b"\xef\xbb\xbf"
_BLOCK_BYTES = 1 << 18
_LARGEST_WINDOW = 1 << 31  # that zstd --ultra --long=31 asks for; the library by itself refuses above 1 << 27


def packing(path: Path) -> str:
    """The end of a name that says how the file is packed; empty if it is not."""
    return path.suffix.lower() if path.suffix.lower() in PACKED else ""


def lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """The lines of an open file, unpacked if its name says that it is packed.

    Raises:
        UserError: a damaged file, or one that is no text.
    """
    unfinished: list[bytes] = []  # joined only once it is whole, so that a very long line is not copied for every block
    for block in blocks(path, file):
        first, *others = block.split(b"\n")
        unfinished.append(first)
        if others:
            yield b"".join(unfinished)
            yield from others[:-1]
            unfinished = [others[-1]]
    if last := b"".join(unfinished):
        yield last


def blocks(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """The content of an open file in blocks of moderate size, unpacked if its name says that it is packed.

    Raises:
        UserError: a damaged file, or one that is no text.
    """
    checked = False
    try:
        for block in _zstd_blocks(path, file) if packing(path) in (".zst", ".zstd") else _plain_blocks(path, file):
            if block and not checked:
                refuse_other_kinds(path, block)
                checked = True
            yield block
    except (zstandard.ZstdError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _plain_blocks(path: Path, file: BinaryIO) -> Iterator[bytes]:
    stream: Any = file
    if suffix := packing(path):
        module, opener = {".gz": ("gzip", "GzipFile"), ".bz2": ("bz2", "BZ2File"), ".xz": ("lzma", "LZMAFile")}[suffix]
        try:  # a Python may have been built without one of them
            library = importlib.import_module(module)
        except ImportError:
            raise UserError(f"{path}: this Python has no {module}: unpack the file") from None
        stream = getattr(library, opener)(**{"fileobj" if suffix == ".gz" else "filename": file})
    try:
        while block := stream.read(_BLOCK_BYTES):
            yield block
    except Exception as error:  # bz2 raises a bare OSError and lzma an error of its own
        if suffix in (".bz2", ".xz") and getattr(error, "errno", None) is None and not isinstance(error, EOFError):
            raise UserError(f"{path} is damaged: {error}") from None
        raise


def _zstd_blocks(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Unpack one or more zstandard frames; zstandard's own stream does not notice that a file is cut off."""
    data = file.read(_BLOCK_BYTES)
    while data:
        head = data
        frame = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()
        while not frame.eof:
            if not data:
                raise EOFError("it is cut off")
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                if "memory" not in str(error):
                    raise
                window = zstandard.get_frame_parameters(head).window_size
                raise UserError(
                    f"{path} takes a window of {window:,} bytes to unpack, and memory is too short"
                ) from None
            data = file.read(_BLOCK_BYTES)
        data = frame.unused_data + data
