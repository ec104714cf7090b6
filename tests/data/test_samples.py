import numpy as np
import pytest

from megatron_bliss.data.samples import extremes


@pytest.mark.parametrize("count", [1, 3, 50])
def test_extremes_are_those_of_a_full_sort(count):
    for levels in (3, 1000):
        scores = np.random.default_rng(levels).integers(0, levels, 50).astype(np.float32)
        order = np.argsort(scores, kind="stable")
        best, worst = extremes(scores, count)
        np.testing.assert_array_equal(best, order[::-1][:count])
        np.testing.assert_array_equal(worst, order[:count])
