"""Healthy noise raises nothing; each fault is found where and when it was put."""

import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
from helpers_alarms import RECORDED, STEPS, DrawnRun, recorded
from hypothesis import given
from hypothesis import strategies as st

from sdd.probing.advice import advice
from sdd.probing.alarms import Alarm, Alarms, broke_first, judge
from sdd.probing.checks import EPS_SHARE, GRADIENT_RANGE, KINDS, LOGIT_MAX, UPDATE_RATIO, Kind, Reading, layer_of
from sdd.probing.metric_checks import DEAD_STEPS, LOOK, ROUTER_ENTROPY_SHARE, SATURATED_STEPS, WINDOW

SEED = st.integers(0, 2**32 - 1)
BLOCK = st.integers(0, 4)
ROW = st.integers(5, len(STEPS) - 4)
HEALTHY = sorted(path.name.removesuffix(".json.xz") for path in RECORDED.glob("healthy-*"))


def found(run: DrawnRun) -> list[Alarm]:
    return judge(run.probe, run.metrics)


def only(alarms: list[Alarm], kind: Kind) -> Alarm:
    assert [alarm.kind for alarm in alarms] == [kind], list(map(str, alarms))
    return alarms[0]


@given(SEED, st.integers(1, 8), st.floats(0, 0.2), st.floats(1 / 30, 30))
def test_healthy_noise_raises_nothing(seed: int, n_blocks: int, noise: float, slope: float) -> None:
    assert found(DrawnRun(seed, n_blocks, noise, slope)) == []


@given(SEED, BLOCK, ROW, st.floats(1e-12, 1e-5), st.sampled_from(["fading gradients", "exploding gradients"]))
def test_gradients_are_told_by_the_block_that_loses_or_multiplies_them(
    seed: int, block: int, row: int, factor: float, kind: Kind
) -> None:
    run = DrawnRun(seed, 5)
    for later in run.probe[row:]:
        below = later["layers"]["grad_rms"]
        for layer in range(block + 1):
            below[layer] *= factor if kind == "fading gradients" else 1 / factor
    alarm = only(found(run), kind)
    assert (alarm.where, alarm.layer, alarm.since_step) == (f"blocks.{block}", block, STEPS[row])
    assert alarm.certainty == "certain"
    assert not alarm.ended
    assert f"block {block} " in alarm.what


def test_a_stream_that_grows_does_not_make_its_gradient_fade() -> None:
    run = DrawnRun(0, 5)
    for row in run.probe:
        row["layers"]["rms"] = [10.0**layer for layer in range(6)]
        row["layers"]["grad_rms"] = [1e-4 / 10.0**layer for layer in range(6)]
    assert found(run) == []


def test_frozen_first_blocks_have_no_gradient_and_no_alarm() -> None:
    run = DrawnRun(0, 5)
    for row in run.probe:
        row["layers"]["grad_rms"] = row["layers"]["grad_rms"][2:]
        row["layers"]["grad_rms"][0] *= 1e-6
    assert only(found(run), "fading gradients").layer == 2


Fault = Callable[[DrawnRun, int, str], None]


def _eps(run: DrawnRun, row: int, block: str) -> None:
    run.site(row, f"{block}.attn.o_proj")["eps_ratio"] = 5 * EPS_SHARE


def _logits(run: DrawnRun, row: int, block: str) -> None:
    run.site(row, f"{block}.attn")["logit_max"] = 1.5 * LOGIT_MAX * 1.3 ** (row % 100)


def _entropy(run: DrawnRun, row: int, block: str) -> None:
    run.site(row, f"{block}.attn")["entropy"] = 0.01


def _alpha(run: DrawnRun, row: int, block: str) -> None:
    run.site(row, f"{block}.attn.o_proj")["alpha_norm"] = 1e-3


def _alpha_gradient(run: DrawnRun, row: int, block: str) -> None:
    run.site(row, f"{block}.attn.o_proj")["alpha_grad_rms"] = 0.0


def _update(run: DrawnRun, row: int, block: str) -> None:
    run.site(row, f"{block}.ffn.up_proj")["update_ratio"] = 2 * UPDATE_RATIO


def _stuck(run: DrawnRun, row: int, block: str) -> None:
    run.site(row, f"{block}.ffn.up_proj")["angle"] = 1e-9


@given(
    SEED,
    BLOCK,
    ROW,
    st.sampled_from(
        [
            (_eps, "eps", "attn.o_proj"),
            (_logits, "attention logits", "attn"),
            (_entropy, "attention logits", "attn"),
            (_alpha, "dead alpha", "attn.o_proj"),
            (_alpha_gradient, "dead alpha", "attn.o_proj"),
            (_update, "large updates", "ffn.up_proj"),
            (_stuck, "stuck weights", "ffn.up_proj"),
        ]
    ),
)
def test_fault_of_a_site_is_told_by_site_and_step(
    seed: int, block: int, row: int, fault: tuple[Fault, Kind, str]
) -> None:
    run = DrawnRun(seed, 5)
    put, kind, site = fault
    for later in range(row, len(STEPS)):
        put(run, later, f"blocks.{block}")
    alarm = only(found(run), kind)
    assert (alarm.where, alarm.since_step) == (f"blocks.{block}.{site}", STEPS[row])
    assert alarm.last_step == STEPS[-1]
    assert alarm.certainty == "certain"


def test_large_logits_that_do_not_grow_are_a_habit() -> None:
    run = DrawnRun(0, 2, noise=0.0)
    for row in range(len(STEPS)):
        run.site(row, "blocks.1.attn")["logit_max"] = 3 * LOGIT_MAX
    assert found(run) == []


@given(SEED, BLOCK, ROW)
def test_numbers_that_are_not_finite_began_where_the_pass_met_them_first(seed: int, block: int, row: int) -> None:
    run = DrawnRun(seed, 5)
    for later in range(block, 5):
        run.site(row, f"blocks.{later}.attn.o_proj")["rms"] = math.nan
    for later in range(5):
        run.site(row, f"blocks.{later}.attn.o_proj")["grad_rms"] = math.inf
    alarm = only(found(run), "non-finite")
    assert (alarm.where, alarm.since_step, alarm.certainty) == (f"blocks.{block}.attn.o_proj", STEPS[row], "certain")


def test_gradients_that_are_not_finite_began_in_the_last_site() -> None:
    run = DrawnRun(0, 5)
    for block in range(3):
        run.probe[7]["sites"][f"blocks.{block}.attn.o_proj"]["grad_rms"] = "nan"  # as the file has it
    assert only(found(run), "non-finite").where == "blocks.2.attn.o_proj"


@given(SEED, BLOCK, ROW, st.floats(8, 100))
def test_spike_is_traced_to_the_first_site_that_left_its_range(seed: int, block: int, row: int, factor: float) -> None:
    run = DrawnRun(seed, 5)
    step = STEPS[row]
    run.metrics[step - 1]["loss"] += 3
    for later in range(block, 5):
        run.site(row, f"blocks.{later}.ffn.up_proj")["rms"] *= factor
    alarm = only(found(run), "loss spike")
    assert (alarm.where, alarm.since_step) == (f"blocks.{block}.ffn.up_proj", step)
    assert f"at step {step}" in alarm.what


@given(SEED, st.integers(WINDOW, STEPS[-1] - 20), st.floats(4, 20))
def test_spike_between_probed_steps_has_a_step_and_no_site(seed: int, step: int, height: float) -> None:
    # The first windows lie on the steep beginning: a jump of 2 nats can be within eight deviations of it.
    run = DrawnRun(seed, 3)
    run.metrics[step - 1]["loss"] += height
    alarm = only(found(run), "loss spike")
    assert (alarm.where, alarm.since_step) == ("", step)


def test_one_gradient_that_clipping_absorbs_is_no_alarm_and_two_are() -> None:
    run = DrawnRun(1, 3)
    run.metrics[99]["grad_norm"] *= 40
    assert found(run) == []
    run.metrics[104]["grad_norm"] *= 40
    alarm = only(found(run), "gradient spike")
    assert (alarm.since_step, alarm.last_step, alarm.certainty) == (100, 105, "likely")


@given(SEED, st.integers(100, 180))
def test_loss_that_rises_for_good_is_told_within_32_steps(seed: int, step: int) -> None:
    run = DrawnRun(seed, 3)
    for row in run.metrics[step:]:
        row["loss"] += 0.02 * (row["step"] - step)
    alarm = next(alarm for alarm in found(run) if alarm.kind == "rising loss")
    assert step < alarm.since_step <= step + 64


@given(SEED, st.floats(0.001, 0.2), st.floats(0.1, 10))
def test_long_run_on_a_plateau_raises_nothing(seed: int, noise: float, loss: float) -> None:
    rng = np.random.default_rng(seed)
    losses = loss * (1 + noise * rng.standard_normal(5000))
    norms = np.exp(0.5 * rng.standard_normal(5000))
    rows = [{"step": s, "loss": x, "grad_norm": y} for s, (x, y) in enumerate(zip(losses, norms, strict=True), 1)]
    assert judge([], rows) == []


def test_what_the_guard_did_is_an_alarm() -> None:
    run = DrawnRun(2, 3)
    what = {"kind": "loss spike", "what": "loss 9.3, lately 7.4 +- 0.1", "batch": 99}
    run.metrics.insert(99, {"step": 100, "event": "skip", **what})
    alarm = only(found(run), "loss spike")
    assert alarm.since_step == 100
    assert "loss 9.3" in alarm.what
    assert "skipped" in alarm.what


def test_loss_that_is_not_finite_is_certain_at_once() -> None:
    run = DrawnRun(3, 3)
    run.metrics[-1]["loss"] = "nan"
    alarm = only(found(run), "non-finite")
    assert (alarm.since_step, alarm.certainty) == (STEPS[-1], "certain")


def test_certainty_grows_with_looks_and_distance() -> None:
    def certainty(times: int, share: float) -> str:
        run = DrawnRun(4, 3)
        for row in range(6, 6 + times):
            run.site(row, "blocks.1.attn.o_proj")["eps_ratio"] = share
        return only(found(run), "eps").certainty

    assert [certainty(times, 0.02) for times in (1, 2, 3)] == ["possible", "likely", "certain"]
    assert [certainty(times, 0.2) for times in (1, 2)] == ["likely", "certain"]


def test_alarm_ends_and_what_comes_later_is_a_new_one() -> None:
    run = DrawnRun(5, 3)
    for row in (5, 6, 12):
        run.site(row, "blocks.1.attn.o_proj")["eps_ratio"] = 0.05
    first, second = found(run)
    assert (first.since_step, first.last_step, first.ended) == (STEPS[5], STEPS[6], True)
    assert second.since_step == STEPS[12]


def test_all_places_are_told_with_their_first_steps() -> None:
    run = DrawnRun(6, 4)
    for row in range(8, len(STEPS)):
        run.site(row, "blocks.2.attn.o_proj")["eps_ratio"] = 0.05
        if row > 9:
            run.site(row, "blocks.0.attn.o_proj")["eps_ratio"] = 0.09
    alarm = only(found(run), "eps")
    assert alarm.where == "blocks.2.attn.o_proj"
    assert alarm.places == {"blocks.2.attn.o_proj": STEPS[8], "blocks.0.attn.o_proj": STEPS[10]}


@given(SEED, ROW)
def test_row_by_row_tells_the_same_as_the_whole_and_never_takes_back(seed: int, row: int) -> None:
    run = DrawnRun(seed, 3)
    for later in range(row, len(STEPS)):
        run.site(later, "blocks.1.attn.o_proj")["eps_ratio"] = 0.02
    run.metrics[150]["loss"] += 3
    alarms, told, before = Alarms(), [], []
    rows = sorted([*run.metrics, *run.probe], key=lambda row: row["step"])
    for each in rows:
        told += alarms.update(each)
        now = [(alarm.kind, alarm.since_step) for alarm in alarms.found]
        assert set(before) <= set(now)
        before = now
    assert alarms.found == found(run)
    assert {(alarm.kind, alarm.since_step) for alarm in told} == set(before)
    levels = [alarm.certainty for alarm in told if alarm.kind == "eps"]
    assert levels == ["possible", "likely", "certain"]


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_recorded_run_raises_nothing(name: str) -> None:
    assert list(map(str, judge(*recorded(name)))) == []


def test_there_are_twelve_healthy_runs_and_they_stay_clear_of_the_thresholds() -> None:
    assert len(HEALTHY) == 12
    readings = [Reading(row) for name in HEALTHY for row in recorded(name)[0]]
    pulls = [np.array(reading.pull) / reading.pull[-1] for reading in readings]
    assert GRADIENT_RANGE * min(pull.min() for pull in pulls) > 10
    assert max(pull.max() for pull in pulls) < GRADIENT_RANGE / 10
    for stat, threshold in (("eps_ratio", EPS_SHARE), ("logit_max", LOGIT_MAX), ("update_ratio", UPDATE_RATIO)):
        assert max(value for reading in readings for value in reading.of(stat).values()) < threshold / 2


def test_failing_post_norm_is_named_before_its_loss_is_lost() -> None:
    """Lost: from there on its loss stays above that of SDD, under the same setting on the same batches."""
    probe, metrics = recorded("hard-postnorm")
    other = [row["loss"] for row in recorded("hard-sdd")[1]]
    gap = np.array([row["loss"] for row in metrics]) - other
    gap = np.convolve(gap, np.ones(9) / 9, "same")
    lost = 1 + max(step for step in range(len(gap) - 9) if gap[step] < 0.05)
    alarm = broke_first(judge(probe, metrics))
    assert alarm is not None
    assert (alarm.kind, alarm.layer) == ("fading gradients", 11)
    assert alarm.since_step <= 8 < 2 * alarm.since_step < lost
    told = Alarms()
    early = [alarm.kind for row in probe if row["step"] < lost for alarm in told.update(row)]
    assert "fading gradients" in early
    assert judge(*recorded("hard-sdd")) == []


def test_placement_that_does_not_learn_at_a_rate_is_named() -> None:
    alarm = broke_first(judge(*recorded("fast-hybrid")))
    assert alarm is not None
    assert alarm.kind == "fading gradients"


def test_eps_that_swallows_the_first_block_is_named() -> None:
    alarm = only(judge(*recorded("small-olmo2")), "eps")
    assert (alarm.layer, alarm.since_step, alarm.certainty) == (0, 1, "certain")


def test_what_broke_first_is_no_mere_condition_nor_a_mere_possibility() -> None:
    run = DrawnRun(7, 3)
    run.site(5, "blocks.1.ffn.up_proj")["update_ratio"] = 0.9
    assert broke_first(found(run)) is not None
    for row in range(8, len(STEPS)):
        run.site(row, "blocks.2.attn.o_proj")["alpha_norm"] = 1e-3
    first = broke_first(found(run))
    assert first is not None
    assert first.kind == "dead alpha"
    assert broke_first([]) is None


def routed(n_steps: int, n_layers: int = 4, entropy: float = 1.9, dead: int = 0) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl with routing alone."""
    routing = {"entropy": [entropy] * n_layers, "dead_experts": [dead] * n_layers}
    return [
        {"step": step, "loss": 5.0, "grad_norm": 1.0, "routing": {name: list(of) for name, of in routing.items()}}
        for step in range(1, n_steps + 1)
    ]


@pytest.mark.parametrize("name", ["moe-sdd", "moe-sdd-prenorm", "moe-prenorm-qk"])
def test_healthy_mixture_of_experts_raises_nothing_and_its_routers_stay_clear(name: str) -> None:
    probe, metrics = recorded(name)
    assert list(map(str, judge(probe, metrics))) == []
    entropies = np.array([row["routing"]["entropy"] for row in metrics])
    assert (entropies > 5 * ROUTER_ENTROPY_SHARE * np.maximum.accumulate(entropies)).all()
    dead = np.array([row["routing"]["dead_experts"] for row in metrics]) > 0
    assert dead.any(), "the run says nothing about experts that are out for a while"
    ever = [dead[at : at + 2 * DEAD_STEPS // 3].all(0).any() for at in range(len(dead) - 2 * DEAD_STEPS // 3)]
    assert not any(ever)


def routed_without_experts(since: int, layer: int, dead: int, lasts: int) -> list[dict[str, Any]]:
    """A run in which experts of one layer get no tokens, from one step on for so many steps."""
    rows = routed(since + lasts + 5 * LOOK)
    for row in rows[since - 1 : since - 1 + lasts]:
        row["routing"]["dead_experts"][layer] = dead
    return rows


@given(st.integers(1, 300), st.integers(0, 3), st.integers(1, 6), st.integers(1, DEAD_STEPS - 1))
def test_experts_that_are_out_for_a_while_raise_nothing(since: int, layer: int, dead: int, lasts: int) -> None:
    assert judge([], routed_without_experts(since, layer, dead, lasts)) == []


@given(st.integers(1, 300), st.integers(0, 3), st.integers(1, 6), st.integers(DEAD_STEPS + LOOK, 400))
def test_experts_that_stay_out_are_told_by_block_and_first_step(since: int, layer: int, dead: int, lasts: int) -> None:
    alarm = only(judge([], routed_without_experts(since, layer, dead, lasts)), "dead experts")
    assert (alarm.where, alarm.layer, alarm.since_step) == (f"blocks.{layer}.ffn.router", layer, since)
    assert alarm.ended


@given(st.integers(1, 300), st.integers(1, 6), st.integers(DEAD_STEPS + LOOK, 400))
def test_each_look_at_experts_that_stay_out_makes_the_alarm_surer(since: int, dead: int, lasts: int) -> None:
    alarm = only(judge([], routed_without_experts(since, 0, dead, lasts)), "dead experts")
    looks = [step for step in range(since + DEAD_STEPS - 1, since + lasts) if step % LOOK == 0]
    points = len(looks) * (2 if dead >= KINDS["dead experts"].far else 1)
    assert alarm.certainty == ("possible", "likely", "certain")[min(points, 3) - 1]
    assert alarm.last_step == looks[-1]


@given(st.integers(1, 200), st.integers(0, 3), st.floats(0, 0.9))
def test_router_that_saturates_is_told_by_block_and_first_step(since: int, layer: int, share: float) -> None:
    rows = routed(since + SATURATED_STEPS + 3 * LOOK)
    for row in rows[since:]:
        row["routing"]["entropy"][layer] = share * ROUTER_ENTROPY_SHARE * 1.9
    alarm = only(judge([], rows), "saturated router")
    assert (alarm.layer, alarm.since_step, alarm.certainty) == (layer, since + 1, "certain")


def test_router_whose_entropy_was_never_higher_raises_nothing() -> None:
    """As that of a single expert, or one that starts low."""
    for entropy in (0.0, 0.01):
        assert judge([], routed(4 * LOOK, entropy=entropy)) == []


def test_what_routers_do_comes_second_to_what_breaks() -> None:
    rows = routed(400)
    for row in rows:
        row["routing"]["dead_experts"][0] = 1
    rows[300]["loss"] = 9.0
    first = broke_first(judge([], rows))
    assert first is not None
    assert first.kind == "loss spike"


def test_advice_about_experts_names_the_weight() -> None:
    assert "model.moe.balance_loss (it is 0.01)" in advice("dead experts", {"model.moe.balance_loss": 0.01})
    assert "model.moe.router_z_loss" in advice("saturated router", {})


@pytest.mark.parametrize("kind", get_args(Kind))
def test_every_kind_has_a_title_and_advice(kind: Kind) -> None:
    assert KINDS[kind].title
    assert advice(kind, {})
    assert advice(kind, {"optim.lr": None, "optim.warmup": "x", "model.placement": "sdd"})


def test_advice_fits_the_run() -> None:
    settings = {
        "optim.lr": 0.01,
        "optim.warmup": 0,
        "steps": 350,
        "model.placement": {"norms": {"attn_post": {}, "ffn_post": {}}},
    }
    text = advice("fading gradients", settings)
    assert "optim.lr from 0.01 to 0.003" in text
    assert "optim.warmup is 0" in text
    assert "--placement sdd" in text
    assert "norm q and k" in advice("attention logits", settings)
    normed = {**settings, "model.placement": {"norms": {"q": {}, "k": {}}}}
    assert "norm q and k" not in advice("attention logits", normed)


@pytest.mark.parametrize(
    ("site", "layer"),
    [
        ("blocks.3.attn.q_proj", 3),
        ("model.layers.17.mlp.experts.5.up_proj", 17),
        ("blocks.4", 4),
        ("embed", None),
        ("h2o.norm", None),
        ("", None),
    ],
)
def test_layer_of_a_site(site: str, layer: int | None) -> None:
    assert layer_of(site) == layer
