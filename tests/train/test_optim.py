import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdd.train.config import OptimConfig
from sdd.train.optim import learning_rate

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
