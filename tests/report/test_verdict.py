import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sdd.report.runs import load_run
from sdd.report.verdict import place, places, span, verdict

MakeRun = Callable[..., Path]


def test_alarm_is_told_with_block_step_and_certainty(make_run: MakeRun) -> None:
    found = verdict(load_run(make_run("a", placement="postnorm", probed=True, fades_at=30)))
    assert found.tone == "bad"
    for fact in ("step 30", "block 1", "certain"):
        assert fact in found.headline


def test_advice_names_the_rate_of_the_run(make_run: MakeRun) -> None:
    found = verdict(load_run(make_run("a", placement="postnorm", lr=0.01, probed=True, fades_at=30)))
    assert "0.01 to 0.003" in found.advice


def test_alarms_after_the_first_are_told_in_their_order(make_run: MakeRun) -> None:
    path = make_run("a", placement="postnorm", probed=True, fades_at=30)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "event": "skip", "kind": "loss spike", "what": "loss 9.3", "batch": 40}\n')
    later = [text for text in verdict(load_run(path)).details if text.startswith("Then: ")]
    assert any("step 41" in text for text in later)


@pytest.mark.parametrize(("probed", "tone"), [(True, "good"), (False, "unknown")])
def test_run_without_alarms_is_good_only_if_it_was_probed(make_run: MakeRun, probed: bool, tone: str) -> None:
    found = verdict(load_run(make_run("a", probed=probed)))
    assert found.tone == tone
    assert any("60 steps" in text for text in found.details)


def test_run_that_ends_badly_without_alarms_is_bad(make_run: MakeRun) -> None:
    path = make_run("a")
    values = json.loads((path / "result.json").read_text())
    (path / "result.json").write_text(json.dumps({**values, "status": "failed", "reason": "out of memory"}))
    found = verdict(load_run(path))
    assert found.tone == "bad"
    assert "out of memory" in found.headline


def test_alarm_in_words(make_run: MakeRun) -> None:
    (alarm,) = load_run(make_run("a", probed=True, fades_at=30)).alarms
    assert place(alarm) == "block 1"
    assert span(alarm) == "since step 30"
    assert places(alarm) == ""
