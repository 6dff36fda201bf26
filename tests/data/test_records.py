"""Records: null, missing and nested text, what JSON may hold beside it, and marks at the start."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import zstandard
from helpers_data import texts_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_inputs import FakeDataset

from sdd.data import TokenizeSettings, builtin_tokenizer, resolve_data, tables, tokenize
from sdd.data.fields import ABSENT, lookup, text_in_json
from sdd.data.inputs import documents, find_inputs
from sdd.errors import UserError

words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30)


def whole(field: str = "text", **other) -> TokenizeSettings:
    return TokenizeSettings(builtin_tokenizer(), validation_fraction=0, text_field=field, **other)


@pytest.fixture(scope="module")
def hub():
    """A module `datasets` whose one dataset is hub["x"]."""
    stored: dict[str, FakeDataset] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda name, split: stored[name]))
        yield stored


@settings(max_examples=25)
@given(st.lists(st.none() | words, min_size=1, max_size=20), st.booleans())
def test_null_text_is_passed_over_and_counted_in_every_kind(tmp_path_factory, hub, texts: list, nested: bool):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("null")
    texts = [*texts, "the last"]
    column = [{"content": text} if text or number % 2 else None for number, text in enumerate(texts)]
    name, field = ("meta", "meta.content") if nested else ("text", "text")
    values = column if nested else texts
    (folder / "a.jsonl").write_text("".join(json.dumps({name: value}) + "\n" for value in values))
    parquet.write_table(pyarrow.table({name: values}), folder / "a.parquet", row_group_size=3)
    hub["x"] = FakeDataset({name: values})
    tables.load_dataset.cache_clear()
    for number, source in enumerate((folder / "a.jsonl", folder / "a.parquet", "hf:x")):
        result = tokenize([str(source)], out := folder / str(number), whole(field))
        assert texts_of([out / "train-00000.npy"]) == [text for text in texts if text]
        assert (result["without_text"], result["skipped"]) == (texts.count(None), 0)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_training_says_how_many_records_have_no_text(tmp_path: Path, kind: str):
    texts = [None, "Call me Ishmael. " * 200, None, None, None, "Some years ago. " * 200, None]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        pytest.importorskip("pyarrow.parquet").write_table(pytest.importorskip("pyarrow").table({"text": texts}), path)
    said: list[str] = []
    resolve_data(path, context=8, notify=said.append)
    assert said[-1] == "a: 5 records without text passed over"


names = st.sampled_from(["a", "b", "a.b", "a.b.c"])
objects = st.recursive(st.integers(), lambda inner: st.dictionaries(names, inner, max_size=3), max_leaves=8)


@given(objects, names)
def test_a_literal_name_goes_before_a_nested_field(value, field: str):
    found = lookup(value, field)
    if not isinstance(value, dict):
        assert found is ABSENT
    elif field in value:
        assert found == value[field]
    else:
        outer, _, inner = field.partition(".")
        assert found is ABSENT or found == lookup(value[outer], inner)
        assert (found is ABSENT) == (not inner or lookup(value.get(outer), inner) is ABSENT)


def test_a_literal_column_goes_before_a_nested_one_in_parquet(tmp_path: Path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    rows = {"meta": [{"content": "nested", "n": 1}], "meta.content": ["literal"]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "both.parquet")
    parquet.write_table(pyarrow.table({"meta": rows["meta"]}), tmp_path / "one.parquet")
    for name, expected in (("both", "literal"), ("one", "nested")):
        tokenize([str(tmp_path / f"{name}.parquet")], tmp_path / name, whole("meta.content"))
        assert texts_of([tmp_path / name / "train-00000.npy"]) == [expected]
    with pytest.raises(UserError, match=r"has no field 'meta\.contend': choose .* e\.g\. meta\.content"):
        tokenize([str(tmp_path / "one.parquet")], tmp_path / "x", whole("meta.contend"))
    with pytest.raises(UserError, match=r'row 1: expected a text in "meta\.n", found a number'):
        tokenize([str(tmp_path / "one.parquet")], tmp_path / "y", whole("meta.n"))


def test_a_field_that_no_record_has_is_an_error(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 5)
    with pytest.raises(UserError, match=r"a\.jsonl has no field 'text': choose with .*--text-field, e\.g\. body"):
        resolve_data(tmp_path / "a.jsonl", context=8)


beside = st.integers(4301, 9000).map(lambda digits: "9" * digits) | st.sampled_from(
    ["NaN", "-Infinity", "1e999", "[[]]"]
)


@given(words, beside)
def test_what_stands_beside_the_text_does_not_matter(text: str, other: str):
    line = f'{{"n": {other}, "text": {json.dumps(text)}}}\r'.encode()
    assert text_in_json(line, "text", "x") == text.encode()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b"{", r"found no JSON .*jq -c"),
        (b'[{"text": "x"}]', r"found a list; jq -c .* an array"),
        (b'{"text": ' + b"9" * 5000 + b"}", "found a number there"),
        (b'{"text": ["x"]}', "found a list there"),
        (b'{"text": "ab\\ud800"}', r"found half a character in it \(\\ud800, a lone surrogate\)"),
        (b'{"n": ' + b"[" * 100_000 + b"}", "found one with too many brackets"),
    ],
)
def test_what_is_no_text_is_named_for_what_it_is(line: bytes, found: str):
    with pytest.raises(UserError, match=f'^x, line 1: expected a JSON object with a string "text", {found}'):
        text_in_json(line, "text", "x, line 1")


@given(words, st.sampled_from([".txt", ".txt.gz", ".jsonl", ".jsonl.zst"]))
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path_factory: pytest.TempPathFactory, text: str, suffix: str):
    path = tmp_path_factory.mktemp("mark") / f"a{suffix}"
    text = text.removeprefix("\ufeff")
    data = (json.dumps({"text": text}) if "json" in suffix else text).encode("utf-8-sig")
    path.write_bytes({".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)(data))
    (source,) = find_inputs([str(path)])
    read = [
        data for _, document in documents(source, "text") if document for data, _ in document.pieces(0, document.size)
    ]
    assert b"".join(read) == text.encode()
    if text.strip():
        tokenize([str(path)], path.parent / "out", whole())
        assert texts_of([path.parent / "out" / "train-00000.npy"]) == [text]


@pytest.mark.parametrize("window_log", [20, 28, 31])
def test_zstandard_windows_up_to_2_gib_and_several_frames_are_read(tmp_path: Path, window_log: int):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log, chain_log=6, hash_log=6)
    frame = b""
    for text in (b"It was the best of times. ", b"It was the worst of times."):
        packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # it does not know the size
        frame += packer.compress(text) + packer.flush()
    assert zstandard.get_frame_parameters(frame).window_size == 1 << window_log
    (tmp_path / "a.txt.zst").write_bytes(frame)
    tokenize([str(tmp_path / "a.txt.zst")], tmp_path / "out", whole())
    assert texts_of([tmp_path / "out" / "train-00000.npy"]) == ["It was the best of times. It was the worst of times."]


def test_the_first_records_that_are_skipped_are_named_and_all_are_counted(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + '{"text": 1}\n' * 9)
    said: list[str] = []
    result = tokenize([str(tmp_path / "a.jsonl")], tmp_path / "out", whole(skip_bad=True), notify=said.append)
    assert [line.partition(":")[0] for line in said] == ["skipped"] * 5
    assert [line.partition(", line ")[2].partition(":")[0] for line in said] == ["2", "3", "4", "5", "6"]
    assert (result["skipped"], result["documents"]) == (9, 1)
