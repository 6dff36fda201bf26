import errno
import gzip
import json
from collections.abc import Callable
from itertools import count, zip_longest
from pathlib import Path

import pytest
import tokenizers
import zstandard
from helpers_data import contents, some_documents, texts_of, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from sdd.data import Loader, TokenFile, Tokenizer, builtin_tokenizer, resolve_data, shards, tokenize_job
from sdd.data.tokenize_job import Status, TokenizeSettings, tokenize
from sdd.errors import RunFailed, UserError

DOCUMENTS = some_documents(60)
SMALL = TokenizeSettings(builtin_tokenizer(), chunk_bytes=2000, shard_tokens=3000, validation_fraction=0.1)
WHOLE = TokenizeSettings(builtin_tokenizer(), chunk_bytes=2000, validation_fraction=0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "text.jsonl", DOCUMENTS)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def files_in(out: Path) -> list[Path]:
    return sorted(out.glob("train-*.npy"))


def compressed(path: Path, compress: Callable[[bytes], bytes], suffix: str) -> Path:
    target = path.with_name(path.name + suffix)
    target.write_bytes(compress(path.read_bytes()))
    path.unlink()
    return target


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_lines_of_json_become_documents(source: Path, out: Path, suffix: str):
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    result = tokenize([str(compressed(source, compress, suffix) if suffix else source)], out, WHOLE)
    assert texts_of(files_in(out)) == DOCUMENTS
    assert (result["documents"], result["validation_tokens"], result["skipped"]) == (60, 0, 0)
    assert result["text_bytes"] == sum(len(text.encode()) for text in DOCUMENTS)
    assert result["tokens"] == sum(len(TokenFile.open(file)) for file in files_in(out))
    assert result["files"] == ["train-00000.npy"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_files_are_documents_and_long_ones_stay_one(
    tmp_path: Path, out: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sdd.data.inputs.PART_BYTES", 500)
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    texts = {"a.txt": DOCUMENTS[0], "b.md": "\n".join(DOCUMENTS), "inner/c.txt": DOCUMENTS[2]}
    for name, text in texts.items():
        (folder / name).write_text(text)
        if suffix:
            compressed(folder / name, {".gz": gzip.compress, ".zst": zstandard.compress}[suffix], suffix)
    (folder / "picture.png").write_bytes(b"\xff")
    tokenize([str(folder)], out, WHOLE)
    assert texts_of(files_in(out)) == list(texts.values())


def test_where_a_tail_was_cut_out_of_a_long_text_stands_an_end(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sdd.data.inputs.PART_BYTES", 3000)
    monkeypatch.setattr("sdd.data.text.SMALLEST_TAIL", 100)
    text = "\n".join(DOCUMENTS)
    (tmp_path / "long.txt").write_text(text)
    tokenize([str(tmp_path / "long.txt")], out, SMALL)
    heads, tails = texts_of(files_in(out)), texts_of([out / "validation.npy"])
    assert abs(len(heads) - len(tails)) <= 1  # the last part may be too short to have both
    assert len(tails) > 5
    assert "".join(head + tail for head, tail in zip_longest(heads, tails, fillvalue="")) == text
    assert 0.04 < sum(map(len, tails)) / len(text) <= 0.1


def test_parquet(tmp_path: Path, out: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"body": [*DOCUMENTS, None, ""], "n": range(62)})
    parquet.write_table(table, path, row_group_size=7)
    with pytest.raises(
        UserError, match=r"rows\.parquet has no field 'text': choose with sdd tokenize --text-field, e\.g\. body, n"
    ):
        tokenize([str(path)], out, WHOLE)
    with pytest.raises(UserError, match=r"rows\.parquet, row 1: expected a text in \"n\", found a number"):
        tokenize([str(path)], tmp_path / "other", TokenizeSettings(builtin_tokenizer(), text_field="n"))
    tokenize(
        [str(path)], tmp_path / "right", TokenizeSettings(builtin_tokenizer(), text_field="body", validation_fraction=0)
    )
    assert texts_of(files_in(tmp_path / "right")) == DOCUMENTS
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"rows\.parquet is damaged or no parquet file"):
        tokenize([str(path)], tmp_path / "damaged", WHOLE)


def test_bytes_that_are_no_utf8_in_parquet_are_named_or_skipped(tmp_path: Path, out: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    column = pyarrow.array([b"fine", b"caf\xe9", b"good"]).cast(pyarrow.string(), safe=False)
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet, row 2 is not UTF-8 text \(byte 3\)"):
        tokenize([str(tmp_path / "x.parquet")], out, WHOLE)
    skipping = TokenizeSettings(builtin_tokenizer(), validation_fraction=0, skip_bad=True)
    assert tokenize([str(tmp_path / "x.parquet")], tmp_path / "skipped", skipping)["skipped"] == 1
    assert texts_of(files_in(tmp_path / "skipped")) == ["fine", "good"]


def test_the_tail_of_documents_is_held_out(source: Path, out: Path):
    tokenize([str(source)], out, SMALL)
    assert len(files_in(out)) > 2  # a full shard is followed by another
    heads, tails = iter(texts_of(files_in(out))), texts_of([out / "validation.npy"])
    text = "".join(DOCUMENTS)
    assert 0.03 < sum(map(len, tails)) / len(text) <= 0.1
    for document in DOCUMENTS:
        head = "" if tails and document == tails[0] else next(heads)
        assert document.startswith(head)
        if head != document:
            assert head + tails.pop(0) == document
    assert not tails


@pytest.mark.parametrize("fraction", [0.004, 0.02, 0.1, 0.4])
@pytest.mark.parametrize("chunk_bytes", [5000, 20_000, 10**6])
def test_the_held_out_share_does_not_depend_on_the_size_of_chunks(
    tmp_path: Path, out: Path, fraction: float, chunk_bytes: int
):
    documents = some_documents(200, seed=1)
    source = write_jsonl(tmp_path / "text.jsonl", documents)
    tokenize(
        [str(source)], out, TokenizeSettings(builtin_tokenizer(), validation_fraction=fraction, chunk_bytes=chunk_bytes)
    )
    share = sum(map(len, texts_of([out / "validation.npy"]))) / sum(map(len, documents))
    assert 0.6 * fraction <= share <= 1.1 * fraction, share


def test_a_folder_of_token_files_is_trained_on(source: Path, out: Path):
    result = tokenize([str(source)], out, SMALL)
    data = resolve_data(out, context=32)
    assert [file.path.name for file in data.train] == [path.name for path in files_in(out)]
    assert (data.n_tokens, len(data.validation)) == (result["tokens"], result["validation_tokens"])
    assert data.tokenizer
    assert data.tokenizer.sha256 == builtin_tokenizer().sha256
    assert Loader(data.parts, 4, 32).batch(3).shape == (4, 33)


class Crash(BaseException):
    pass


@settings(max_examples=40)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=3), st.booleans())
def test_killed_anywhere_and_started_again_the_result_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, moments: list[int], torn: bool
):
    folder = tmp_path_factory.mktemp("crash")
    source, whole, out = write_jsonl(folder / "text.jsonl", DOCUMENTS), folder / "whole", folder / "out"
    tokenize([str(source)], whole, SMALL)
    for moment in moments:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tokenize_job, "_SECONDS_BETWEEN_COMMITS", 0)
            _crash_at(moment, torn, patch)
            try:
                tokenize([str(source)], out, SMALL)
            except Crash:
                if (out / "progress.json").exists():
                    with pytest.raises(UserError, match="is not complete: give the same sdd tokenize command again"):
                        resolve_data(out, context=8)
    tokenize([str(source)], out, SMALL)
    assert contents(out) == contents(whole)
    assert not list(out.glob("*.part"))


def _crash_at(moment: int, torn: bool, patch: pytest.MonkeyPatch) -> None:
    """The system's calls that make things last end the process at call number `moment`, before or after their work."""
    calls = count()

    def dying(call: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            if next(calls) < moment:
                return call(*args, **kwargs)
            if torn:
                call(*args, **kwargs)
            raise Crash

        return wrapped

    patch.setattr(Path, "replace", dying(Path.replace))
    patch.setattr(shards.os, "fsync", dying(shards.os.fsync))


def test_a_complete_folder_answers_at_once(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    first = tokenize([str(source)], out, SMALL)
    monkeypatch.setattr(Tokenizer, "encode_batch", pytest.fail)
    again = tokenize([str(source)], out, SMALL)
    assert again.pop("mb_per_second") is None
    assert first.pop("mb_per_second") > 0
    assert again == first


def test_what_is_written_is_told(source: Path, out: Path):
    told: list[Status] = []
    result = tokenize([str(source)], out, SMALL, told.append)
    assert told[0].done == told[0].text_bytes == 0
    assert [status.done for status in told] == sorted(status.done for status in told)
    assert told[-1].done == told[-1].size == source.stat().st_size
    assert told[-1].text_bytes == result["text_bytes"] == told[-1].total.n_bytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation_fraction": 0.2}, r"was begun with validation fraction 0\.1, now it is 0\.2: give the same"),
        ({"text_field": "body"}, "was begun with text field text, now it is body"),
        ({"dtype": "uint32"}, "was begun with dtype uint16, now it is uint32"),
        ({"eos": "300"}, "was begun with eos 0, now it is 300"),
    ],
)
def test_other_settings_are_refused(source: Path, out: Path, change: dict, message: str):
    tokenize([str(source)], out, SMALL)
    before = contents(out)
    with pytest.raises(UserError, match=message):
        tokenize([str(source)], out, TokenizeSettings(**{**SMALL.__dict__, **change}))
    assert contents(out) == before


def test_other_inputs_are_refused(source: Path, out: Path, tmp_path: Path):
    other = write_jsonl(tmp_path / "other.jsonl", DOCUMENTS)
    tokenize([str(source)], out, SMALL)
    with pytest.raises(UserError, match=r"other inputs \(.*other\.jsonl is new\)"):
        tokenize([str(source), str(other)], out, SMALL)
    with pytest.raises(UserError, match=r"other inputs \(.*text\.jsonl is missing\)|other\.jsonl is new"):
        tokenize([str(other)], out, SMALL)
    write_jsonl(source, DOCUMENTS[:-1])
    with pytest.raises(UserError, match=r"another .*text\.jsonl \(it had size \d+, now \d+\)"):
        tokenize([str(source)], out, SMALL)
    write_jsonl(source, [*DOCUMENTS[:-1], DOCUMENTS[-1][::-1]])
    with pytest.raises(UserError, match=r"another .*text\.jsonl \(it was written again\)"):
        tokenize([str(source)], out, SMALL)


def test_folders_with_something_else_are_left_alone(source: Path, out: Path):
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"is not empty \(it holds thesis\.tex\)"):
        tokenize([str(source)], out, SMALL)
    assert {path.name for path in out.iterdir()} == {"thesis.tex", ".lock"}
    with pytest.raises(UserError, match=r"thesis\.tex is a file: name a folder"):
        tokenize([str(source)], out / "thesis.tex", SMALL)


def test_two_at_once_are_refused(source: Path, out: Path):
    def second(_: Status) -> None:
        with pytest.raises(UserError, match="another process is writing into"):
            tokenize([str(source)], out, SMALL)

    tokenize([str(source)], out, SMALL, second)


def test_damage_to_unfinished_work_is_told(source: Path, out: Path):
    def stop(status: Status) -> None:
        if status.text_bytes > 20_000:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_job, "_SECONDS_BETWEEN_COMMITS", 0)
        with pytest.raises(KeyboardInterrupt):
            tokenize([str(source)], out, SMALL, stop)
    part = out / "train-00000.npy.part"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(
        UserError, match=r"train-00000\.npy\.part holds 100 bytes, progress\.json counts [\d,]+: it was"
    ):
        tokenize([str(source)], out, SMALL)
    (out / "progress.json").unlink()
    with pytest.raises(UserError, match=r"has lost its progress\.json: delete it and start again"):
        tokenize([str(source)], out, SMALL)


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
fields = st.sampled_from(["position", "train", "validation", "skipped", "seconds", "format", "inputs", "eos", "dtype"])


@given(
    st.sampled_from(["progress.json", "manifest.json"]),
    st.binary(max_size=40) | st.dictionaries(fields, junk, min_size=1).map(json.dumps).map(str.encode),
)
def test_junk_for_progress_or_manifest_is_one_line(tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes):
    folder = tmp_path_factory.mktemp("junk")
    source, out = write_jsonl(folder / "text.jsonl", DOCUMENTS[:3]), folder / "out"

    def stop(_: Status) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize([str(source)], out, SMALL, stop)
    path = out / name
    values = json.loads(path.read_bytes())
    try:
        path.write_text(json.dumps({**values, **json.loads(content)}))
    except (ValueError, TypeError):
        path.write_bytes(content)
    try:
        tokenize([str(source)], out, SMALL)
    except UserError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1000 + len(str(out)) * 3


def test_a_full_disk_and_an_unwritable_folder_are_one_line(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    blocked = source / "out"
    with pytest.raises(RunFailed, match=r"cannot write .*Not a directory"):
        tokenize([str(source)], blocked, SMALL)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards.os, "fsync", full)
        with pytest.raises(RunFailed, match="No space left on device; once that is mended the same command goes on"):
            tokenize([str(source)], out, SMALL)
    tokenize([str(source)], out, SMALL)
    assert resolve_data(out, context=8).n_tokens > 1000


@pytest.mark.parametrize("line", ["{", "[]", '"x"', '{"text": 3}', '{"text": "\\ud800"}', "\xff"])
def test_a_bad_line_is_named_or_skipped(tmp_path: Path, out: Path, line: str):
    path = tmp_path / "some.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line.encode("latin1") + b'\n{"text": "good"}')
    with pytest.raises(UserError, match=r"some\.jsonl, line 3: expected a JSON object with a string \"text\""):
        tokenize([str(path)], out, WHOLE)
    skipping = TokenizeSettings(builtin_tokenizer(), validation_fraction=0, skip_bad=True)
    result = tokenize([str(path)], tmp_path / "skipped", skipping)
    assert (result["skipped"], result["documents"]) == (1, 2)
    assert texts_of(files_in(tmp_path / "skipped")) == ["fine", "good"]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "x.txt", "no text to train on"),
        (b"\n\n", "x.jsonl", "no text to train on"),
        (b"caf\xe9", "x.txt", r"x\.txt is not UTF-8 text \(byte 3\)"),
        (b"no archive", "x.jsonl.zst", r"x\.jsonl\.zst is damaged"),
        (b"no archive", "x.jsonl.gz", r"x\.jsonl\.gz is damaged"),
        (b"no parquet", "x.parquet", r"x\.parquet is damaged or no parquet file"),
    ],
)
def test_unusable_inputs_are_one_line(tmp_path: Path, out: Path, content: bytes, name: str, message: str):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        tokenize([str(tmp_path / name)], out, WHOLE)
    assert "\n" not in str(caught.value)


def test_inputs_that_are_not_there(tmp_path: Path, source: Path, out: Path):
    with pytest.raises(UserError, match=r"no data at .*: did you mean text\.jsonl\?"):
        tokenize([str(tmp_path / "txt.jsonl")], out, WHOLE)
    with pytest.raises(
        UserError, match=r"no data at .*: expected text files, or hf:NAME\[:SPLIT\] for a dataset of the hub"
    ):
        tokenize([str(tmp_path / "nowhere" / "zzz")], out, WHOLE)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=r"nothing holds no data, expected \.txt"):
        tokenize([str(tmp_path / "nothing")], out, WHOLE)
    assert not out.exists()


def test_the_end_of_text_token(tmp_path: Path, source: Path, out: Path):
    spec = json.loads(builtin_tokenizer().path.read_bytes())
    spec["added_tokens"][0]["content"] = "<|stop|>"
    spec["model"]["vocab"] = {
        "<|stop|>" if name == "<|endoftext|>" else name: number for name, number in spec["model"]["vocab"].items()
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"none of the usual end-of-text tokens .* name its own with --eos TOKEN"):
        tokenize([str(source)], out, TokenizeSettings(tokenizer))
    with pytest.raises(UserError, match=r"has no token '<\|halt\|>' to end a text with"):
        tokenize([str(source)], out, TokenizeSettings(tokenizer, eos="<|halt|>"))
    tokenize([str(source)], out, TokenizeSettings(tokenizer, eos="<|stop|>", validation_fraction=0))
    assert TokenFile.open(out / "train-00000.npy").eos == 0
    assert texts_of(files_in(out), tokenizer) == DOCUMENTS


def test_the_dtype(source: Path, out: Path, tmp_path: Path):
    tokenize([str(source)], out, TokenizeSettings(builtin_tokenizer(), dtype="uint32", validation_fraction=0))
    assert TokenFile.open(out / "train-00000.npy").info.dtype == "uint32"
    assert texts_of(files_in(out)) == DOCUMENTS
    words = tokenizers.models.WordLevel({"</s>": 0, "word": 2**16}, unk_token="word")
    tokenizers.Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="has 65537 tokens, more than uint16 holds"):
        tokenize(
            [str(source)], tmp_path / "x", TokenizeSettings(Tokenizer.load(tmp_path / "tokenizer.json"), dtype="uint16")
        )
    with pytest.raises(UserError, match=r"validation fraction 1\.5 must be"):
        tokenize([str(source)], tmp_path / "x", TokenizeSettings(builtin_tokenizer(), validation_fraction=1.5))


def whole_documents(fraction: float = 0.1, **other) -> TokenizeSettings:
    return TokenizeSettings(builtin_tokenizer(), validation_fraction=fraction, whole_documents=True, **other)


def test_whole_documents_give_one_tail_each(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sdd.data.text.PIECE_BYTES", 1000)
    text = "\n".join(some_documents(200))
    (tmp_path / "long.txt").write_text(text)
    result = tokenize([str(tmp_path / "long.txt")], out, whole_documents(chunk_bytes=5000))
    (head,), (tail,) = texts_of(files_in(out)), texts_of([out / "validation.npy"])
    assert head + tail == text
    assert 0.05 < len(tail.encode()) / len(text.encode()) <= 0.1
    assert result["text_bytes"] == len(text.encode())
    tokens = [*TokenFile.open(files_in(out)[0]).tokens[:-1], *TokenFile.open(out / "validation.npy").tokens[:-1]]
    assert tokens == builtin_tokenizer().encode(text)


@pytest.mark.parametrize("workers", [0, 1])
def test_little_text_is_encoded_at_once(tmp_path: Path, out: Path, workers: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sdd.data.text.PIECE_BYTES", 1000)
    monkeypatch.setattr("sdd.data.chunks.PIECE_BYTES", 1000)
    (tmp_path / "long.txt").write_text("some words of a line\n" * 20_000)
    batches: list[int] = []
    encode = Tokenizer.encode_batch

    def record(self: Tokenizer, texts: list[str], begins: list[bool] | None = None) -> list[list[int]]:
        batches.append(sum(map(len, texts)))
        return encode(self, texts, begins)

    monkeypatch.setattr(Tokenizer, "encode_batch", record)
    tokenize([str(tmp_path / "long.txt")], out, whole_documents(workers=workers))
    assert max(batches) < {0: 32_000, 1: 4000}[workers] + 1100  # the last piece goes beyond


def test_work_that_an_earlier_version_began_goes_on_and_is_known_when_complete(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "long.txt").write_text("中文没有空格" * 2000)
    settings = TokenizeSettings(builtin_tokenizer(), chunk_bytes=2000)
    monkeypatch.setattr("sdd.data.inputs.PART_BYTES", 2000)
    with monkeypatch.context() as earlier:
        earlier.setattr("sdd.data.chunks.FORMAT", 1)
        earlier.setattr("sdd.data.tokenize_job.FORMAT", 1)
        earlier.setattr("sdd.data.tokenize_job._SECONDS_BETWEEN_COMMITS", 0)
        tokenize([str(tmp_path / "long.txt")], tmp_path / "whole", settings)

        def stop(status: Status) -> None:
            if status.total.n_bytes > 10_000:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tokenize([str(tmp_path / "long.txt")], out, settings, stop)
    assert json.loads((out / "manifest.json").read_text())["format"] == 1
    for _ in range(2):
        tokenize([str(tmp_path / "long.txt")], out, settings)
        assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("stop_after", [3000, 20_000])
def test_whole_documents_go_on_where_they_were(source: Path, tmp_path: Path, stop_after: int):
    settings = whole_documents(chunk_bytes=2000, shard_tokens=3000)

    def stop(status: Status) -> None:
        if status.text_bytes > stop_after:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_job, "_SECONDS_BETWEEN_COMMITS", 0)
        with pytest.raises(KeyboardInterrupt):
            tokenize([str(source)], tmp_path / "out", settings, stop)
    for folder in (tmp_path / "out", tmp_path / "whole"):
        tokenize([str(source)], folder, settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_a_killed_process_left_beside_is_no_obstacle(source: Path, out: Path):
    out.mkdir()
    (out / ".tmp-manifest.json-1-2").write_text("{")
    assert tokenize([str(source)], out, WHOLE)["documents"] == 60
