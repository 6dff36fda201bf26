import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sdd.lab.statistics import (
    bootstrap_factor,
    first_reach,
    lr_sensitivity,
    mean_factor,
    mean_interval,
    paired_difference,
)

LOSSES = st.floats(0.5, 12.0)
SEVERAL = st.lists(LOSSES, min_size=2, max_size=8)
FACTORS = st.lists(st.floats(0.2, 5.0), min_size=2, max_size=8)


@given(SEVERAL)
def test_interval_is_that_of_scipys_t_test(values: list[float]) -> None:
    found = mean_interval(values)
    assert found.value == pytest.approx(np.mean(values))
    if np.std(values) > 1e-9:
        expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(1).normal(3.0, 0.1, (1000, 3))
    covered = [mean_interval(list(row)).low <= 3.0 <= mean_interval(list(row)).high for row in draws]
    assert 0.93 <= np.mean(covered) <= 0.97


def test_fewer_than_two_seeds_have_no_interval() -> None:
    assert mean_interval([2.0]).value == 2.0
    assert math.isnan(mean_interval([2.0]).low)
    assert math.isnan(mean_interval([]).value)
    for factor in (mean_factor, bootstrap_factor):
        assert factor([1.5]).value == pytest.approx(1.5)
        assert math.isnan(factor([1.5]).high)
        assert math.isnan(factor([]).value)
    assert not mean_interval([2.0]).excludes(0)


@given(SEVERAL, LOSSES, st.floats(0.01, 0.1))
def test_pairing_cancels_what_a_seed_does_to_both(values: list[float], shift: float, noise: float) -> None:
    first = dict(enumerate(values))
    second = {seed: value - shift - (noise if seed == 0 else 0) for seed, value in first.items()}
    found = paired_difference(first, second)
    assert found.value == pytest.approx(shift + noise / len(values))
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, len(values) - 1) * noise / len(values), rel=1e-3)


def test_pairs_are_of_seeds_that_both_finished() -> None:
    found = paired_difference({0: 1.0, 1: 2.0, 2: math.nan, 4: 1.0}, {0: 0.5, 1: 1.5, 2: 1.0, 3: 9.0})
    assert (found.value, found.n) == (0.5, 2)


@given(FACTORS)
def test_factors_are_symmetric_in_who_is_compared_with_whom(factors: list[float]) -> None:
    for estimate in (mean_factor, bootstrap_factor):
        forth, back = estimate(factors), estimate([1 / factor for factor in factors])
        assert forth.value * back.value == pytest.approx(1)
        assert forth.low * back.high == pytest.approx(1, rel=0.05)
        assert forth.low <= forth.value * (1 + 1e-9)
    assert min(factors) * (1 - 1e-9) <= bootstrap_factor(factors).low
    assert bootstrap_factor(factors).high <= max(factors) * (1 + 1e-9)


@given(st.lists(st.one_of(LOSSES, st.just(math.nan), st.just(math.inf)), min_size=1, max_size=9), LOSSES)
def test_sensitivity_is_none_on_a_plain_and_at_most_the_whole_fall(losses: list[float], initial: float) -> None:
    found = lr_sensitivity(losses, initial)
    finite = [min(loss, initial) for loss in losses if math.isfinite(loss)]
    assert 0 <= found <= initial - min([*finite, initial]) + 1e-9
    assert lr_sensitivity([losses[0]] * 3, initial) == 0


def test_sensitivity_counts_divergence_with_the_initial_loss() -> None:
    assert lr_sensitivity([2.0, 3.0, math.nan, 50.0], 8.0) == pytest.approx((0 + 1 + 6 + 6) / 4)


@given(st.lists(LOSSES, min_size=2, max_size=20, unique=True), st.data())
def test_a_falling_curve_is_at_the_target_where_it_reaches_it(losses: list[float], data: st.DataObject) -> None:
    curve = sorted(losses, reverse=True)
    tokens = list(np.cumsum(np.arange(1.0, len(curve) + 1)))
    target = data.draw(st.floats(curve[-1], curve[0]))
    reached = first_reach(tokens, curve, target)
    assert np.interp(reached, tokens, curve) == pytest.approx(target)


def test_a_curve_that_stays_above_never_reaches_and_one_below_has_begun_there() -> None:
    assert math.isnan(first_reach([1, 2], [5.0, 4.0], 3.0))
    assert first_reach([1, 2], [5.0, 4.0], 6.0) == 1
    assert first_reach([1, 2], [math.inf, 4.0], 4.5) == 2
