"""Plots are well-formed SVG in the page's colours, whatever the data."""

import math
import re

import numpy as np
import pytest

from megatron_bliss.report.plots import (
    Line,
    Marks,
    histogram_chart,
    line_chart,
    running_mean,
    short_number,
    strip_chart,
)
from tests.report.run_folders import Page


def test_running_mean_leaves_gaps_out():
    assert running_mean([1, 1, 1, 1], 3).tolist() == [1, 1, 1, 1]
    assert running_mean([0, 3, math.nan, 3, 6], 3).tolist() == [1.5, 1.5, 3, 4.5, 4.5]
    assert np.isnan(running_mean([math.nan] * 3, 3)).all()


def test_plots_take_their_colours_from_the_page():
    marks = Marks(level=3.5, point=(1.5, 3.5))
    svg = line_chart([Line("a", [1, 2], [3.0, 4.0], color=1)], title="t", x_label="step", marks=marks)
    assert "var(--series-2)" in svg and "var(--ink-soft)" in svg and not re.search(r"#0[123]0", svg)
    assert "<style" not in svg and "font-family" not in svg and "<metadata" not in svg


@pytest.mark.parametrize("values", [np.zeros(5), np.array([1.0]), np.linspace(-3, 3, 999)])
def test_scores_that_are_all_equal_or_one_alone_are_drawn(values):
    histogram = histogram_chart({"round 1": values}, title="h", x_label="score")
    strip = strip_chart({"$a_b$ \\ \ud800 <i>": values, "b": values}, title="s", x_label="score")
    for svg in (histogram, strip):
        Page(svg)
        assert svg.count("<svg") == svg.count("</svg>") == 1 and "<i>" not in svg


def test_errors_are_a_band_around_the_curve():
    plain = line_chart([Line("a", [1, 2], [3.0, 4.0])], title="t", x_label="step")
    banded = line_chart([Line("a", [1, 2], [3.0, 4.0], error=[0.5, 0.0])], title="t", x_label="step")
    Page(banded)
    assert banded.count("<path") > plain.count("<path") and "var(--series-1)" in banded


def test_short_numbers_have_three_digits_and_a_unit():
    assert [short_number(x) for x in (0, 999, 1500, 2.5e6, 3e9, 0.25)] == ["0", "999", "1.5k", "2.5M", "3B", "0.25"]
    assert [short_number(x) for x in (4e12, 2e15, 6.35e19, 1.5e21)] == ["4T", "2P", "63.5E", "1.5Z"]
