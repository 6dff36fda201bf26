"""`./dev bench smollm2`: paired gaps, the falling eps, a run that is resumed, and what the page says of the numbers."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sdd
from sdd.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import _healing
import _smollm2_page as pages

NATS = st.floats(0.011, 5)


def arm(before: float, after: float, se: float = 0.001, **more: Any) -> dict[str, Any]:
    return {
        "label": "o and up",
        "layers": 60,
        "share": 0.3,
        "rate": 1e-4,
        "tuned": {"0.0001": 3.6, "0.0003": 3.7},
        "before": 3.5 + before,
        "after": 3.3 + after,
        "gap_before": {"nats": before, "se": se},
        "gap_after": {"nats": after, "se": se},
        "curve": [[0, 3.5 + before], [20, 3.4], [300, 3.3 + after]],
        **more,
    }


def result(**arms: dict[str, Any]) -> dict[str, Any]:
    settings = {**vars(_healing.Settings()), "rates": [1e-4, 3e-4]}
    return {
        "settings": settings,
        "versions": {"torch": "2.11"},
        "machine": {"cpu": "a CPU", "date": "2026-11-28", "revision": "abc"},
        "heldout_tokens": 8192,
        "original": {"loss": 3.5},
        "arms": {"plain": arm(0, 0, label="not converted"), **arms},
    }


@given(before=NATS, after=NATS, se=st.floats(0, 0.02))
def test_the_page_calls_an_arm_missed_only_if_it_is_outside_the_bound_and_recovered_less_than_half(before, after, se):
    said = pages.verdict(arm(before, after, se))
    within, half = after + 1.96 * se <= 0.1, after <= before / 2
    assert ("missed" in said) == (not within and not half)
    assert ("**within 0.1 nats**" in said) == within


def test_the_page_has_every_arm_the_rates_tried_and_the_gaps_with_their_errors():
    text = pages.page(result(**{"o+up": arm(0.4, 0.05), "all": arm(2, 1.5, label="all layers")}))
    assert "| 0.400 ± 0.001 | 0.050 ± 0.001 | 88% |" in text
    assert "- all layers: **missed**" in text
    assert "| not converted | 3.600 | 3.700 |" in text
    assert "At an end of the search, so that a better rate may lie outside: not converted, o and up" in text
    assert all(len(line) <= 120 or line.startswith(("|", "!")) for line in text.splitlines())


def test_the_picture_shows_gaps_to_the_unconverted_model_at_steps_that_both_have():
    loss, gap = pages.panels(result(all=arm(2, 1.5, curve=[[0, 5.5], [10, 5.0], [300, 4.8]])))
    assert [line.label for line in loss.lines] == ["not converted", "o and up"]
    assert gap.lines[0].x.tolist() == [0, 300]
    np.testing.assert_allclose(gap.lines[0].y, [2.0, 1.5])


@given(seed=st.integers(0, 2**32 - 1))
def test_a_paired_gap_does_not_see_what_both_models_find_hard(seed):
    rng = np.random.default_rng(seed)
    hard, gap = rng.normal(3, 2, (16, 8)), rng.normal(0.2, 0.1, (16, 8))
    mean, se = _healing.paired(hard + gap, hard)
    assert mean == pytest.approx(gap.mean())
    assert se == pytest.approx(gap.mean(1).std(ddof=1) / math.sqrt(16))


@given(start=st.floats(0.1, 100), square=st.floats(1e-3, 1e3), seed=st.integers(0, 2**32 - 1))
def test_falling_eps_keeps_the_output_of_a_token_of_median_scale(start, square, seed):
    torch.manual_seed(seed)
    layer, x = sdd.SDDLinear(8, 8, bias=False, eps=start * square), torch.randn(8)
    with torch.no_grad():
        layer.weight.mul_((square / (layer.weight @ x).square().mean()).sqrt())
        before = layer(x)
        settings = _healing.Settings()
        falling = _healing.Falling({layer: square}, settings, start)
        for step in range(settings.decay_from + 1):
            falling.before(step)
        torch.testing.assert_close(layer(x), before, rtol=1e-3, atol=1e-5)
    assert layer.eps == pytest.approx(1e-3 * square)


def test_a_folder_without_a_model_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"no config.json: give the folder that save_pretrained wrote"):
        _healing.load(tmp_path)


@pytest.fixture
def tiny(monkeypatch):
    """A tiny LLaMA in the place of SmolLM2, and windows of random tokens."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )

    def load(_: Path) -> Any:
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config)

    monkeypatch.setattr(_healing, "load", load)
    settings = replace(_healing.Settings(), steps=4, decay_from=2, curve_every=1, save_every=1, length=8)
    data = object.__new__(_healing.Data)
    torch.manual_seed(1)
    data.calibration, data.tuning, data.heldout = (torch.randint(64, (2, 9)) for _ in range(3))
    data.batches = torch.randint(64, (4, 9)).split(1)
    return data, settings


@pytest.mark.parametrize("name", _healing.ARMS)
def test_a_run_that_is_stopped_and_resumed_ends_as_one_that_was_not(name, tiny, tmp_path):
    def trained(work: Path, *stops: int) -> _healing.Run:
        for stop in stops:
            run = _healing.Run(work, tmp_path, name, 1e-2, *tiny)
            run.to(stop, lambda _: None)
        return run

    whole, parts = trained(tmp_path / "whole", 4), trained(tmp_path / "parts", 1, 3, 4)
    assert parts.values["curve"] == whole.values["curve"]
    np.testing.assert_array_equal(parts.losses(4), whole.losses(4))
    assert parts.values["curve"][-1][1] != parts.values["curve"][0][1]
