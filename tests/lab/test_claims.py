import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdd.lab.grid import claims
from sdd.lab.grid.claims import Claims


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the claims see; append to move it."""
    now = [0.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: now[-1])
    return now


def elsewhere(folder: Path, host: str = "far") -> Claims:
    """The claims of a process of another machine."""
    found = Claims(folder)
    found._me |= {"host": host, "pid": 1}
    return found


def test_one_of_two_gets_a_run_until_it_is_given_up(tmp_path: Path) -> None:
    here, there = Claims(tmp_path), elsewhere(tmp_path)
    assert here.take("run")
    assert here.take("run")  # it is ours already
    assert not there.take("run")
    assert there.take("other")
    here.release("run")
    assert there.take("run")
    assert not here.take("run")


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["take", "release"])), max_size=20))
def test_never_two_owners_whatever_the_order(
    tmp_path_factory: pytest.TempPathFactory, acts: list[tuple[int, str]]
) -> None:
    folder = tmp_path_factory.mktemp("claims")
    machines = [elsewhere(folder, f"host{number}") for number in range(3)]
    for number, act in acts:
        getattr(machines[number], act)("run")
        assert sum("run" in machine._held for machine in machines) <= 1


def test_owner_of_this_machine_that_has_ended_is_followed_at_once(tmp_path: Path) -> None:
    here = Claims(tmp_path)
    assert here.take("run")
    file = tmp_path / "run/0/owner.json"
    owner = json.loads(file.read_text())
    assert owner["pid"] == os.getpid()
    file.write_text(json.dumps({**owner, "owner": "before", "pid": 2**22 + 1}))  # above Linux's largest number
    assert Claims(tmp_path).take("run")


def test_owner_that_is_not_heard_of_is_lost_and_notices(tmp_path: Path, clock: list[float]) -> None:
    here, there = Claims(tmp_path), elsewhere(tmp_path)
    assert there.take("run")
    assert not here.take("run")
    for seconds in (60.0, 110.0, 170.0, 230.0):  # it renews its claim
        clock.append(seconds)
        assert there.renew() == []
        assert not here.take("run")
    clock.append(360.0)
    assert here.take("run")
    assert there.renew() == ["run"]
    there.release("run")  # says nothing about a claim that is another's
    assert not Claims(tmp_path).take("run")


def test_damaged_claim_is_waited_for_and_then_passed_over(tmp_path: Path, clock: list[float]) -> None:
    there = elsewhere(tmp_path)
    assert there.take("run")
    (tmp_path / "run/0/owner.json").write_text("")
    here = Claims(tmp_path)
    assert not here.take("run")
    clock.append(130.0)
    assert here.take("run")


def test_names_may_hold_dots(tmp_path: Path) -> None:
    here, there = Claims(tmp_path), elsewhere(tmp_path)
    assert here.take("lr0.1")
    assert there.take("lr0")
    assert there.take("lr0.1.0")
    assert not there.take("lr0.1")
