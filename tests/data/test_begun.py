"""A folder of tokens goes on after a bad input was mended or taken away."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_data import contents, some_documents, texts_of, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from sdd.data import TokenizeSettings, builtin_tokenizer, tokenize, tokenize_job
from sdd.errors import UserError

SMALL = TokenizeSettings(builtin_tokenizer(), chunk_bytes=1500, validation_fraction=0)
DOCUMENTS = some_documents(60)


@pytest.fixture(scope="module", autouse=True)
def _commit_at_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_job, "_SECONDS_BETWEEN_COMMITS", 0)
        yield


def three(folder: Path) -> list[Path]:
    return [write_jsonl(folder / f"{n}.jsonl", DOCUMENTS[20 * n : 20 * n + 20]) for n in range(3)]


def spoil(path: Path, line: int) -> list[str]:
    """Put bad JSON in place of a line; the lines as they were."""
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:line], "{bad", *lines[line + 1 :]]))
    return lines


def texts(out: Path) -> list[str]:
    return texts_of(sorted(out.glob("train-*.npy")))


@settings(max_examples=12)
@given(st.integers(0, 2), st.integers(0, 19), st.sampled_from(["mend", "cut the line", "take away", "skip"]))
def test_it_goes_on_when_a_bad_line_is_dealt_with(tmp_path_factory, bad: int, line: int, how: str):
    folder = tmp_path_factory.mktemp("begun")
    files, out = three(folder), folder / "out"
    names, how_to = [str(file) for file in files], SMALL
    lines = spoil(files[bad], line)
    with pytest.raises(UserError, match=r"line \d+: .*mend it or take the file away, or add --skip-bad: the same"):
        tokenize(names, out, SMALL)
    done = json.loads((out / "progress.json").read_text())["position"]
    if how == "mend":
        files[bad].write_text("\n".join(lines))
    elif how == "cut the line":
        files[bad].write_text("\n".join(lines[:line] + lines[line + 1 :]))
    elif how == "skip":
        how_to = replace(SMALL, skip_bad=True)
    else:
        files[bad].unlink()
        del names[bad]
    tokenize(names, out, how_to)
    kept = [*DOCUMENTS]
    if how in ("cut the line", "skip"):
        del kept[20 * bad + line]
    if how == "take away":
        read = done["record"] if done["input"] == bad else 0
        kept[20 * bad + read : 20 * bad + 20] = []
    assert texts(out) == kept
    before = contents(out)
    tokenize(names, out, how_to)
    assert contents(out) == before


def test_what_is_done_must_be_as_it_was(tmp_path: Path):
    files, out = three(tmp_path), tmp_path / "out"
    lines = spoil(files[1], 15)
    with pytest.raises(UserError, match="mend it"):
        tokenize([str(tmp_path)], out, SMALL)
    assert json.loads((out / "progress.json").read_text())["position"]["input"] == 1
    files[1].write_text("\n".join([json.dumps({"text": "another"}), *lines[1:]]))
    with pytest.raises(UserError, match=r"1\.jsonl differs from what .* in the first \d+ records, which are done"):
        tokenize([str(tmp_path)], out, SMALL)
    files[1].write_text("\n".join(lines))
    first = files[0].read_text()
    files[0].write_text(first + '{"text": "more"}\n')
    with pytest.raises(UserError, match=r"another .*0\.jsonl \(it had size"):
        tokenize([str(tmp_path)], out, SMALL)


def test_a_folder_that_an_earlier_version_made_of_more_files_still_answers(tmp_path: Path):
    """Files that were read then, and are left out today, do not make another command of the same one."""
    folder, out = tmp_path / "data", tmp_path / "out"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", DOCUMENTS)
    (folder / "README.md").write_text("About the data.")
    result = tokenize([str(folder / "README.md"), str(folder / "a.jsonl")], out, SMALL)  # as they were found then
    again = tokenize([str(folder)], out, SMALL)
    assert again["tokens"] == result["tokens"]
    (folder / "README.md").write_text("Another text.")
    with pytest.raises(UserError, match=r"other inputs \(.*README\.md is missing\)"):
        tokenize([str(folder)], out, SMALL)


def test_a_folder_in_which_nothing_is_done_takes_other_settings(tmp_path: Path):
    nested = tmp_path / "nested.jsonl"
    nested.write_text(json.dumps({"meta": {"content": "one two three " * 400}}) + "\n")
    out = tmp_path / "tokens"
    with pytest.raises(UserError, match=r"has no field 'text': .*e\.g\. meta\.content"):
        tokenize([str(nested)], out, TokenizeSettings(builtin_tokenizer()))
    named = TokenizeSettings(builtin_tokenizer(), text_field="meta.content")
    assert tokenize([str(nested)], out, named)["documents"] == 1
