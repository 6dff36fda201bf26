import math

import numpy as np
import pytest

from sdd.draw.maps import draw_maps
from sdd.draw.panel import HeatMap, Line, Panel, share_scale
from sdd.draw.style import OWN_STYLE


def heat_map(*values: float, log: bool = True) -> HeatMap:
    return HeatMap("x", "X", "rms", "run", np.arange(len(values)), ("0",), np.array([values]), log=log)


def panel(*values: float, log: bool = False, ceiling: float | None = None) -> Panel:
    line = Line("run", np.arange(float(len(values))), np.array(values), OWN_STYLE)
    return Panel("Loss", "nats", [line], log=log, ceiling=ceiling)


def test_scale_of_a_map_spans_at_most_nine_decades() -> None:
    assert heat_map(1e-20, 0.0, 1.0).scale == (pytest.approx(1e-9), 1.0)


@pytest.mark.parametrize("log", [True, False])
def test_scale_of_a_constant_map_is_not_empty(log: bool) -> None:
    low, high = heat_map(3.0, 3.0, log=log).scale
    assert low <= 3 <= high
    assert low < high


def test_map_without_finite_values_is_drawn() -> None:
    nothing = heat_map(math.nan, math.inf)
    assert nothing.extent() is None
    assert "nan" not in nothing.describe()
    draw_maps([nothing])


def test_shared_scale_covers_all_maps() -> None:
    maps = share_scale([heat_map(1.0, 2.0), heat_map(math.nan), heat_map(0.5)])
    assert {each.scale for each in maps} == {(0.5, 2.0)}


def test_values_above_the_ceiling_are_cut_off() -> None:
    cut, whole = panel(1, 2, 90, ceiling=10), panel(1, 2, ceiling=10)
    assert (cut.clipped, whole.clipped) == (True, False)
    extent = cut.extent()
    assert extent is not None
    assert extent[1] < 11


def test_extent_covers_positive_values_only_on_a_logarithmic_axis() -> None:
    extent = panel(0, 1, 100, math.nan, log=True).extent()
    assert extent is not None
    assert 0 < extent[0] < 1 < 100 < extent[1]


def test_point_nearest_to_x_is_one_that_is_drawn() -> None:
    line = panel(1, math.nan, 3).lines[0]
    assert line.at(1.2) == (2.0, 3.0)
