import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import zstandard
from helpers_data import some_documents, texts_of

from sdd.data import builtin_tokenizer
from sdd.data.inputs import documents, find_inputs, records, token_files
from sdd.data.tables import load_dataset
from sdd.data.tokenize_job import TokenizeSettings, tokenize
from sdd.errors import UserError

DOCUMENTS = some_documents(600)
WHOLE = TokenizeSettings(builtin_tokenizer(), validation_fraction=0)


class FakeDataset:
    """As much of a `datasets.Dataset` as is used."""

    def __init__(self, columns: dict[str, list]) -> None:
        self._columns = columns
        self.column_names = list(columns)
        self.dataset_size = None
        self._fingerprint = "abc"

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, rows: slice) -> dict[str, list]:
        return {name: values[rows] for name, values in self._columns.items()}

    def select_columns(self, names: list[str]) -> "FakeDataset":
        return FakeDataset({name: self._columns[name] for name in names})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    """A module `datasets`, and what load_dataset and load_from_disk find."""
    stored: dict = {}

    def load(*key, **options):
        key = (*key, *options.values())
        if key not in stored:
            raise RuntimeError(f"no dataset {key}\nand a second line")
        return stored[key]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load, load_from_disk=load))
    load_dataset.cache_clear()
    yield stored
    load_dataset.cache_clear()


def test_datasets_of_the_hub(hub: dict, tmp_path: Path):
    hub["org/name", "train"] = FakeDataset({"text": [*DOCUMENTS, None], "n": [*range(601)]})
    hub["org/name", "part", "test[:9]"] = FakeDataset({"text": DOCUMENTS[:9]})
    tokenize(["hf:org/name", "hf:org/name:part:test[:9]"], tmp_path / "out", WHOLE)
    assert texts_of([tmp_path / "out" / "train-00000.npy"]) == [*DOCUMENTS, *DOCUMENTS[:9]]
    (source,) = find_inputs(["hf:org/name"], "text")
    assert [record.number for record in records(source, "text", start=590)] == [*range(591, 602)]
    with pytest.raises(
        UserError, match=r"hf:org/name has no field 'txt': choose with sdd tokenize --text-field, e.g. text"
    ):
        find_inputs(["hf:org/name"], "txt")
    with pytest.raises(UserError, match=r"cannot load the dataset hf:org/other: no dataset \('org/other', 'train'\)$"):
        find_inputs(["hf:org/other"], "text")


@pytest.mark.parametrize("spelled", ["{}", "hf:{}", "hf:{}:train"])
def test_saved_datasets(hub: dict, tmp_path: Path, spelled: str):
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "dataset_dict.json").write_text("{}")
    hub[(str(folder),)] = {"train": FakeDataset({"text": DOCUMENTS}), "test": FakeDataset({"text": ["x"]})}
    tokenize([spelled.format(folder)], tmp_path / "out", WHOLE)
    assert texts_of([tmp_path / "out" / "train-00000.npy"]) == DOCUMENTS
    with pytest.raises(UserError, match=r"has the splits train, test: name one, hf:.*:SPLIT"):
        find_inputs([f"hf:{folder}:validation"], "text")


@pytest.mark.parametrize(
    ("package", "name", "extra"),
    [("datasets", "hf:name", r"sdd-torch\[datasets\]"), ("pyarrow", "x.parquet", r"sdd-torch\[data\]")],
)
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str, extra: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    load_dataset.cache_clear()
    with pytest.raises(UserError, match=f"{package}: pip install '{extra}'"):
        find_inputs([name], "text")


def test_pyarrow_is_not_imported_for_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.txt").write_text("a few words")
    tokenize([str(tmp_path)], tmp_path / "out", WHOLE)
    assert texts_of([tmp_path / "out" / "train-00000.npy"]) == ["a few words"]


@pytest.mark.parametrize("kind", ["text", "json lines", "parquet"])
def test_reading_goes_on_at_any_record(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sdd.data.inputs.PART_BYTES", 4000)
    path = tmp_path / {"text": "x.txt", "json lines": "x.jsonl", "parquet": "x.parquet"}[kind]
    if kind == "parquet":
        parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        parquet.write_table(pyarrow.table({"text": DOCUMENTS[:60]}), path, row_group_size=7)
    elif kind == "text":
        path.write_text("\n".join(DOCUMENTS[:60]))
    else:
        path.write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS[:60]))
    (source,) = find_inputs([str(path)], "text")
    whole = list(records(source, "text"))
    assert [record.number for record in whole] == [*range(1, len(whole) + 1)]
    assert len(whole) > 5
    for start in range(len(whole) + 1):
        assert list(records(source, "text", start)) == whole[start:]
    assert whole[-1].done == source.size


def test_a_module_without_the_right_shape_is_not_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", ModuleType("datasets"))
    load_dataset.cache_clear()
    with pytest.raises(UserError, match="cannot load the dataset hf:x: module 'datasets' has no attribute"):
        find_inputs(["hf:x"], "text")


COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def whole(path: Path) -> list[bytes]:
    (source,) = find_inputs([str(path)])
    return [b"".join(data for data, _ in doc.pieces(0, doc.size)) for _, doc in documents(source, "text") if doc]


@pytest.mark.parametrize("archive", COMPRESS)
def test_a_line_of_json_is_a_document(tmp_path: Path, archive: str):
    texts = ["first\nsecond line", "“three”", ""]
    data = "\n".join(json.dumps({"text": text, "id": 1}) for text in texts).encode() + b"\n\n"
    path = tmp_path / f"some.jsonl{archive}"
    path.write_bytes(COMPRESS[archive](data) + COMPRESS[archive](data))
    assert whole(path) == [text.encode() for text in texts * 2]


@pytest.mark.parametrize("archive", COMPRESS)
def test_a_text_file_is_a_document(tmp_path: Path, archive: str):
    text = "\n".join(DOCUMENTS).encode()
    path = tmp_path / f"some.txt{archive}"
    path.write_bytes(COMPRESS[archive](text))
    assert whole(path) == [text]


@pytest.mark.parametrize("archive", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["some.jsonl", "some.txt"])
def test_an_archive_that_is_cut_off_is_refused(tmp_path: Path, name: str, archive: str):
    path = tmp_path / (name + archive)
    path.write_bytes(COMPRESS[archive](json.dumps({"text": "x"}).encode() * 1000)[:-9])
    with pytest.raises(UserError, match="damaged"):
        whole(path)


def test_token_files_of_a_folder_go_before_text(tmp_path: Path):
    for name in ("a.npy", "b.bin", "c.txt"):
        (tmp_path / name).write_text("some text")
    (tmp_path / "empty.npy").touch()
    assert [path.name for path in token_files(tmp_path)] == ["a.npy", "b.bin"]
    assert token_files(tmp_path / "c.txt") == []
    assert token_files(tmp_path / "d.u16", any_name=True) == []
    (tmp_path / "d.u16").touch()
    assert token_files(tmp_path / "d.u16", any_name=True) == [tmp_path / "d.u16"]


def test_a_token_file_is_not_taken_for_text(tmp_path: Path):
    (tmp_path / "train.npy").write_bytes(b"\0\0")
    with pytest.raises(UserError, match=r"train\.npy is a token file, expected text: give it to sdd train --data"):
        find_inputs([str(tmp_path / "train.npy")])
