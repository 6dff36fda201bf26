import importlib.util

import pytest

from sdd.train.tensorboard import TensorBoard


class StandIn:
    def __init__(self):
        self.scalars, self.closed = [], False

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def close(self):
        self.closed = True


def test_every_number_of_a_row_is_a_scalar_at_its_step():
    writer = StandIn()
    with TensorBoard(writer) as tensorboard:
        tensorboard.log({"step": 3, "loss": 1.5, "event": "x", "tokens": 7})
    assert writer.scalars == [("loss", 1.5, 3), ("tokens", 7, 3)]
    assert writer.closed


def test_without_the_package_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with TensorBoard.if_present(tmp_path) as tensorboard:
        tensorboard.log({"step": 1, "loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_with_the_package_events_are_written(tmp_path):
    pytest.importorskip("tensorboard")
    with TensorBoard.if_present(tmp_path) as tensorboard:
        tensorboard.log({"step": 1, "loss": 1.0})
    assert list((tmp_path / "tensorboard").iterdir())
