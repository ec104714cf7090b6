import numpy as np
import pyarrow as pa
import pytest

from megatron_bliss.selection import POLICIES, domain_shares, shards, top_fraction


def test_planted_scores_are_found():
    generator = np.random.default_rng(0)
    planted = np.sort(generator.choice(1000, 200, replace=False))
    scores = generator.random(1000).astype(np.float32)
    scores[planted] += 2
    np.testing.assert_array_equal(top_fraction(scores, fraction=0.2, seed=9), planted)


def test_corpus_order_is_kept_and_any_order_of_equal_scores_is_drawn_by_seed():
    scores = np.array([1.0, 3.0, 1.0, 1.0, 1.0, 2.0])
    draws = [top_fraction(scores, fraction=0.5, seed=seed) for seed in range(40)]
    for kept in draws:
        assert len(kept) == 3 and {1, 5} <= set(kept.tolist()) and (np.diff(kept) > 0).all()
    assert {int((set(kept.tolist()) - {1, 5}).pop()) for kept in draws} == {0, 2, 3, 4}
    np.testing.assert_array_equal(draws[7], top_fraction(scores, fraction=0.5, seed=7))


@pytest.mark.parametrize("fraction, count", [(1.0, 10), (0.25, 2), (0.001, 1), (0.99, 10)])
def test_how_many_are_kept(fraction, count):
    assert len(top_fraction(np.arange(10.0), fraction=fraction)) == count


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, float("nan")])
def test_impossible_fractions(fraction):
    with pytest.raises(ValueError, match="expected more than 0 and at most 1"):
        top_fraction(np.arange(10.0), fraction=fraction)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers(bad):
    for name, settings in (("top_fraction", {"fraction": 0.5}), ("threshold", {"threshold": 0.5})):
        with pytest.raises(ValueError, match=r"1 of 3 scores are not finite \(unit 1"):
            POLICIES[name](np.array([0.0, bad, 1.0]), **settings)


def test_threshold():
    np.testing.assert_array_equal(POLICIES["threshold"](np.array([0.1, 0.5, 0.4, 0.9]), threshold=0.5), [1, 3])


@pytest.mark.parametrize("by", ["random", "range"])
def test_shards_are_disjoint_and_cover_everything(by):
    dealt = shards(103, 5, by=by, seed=4)
    np.testing.assert_array_equal(np.sort(np.concatenate(dealt)), np.arange(103))
    assert {len(ids) for ids in dealt} == {20, 21}
    assert all((np.diff(ids) > 0).all() for ids in dealt)
    if by == "range":
        assert all(a[-1] < b[0] for a, b in zip(dealt, dealt[1:], strict=False))
    else:
        assert any((first != second).any() for first, second in zip(dealt, shards(103, 5, by=by, seed=5), strict=True)
                   if len(first) == len(second))  # fmt: skip
        np.testing.assert_array_equal(dealt[2], shards(103, 5, by=by, seed=4)[2])


def test_more_shards_than_units():
    with pytest.raises(ValueError, match="6 shards of 5 units"):
        shards(5, 6)


def test_domain_shares():
    table = pa.table({"domain": pa.array(["b", "a", "a", None]), "format": pa.array([None] * 4, pa.string())})
    assert domain_shares(table) == {"a": 0.5, "b": 0.25, "unknown": 0.25}
    assert domain_shares(table, np.array([1, 2])) == {"a": 1.0}
    assert domain_shares(table, field="format") == {} and domain_shares(table, field="url") == {}
    encoded = pa.table({"domain": table.column("domain").dictionary_encode()})
    assert domain_shares(encoded) == domain_shares(table)
