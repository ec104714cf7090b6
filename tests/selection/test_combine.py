import numpy as np
import pytest

from megatron_bliss.selection.combine import intersection, mean_score, union


def test_combinations_of_selections_and_scores():
    parts = [np.array([1, 4, 7]), np.array([0, 4, 7, 9]), np.array([4, 9])]
    np.testing.assert_array_equal(union(parts, 10), [0, 1, 4, 7, 9])
    np.testing.assert_array_equal(intersection(parts, 10), [4])
    first, second = np.array([0.0, 1.0, 2.0]), np.array([300.0, 200.0, 100.0])
    np.testing.assert_allclose(mean_score([first, second]), 0, atol=1e-6)  # scales do not matter
    assert (
        mean_score([first, second], [0.9, 0.1]).argmax() == 2 and mean_score([first, second], [0.1, 0.9]).argmax() == 0
    )
    with pytest.raises(ValueError, match="1 weights .* for 2 score files"):
        mean_score([first, second], [1.0])
