"""The table of docs/training.md, "What is read, what is refused, what is left out", row by row, for both commands."""

import bz2
import gzip
import io
import json
import lzma
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from helpers_data import texts_of

from sdd.commands.main import main
from sdd.data import TokenizeSettings, builtin_tokenizer, resolve_data, tokenize
from sdd.errors import UserError

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
PROSE = "".join(f"Call me Ishmael, number {i}.\n" for i in range(200))
LINES = (json.dumps({"text": PROSE}) + "\n").encode()


def _zip() -> bytes:
    with zipfile.ZipFile(stream := io.BytesIO(), "w") as archive:
        archive.writestr("a.txt", PROSE)
    return stream.getvalue()


def _parquet() -> bytes:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.table({"text": [PROSE]}), stream := io.BytesIO())
    return stream.getvalue()


def _tar() -> bytes:
    with tarfile.open(fileobj=(stream := io.BytesIO()), mode="w:gz") as archive:
        (info := tarfile.TarInfo("a.txt")).size = len(PROSE)
        archive.addfile(info, io.BytesIO(PROSE.encode()))
    return stream.getvalue()


CONTENTS: dict[str, bytes | Callable[[], bytes]] = {
    **dict.fromkeys(("notes.txt", "notes.MD", "table.csv", "notes.tex", "notes", ".notes.txt"), PROSE.encode()),
    **dict.fromkeys(("notes.txt~", "notes.txt.bak", "#notes.txt#", "README.md", "LICENSE.txt"), PROSE.encode()),
    **dict.fromkeys(("rows.jsonl", "rows.JSONL", "rows.ndjson", "rows.json"), LINES),
    "rows.jsonl.gz": gzip.compress(LINES),
    "rows.jsonl.zst": zstandard.compress(LINES),
    "rows.jsonl.zstd": zstandard.compress(LINES),
    "notes.txt.bz2": bz2.compress(PROSE.encode()),
    "notes.txt.xz": lzma.compress(PROSE.encode()),
    "rows.parquet": _parquet,
    "notes.zip": _zip(),
    "notes.docx": _zip(),
    "notes.tar.gz": _tar(),
    "notes.7z": b"7z\xbc\xaf\x27\x1c\0\4" + bytes(30),
    "paper.pdf": b"%PDF-1.7\n%\xbf\xf7\xa2\xfe\n1 0 obj",
    "rows.arrow": b"ARROW1\0\0" + bytes(30),
    "rows.sqlite": b"SQLite format 3\0" + bytes(30),
    "picture.png": b"\x89PNG\r\n\x1a\n" + bytes(30),
    "program": b"\x7fELF\2\1\1" + bytes(30),
    "packed.txt": gzip.compress(PROSE.encode()),
    "utf16.txt": PROSE.encode("utf-16"),
    "latin1.txt": "café au lait".encode("latin1") * 100,
    "cut.jsonl.gz": gzip.compress(LINES)[:-9],
    "cut.txt.zst": zstandard.compress(PROSE.encode())[:-9],
    "array.json": b"[\n" + LINES.strip() + b"]\n",
    "._notes.txt": b"\0\5\x16\7\0\2\0\0Mac OS X\xff" + bytes(30),
    ".DS_Store": b"\0\0\0\1Bud1\xff" + bytes(30),
    "Thumbs.db": b"\xd0\xcf\x11\xe0" + bytes(30),
}


def table() -> dict[str, tuple[str, str]]:
    """File name to what happens if it is named, and if it lies in a folder."""
    section = (
        PAGE.read_text().partition("### What is read, what is refused, what is left out\n")[2].partition("\n### ")[0]
    )
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return {name: (row[1].strip(), row[2].strip()) for row in rows for name in re.findall(r"`([^`]+)`", row[0])}


def both_ways(path: Path, folder: Path) -> tuple[list[str], str]:
    """What training and tokenising say, which must be alike, and the text or the error."""
    answers = []
    for way in ("train", "tokenize"):
        said: list[str] = []
        try:
            if way == "train":
                data = resolve_data(path, context=8, notify=said.append)
                text = "".join(builtin_tokenizer().decode(file.tokens) for file in (*data.train, data.validation))
            else:
                settings = TokenizeSettings(builtin_tokenizer(), validation_fraction=0)
                tokenize([str(path)], folder / "out", settings, notify=said.append)
                text = "".join(texts_of([folder / "out" / "train-00000.npy"]))
        except UserError as error:
            text = "refused: " + str(error).partition("; mend it")[0]
            assert "\n" not in text
        text = text if text.startswith("refused") else "".join(sorted(text))  # held-out tails come last
        answers.append(([line for line in said if not line.startswith("tokenising")], text))
    assert answers[0] == answers[1]
    return answers[0]


def test_every_kind_that_is_tried_stands_in_the_table():
    assert set(table()) == set(CONTENTS)


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_that_is_named(tmp_path: Path, name: str):
    content = CONTENTS[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content())
    said, text = both_ways(tmp_path / name, tmp_path)
    expected, _ = table()[name]
    if expected == "refused":
        assert text.startswith(f"refused: {tmp_path / name}")
        assert ("iconv" in text) == (name in ("utf16.txt", "latin1.txt"))
    else:
        assert text == "".join(sorted(PROSE))
        assert any(name in line for line in said) == (expected == "read as plain text, said")


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_in_a_folder(tmp_path: Path, name: str):
    content, folder = CONTENTS[name], tmp_path / "folder"
    folder.mkdir()
    (folder / "0.jsonl").write_text(json.dumps({"text": "Zero. " * 60}))
    (folder / name).write_bytes(content if isinstance(content, bytes) else content())
    said, text = both_ways(folder, tmp_path)
    _, expected = table()[name]
    if expected == "refused":
        assert text.startswith(f"refused: {folder / name}")
    else:
        assert text == "".join(sorted("Zero. " * 60 + (PROSE if expected == "read" else "")))
        assert [name in line and "left out" in line for line in said] == [True] * (expected == "left out, said")


def test_the_options_of_both_commands_name_the_same_kinds(capsys: pytest.CaptureFixture):
    kinds = "text (.txt, .md), JSON lines (.jsonl, .ndjson, .json), each also packed (.gz, .zst, .bz2, .xz), parquet"
    for command in ("train", "tokenize"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert kinds in " ".join(capsys.readouterr().out.split())
