"""What of a folder is data."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers_data import contents, some_documents, texts_of, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from sdd.data import TokenInfo, TokenizeSettings, builtin_tokenizer, resolve_data, tokenize, write_tokens
from sdd.data.folders import part_of, search
from sdd.errors import UserError
from sdd.files import is_stray

WHOLE = TokenizeSettings(builtin_tokenizer(), validation_fraction=0)


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": f"{name} " * 200}) + "\n")
    return folder


def found(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in search(folder).texts]


def test_links_are_followed_and_each_folder_is_read_once(tmp_path: Path):
    folder, beside = fill(tmp_path / "data", "b/x.txt", "c.txt"), fill(tmp_path / "beside", "y.txt")
    (beside / "back").symlink_to(folder)
    for name, target in {"a": folder / "b", "self": folder, "up": tmp_path, "link": beside, "gone": "nowhere"}.items():
        (folder / name).symlink_to(target)
    assert found(folder) == ["b/x.txt", "c.txt", "link/y.txt"]
    assert [line for line in search(folder).lines() if "gone" in line]


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=2, max_size=6), st.data())
def test_links_in_any_place_end_and_lose_no_file(tmp_path_factory: pytest.TempPathFactory, places: list[str], data):
    root = tmp_path_factory.mktemp("links")
    folders = [root]
    for number, name in enumerate(places):
        folders.append(folders[data.draw(st.integers(0, number))] / f"{name}{number}")
        fill(folders[-1], "x.txt")
    for number in range(3):
        link = folders[data.draw(st.integers(0, len(folders) - 1))] / f"{number}link"
        link.symlink_to(folders[data.draw(st.integers(0, len(folders) - 1))])
    assert [root / name for name in found(root)] == sorted(folder / "x.txt" for folder in folders[1:])


RUN = ("config.json", "metrics.jsonl", "samples.jsonl", "checkpoints/step-00000001/state.json")


@pytest.mark.parametrize(
    ("name", "files", "what"),
    [
        ("run", RUN, "a run"),
        ("step-00000001", ("state.json", "model.safetensors", "notes.txt"), "a checkpoint"),
        ("study", ("study.json", "results/a.jsonl"), "a study"),
    ],
)
def test_what_we_wrote_is_no_data(tmp_path: Path, name: str, files: tuple[str, ...], what: str):
    folder = fill(tmp_path / "data", "x.txt", *(f"{name}/{file}" for file in files))
    assert found(folder) == ["x.txt"]
    assert search(folder).lines() == [f"{folder}: left out, written by sdd: {name}"]
    for read in (lambda path: resolve_data(path, context=8), lambda path: tokenize([path], tmp_path / "out", WHOLE)):
        with pytest.raises(UserError, match=f"{name} is {what} that sdd wrote, no data"):
            read(str(folder / name))


def test_a_named_file_of_a_run_is_read(tmp_path: Path):
    run = fill(tmp_path / "run", *RUN)
    assert resolve_data(run / "samples.jsonl", context=8).n_tokens > 100


def test_tokens_inside_a_folder_of_text_are_left_alone_and_found_where_there_is_no_text(tmp_path: Path):
    folder = fill(tmp_path / "data", "x.txt")
    tokenize([str(folder / "x.txt")], folder / "tokens", TokenizeSettings(builtin_tokenizer(), validation_fraction=0.1))
    said: list[str] = []
    assert resolve_data(folder, context=8, notify=said.append).name == "data"
    assert said[0] == f"{folder}: left out, written by sdd: tokens"
    (folder / "x.txt").unlink()
    assert resolve_data(folder, context=8).train[0].path == folder / "tokens" / "train-00000.npy"


def test_text_beside_token_files_is_named(tmp_path: Path):
    folder = fill(tmp_path / "data", "x.txt")
    write_tokens(folder / "a.npy", [np.arange(90)], TokenInfo(dtype="uint16", vocab_size=90, eos=0))
    said: list[str] = []
    assert resolve_data(folder, context=8, notify=said.append).vocab_size == 90
    assert said == [f"{folder}: left out, text beside token files: x.txt"]


STRAY = ("._train-00000.npy", ".DS_Store", "Thumbs.db", "notes~", "#x#", "x.swp", ".git/a.txt", "__MACOSX/b.txt")


def test_stray_files_in_token_folders_do_no_harm(tmp_path: Path):
    source = write_jsonl(tmp_path / "x.jsonl", some_documents(60))
    settings = TokenizeSettings(builtin_tokenizer(), validation_fraction=0.1)
    fill(tmp_path / "out", *STRAY)
    tokenize([str(source)], tmp_path / "out", settings)
    tokenize([str(source)], tmp_path / "clean", settings)
    mine = {name: data for name, data in contents(tmp_path / "out").items() if not is_stray(name)}
    assert mine == contents(tmp_path / "clean")
    assert (
        resolve_data(tmp_path / "out", context=8).fingerprint()
        == resolve_data(tmp_path / "clean", context=8).fingerprint()
    )


def test_a_readme_among_files_of_its_kind_is_one_of_them(tmp_path: Path):
    assert found(fill(tmp_path / "docs", "README.md", "a.md", "b.md")) == ["README.md", "a.md", "b.md"]
    assert found(fill(tmp_path / "data", "README.md", "LICENSE.txt", "a.parquet")) == ["a.parquet"]
    assert found(fill(tmp_path / "alone", "README.md")) == ["README.md"]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *((name, "train") for name in ("train.jsonl", "TRAIN.txt", "train-00000-of-00002.parquet", "train/a.txt")),
        *((name, "validation") for name in ("valid.txt", "val.jsonl.gz", "dev.txt", "webtext.valid.jsonl")),
        *(
            (name, "validation")
            for name in ("c4-validation.00000-of-00008.jsonl.gz", "validation/train.txt", "val_a.md")
        ),
        *((name, "test") for name in ("test.txt", "test/a.txt", "wiki.test.txt", "test-00000-of-00001-9a8b.parquet")),
        *(
            (name, "")
            for name in (
                "trainings.txt",
                "to-test-a.md",
                "value.txt",
                "developers.md",
                "latest.txt",
                "a.txt",
                "pretrain",
            )
        ),
    ],
)
def test_the_part_that_a_name_says(name: str, part: str):
    assert part_of(Path(name)) == part


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("form", ["{}.jsonl", "{}/a.jsonl", "{}-00000-of-00001.jsonl"])
def test_a_validation_part_is_held_out_and_nothing_else(tmp_path: Path, form: str, whole: bool):
    folder = fill(tmp_path / "data", *(form.format(part) for part in ("train", "validation", "test")))
    said: list[str] = []
    if whole:
        data = resolve_data(folder, context=8, notify=said.append)
        train, validation = [file.path for file in data.train], data.validation.path
    else:
        tokenize([str(folder)], out := tmp_path / "out", WHOLE, notify=said.append)
        train, validation = [out / "train-00000.npy"], out / "validation.npy"
    assert texts_of(train) == [f"{form.format('train')} " * 200]
    assert texts_of([validation]) == [f"{form.format('validation')} " * 200]
    assert said[:2] == [
        f"{folder}: held out: {form.format('validation')}",
        f"{folder}: left out, for tests: {form.format('test')}",
    ]


def test_a_long_file_that_is_held_out_stays_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sdd.data.inputs.PART_BYTES", 500)
    fill(tmp_path / "data", "train.txt")
    (tmp_path / "data" / "validation.txt").write_text(text := "\n".join(some_documents(20)))
    tokenize([str(tmp_path / "data")], tmp_path / "out", TokenizeSettings(builtin_tokenizer(), chunk_bytes=1000))
    assert texts_of([tmp_path / "out" / "validation.npy"]) == [text]


def test_names_of_parts_alone_say_nothing(tmp_path: Path):
    assert search(fill(tmp_path / "a", "test.txt", "dev.md", "val.txt")).held_out == []
    assert found(tmp_path / "a") == ["dev.md", "test.txt", "val.txt"]
    assert search(fill(tmp_path / "b", "validation-0.txt", "validation-1.txt")).held_out == []
    beside = search(fill(tmp_path / "c", "books.txt", "validation.txt"))
    assert [path.name for path in beside.held_out] == ["validation.txt"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, listed = fill(tmp_path / "data", "a.txt", "lost/b.txt"), Path.iterdir

    def refuse(path: Path):
        if path.name == "lost":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert found(folder) == ["a.txt"]
    assert search(folder).lines() == [f"{folder}: left out, cannot be read: lost"]
