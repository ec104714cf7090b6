"""Units cut into windows, and their scores joined, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_bliss.scorers.windows import cut, groups

LENGTHS = np.array([3, 0, 17, 8, 9, 1, 24, 0])
WINDOW = 8


def pieces(how: str) -> list[list[tuple[int, int]]]:
    """(start, stop) of the windows of every unit."""
    found, start = [], 0
    for length in LENGTHS.tolist():
        most = WINDOW if how == "first" else length
        places = range(0, max(min(length, most), 1), WINDOW)
        found.append([(start + place, start + min(place + WINDOW, length)) for place in places])
        start += length
    return found


@pytest.mark.parametrize("how", ["mean", "max", "first"])
def test_windows_and_joined_scores(how: str) -> None:
    windows, expected = cut(LENGTHS, WINDOW, how), pieces(how)
    flat = [piece for unit in expected for piece in unit]
    assert list(zip(windows.starts.tolist(), (windows.starts + windows.sizes).tolist(), strict=True)) == flat
    scores = np.random.default_rng(1).normal(size=len(windows))
    joined, place = [], 0
    for unit in expected:
        mine, sizes = scores[place : place + len(unit)], [max(stop - start, 1) for start, stop in unit]
        joined.append(mine.max() if how == "max" else np.average(mine, weights=sizes))
        place += len(unit)
    np.testing.assert_allclose(windows.joined(scores, how), joined, rtol=1e-6)
    assert windows.joined(scores, how).dtype == np.float32


def test_groups_are_all_windows_once_and_bounded() -> None:
    windows = cut(LENGTHS, WINDOW, "mean")
    for tokens in (1, 8, 20, 1000):
        parts = list(groups(windows, tokens))
        assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
        assert (parts[0].start, parts[-1].stop) == (0, len(windows))
        assert all(windows.sizes[part].sum() <= tokens or part.stop - part.start == 1 for part in parts)
