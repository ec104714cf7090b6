"""Rising curves give the same answers as falling ones turned over."""

import math

import pytest

from megatron_bliss.report.curves import first_reach, rise_reach, rise_speedup, speedup

CONTROL = [[100, 0.25, 0.01], [200, 0.30, 0.01], [400, 0.40, 0.01]]


@pytest.mark.parametrize(
    "chosen, expected",
    [
        ([[100, 0.25, 0.01], [200, 0.35, 0.01], [400, 0.45, 0.01]], 400 / 300),  # halfway between two rounds
        ([[100, 0.25, 0.01], [200, 0.40, 0.01]], 2.0),  # exactly at a round
        ([[100, 0.45, 0.01]], 4.0),  # at the first point: no extrapolation
        ([[100, 0.25, 0.01], [400, 0.39, 0.01]], None),  # never
        ([[100, 0.25, 0.01], [200, None, None], [400, 0.45, 0.01]], 400 / 325),
        ([[0, 0.5, 0.01]], None),
        ([], None),
    ],
)
def test_rise_speedup(chosen, expected):
    assert rise_speedup(CONTROL, chosen) == (None if expected is None else pytest.approx(expected, rel=1e-12))


def test_a_rising_curve_is_a_falling_one_upside_down():
    rising = [[1, 0.1], [2, math.nan], [3, 0.5], [4, 0.2]]
    falling = [[x, 1 - value] for x, value in rising]
    assert rise_reach(rising, 0.3) == pytest.approx(first_reach(falling, 0.7), rel=1e-12) == pytest.approx(2)
    assert rise_speedup(rising, rising[:3]) == pytest.approx(speedup(falling, falling[:3]), rel=1e-12)
