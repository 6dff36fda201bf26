import math

import pytest

from sdd.report.html import count, decimals, duration, setting, signed, significant


@pytest.mark.parametrize(
    ("value", "text"), [(1.23456, "1.235"), (-1, "-1.000"), (math.nan, "–"), (math.inf, "infinite"), ("x", "–")]
)
def test_decimals(value: object, text: str) -> None:
    assert decimals(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.25, "+0.25"), (-0.25, "−0.25"), (math.nan, "–")])
def test_signed(value: float, text: str) -> None:
    assert signed(value, 2) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0012345, "0.00123"),
        (-2.0, "-2"),
        (None, ""),
        (math.nan, "nan"),
        (math.inf, "infinite"),
        (-math.inf, "−infinite"),
    ],
)
def test_significant(value: float | None, text: str) -> None:
    assert significant(value) == text


@pytest.mark.parametrize(("value", "text"), [(1234567, "1,234,567"), (2.0, "2"), (None, "–"), (math.nan, "–")])
def test_count(value: object, text: str) -> None:
    assert count(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(59.6, "1:00"), (3723, "1:02:03"), (None, "–"), (math.inf, "–")])
def test_duration(seconds: object, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.004, "0.004"), (4096, "4,096"), (True, "true"), (None, "none"), ("x", "x"), ([1], "[1]")]
)
def test_setting(value: object, text: str) -> None:
    assert setting(value) == text
