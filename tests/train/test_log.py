import importlib.util
import math

import pytest
from helpers_disk import no_file_larger_than

from sdd.train.trackers import TensorBoard

ROW = {"step": 3, "loss": 1.5, "event": "x", "tokens": 7, "grad_norm": math.inf}


def scalars(folder):
    """The scalars as TensorBoard itself reads them: (step, value) by name."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {name: [(one.step, one.value) for one in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_without_the_package_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with TensorBoard(tmp_path / "tensorboard") as tensorboard:
        tensorboard.log(ROW)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ties
def test_every_number_of_a_row_is_a_scalar_at_its_step(tmp_path):
    pytest.importorskip("tensorboard")
    with TensorBoard(tmp_path / "tensorboard") as tensorboard:
        tensorboard.log(ROW)
    assert scalars(tmp_path / "tensorboard") == {"loss": [(3, 1.5)], "tokens": [(3, 7.0)], "grad_norm": [(3, math.inf)]}


@pytest.mark.ties
def test_a_resumed_run_hides_what_it_does_again(tmp_path):
    pytest.importorskip("tensorboard")
    for first, last in ((1, 6), (5, 8)):
        with TensorBoard(tmp_path / "tensorboard", first - 1) as tensorboard:
            for step in range(first, last + 1):
                tensorboard.log({"step": step, "loss": float(step * first)})
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 25.0), (6, 30.0), (7, 35.0), (8, 40.0)]
    assert scalars(tmp_path / "tensorboard")["loss"] == expected


@pytest.mark.ties
@pytest.mark.parametrize("room", [0, 20, 100, 200])
def test_a_disk_that_fills_up_is_told_once_and_raises_nothing(tmp_path, room):
    pytest.importorskip("tensorboard")
    said = []
    with no_file_larger_than(room), TensorBoard(tmp_path / "tensorboard", say=said.append) as tensorboard:
        for step in range(10):
            tensorboard.log({**ROW, "step": step})
    assert len(said) == 1
    assert said[0].startswith("TensorBoard gets nothing from here on")
    assert "File too large" in said[0]


@pytest.mark.ties
def test_a_folder_that_cannot_be_made_is_told_with_its_name(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").touch()
    said = []
    with TensorBoard(tmp_path / "tensorboard", say=said.append) as tensorboard:
        tensorboard.log(ROW)
    assert said == [f"TensorBoard gets nothing from here on ({tmp_path}/tensorboard: File exists); the run goes on"]
