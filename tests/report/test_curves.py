from collections.abc import Callable
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sdd.draw.panel import Panel, share_scale
from sdd.draw.style import line_styles
from sdd.report import curves
from sdd.report.runs import load_runs

MakeRun = Callable[..., Path]
VALUES = arrays(float, st.integers(1, 200), elements=st.floats(-1e6, 1e6) | st.just(np.nan))


@given(VALUES)
def test_smoothing_stays_between_the_extremes_and_keeps_gaps(values: np.ndarray) -> None:
    smoothed = curves.smooth(values)
    np.testing.assert_array_equal(np.isnan(smoothed), np.isnan(values))
    finite = values[np.isfinite(values)]
    if len(finite):
        margin = 1e-6 * np.abs(finite).max()
        kept = smoothed[np.isfinite(smoothed)]
        assert kept.min() >= finite.min() - margin
        assert kept.max() <= finite.max() + margin


def test_smoothing_leaves_a_constant_alone() -> None:
    np.testing.assert_allclose(curves.smooth(np.full(500, 3.0)), 3.0)


def test_thinning_keeps_few_points_in_order_and_every_spike() -> None:
    x = np.arange(10_000.0)
    y = np.ones(10_000)
    y[[17, 5003]] = 9, -9
    thin_x, thin_y = curves.thin(x, y)
    assert len(thin_x) <= 600
    assert (np.diff(thin_x) > 0).all()
    assert {9.0, -9.0} <= set(thin_y)


def test_thinning_leaves_out_gaps() -> None:
    y = np.ones(10_000)
    y[:2000] = np.nan
    assert np.isfinite(curves.thin(np.arange(10_000.0), y)[1]).all()


def test_held_out_panel_falls_back_to_the_loss(make_run: MakeRun) -> None:
    first, second = make_run("a"), make_run("b")
    text = (second / "metrics.jsonl").read_text().replace("eval_bits_per_byte", "nothing")
    (second / "metrics.jsonl").write_text(text)
    assert _heldout([first]).unit == "bits per byte"
    assert _heldout([first, second]).unit == "nats a token"


def test_losses_above_an_untrained_model_are_cut_off(make_run: MakeRun) -> None:
    assert not _heldout([make_run("a")]).clipped
    runs = load_runs([make_run("b"), make_run("c", end=60.0)])
    panel = curves.loss_panel(runs, line_styles(["sdd", "sdd"]))
    assert panel is not None
    assert panel.clipped
    extent = panel.extent()
    assert extent is not None
    assert extent[1] < 12


def test_description_tells_the_ends_and_the_break(make_run: MakeRun) -> None:
    panel = _heldout([make_run("a"), make_run("b", breaks_at=42)])
    text = panel.describe()
    assert "a: from" in text
    assert text.count("broke off") == 1


def test_shared_scale_covers_all_panels(make_run: MakeRun) -> None:
    low, high = share_scale([_heldout([make_run("a", end=4.0)]), _heldout([make_run("b", end=6.0)])])
    assert low.limits == high.limits
    assert low.limits is not None
    assert low.limits[0] < 0.3657 * 4.1
    assert low.limits[1] > 0.3657 * 6.9


def test_run_without_steps_gives_no_panel(make_run: MakeRun) -> None:
    path = make_run("a", until=1)
    (path / "metrics.jsonl").unlink()
    assert curves.run_panels(load_runs([path]), line_styles(["sdd"])) == {}


def test_alarm_and_guard_are_marked_where_they_happened(make_run: MakeRun) -> None:
    path = make_run("a", probed=True, fades_at=30)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "event": "skip"}\n{"step": null, "event": "skip"}\n')
    panel = curves.loss_panel(load_runs([path]), line_styles(["sdd"]))
    assert panel is not None
    (line,) = panel.lines
    assert (line.alarm, line.events) == (30 * 512, (41 * 512,))


def _heldout(paths: list[Path]) -> Panel:
    runs = load_runs(paths)
    panel = curves.heldout_panel(runs, line_styles([run.placement for run in runs]))
    assert panel is not None
    return panel
