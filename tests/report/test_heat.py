import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers_runs import config_of, write_run
from sdd.draw.maps import draw_maps
from sdd.draw.panel import HeatMap
from sdd.probing import append_row
from sdd.report.heat import block_maps, site_maps, thinned
from sdd.report.runs import RunHistory, load_runs


@pytest.fixture
def runs(tmp_path: Path) -> list[RunHistory]:
    broken = write_run(tmp_path / "broken", config_of("postnorm"), probed=True, fades_at=30)
    sound = write_run(tmp_path / "sound", config_of(), probed=True)
    return load_runs([broken, sound, write_run(tmp_path / "unprobed", config_of())])


def test_stream_is_that_of_the_probe(runs: list[RunHistory]) -> None:
    stream = maps_by_name(runs)["stream-grad"][0]
    assert runs[0].probe is not None
    assert stream.rows == ("in", "0", "1", "2")
    np.testing.assert_array_equal(stream.values, runs[0].probe.layers["grad_rms"].T)


@pytest.mark.parametrize(
    ("name", "stat", "reduce"), [("outputs", "rms", np.max), ("weight-grads", "weight_grad_rms", np.median)]
)
def test_block_holds_its_sites_reduced(
    runs: list[RunHistory], name: str, stat: str, reduce: Callable[..., np.ndarray]
) -> None:
    probe, found = runs[0].probe, maps_by_name(runs)[name][0]
    assert probe is not None
    for block, values in zip(found.rows, found.values, strict=True):
        sites = [site for site in probe.has(stat) if site.startswith(f"blocks.{block}.")]
        np.testing.assert_array_equal(values, reduce([probe.series(site, stat) for site in sites], axis=0))


def test_probed_runs_share_one_scale(runs: list[RunHistory]) -> None:
    for found in [*block_maps(runs), *site_maps(runs)]:
        assert [each.run for each in found] == ["broken", "sound"]
        assert len({each.limits for each in found}) == 1


def test_cell_where_an_alarm_began_is_marked(runs: list[RunHistory]) -> None:
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


def maps_by_name(runs: list[RunHistory]) -> dict[str, list[HeatMap]]:
    return {found[0].name: found for found in block_maps(runs)}
