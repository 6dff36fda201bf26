import math

from hypothesis import given
from hypothesis import strategies as st

from sdd.lab.search import MOST_MOVES, Lattice, Search, Setting, round_rate, search

INITS = (1.0, 0.5, 0.25, 0.1)
LATTICE = Lattice(8e-3, 2.0, INITS)


def rate(octave: int) -> float:
    return round_rate(8e-3 * 2.0**octave)


def bowl(best: Setting):
    def loss(setting: Setting) -> float:
        return math.log2(setting.rate / best.rate) ** 2 + math.log2(setting.init / best.init) ** 2

    return loss


def finish(loss, start: Setting) -> tuple[Search, int]:
    """Run a search in rounds, as a study does: returns its end and the number of rounds."""
    known: dict[Setting, float] = {}
    rounds = 0
    while (found := search(known.get, start, LATTICE)).missing:
        known |= {setting: loss(setting) for setting in found.missing}
        rounds += 1
    return found, rounds


@given(st.integers(-3, 3), st.sampled_from(INITS), st.sampled_from(INITS))
def test_a_search_finds_the_bottom_of_a_bowl(octave: int, init: float, first: float) -> None:
    best = Setting(rate(octave), init)
    found, _ = finish(bowl(best), Setting(8e-3, first))
    assert (found.best, found.ended_by) == (best, "found")


@given(st.integers(-3, 3), st.sampled_from(INITS))
def test_what_was_found_is_better_than_every_neighbour_and_everything_visited(octave: int, init: float) -> None:
    loss = bowl(Setting(rate(octave), init))
    found, _ = finish(loss, Setting(8e-3, 1.0))
    assert set(LATTICE.neighbours(found.best)) <= set(found.visited)
    assert loss(found.best) == min(map(loss, found.visited))


def test_losses_that_the_search_did_not_ask_for_do_not_change_its_path() -> None:
    loss = bowl(Setting(4e-3, 0.25))
    found, _ = finish(loss, Setting(8e-3))
    everything = search(loss, Setting(8e-3), LATTICE)
    assert everything == found


def test_where_nothing_converges_the_rate_falls() -> None:
    found, rounds = finish(lambda _: math.inf, Setting(8e-3))
    assert found.best == Setting(rate(-MOST_MOVES))
    assert (found.ended_by, rounds) == ("moves", MOST_MOVES)


def test_a_search_leaves_the_region_where_runs_diverge() -> None:
    valley = bowl(Setting(1e-3, 0.5))
    found, _ = finish(lambda setting: math.inf if setting.rate > 3e-3 else valley(setting), Setting(1.6e-2))
    assert found.best == Setting(1e-3, 0.5)


def test_inits_end_where_their_list_does() -> None:
    assert {setting.init for setting in LATTICE.neighbours(Setting(1e-3, 1.0))} == {1.0, 0.5}
    assert {setting.init for setting in LATTICE.neighbours(Setting(1e-3, 0.1))} == {0.1, 0.25}


@given(st.integers(-8, 8))
def test_a_step_up_and_a_step_down_come_back_to_the_same_rate(octave: int) -> None:
    up = LATTICE.neighbours(Setting(rate(octave)))[1]
    assert LATTICE.neighbours(up)[0].rate == rate(octave)
