"""Disks that are full or read-only, folders that vanish: one line, nothing lost, and the run can go on."""

import json
import shutil
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from helpers_disk import full_disk_for, no_file_larger_than, read_only, shared_folder
from helpers_train import assert_same_tensors, little, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from sdd.commands.main import main
from sdd.data import Loader
from sdd.train import config_io
from sdd.train.checkpoint import list_checkpoints
from sdd.train.trainer import start

STEPS = 12


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, to be compared with; its settings lie beside it."""
    folder = tmp_path_factory.mktemp("whole")
    config = little(folder, steps=STEPS, keep_checkpoints=2)
    config_io.save(config, folder / "settings.json")
    start(config, folder / "run").run()
    return folder / "run"


def train(whole, run):
    return main(["train", str(whole.parent / "settings.json"), "--out", str(run)])


def assert_equal(whole, run):
    assert rows(run) == rows(whole)
    assert json.loads((run / "result.json").read_text())["status"] == "done"
    one, two = (list_checkpoints(folder / "checkpoints") for folder in (whole, run))
    assert [path.name for path in one] == [path.name for path in two]
    assert_same_tensors(one[-1], two[-1])


def one_line(capsys, start):
    """The last line on stderr, which alone tells of the failure."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    *before, last = err.splitlines()
    assert last.startswith(start), err
    assert not [line for line in before if "failed" in line or "cannot" in line]
    return last


def at_step(monkeypatch, step, do):
    """Do something just before the batch of a step (from 0) is read, once."""
    batch, done = Loader.batch, []

    def hooked(loader, number):
        if number == step and not done:
            done.append(True)
            do()
        return batch(loader, number)

    monkeypatch.setattr(Loader, "batch", hooked)


@pytest.mark.slow
@settings(max_examples=8)
@given(step=st.integers(0, STEPS - 1), room=st.integers(0, 5000))
def test_a_disk_that_fills_up_in_mid_run_costs_the_steps_since_the_last_checkpoint(whole, step, room):
    """At a drawn step files stop growing: metrics after part of a line, a checkpoint after part of its tensors."""
    with shared_folder() as folder, pytest.MonkeyPatch.context() as patch:
        run = folder / "run"
        with ExitStack() as disk:

            def fill():
                written = (run / "metrics.jsonl").stat().st_size if step else 0
                disk.enter_context(no_file_larger_than(written + room))

            at_step(patch, step, fill)
            assert train(whole, run) == 3
        kept = [path.name for path in list_checkpoints(run / "checkpoints")]
        assert kept == [f"step-{done:08d}" for done in range(4, step + 1, 4)][-2:]
        assert main(["resume", str(run)]) == 0
        assert_equal(whole, run)


@pytest.mark.parametrize("harm", ["full", "no folder"])
def test_a_disk_that_refuses_what_is_written_beside_the_training_ends_the_run_in_one_line(
    whole, tmp_path, capsys, monkeypatch, harm
):
    run = tmp_path / "run"
    folder = run / "checkpoints"
    with ExitStack() as disk:

        def spoil():
            while not (folder / "step-00000004").exists():
                time.sleep(0.01)
            if harm == "full":
                disk.enter_context(no_file_larger_than((run / "metrics.jsonl").stat().st_size + 5000))
            else:
                folder.rename(tmp_path / "elsewhere")
                folder.touch()

        at_step(monkeypatch, 6, spoil)
        words = ["train", str(whole.parent / "settings.json"), "--out", str(run)]
        assert main([*words, "--checkpoint_async", "true"]) == 3
    assert "cannot write" in one_line(capsys, "sdd: the run failed: step ")
    if harm == "no folder":
        folder.unlink()
        (tmp_path / "elsewhere").rename(folder)
    assert [path.name for path in folder.iterdir()] == ["step-00000004"]
    assert main(["resume", str(run)]) == 0
    assert_equal(whole, run)


@pytest.mark.parametrize("name", ["metrics.jsonl", "environment.json", "result.json"])
def test_a_full_disk_on_resume_is_one_line(whole, tmp_path, capsys, name):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "result.json").unlink()
    shutil.rmtree(list_checkpoints(run / "checkpoints")[-1])
    with full_disk_for(run / name):
        assert main(["resume", str(run)]) == 3
    assert f"{run}/{name}: No space left on device" in one_line(capsys, "sdd: ")
    assert main(["resume", str(run)]) == 0
    assert_equal(whole, run)


def test_a_full_disk_for_the_start_is_one_line_and_the_start_can_be_repeated(whole, tmp_path, capsys):
    run = tmp_path / "run"
    with no_file_larger_than(100):
        assert train(whole, run) == 3
    assert one_line(capsys, "sdd: ").endswith("File too large")
    assert train(whole, run) == 0
    assert_equal(whole, run)


def test_the_failure_says_where_the_run_stands_and_how_to_go_on(whole, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"

    def fill():
        (run / "metrics.jsonl").unlink()
        (run / "metrics.jsonl").symlink_to("/dev/full")

    at_step(monkeypatch, 9, fill)
    assert train(whole, run) == 3
    assert one_line(capsys, "sdd: the run failed: ") == (
        f"sdd: the run failed: step 10: cannot write {run}/metrics.jsonl: No space left on device; "
        f"the last checkpoint is {run}/checkpoints/step-00000008; once that is mended: sdd resume {run}"
    )


@pytest.mark.parametrize("what", ["all of it", "the checkpoints"])
def test_a_folder_that_vanishes_in_mid_run_is_one_line(whole, tmp_path, capsys, monkeypatch, what):
    run = tmp_path / "run"
    gone = run if what == "all of it" else run / "checkpoints"
    at_step(monkeypatch, 6, lambda: gone.rename(tmp_path / "elsewhere"))
    assert train(whole, run) == (3 if what == "all of it" else 0)
    if what == "all of it":
        one_line(capsys, "sdd: the run failed: step 7: cannot write ")
        (tmp_path / "elsewhere").rename(run)
        monkeypatch.undo()
        assert main(["resume", str(run)]) == 0
        assert_equal(whole, run)


def test_a_run_directory_that_cannot_be_made_is_one_line(whole, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert train(whole, tmp_path / "file") == 2
    assert "is a file: name a new directory" in one_line(capsys, "sdd: ")
    assert train(whole, tmp_path / "file" / "run") == 2
    assert "cannot make the run directory" in one_line(capsys, "sdd: ")


def test_a_read_only_directory_is_one_line_and_stays_as_it_is(whole, capsys):
    with shared_folder() as folder:
        run = folder / "run"
        shutil.copytree(whole, run)
        (run / "result.json").unlink()
        shutil.copy(whole.parent / "tokens.npy", folder)
        values = json.loads((run / "config.json").read_text())
        values["data"]["path"] = str(folder / "tokens.npy")
        (run / "config.json").write_text(json.dumps(values))
        before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
        with read_only(folder):
            assert main(["resume", str(run)]) == 2
            assert one_line(capsys, "sdd: ") == f"sdd: cannot write into {run}: Permission denied"
            assert main(["train", str(run / "config.json"), "--out", str(folder / "new")]) == 2
            assert "cannot make the run directory" in one_line(capsys, "sdd: ")
        assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
        assert main(["resume", str(run)]) == 0


@pytest.mark.ties
def test_a_run_goes_on_without_tensorboard_and_says_so_once(whole, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "result.json").unlink()
    for path in list_checkpoints(run / "checkpoints"):
        shutil.rmtree(path)
    shutil.rmtree(run / "tensorboard")
    (run / "tensorboard").touch()
    assert main(["resume", str(run)]) == 0
    assert capsys.readouterr().err.count("TensorBoard gets nothing from here on") == 1
    assert_equal(whole, run)


def test_a_log_on_a_full_disk_does_not_end_a_run(whole, tmp_path, monkeypatch):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert train(whole, tmp_path / "run") == 0
        assert main(["resume", str(tmp_path / "run")]) == 2, "nor does what cannot be told end in a traceback"
        monkeypatch.undo()
        with suppress(OSError):
            full.close()
    assert_equal(whole, tmp_path / "run")


def test_an_answer_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["presets"]) == 3
        monkeypatch.undo()
    assert one_line(capsys, "sdd: ") == "sdd: failed: No space left on device"
