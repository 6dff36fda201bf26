"""Checkpoints that were damaged, forged or do not fit, seen from `sdd resume`."""

import hashlib
import json
import pickle
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_train import TINY, little, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sdd.commands.main import main
from sdd.errors import UserError
from sdd.train import config_io
from sdd.train.checkpoint import FORMAT, list_checkpoints, sealed
from sdd.train.trainer import reopen, start


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoints at 4, 8 and 12, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    start(little(folder), folder / "run").run()
    return folder / "run"


@pytest.fixture(scope="module")
def scratch(finished, tmp_path_factory):
    """A function that gives a fresh copy of the run, in which result.json says nothing yet."""
    folder = tmp_path_factory.mktemp("scratch") / "run"

    def copy():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(finished, folder)
        (folder / "result.json").unlink()
        return folder

    return copy


def reopened(run):
    """The step at which a run goes on, found as `sdd resume` does."""
    trainer = reopen(run)
    trainer.run_dir.unlock()
    return trainer.step


HARMS = ["flip", "cut out", "cut off", "insert", "replace", "json", "header", "delete", "folder"]
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20))
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def damage(draw, file):
    """Flip, cut out, cut off or insert bytes at drawn places, or put something else in the file's place."""
    content = bytearray(file.read_bytes())
    at = draw(st.integers(0, len(content) - 1))
    match draw(st.sampled_from(HARMS)):
        case "flip":
            content[at] ^= 1 << draw(st.integers(0, 7))
        case "cut out":
            del content[at : at + draw(st.integers(1, 100))]
        case "cut off":
            del content[at:]
        case "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=20))
        case "replace":
            content = draw(st.binary(max_size=200))
        case "json":
            content = json.dumps(draw(JSON)).encode()
        case "header":  # of a safetensors file: its length, here an absurd one, in 8 bytes
            content[:8] = struct.pack("<Q", draw(st.integers(0, 2**64 - 1)))
        case other:
            file.unlink()
            if other == "folder":
                file.mkdir()
            return
    file.write_bytes(content)


@pytest.mark.slow
@settings(max_examples=25)
@given(st.data())
def test_whatever_happens_to_the_newest_the_one_before_is_found(scratch, data):
    run = scratch()
    newest = list_checkpoints(run / "checkpoints")[-1]
    before = {path: path.read_bytes() for path in newest.iterdir()}
    for file in data.draw(st.lists(st.sampled_from(sorted(before)), min_size=1, max_size=2, unique=True)):
        damage(data.draw, file)
    assert reopened(run) == (12 if is_same(newest, before) else 8)


def is_same(path, before):
    """Whether a checkpoint is what it was, but for white space in state.json."""
    try:
        changed = {file: content for file, content in before.items() if file.read_bytes() != content}
        return all(
            file.name == "state.json" and json.loads(file.read_bytes()) == json.loads(content)
            for file, content in changed.items()
        )
    except (OSError, ValueError):
        return False


@pytest.mark.slow
@settings(max_examples=25)
@given(
    field=st.sampled_from(
        ["step", "seconds", "tokens", "data", "data_files", "config", "environment", "files", "format"]
    ),
    value=JSON,
)
def test_a_forged_state_that_seals_itself_is_one_line_at_most(scratch, field, value):
    run = scratch()
    file = list_checkpoints(run / "checkpoints")[-1] / "state.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps(sealed({**state, field: value})))
    ends_in_one_line(run)


@pytest.mark.slow
@settings(max_examples=25)
@given(st.data())
def test_forged_tensors_with_the_right_hashes_are_one_line_at_most(scratch, data):
    run = scratch()
    newest = list_checkpoints(run / "checkpoints")[-1]
    (tensors,) = newest.glob("*.safetensors")
    content = tensors.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(header)))
    if data.draw(st.booleans()):
        damage(data.draw, tensors)
    else:
        entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **header[name]}
        field = data.draw(st.sampled_from(sorted(entry)))
        absurd = (
            st.lists(st.integers(-1, 2**64), max_size=3) | st.sampled_from(["F64", "BF16", "U8", "BOOL", "X9"]) | JSON
        )
        header[name] = {**entry, field: data.draw(absurd)}
        text = json.dumps(header).encode()
        tensors.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    if tensors.is_file():
        reseal(newest)
    ends_in_one_line(run)


@pytest.mark.parametrize("field", ["step", "seconds", "tokens", "data", "config", "environment", "sha256"])
def test_a_value_of_state_json_that_changed_is_damage(scratch, capsys, field):
    run = scratch()
    file = list_checkpoints(run / "checkpoints")[-1] / "state.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps({**state, field: [state[field]]}))
    assert reopened(run) == 8
    assert "step-00000012/state.json is damaged (its SHA-256 differs" in capsys.readouterr().err


def test_tensors_of_another_dtype_are_not_converted(scratch, capsys):
    run = scratch()
    newest = list_checkpoints(run / "checkpoints")[-1]
    (file,) = newest.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.embed.weight"] = tensors["model.embed.weight"].bfloat16()
    save_file(tensors, file)
    reseal(newest)
    assert reopened(run) == 8
    assert "model.embed.weight is torch.bfloat16, expected torch.float32" in capsys.readouterr().err


def test_a_file_of_tensors_that_is_no_part_of_a_checkpoint_is_not_read(scratch, capsys):
    run = scratch()
    newest = list_checkpoints(run / "checkpoints")[-1]
    save_file({"model.embed.weight": torch.zeros(64, 32)}, newest / "zz.safetensors")
    assert reopened(run) == 8
    assert "zz.safetensors is no part" in capsys.readouterr().err


def reseal(path):
    """Let state.json say of every file what is true of it now, as a forger would."""
    state = json.loads((path / "state.json").read_text())
    for file in path.iterdir():
        if file.name != "state.json":
            content = file.read_bytes()
            state["files"][file.name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "state.json").write_text(json.dumps(sealed(state)))


def ends_in_one_line(run):
    """`sdd resume` goes on from one of the checkpoints, or says in one line why it does not."""
    try:
        assert reopened(run) in (8, 12)
    except UserError as error:
        assert len(str(error)) < 1000


@pytest.mark.parametrize(
    "name", ["state.json", "model.safetensors", ".metadata", "rng.pkl", "model.safetensors.index.json"]
)
@pytest.mark.parametrize("forged", [False, True])
def test_no_code_in_a_checkpoint_is_executed(scratch, tmp_path, name, forged):
    run, trace = scratch(), tmp_path / "executed"
    pickle.loads(pickle.dumps(Touch(trace)))
    assert trace.exists(), "it would"
    trace.unlink()
    newest = list_checkpoints(run / "checkpoints")[-1]
    if name.endswith(".pkl"):
        torch.save(Touch(trace), newest / name)
    else:
        (newest / name).write_bytes(pickle.dumps(Touch(trace)))
    if forged and name != "state.json":
        reseal(newest)
    ends_in_one_line(run)
    assert not trace.exists()


def test_when_all_are_damaged_nothing_is_begun_again(scratch, capsys):
    run = scratch()
    before = rows(run)
    for path in list_checkpoints(run / "checkpoints"):
        (path / "state.json").write_text("{}")
    assert main(["resume", str(run)]) == 2
    err = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in err] == ["passed over"] * 3 + ["sdd"]
    assert "has no whole checkpoint, 3 damaged" in err[-1]
    assert rows(run) == before


def test_half_written_ones_are_named_passed_over_and_removed(scratch, capsys):
    run = scratch()
    newest = list_checkpoints(run / "checkpoints")[-1]
    half = newest.with_name(f".tmp-{newest.name}")
    newest.rename(half)
    (half / "state.json").unlink()
    assert reopened(run) == 8
    assert f"passed over: {half} is half-written" in capsys.readouterr().err
    assert not half.exists()


def test_a_damaged_one_does_not_count_among_those_to_keep(scratch):
    """It used to: the checkpoint just written was deleted, and the damaged one kept."""
    run = scratch()
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**settings, "keep_checkpoints": 1, "checkpoint_every": 5}))
    newest = list_checkpoints(run / "checkpoints")[-1]
    (newest / "state.json").write_text("{}")
    trainer = reopen(run)
    trainer.step = 9
    trainer.save()
    trainer.run_dir.unlock()
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-00000009"]
    assert reopened(run) == 9


@pytest.mark.parametrize(
    ("dotted", "value", "expected"),
    [
        (
            "model.d_model",
            64,
            "does not fit step-00000012: model.d_model is 64, the checkpoint was trained with 32",
        ),
        ("model.placement", "prenorm", "model.placement is prenorm, the checkpoint was trained with sdd"),
        ("model.init_scale", 2.0, "model.init_scale is 2.0, the checkpoint was trained with 1.0"),
        ("model.context", 16, "model.context is 16, the checkpoint was trained with 32"),
        ("data.batch_size", 8, "data.batch_size is 8, the checkpoint was trained with 4"),
        ("seed", 1, "seed is 1, the checkpoint was trained with 0"),
        ("steps", 11, "step-00000012 lies beyond the end, steps=11"),
    ],
)
def test_a_config_that_does_not_fit_is_one_line_and_changes_nothing(scratch, capsys, dotted, value, expected):
    run = scratch()
    values = json.loads((run / "config.json").read_text())
    target = values
    *path, last = dotted.split(".")
    for key in path:
        target = target[key]
    target[last] = value
    (run / "config.json").write_text(json.dumps(values))
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert main(["resume", str(run)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("sdd: ")
    assert err.count("\n") == 1
    assert expected in err
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}


def test_a_checkpoint_of_another_version_is_one_line_and_stays(scratch, capsys):
    run = scratch()
    file = list_checkpoints(run / "checkpoints")[-1] / "state.json"
    file.write_text(json.dumps(sealed({**json.loads(file.read_text()), "format": FORMAT + 1})))
    assert main(["resume", str(run)]) == 2
    assert f"has checkpoint format {FORMAT + 1}, this version of sdd reads {FORMAT}" in capsys.readouterr().err
    assert len(list_checkpoints(run / "checkpoints")) == 3


def test_settings_and_surroundings_that_changed_are_told(scratch, capsys):
    run = scratch()
    values = json.loads((run / "config.json").read_text())
    values["optim"]["lr"] = 1e-3
    (run / "config.json").write_text(json.dumps(values))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        reopened(run)
        err = capsys.readouterr().err
        assert "settings changed since step 12: optim.lr 0.004 -> 0.001\n" in err
        assert f"not bit-identical to an uninterrupted run: threads {before} -> {before + 1}\n" in err
    finally:
        torch.set_num_threads(before)


def test_an_unchanged_run_is_told_nothing(scratch, capsys):
    assert reopened(scratch()) == 12
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("earlier", ["interrupted", "done"])
def test_what_was_killed_after_its_last_checkpoint_is_brought_to_its_end(tmp_path, earlier):
    """result.json then tells of an earlier end: an interruption, or that of a run with fewer steps."""
    run = tmp_path / "run"
    result = start(replace(TINY, steps=2), run).run()
    samples = (run / "samples.jsonl").read_text()
    (run / "result.json").write_text(json.dumps({"status": earlier, "step": 1}))
    assert reopen(run).run()["eval_loss"] == result["eval_loss"]
    assert (run / "samples.jsonl").read_text() == samples, "the text is not sampled twice"


@settings(max_examples=15)
@given(st.binary(max_size=300) | JSON.map(lambda value: (json.dumps(value) + "\n").encode()))
def test_whatever_stands_in_metrics_the_run_goes_on(scratch, junk):
    run = scratch()
    whole = rows(run)
    with (run / "metrics.jsonl").open("ab") as stream:
        stream.write(b"\n" + junk)
    assert reopened(run) == 12
    assert [row for row in rows(run) if row in whole] == whole


@settings(max_examples=100)
@given(st.data())
def test_a_drawn_config_json_is_one_line_at_most(scratch, data):
    """Any part of a right config.json replaced by anything; what is accepted has all fields."""
    values = config_io.to_dict(TINY)
    names = [name for name, _, _ in config_io.fields()]
    for dotted in data.draw(st.lists(st.sampled_from([*names, "model", "data", "optim"]), min_size=1, max_size=3)):
        target = values
        *path, last = dotted.split(".")
        for key in path:
            target = target[key] if isinstance(target, dict) and key in target else {}
        if isinstance(target, dict):
            target[last] = data.draw(JSON)
    try:
        config = config_io.from_dict(values)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert config_io.from_dict(config_io.to_dict(config)) == config


def test_a_setting_that_was_left_open_and_is_decided_now_is_no_change(scratch, capsys):
    run = scratch()
    state = list_checkpoints(run / "checkpoints")[-1] / "state.json"
    content = json.loads(state.read_text())
    content["config"]["compile"] = "auto"
    state.write_text(json.dumps(sealed(content)))
    assert reopened(run) == 12
    assert capsys.readouterr().err == ""
