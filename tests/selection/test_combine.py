"""Several selections or scores of the same units as one."""

import numpy as np
import pytest

from megatron_bliss.selection.combine import (
    COMBINATIONS,
    check_combination,
    intersection,
    least_rank,
    mean_rank,
    mean_score,
    rank_product,
    union,
)


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
    np.testing.assert_array_equal(intersection([np.array([2])] * 256, 3), [2])  # more files than a byte counts


def ranks_by_hand(scores):
    """Ranks from 0 on, equal scores at the mean of theirs, by comparing all pairs."""
    return np.array([((scores < one).sum() + (scores <= one).sum() - 1) / 2 for one in scores])


def test_ranks_are_averaged_multiplied_and_bounded():
    generator = np.random.default_rng(0)
    parts = [generator.integers(0, 20, 70).astype(np.float32), generator.normal(size=70)]
    count, ranks = 70, [ranks_by_hand(part) for part in parts]
    for weights, (a, b) in ((None, (0.5, 0.5)), ([3, 1], (0.75, 0.25)), ([0, 2], (0, 1))):
        expected = (a * ranks[0] + b * ranks[1]) / (count - 1)
        np.testing.assert_allclose(mean_rank(parts, weights), expected, rtol=1e-12)
        expected = ((ranks[0] + 1) / count) ** a * ((ranks[1] + 1) / count) ** b
        np.testing.assert_allclose(rank_product(parts, weights), expected, rtol=1e-12)
    np.testing.assert_allclose(least_rank(parts), np.minimum(*ranks) / (count - 1))
    assert rank_product(parts).min() > 0 and rank_product(parts).max() <= 1


def test_ranks_see_order_alone_and_agree_across_blocks():
    count = 2_500_000  # more than two blocks
    scores = np.random.default_rng(1).permutation(count).astype(np.float32)
    np.testing.assert_allclose(mean_rank([scores]), scores / (count - 1))
    np.testing.assert_array_equal(mean_rank([scores]), mean_rank([scores * 2 - 7]))
    np.testing.assert_allclose(mean_rank([scores, -scores]), 0.5)
    np.testing.assert_array_equal(least_rank([scores, scores, scores]), mean_rank([scores]))
    np.testing.assert_allclose(rank_product([scores] * 3, [1e308] * 3), (scores + 1) / count)  # no sum overflows


def test_a_lone_unit_and_equal_scores():
    for one in (mean_rank, rank_product, least_rank):
        np.testing.assert_array_equal(one([np.array([7.0])] * 2), [1.0])
    np.testing.assert_array_equal(mean_rank([np.zeros(5)]), [0.5] * 5)
    np.testing.assert_array_equal(mean_rank([np.array([0.0, -0.0])]), [0.5] * 2)


def test_a_product_or_minimum_wants_good_by_all():
    first, second = np.array([0.0, 9, 8, 1, 2]), np.array([9.0, 0, 8, 1, 2])
    assert mean_rank([first, second]).argmax() == 2 and least_rank([first, second]).argmax() == 2
    lopsided = [np.array([4.0, 2, 1, 0, 3]), np.array([0.0, 2, 1, 4, 3])]
    assert mean_rank(lopsided)[0] == mean_rank(lopsided)[1] and rank_product(lopsided)[0] < rank_product(lopsided)[1]


@pytest.mark.parametrize("name", [name for name, one in COMBINATIONS.items() if one.scores])
def test_scores_that_are_no_numbers_are_refused_by_all(name):
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="1 of 2 scores are not finite"):
            COMBINATIONS[name].scores([np.zeros(2), np.array([0, bad])], None)


@pytest.mark.parametrize("name", [name for name, one in COMBINATIONS.items() if one.weighted])
@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [1.0, np.nan], [1.0, np.inf], []])
def test_weights_that_cannot_be(name, weights):
    with pytest.raises(ValueError, match="weights .* for 2 score files, expected one finite number each"):
        COMBINATIONS[name].scores([np.zeros(2)] * 2, weights)


def test_ranks_take_no_weight_below_zero():
    for one in (mean_rank, rank_product):
        with pytest.raises(ValueError, match="expected none below 0: change --weights"):
            one([np.zeros(2)] * 2, [2.0, -1.0])


def test_what_is_asked_for_has_to_fit():
    check_combination(None, 1, None)
    check_combination("union", 1, None)
    check_combination("product", 2, [1, 2])
    with pytest.raises(ValueError, match="found 2 score files, expected --combine union, intersection, mean, ranks"):
        check_combination(None, 2, None)
    for name, files in ((None, 1), ("union", 2), ("minimum", 2)):
        with pytest.raises(ValueError, match="--weights without --combine mean, ranks, product, expected both or none"):
            check_combination(name, files, [1, 2])
