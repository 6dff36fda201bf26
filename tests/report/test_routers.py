"""Routers of mixtures of experts, from metrics.jsonl to curves, maps and the page."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers_runs import config_of, write_run
from sdd.draw import curves as figures
from sdd.draw.maps import draw_maps
from sdd.draw.style import line_styles
from sdd.models import MoEConfig
from sdd.report.curves import router_panels
from sdd.report.heat import earlier_loads, latest_loads, router_maps
from sdd.report.page import render, write_report
from sdd.report.runs import ROUTER_COLUMNS, RunHistory, load_runs, router_history
from sdd.train import RunConfig

E = 8


def mixture(steps: int = 60) -> RunConfig:
    config = config_of("sdd-prenorm", steps=steps)
    return replace(config, model=replace(config.model, moe=MoEConfig(E, 2)))


@pytest.fixture
def runs(tmp_path: Path) -> list[RunHistory]:
    """Two mixtures, of which one loses experts, and a dense model between them."""
    sound = write_run(tmp_path / "sound", mixture(), experts=E)
    dense = write_run(tmp_path / "dense", config_of())
    lost = write_run(tmp_path / "lost", mixture(200), experts=E, dead_from=35)
    return load_runs([sound, dense, lost])


def rows_of(run: RunHistory) -> list[dict]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def test_history_holds_what_the_rows_say(runs: list[RunHistory]) -> None:
    assert runs[1].routers is None
    found, rows = runs[2].routers, rows_of(runs[2])
    steps = [row for row in rows if "loss" in row]
    assert found is not None
    assert found.steps.tolist() == [row["step"] for row in steps]
    for name in ROUTER_COLUMNS:
        assert found.columns[name].tolist() == [row[name] for row in steps]
    for name, values in found.layers.items():
        assert values.tolist() == [row["routing"][name] for row in steps]
    loads = [row for row in rows if "expert_load" in row]
    assert {step: load.tolist() for step, load in found.loads.items()} == {
        row["step"]: row["expert_load"] for row in loads
    }


junk = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["entropy", "x"]), inner, max_size=2),
    max_leaves=6,
)


@given(st.lists(st.fixed_dictionaries({"step": junk, "routing": junk, "expert_load": junk}), max_size=3), st.booleans())
def test_malformed_rows_are_passed_over(odd: list[dict], first: bool) -> None:
    good = {
        "step": 1,
        "routing": {"entropy": [1.0], "worst_load": ["nan"], "dead_experts": [0]},
        "expert_load": [[1, 1]],
    }
    odd = [row for row in odd if not isinstance(row["routing"], dict) or len(row["routing"]) < 3]
    for row in odd:
        row["expert_load"] = None if row["expert_load"] and isinstance(row["expert_load"], list) else row["expert_load"]
    found = router_history([*odd, good] if first else [good, *odd])
    assert found is not None
    assert (found.steps.tolist(), list(found.loads)) == ([1], [1])
    assert math.isnan(found.layers["worst_load"][0, 0])
    assert math.isnan(found.columns["router_entropy"][0])


def test_maps_have_one_scale_and_leave_dense_models_out(runs: list[RunHistory]) -> None:
    groups = [*router_maps(runs), latest_loads(runs), *earlier_loads(runs)]
    for group in groups:
        assert {each.run for each in group} <= {"sound", "lost"}
        assert len({each.limits for each in group}) == 1
        draw_maps(group, "title")
    assert router_maps([runs[1]]) == latest_loads([runs[1]]) == earlier_loads([runs[1]]) == []
    names = [each.name for group in groups for each in group if each.run == "lost"]
    assert len(names) == len(set(names)) == 3 + 1 + 5


def test_experts_without_tokens_have_a_colour_of_their_own(runs: list[RunHistory]) -> None:
    sound, lost = latest_loads(runs)
    assert np.isfinite(sound.values).all()
    assert np.isnan(lost.values).tolist() == [[False] * E, [False] * E, [False] + [True] * (E - 1)]
    assert "7 of 24" in lost.describe()


def test_title_of_loads_names_the_step_if_it_is_the_same_for_all(runs: list[RunHistory]) -> None:
    assert "60" in latest_loads(runs[:1])[0].title
    assert not any(digit.isdigit() for digit in latest_loads(runs)[0].title)


def test_block_and_step_where_experts_went_missing_are_marked(runs: list[RunHistory]) -> None:
    (alarm,) = runs[2].alarms
    assert (alarm.kind, alarm.layer, alarm.since_step) == ("dead experts", 2, 35)
    dead = next(group for group in router_maps(runs) if group[0].name == "dead-experts")[1]
    ((row, column),) = dead.marks
    assert (dead.rows[row], dead.steps[column]) == ("2", 35)
    assert (dead.values[2, column:] == E - 1).all()
    assert not dead.values[:, :column].any()


def test_curves_are_of_mixtures_and_entropy_has_its_highest_value(runs: list[RunHistory]) -> None:
    panels = router_panels(runs, line_styles([run.placement for run in runs]))
    assert list(panels) == list(ROUTER_COLUMNS)
    for panel in panels.values():
        assert [line.label for line in panel.lines] == ["sound", "lost"]
    reference = panels["router_entropy"].reference
    assert reference is not None
    assert reference[0] == math.log(E)
    other = replace(runs[0], config=runs[0].config | {"model.moe.n_experts": 4})
    assert router_panels([other, runs[2]], line_styles(["sdd", "sdd"]))["router_entropy"].reference is None


def test_page_has_a_part_about_experts_if_there_are_any(runs: list[RunHistory]) -> None:
    page, dense = render(runs[1:]), render([runs[1]])
    for words in ("<h2>Experts</h2>", latest_loads(runs[1:])[0].title, earlier_loads(runs[1:])[0][0].title):
        assert words in page
        assert words not in dense
    assert "since step 35, first in block 2 (ffn.router)" in page
    ids = [part.split('"')[0] for part in page.split(' id="')[1:]]
    assert len(ids) == len(set(ids))


def test_figures_come_as_files_too(tmp_path: Path, runs: list[RunHistory], monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[str] = []
    monkeypatch.setattr(figures, "save_figure", lambda _, path: saved.append(path.name))
    write_report([run.path for run in runs[1:]], tmp_path / "page.html")
    curves = {"router-entropy", "balance-loss", "router-z-loss", "worst-load", "dead-experts"}
    maps = {"map-router-entropy", "map-worst-load", "map-dead-experts", "map-expert-load"}
    assert curves | maps <= set(saved)
    assert len(saved) == len(set(saved))
