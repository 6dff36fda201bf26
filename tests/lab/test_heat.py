import math
from pathlib import Path

import numpy as np
import pytest
from helpers_lab import config_of, write_run
from hypothesis import given
from hypothesis import strategies as st

from sdd.draw.maps import draw_maps
from sdd.probing import append_row
from sdd.report.heat import HeatMap, block_maps, site_maps, thinned
from sdd.report.runs import Run, load_runs


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    broken = write_run(tmp_path / "broken", config_of("postnorm"), probed=True, fades_at=30)
    sound = write_run(tmp_path / "sound", config_of(), probed=True)
    return load_runs([broken, sound, write_run(tmp_path / "unprobed", config_of())])


def test_maps_hold_the_numbers_of_the_probe_by_block_and_step(runs: list[Run]) -> None:
    probe = runs[0].probe
    assert probe is not None
    maps = {found[0].name: found for found in block_maps(runs)}
    stream = maps["stream-grad"][0]
    assert stream.rows == ("in", "0", "1", "2")
    np.testing.assert_array_equal(stream.values, probe.layers["grad_rms"].T)
    outputs = maps["outputs"][0]
    for block, values in zip(outputs.rows, outputs.values, strict=True):
        sites = [name for name in probe.has("rms") if name.startswith(f"blocks.{block}.")]
        np.testing.assert_array_equal(values, np.max([probe.series(name, "rms") for name in sites], axis=0))
    for found in [*maps.values(), *site_maps(runs)]:
        assert [each.run for each in found] == ["broken", "sound"]
        assert len({each.limits for each in found}) == 1


def test_cell_where_an_alarm_began_is_marked(runs: list[Run]) -> None:
    broken, sound = next(found for found in block_maps(runs) if found[0].name == "stream-grad")
    ((row, column),) = broken.marks
    assert (broken.rows[row], broken.steps[column]) == ("1", 30)
    assert sound.marks == ()


def test_numbers_that_are_not_finite_are_kept_and_seen(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", config_of(), probed=True)
    row = {"step": 70, "sites": {"blocks.1.attn.o_proj": {"rms": math.nan}}, "layers": {"rms": [math.inf] * 4}}
    row["layers"] |= {"cosine": [0.0] * 3, "grad_rms": [math.nan] * 4}
    append_row(path / "probe.jsonl", row)
    for (found,) in block_maps(load_runs([path])):
        assert found.extent() is not None
        assert "nan" not in found.describe()
        draw_maps([found])
    stream = block_maps(load_runs([path]))[0][0]
    assert np.isinf(stream.values[:, -1]).all()


@given(st.integers(1, 600), st.integers(0, 599))
def test_a_step_that_stands_out_is_not_lost_in_a_long_run(n: int, at: int) -> None:
    values = np.ones((3, n))
    values[1, at % n] = 100
    steps, kept = thinned(np.arange(n), values)
    assert len(steps) == kept.shape[1] <= 240
    assert kept.max() == 100
    assert (steps[0], steps[-1]) == (0, n - 1)
    assert (np.diff(steps) > 0).all()


def test_scale_spans_at_most_nine_decades() -> None:
    whole = HeatMap("x", "X", "rms", "run", np.arange(3), ("0",), np.array([[1e-20, 0.0, 1.0]]))
    assert whole.extent() == (pytest.approx(1e-9), 1.0)
    nothing = HeatMap("x", "X", "rms", "run", np.arange(2), ("0",), np.full((1, 2), math.nan))
    assert nothing.extent() is None
    assert "Nothing finite" in nothing.describe()
    draw_maps([nothing])
