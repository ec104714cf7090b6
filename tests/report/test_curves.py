"""Speed-ups and reading between the points of a curve; rising curves give the answers of falling ones turned over."""

import math

import pytest

from megatron_bliss.report.curves import first_reach, loss_at, rise_reach, rise_speedup, speedup

CONTROL = [[100, 0.25, 0.01], [200, 0.30, 0.01], [400, 0.40, 0.01]]
RANDOM = [[100, 9.0], [200, 7.0], [300, 6.0], [400, 5.0]]


@pytest.mark.parametrize(
    "bliss, expected",
    [
        ([[100, 9.0], [200, 6.0], [300, 4.0], [400, 3.5]], 400 / 250),  # halfway between two evaluations
        ([[100, 9.0], [200, 5.0], [300, 4.0], [400, 3.0]], 400 / 200),  # exactly at an evaluation
        ([[100, 5.0], [200, 4.0]], 400 / 100),  # at the first point
        ([[100, 4.0], [200, 3.0]], 400 / 100),  # below it at the first point: no extrapolation
        ([[100, 9.0], [200, 4.0], [300, 6.0], [400, 5.5]], 400 / 180),  # the first time counts, not the last
        ([[100, 9.0], [400, 5.0]], 1.0),
        ([[100, 9.0], [400, 6.0], [800, 4.0]], 400 / 600),  # slower than random
        ([[100, 9.0], [400, 5.1]], None),  # never
        ([], None),
        ([[0, 4.0], [100, 3.0]], None),  # before its first step: no ratio
        ([[100, 9.0], [200, math.nan], [300, 4.0]], 400 / 260),  # an evaluation that failed is left out
        ([[100, 9.0], [200, None], [300, 4.0]], 400 / 260),  # as it comes back from JSON
    ],
)
def test_the_speed_up_is_read_where_the_curve_first_has_the_control_s_last_loss(bliss, expected):
    assert speedup(RANDOM, bliss) == (None if expected is None else pytest.approx(expected, rel=1e-12))


def test_without_a_control_there_is_no_speed_up():
    assert speedup([], RANDOM) is None
    assert speedup([[100, math.nan]], RANDOM) is None
    assert speedup(RANDOM, RANDOM) == 1.0


def test_speedup_is_unchanged_by_the_unit_of_the_axis():
    bliss = [[100, 9.0], [200, 6.0], [300, 4.0]]
    in_steps = [[x / 4096, loss] for x, loss in bliss], [[x / 4096, loss] for x, loss in RANDOM]
    assert speedup(in_steps[1], in_steps[0]) == pytest.approx(speedup(RANDOM, bliss), rel=1e-12)


def test_reading_a_loss_and_where_it_is_reached_are_inverse():
    assert loss_at(RANDOM, 250) == pytest.approx(6.5)
    assert loss_at(RANDOM, 400) == 5.0
    assert loss_at(RANDOM, 401) is None and loss_at(RANDOM, 99) is None
    assert first_reach(RANDOM, loss_at(RANDOM, 333)) == pytest.approx(333)
    assert first_reach(RANDOM, 4.9) is None


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
def test_a_rise_is_read_where_the_curve_first_has_the_control_s_last_value(chosen, expected):
    assert rise_speedup(CONTROL, chosen) == (None if expected is None else pytest.approx(expected, rel=1e-12))


def test_a_rising_curve_is_a_falling_one_upside_down():
    rising = [[1, 0.1], [2, math.nan], [3, 0.5], [4, 0.2]]
    falling = [[x, 1 - value] for x, value in rising]
    assert rise_reach(rising, 0.3) == pytest.approx(first_reach(falling, 0.7), rel=1e-12) == pytest.approx(2)
    assert rise_speedup(rising, rising[:3]) == pytest.approx(speedup(falling, falling[:3]), rel=1e-12)
