import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdd.errors import UserError
from sdd.train.config import OptimConfig, preset
from sdd.train.schedule import fit, learning_rate, misfit

CONFIG = OptimConfig(lr=2.0, warmup=10, final_lr=0.1)


def test_warmup_is_linear_and_reaches_the_peak():
    rates = [learning_rate(CONFIG, step, 100) for step in range(1, 11)]
    assert rates == pytest.approx([0.2 * step for step in range(1, 11)])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_last_step_has_the_final_rate(schedule):
    assert learning_rate(replace(CONFIG, schedule=schedule), 100, 100) == pytest.approx(0.2)


def test_cosine_is_halfway_down_at_half_time():
    assert learning_rate(CONFIG, 55, 100) == pytest.approx((2.0 + 0.2) / 2)


def test_wsd_is_stable_then_linear():
    config = replace(CONFIG, schedule="wsd", decay_fraction=0.2)
    assert [learning_rate(config, step, 100) for step in (10, 50, 80)] == [2.0, 2.0, 2.0]
    assert learning_rate(config, 90, 100) == pytest.approx((2.0 + 0.2) / 2)


def test_without_warmup_the_first_step_has_the_full_rate():
    for schedule in ("wsd", "constant"):
        assert learning_rate(replace(CONFIG, warmup=0, schedule=schedule), 1, 100) == 2.0
    assert learning_rate(replace(CONFIG, warmup=0), 1, 1000) == pytest.approx(2.0, rel=1e-4)


@given(
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    warmup=st.integers(0, 50),
    steps=st.integers(1, 200),
    final=st.floats(0, 1),
)
def test_the_rate_stays_between_zero_and_the_peak_and_falls_after_warmup(schedule, warmup, steps, final):
    config = replace(CONFIG, schedule=schedule, warmup=warmup, final_lr=final)
    rates = [learning_rate(config, step, steps) for step in range(1, steps + 1)]
    assert all(math.isfinite(rate) and 0 <= rate <= 2.0 for rate in rates)
    after = rates[max(warmup - 1, 0) :]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))


ramps = st.builds(
    OptimConfig,
    lr=st.floats(1e-6, 100),
    warmup=st.integers(0, 60),
    schedule=st.just("ramp"),
    first_lr=st.floats(1e-9, 1),
)


@given(optim=ramps, steps=st.integers(2, 500))
def test_a_ramp_rises_by_one_factor_from_its_first_rate_to_the_peak(optim, steps):
    rates = [learning_rate(optim, step, steps) for step in range(1, steps + 1)]
    assert rates[0] == pytest.approx(optim.lr * optim.first_lr)
    assert rates[-1] == optim.lr
    factors = [later / earlier for earlier, later in itertools.pairwise(rates)]
    assert factors == pytest.approx([(1 / optim.first_lr) ** (1 / (steps - 1))] * (steps - 1))


def test_a_ramp_of_one_step_is_at_its_peak():
    assert learning_rate(replace(CONFIG, schedule="ramp"), 1, 1) == 2.0


@given(optim=ramps, steps=st.integers(1, 100))
def test_a_ramp_has_no_warm_up(optim, steps):
    config = replace(preset("nano"), optim=optim, steps=steps)
    assert fit(config, [])[0].optim == replace(optim, warmup=0)
    if optim.warmup:
        with pytest.raises(UserError, match="the schedule ramp leaves at most 0 steps for warm-up"):
            fit(config, ["optim.warmup"])


@pytest.mark.parametrize("first", [0.0, -0.1, 1.5, math.nan])
def test_a_ramp_starts_above_zero_and_not_above_its_peak(first):
    with pytest.raises(ValueError, match="first_lr="):
        OptimConfig(first_lr=first)


def rates_of(config):
    return [learning_rate(config.optim, step, config.steps) for step in range(1, config.steps + 1)]


def formula(optim, steps):
    """The rates of a schedule that fits, written as pieces: a line up, a level, a way down."""
    down = {"cosine": steps - optim.warmup, "wsd": round(optim.decay_fraction * steps, 6), "constant": 0}
    decay = down[optim.schedule]
    for step in range(1, steps + 1):
        left = (steps - step) / decay if decay else 1
        if step < optim.warmup:
            yield optim.lr * step / optim.warmup
        elif left >= 1 or optim.schedule == "constant":
            yield optim.lr
        else:
            shape = (1 - math.cos(math.pi * left)) / 2 if optim.schedule == "cosine" else left
            yield optim.lr * (optim.final_lr + (1 - optim.final_lr) * shape)


drawn_optims = st.builds(
    OptimConfig,
    lr=st.floats(1e-6, 10),
    warmup=st.integers(0, 60),
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    final_lr=st.floats(0, 1),
    decay_fraction=st.floats(0, 1),
)
drawn_given = st.sets(st.sampled_from(["optim.warmup", "optim.decay_fraction"]))


@given(optim=drawn_optims, steps=st.integers(1, 120), named=drawn_given)
def test_a_fitted_schedule_reaches_its_peak_and_its_final_rate(optim, steps, named):
    config = replace(preset("nano"), optim=optim, steps=steps)
    try:
        fitted, line = fit(config, named)
    except UserError:
        assert named
        return
    optim, rates = fitted.optim, rates_of(fitted)
    assert rates == pytest.approx(list(formula(optim, steps)), rel=1e-6, abs=1e-5 * optim.lr)
    assert rates[-1] == pytest.approx(optim.lr * (1 if optim.schedule == "constant" else optim.final_lr), abs=1e-5)
    assert max([*rates, learning_rate(optim, 0, steps)]) == pytest.approx(optim.lr, rel=1e-5)
    assert (line is None) == (fitted == config)


@given(optim=drawn_optims, steps=st.integers(1, 120), named=drawn_given)
def test_fitting_keeps_given_numbers_and_never_lengthens_warm_up(optim, steps, named):
    config = replace(preset("nano"), optim=optim, steps=steps)
    try:
        fitted, _ = fit(config, named)
    except UserError:
        return
    assert fitted.optim.warmup <= optim.warmup
    assert all(getattr(fitted.optim, name[6:]) == getattr(optim, name[6:]) for name in named)
    assert replace(fitted, optim=optim) == config
    assert fit(fitted, ["optim.warmup", "optim.decay_fraction"]) == (fitted, None)


@given(optim=drawn_optims, steps=st.integers(1, 120))
def test_only_numbers_that_cannot_fit_are_refused(optim, steps):
    config = replace(preset("nano"), optim=optim, steps=steps)
    decay = {"constant": 0, "cosine": 1, "wsd": optim.decay_fraction * steps}[optim.schedule]
    fits = optim.warmup + decay <= steps + 1e-6 and (optim.schedule != "wsd" or decay >= 1 - 1e-6)
    assert fits == (misfit(config) is None), "a run that keeps its schedule says so"
    if fits:
        assert fit(config, ["optim.warmup", "optim.decay_fraction"]) == (config, None)
    else:
        with pytest.raises(UserError, match=r"optim\.(warmup|decay_fraction)="):
            fit(config, ["optim.warmup", "optim.decay_fraction"])


def test_the_presets_own_schedules_fit():
    for name in ("nano", "moe-nano", "micro", "581m", "2b"):
        assert fit(preset(name), []) == (preset(name), None)


def test_a_schedule_that_does_not_fit_keeps_the_rates_of_earlier_versions():
    config = OptimConfig(lr=1.0, warmup=40)
    assert [learning_rate(config, step, 10) for step in (1, 10)] == [1 / 40, 10 / 40]
    config = replace(config, schedule="wsd", warmup=0, decay_fraction=0.05)
    assert learning_rate(config, 10, 10) == pytest.approx(1 - 0.9 * 0.5)
