import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers_disk import no_file_larger_than, shared_folder
from helpers_train import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from sdd.errors import UserError
from sdd.models import LanguageModel
from sdd.train import checkpoint as ckpt
from sdd.train.optim import build_optimizer, optimizer_tensors


def new():
    torch.manual_seed(0)
    model = LanguageModel(TINY.model)
    optimizer = build_optimizer(model, TINY.optim)
    tokens = torch.randint(0, 4096, (2, 17))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def trained():
    return new()


def save(folder, trained, step=7, **state):
    return ckpt.save_checkpoint(folder, *trained, {"step": step, **state})


def test_everything_comes_back(tmp_path, trained):
    path = save(tmp_path, trained, note="x")
    drawn = torch.rand(3)
    torch.manual_seed(1)
    model = LanguageModel(TINY.model)
    optimizer = build_optimizer(model, TINY.optim)
    state = ckpt.load_checkpoint(path, model, optimizer)
    assert (state["step"], state["note"]) == (7, "x")
    for one, other in zip(model.parameters(), trained[0].parameters(), strict=True):
        assert torch.equal(one, other)
    ours, theirs = optimizer_tensors(optimizer), optimizer_tensors(trained[1])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(tensor.abs().max() > 0 for name, tensor in ours.items() if "exp_avg_sq" in name)
    assert torch.equal(torch.rand(3), drawn), "the generator goes on where it was when the checkpoint was written"


def test_what_a_system_leaves_in_checkpoints_does_no_harm(tmp_path, trained, monkeypatch):
    complete = ckpt._synced_digests

    def littered(folder, world):
        (folder / ".DS_Store").write_bytes(b"x")
        return complete(folder, world)

    monkeypatch.setattr(ckpt, "_synced_digests", littered)
    path = save(tmp_path, trained)
    (path / ".DS_Store").unlink()
    tensors = next(path.glob("*.safetensors"))
    for name in (f"._{tensors.name}", ".DS_Store", "Thumbs.db"):
        for folder in (path, tmp_path):
            (folder / name).write_bytes(b"\0\5\x16\7")
    assert ckpt.list_checkpoints(tmp_path) == [path]
    assert not ckpt.half_written(tmp_path)
    assert ckpt.load_checkpoint(path, *new())["step"] == 7


def test_no_file_is_a_pickle(tmp_path, trained):
    path = save(tmp_path, trained)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


@settings(max_examples=8)
@given(st.integers(0, 3_000_000))
def test_a_save_for_which_the_disk_has_no_room_leaves_the_earlier_ones(n_bytes):
    """All of the checkpoint is 3.3 MB in one file of tensors, an index and state.json."""
    with shared_folder() as folder:
        model, optimizer = new()
        path = save(folder, (model, optimizer), 1)
        with no_file_larger_than(n_bytes), pytest.raises(OSError, match="File too large"):
            save(folder, (model, optimizer), 2)
        assert list(folder.iterdir()) == [path]
        ckpt.load_checkpoint(path, model, optimizer)


def test_pruning_keeps_the_newest_up_to_the_one_just_written(tmp_path, trained):
    paths = [save(tmp_path, trained, step) for step in (1, 2, 3, 9)]
    (tmp_path / "notes").mkdir()
    (tmp_path / ".old-step-00000000").mkdir()
    ckpt.prune(tmp_path, 2, paths[2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-00000002", "step-00000003"]
    ckpt.prune(tmp_path, 0, paths[2])
    assert ckpt.list_checkpoints(tmp_path) == paths[1:3]


def test_half_written_ones_are_no_checkpoints_but_told_apart(tmp_path, trained):
    path = save(tmp_path, trained, 3)
    shutil.copytree(path, tmp_path / ".tmp-step-00000004")
    assert ckpt.list_checkpoints(tmp_path) == [path]
    (left,) = ckpt.half_written(tmp_path)
    assert left.name == ".tmp-step-00000004"
    ckpt.remove(left)
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoints_are_listed_by_step_not_by_spelling(tmp_path):
    steps = [5, 99_999_999, 100_000_000, 10**12]
    for step in reversed(steps):
        (tmp_path / f"step-{step:08d}").mkdir()
    assert [ckpt.step_of(path) for path in ckpt.list_checkpoints(tmp_path)] == steps


def flip_a_bit(path):
    (tensors,) = path.glob("*.safetensors")
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 1
    tensors.write_bytes(content)


def truncate_the_tensors(path):
    (tensors,) = path.glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-10])


def delete_the_tensors(path):
    next(path.glob("*.safetensors")).unlink()


def truncate_the_state(path):
    (path / "state.json").write_text("{")


def delete_the_state(path):
    (path / "state.json").unlink()


@pytest.mark.parametrize(
    "harm", [flip_a_bit, truncate_the_tensors, delete_the_tensors, truncate_the_state, delete_the_state]
)
def test_damage_is_named(tmp_path, trained, harm):
    path = save(tmp_path, trained)
    harm(path)
    with pytest.raises(ckpt.DamagedCheckpoint, match="step-00000007"):
        ckpt.load_checkpoint(path, *trained)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"d_ff": 64}, r"gate_proj.weight has shape \[48, 32\], this model's is \[64, 32\]"),
        ({"n_layers": 3}, r"has no model\.blocks\.2"),
        ({"n_layers": 1}, r"holds model\.blocks\.1"),
    ],
)
def test_another_model_is_one_clear_line(tmp_path, trained, changes, expected):
    path = save(tmp_path, trained)
    with pytest.raises(UserError, match=expected):
        ckpt.load_checkpoint(path, LanguageModel(replace(TINY.model, **changes)))


@pytest.mark.parametrize("sealed", [True, False])
def test_a_newer_checkpoint_is_one_clear_line_and_not_called_damaged(tmp_path, trained, sealed):
    path = save(tmp_path, trained)
    state = json.loads((path / "state.json").read_text())
    newer = ckpt.sealed({**state, "format": 99}) if sealed else {"format": 99, "step": 7}
    (path / "state.json").write_text(json.dumps(newer))
    with pytest.raises(UserError, match="format 99, this version of sdd reads 2") as raised:
        ckpt.load_checkpoint(path, *trained)
    assert not isinstance(raised.value, ckpt.DamagedCheckpoint)


def test_saving_the_same_step_again_replaces_it(tmp_path, trained):
    path = save(tmp_path, trained, note=1)
    assert save(tmp_path, trained, note=2) == path
    assert ckpt.read_state(path)["note"] == 2
    shutil.rmtree(path)
