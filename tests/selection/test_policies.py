import numpy as np
import pytest

from megatron_bliss.data.compare import domain_shares
from megatron_bliss.selection.policies import (
    POLICIES,
    gumbel_top_k,
    intersection,
    mean_score,
    proportional,
    quotas,
    shards,
    token_budget,
    top_fraction,
    union,
)


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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("budget", [7, 100, 5000, 10**9])
def test_a_token_budget_equals_walking_down_the_sorted_scores(dtype, budget):
    generator = np.random.default_rng(budget)
    scores = (generator.normal(size=2000) * 10.0 ** generator.integers(-6, 6, 2000)).astype(dtype)
    lengths = generator.integers(1, 7, 2000).astype(np.int32)
    order = np.argsort(-scores, kind="stable")
    expected = order[np.cumsum(lengths[order]) <= budget]
    np.testing.assert_array_equal(token_budget(scores, lengths=lengths, tokens=budget), np.sort(expected))


def test_a_token_budget_among_equal_scores_is_drawn_by_seed():
    scores, lengths = np.array([0.0, -0.0, 0.0, 1.0, -1.0], np.float32), np.array([2, 2, 2, 3, 1])
    draws = {tuple(token_budget(scores, lengths=lengths, tokens=6, seed=seed)) for seed in range(20)}
    assert draws == {(0, 3), (1, 3), (2, 3)}
    for tokens in (0, 2):
        with pytest.raises(ValueError, match=f"token budget is {tokens}, .* selection.tokens"):
            token_budget(scores, lengths=lengths, tokens=tokens)


def test_gumbel_draws_in_proportion_to_the_softmax():
    scores = np.log(np.array([8.0, 4.0, 2.0, 1.0, 1.0], dtype=np.float32))
    draws = [gumbel_top_k(scores, fraction=0.2, temperature=1.0, seed=seed)[0] for seed in range(4000)]
    np.testing.assert_allclose(np.bincount(draws, minlength=5) / 4000, [0.5, 0.25, 0.125, 0.0625, 0.0625], atol=0.025)


def test_gumbel_between_the_top_fraction_and_a_uniform_draw():
    scores = np.random.default_rng(0).random(100_000).astype(np.float32)
    best = top_fraction(scores, fraction=0.2)
    kept = {t: gumbel_top_k(scores, fraction=0.2, temperature=t, seed=3) for t in (1e-12, 0.3, 1e12)}
    shared = {temperature: len(np.intersect1d(ids, best)) / len(best) for temperature, ids in kept.items()}
    assert all(len(ids) == 20_000 and (np.diff(ids) > 0).all() for ids in kept.values())
    assert shared[1e-12] == 1.0 and 0.3 < shared[0.3] < 0.9 and abs(shared[1e12] - 0.2) < 0.01
    np.testing.assert_array_equal(kept[0.3], gumbel_top_k(scores, fraction=0.2, temperature=0.3, seed=3))
    with pytest.raises(ValueError, match="temperature is 0"):
        gumbel_top_k(scores, fraction=0.2, temperature=0)


def test_proportional_keeps_the_mixture_and_the_best_of_each_group():
    generator = np.random.default_rng(1)
    groups = generator.choice(4, 1003, p=[0.5, 0.3, 0.15, 0.05]).astype(np.int32)
    scores = generator.random(1003) + groups  # one group is best throughout
    ids = proportional(scores, groups=groups, fraction=0.1)
    assert len(ids) == 100
    for group in range(4):
        members = np.flatnonzero(groups == group)
        kept = ids[groups[ids] == group]
        assert abs(len(kept) - 0.1 * len(members)) < 1
        assert set(kept) == set(members[np.argsort(-scores[members])[: len(kept)]])


def test_quotas_set_the_mixture():
    groups, scores = np.repeat([0, 1, 2], 100), np.arange(300.0)
    names = ["prose", "code", "tables"]
    ids = quotas(scores, groups=groups, names=names, shares={"prose": 0.5}, fraction=0.2)
    np.testing.assert_array_equal(ids, [*range(70, 100), *range(270, 300)])  # the rest competes for the other half
    ids = quotas(scores, groups=groups, names=names, shares={"prose": 0.25, "code": 0.75}, fraction=0.2)
    np.testing.assert_array_equal(np.bincount(groups[ids], minlength=3), [15, 45, 0])
    for shares, message in (
        ({"poems": 0.5}, "'poems', expected some of 'prose', 'code', 'tables'"),
        ({"prose": 0.6, "code": 0.6}, "sum to at most 1"),
    ):
        with pytest.raises(ValueError, match=message):
            quotas(scores, groups=groups, names=names, shares=shares, fraction=0.2)
    with pytest.raises(ValueError, match="100 units of prose, but the quota takes 135"):
        quotas(scores, groups=groups, names=names, shares={"prose": 0.9}, fraction=0.5)


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


def test_shards_by_file_keep_files_together_and_are_about_equal():
    files = np.random.default_rng(0).permutation(np.repeat(np.arange(12), np.arange(1, 13) * 10))
    dealt = shards(len(files), 3, by="file", seed=1, files=files)
    np.testing.assert_array_equal(np.sort(np.concatenate(dealt)), np.arange(len(files)))
    owners = [set(files[ids]) for ids in dealt]
    assert sum(map(len, owners)) == 12 and {len(ids) for ids in dealt} <= set(range(250, 271))
    with pytest.raises(ValueError, match="12 source files for 13 shards"):
        shards(len(files), 13, by="file", files=files)


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
    assert domain_shares(np.array([1, 0, 0, 3]), ["a", "b", "none", "c"]) == {"a": 0.5, "b": 0.25, "c": 0.25}
    assert list(domain_shares(np.array([2, 1, 1, 0]), ["z", "y", "x"])) == ["y", "x", "z"]
    assert domain_shares(np.zeros(0, np.int64), ["a"]) == {}
