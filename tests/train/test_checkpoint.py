import json
import shutil

import pytest
import torch
from helpers_train import TINY

from sdd.errors import UserError
from sdd.models import LanguageModel
from sdd.train import checkpoint as ckpt
from sdd.train.optim import build_optimizer, optimizer_tensors


@pytest.fixture
def trained():
    torch.manual_seed(0)
    model = LanguageModel(TINY.model)
    optimizer = build_optimizer(model, TINY.optim)
    tokens = torch.randint(0, 4096, (2, 17))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    return model, optimizer


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


def test_no_file_is_a_pickle(tmp_path, trained):
    path = save(tmp_path, trained)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_a_failed_save_leaves_the_earlier_ones(tmp_path, trained, monkeypatch):
    path = save(tmp_path, trained, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ckpt, "_write_synced", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, trained, 2)
    assert list(tmp_path.iterdir()) == [path]
    ckpt.load_checkpoint(path, *trained)


def test_listing_ignores_half_written_ones_and_pruning_removes_them(tmp_path, trained):
    paths = [save(tmp_path, trained, step) for step in (1, 2, 3)]
    (tmp_path / ".tmp-step-00000004").mkdir()
    (tmp_path / "notes").mkdir()
    assert ckpt.list_checkpoints(tmp_path) == paths
    ckpt.prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-00000002", "step-00000003"]
    ckpt.prune(tmp_path, 0)
    assert ckpt.list_checkpoints(tmp_path) == paths[1:]


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "state", "no state"])
def test_damage_is_named(tmp_path, trained, harm):
    path = save(tmp_path, trained)
    (tensors,) = path.glob("*.safetensors")
    content = bytearray(tensors.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
        tensors.write_bytes(content)
    elif harm == "truncate":
        tensors.write_bytes(content[:-10])
    elif harm == "delete":
        tensors.unlink()
    elif harm == "state":
        (path / "state.json").write_text("{")
    else:
        (path / "state.json").unlink()
    with pytest.raises(ckpt.DamagedCheckpoint, match="step-00000007"):
        ckpt.load_checkpoint(path, *trained)


def test_another_format_or_model_is_one_clear_line(tmp_path, trained):
    path = save(tmp_path, trained)
    other = LanguageModel(TINY.model.__class__(**{**vars(TINY.model), "d_ff": 64}))
    with pytest.raises(UserError, match=r"gate_proj.weight has shape \[48, 32\], this model's is \[64, 32\]"):
        ckpt.load_checkpoint(path, other)
    more = LanguageModel(TINY.model.__class__(**{**vars(TINY.model), "n_layers": 3}))
    with pytest.raises(UserError, match=r"has no model\.blocks\.2"):
        ckpt.load_checkpoint(path, more)
    fewer = LanguageModel(TINY.model.__class__(**{**vars(TINY.model), "n_layers": 1}))
    with pytest.raises(UserError, match=r"holds model\.blocks\.1"):
        ckpt.load_checkpoint(path, fewer)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        ckpt.load_checkpoint(path, *trained)


def test_saving_the_same_step_again_replaces_it(tmp_path, trained):
    path = save(tmp_path, trained, note=1)
    assert save(tmp_path, trained, note=2) == path
    assert ckpt.read_state(path)["note"] == 2
    shutil.rmtree(path)
