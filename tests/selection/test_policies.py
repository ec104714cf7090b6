"""What each policy keeps, and that its record says all that others must know of it."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_bliss.config.selection import SelectionConfig
from megatron_bliss.config.settings import settings_of
from megatron_bliss.selection.combine import COMBINATIONS
from megatron_bliss.selection.policies import POLICIES
from megatron_bliss.selection.policies.soft import best_share, log_odds_of_ranks
from megatron_bliss.selection.policy import Domains


def keep(policy: str, scores: np.ndarray, *, seed: int = 0, **values) -> np.ndarray:
    """Units that a policy keeps; values: its settings, and what it needs of the corpus."""
    record = POLICIES[policy]
    needs = {name: values.pop(name) for name in record.needs}
    return record.keep(scores, record.settings(**values), seed=seed, **needs)


def test_planted_scores_are_found():
    generator = np.random.default_rng(0)
    planted = np.sort(generator.choice(1000, 200, replace=False))
    scores = generator.random(1000).astype(np.float32)
    scores[planted] += 2
    np.testing.assert_array_equal(keep("top_fraction", scores, fraction=0.2, seed=9), planted)


def test_corpus_order_is_kept_and_any_order_of_equal_scores_is_drawn_by_seed():
    scores = np.array([1.0, 3.0, 1.0, 1.0, 1.0, 2.0])
    draws = [keep("top_fraction", scores, fraction=0.5, seed=seed) for seed in range(40)]
    for kept in draws:
        assert len(kept) == 3 and {1, 5} <= set(kept.tolist()) and (np.diff(kept) > 0).all()
    assert {int((set(kept.tolist()) - {1, 5}).pop()) for kept in draws} == {0, 2, 3, 4}
    np.testing.assert_array_equal(draws[7], keep("top_fraction", scores, fraction=0.5, seed=7))


@pytest.mark.parametrize("fraction, count", [(1.0, 10), (0.25, 2), (0.001, 1), (0.99, 10)])
def test_how_many_are_kept(fraction, count):
    assert len(keep("top_fraction", np.arange(10.0), fraction=fraction)) == count


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, float("nan")])
def test_impossible_fractions(fraction):
    with pytest.raises(
        ValueError, match="found selection.fraction .*, expected (more than 0, at most 1|a finite number)"
    ):
        keep("top_fraction", np.arange(10.0), fraction=fraction)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers(bad):
    for name, settings in (("top_fraction", {"fraction": 0.5}), ("threshold", {"threshold": 0.5})):
        with pytest.raises(ValueError, match=r"1 of 3 scores are not finite \(unit 1"):
            keep(name, np.array([0.0, bad, 1.0]), **settings)


def test_threshold():
    np.testing.assert_array_equal(keep("threshold", np.array([0.1, 0.5, 0.4, 0.9]), threshold=0.5), [1, 3])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("budget", [7, 100, 5000, 10**9])
def test_a_token_budget_equals_walking_down_the_sorted_scores(dtype, budget):
    generator = np.random.default_rng(budget)
    scores = (generator.normal(size=2000) * 10.0 ** generator.integers(-6, 6, 2000)).astype(dtype)
    lengths = generator.integers(1, 7, 2000).astype(np.int32)
    order = np.argsort(-scores, kind="stable")
    expected = order[np.cumsum(lengths[order]) <= budget]
    np.testing.assert_array_equal(keep("token_budget", scores, lengths=lengths, tokens=budget), np.sort(expected))


def test_a_token_budget_among_equal_scores_is_drawn_by_seed():
    scores, lengths = np.array([0.0, -0.0, 0.0, 1.0, -1.0], np.float32), np.array([2, 2, 2, 3, 1])
    draws = {tuple(keep("token_budget", scores, lengths=lengths, tokens=6, seed=seed)) for seed in range(20)}
    assert draws == {(0, 3), (1, 3), (2, 3)}
    for tokens in (0, 2):
        with pytest.raises(ValueError, match=f"token budget is {tokens}, .* selection.tokens"):
            keep("token_budget", scores, lengths=lengths, tokens=tokens)


def test_gumbel_draws_in_proportion_to_the_softmax():
    scores = np.log(np.array([8.0, 4.0, 2.0, 1.0, 1.0], dtype=np.float32))
    draws = [keep("gumbel", scores, fraction=0.2, temperature=1.0, seed=seed)[0] for seed in range(4000)]
    np.testing.assert_allclose(np.bincount(draws, minlength=5) / 4000, [0.5, 0.25, 0.125, 0.0625, 0.0625], atol=0.025)


def test_gumbel_between_the_top_fraction_and_a_uniform_draw():
    scores = np.random.default_rng(0).random(100_000).astype(np.float32)
    best = keep("top_fraction", scores, fraction=0.2)
    kept = {t: keep("gumbel", scores, fraction=0.2, temperature=t, seed=3) for t in (1e-12, 0.3, 1e12)}
    shared = {temperature: len(np.intersect1d(ids, best)) / len(best) for temperature, ids in kept.items()}
    assert all(len(ids) == 20_000 and (np.diff(ids) > 0).all() for ids in kept.values())
    assert shared[1e-12] == 1.0 and 0.3 < shared[0.3] < 0.9 and abs(shared[1e12] - 0.2) < 0.01
    np.testing.assert_array_equal(kept[0.3], keep("gumbel", scores, fraction=0.2, temperature=0.3, seed=3))
    with pytest.raises(ValueError, match="found selection.temperature 0"):
        keep("gumbel", scores, fraction=0.2, temperature=0)


@pytest.mark.parametrize("temperature", [1e-3, 0.5, 1.0, 1e9])
def test_effective_sample_share_of_a_temperature(temperature):
    scores = (np.random.default_rng(0).normal(size=100_000) * 3).astype(np.float32)  # more than one block
    record = POLICIES["gumbel"]
    measured = record.measure(scores, record.settings(temperature=temperature))
    weights = np.exp((scores.astype(np.float64) - scores.max()) / temperature)
    expected = weights.sum() ** 2 / (weights**2).sum() / len(scores)
    assert measured == {"effective_sample_share": pytest.approx(expected, rel=1e-12)}


def test_effective_sample_share_where_it_is_known_and_where_weights_overflow():
    record = POLICIES["gumbel"]
    for scores, temperature, share in (
        ([2.0, 2.0, 2.0, 2.0], 1e-9, 1.0),  # all alike
        ([5.0, 0.0, 0.0, 0.0], 1e-9, 0.25),  # one has all the weight
        ([1e30, 1e30, -1e30, 0.0], 1e-9, 0.5),
        (np.log([3.0, 1.0, 1.0]), 1.0, 25 / 11 / 3),
    ):
        measured = record.measure(np.array(scores), record.settings(temperature=temperature))
        assert measured["effective_sample_share"] == pytest.approx(share)
    line = record.describe({"temperature": 0.5, "effective_sample_share": 0.1234})
    assert "temperature 0.5" in line and "12.34% of the units" in line


def test_mixed_keeps_the_best_and_draws_the_others_from_the_rest():
    scores = np.random.default_rng(0).permutation(20).astype(np.float32)
    drawn = []
    for seed in range(3000):
        ids = keep("mixed", scores, fraction=0.5, random_share=0.3, seed=seed)
        assert len(ids) == 10 and (np.diff(ids) > 0).all()
        values = set(scores[ids].astype(int).tolist())
        assert values >= set(range(13, 20))  # 7 of 10 are the best
        drawn += values - set(range(13, 20))
    np.testing.assert_allclose(np.bincount(drawn, minlength=13) / 3000, 3 / 13, atol=0.03)
    np.testing.assert_array_equal(ids, keep("mixed", scores, fraction=0.5, random_share=0.3, seed=2999))


def test_soft_draws_in_proportion_to_the_odds_of_ranks():
    """Five units have r = 0.1, 0.3 .. 0.9: odds to the power 1/2."""
    scores = np.array([5.0, -1.0, 1e9, 7.0, 6.0])
    rank = np.array([0.3, 0.1, 0.9, 0.7, 0.5])
    expected = np.sqrt(rank / (1 - rank))
    draws = [keep("soft", scores, fraction=0.2, softness=2.0, seed=seed)[0] for seed in range(4000)]
    np.testing.assert_allclose(np.bincount(draws, minlength=5) / 4000, expected / expected.sum(), atol=0.025)


def test_soft_takes_equal_scores_alike():
    scores = np.array([2.0, 1.0, 1.0, 1.0, 0.0], dtype=np.float32)
    rank = np.array([0.9, 0.5, 0.5, 0.5, 0.1])
    np.testing.assert_allclose(log_odds_of_ranks(scores), np.log(rank / (1 - rank)), rtol=1e-6, atol=1e-7)
    assert not log_odds_of_ranks(np.zeros(4)).any()


def test_soft_between_the_top_fraction_and_a_uniform_draw():
    scores = np.random.default_rng(0).random(100_000).astype(np.float32)
    best = keep("top_fraction", scores, fraction=0.2)
    kept = {s: keep("soft", scores, fraction=0.2, softness=s, seed=3) for s in (1e-12, 2.0, 1e12)}
    shared = {softness: len(np.intersect1d(ids, best)) / len(best) for softness, ids in kept.items()}
    assert all(len(ids) == 20_000 and (np.diff(ids) > 0).all() for ids in kept.values())
    assert shared[1e-12] == 1.0 and abs(shared[1e12] - 0.2) < 0.01
    record = POLICIES["soft"]
    measured = record.measure(scores, record.settings(fraction=0.2, softness=2.0))
    assert measured == {"best_share": pytest.approx(shared[2.0], abs=0.02)} and 0.3 < shared[2.0] < 0.6
    for fraction, softness, expected in ((0.1, 1.0, 0.553), (0.2, 1.5, 0.527), (0.3, 0.5, 0.831), (1.0, 2.0, 1.0)):
        assert best_share(record.settings(fraction=fraction, softness=softness)) == pytest.approx(expected, abs=0.01)
    assert best_share(record.settings(fraction=0.2, softness=1e-6)) == pytest.approx(1.0, abs=0.01)
    assert best_share(record.settings(fraction=0.2, softness=1e6)) == pytest.approx(0.2, abs=0.01)
    assert 0 < best_share(record.settings(fraction=1e-7, softness=2.0)) < 0.1  # no unit of a few thousand
    line = record.describe({"softness": 2.0, "fraction": 0.2, **measured})
    assert "softness 2: about 4" in line and "of the kept are among the best 20%" in line
    np.testing.assert_array_equal(kept[2.0], keep("soft", scores, fraction=0.2, softness=2.0, seed=3))
    np.testing.assert_array_equal(kept[2.0], keep("soft", np.exp(30 * scores), fraction=0.2, softness=2.0, seed=3))
    with pytest.raises(ValueError, match="found selection.softness 0"):
        keep("soft", scores, fraction=0.2, softness=0)


@pytest.mark.parametrize("share, same", [(0.0, True), (1.0, False)])
def test_mixed_between_the_top_fraction_and_a_uniform_draw(share, same):
    scores = np.repeat(np.arange(100.0), 3)
    ids = keep("mixed", scores, fraction=0.25, random_share=share, seed=4)
    best = keep("top_fraction", scores, fraction=0.25, seed=4)
    assert len(ids) == 75 and np.array_equal(ids, best) == same
    assert len(keep("mixed", scores, fraction=1.0, random_share=share)) == 300


def test_proportional_keeps_the_mixture_and_the_best_of_each_group():
    generator = np.random.default_rng(1)
    groups = generator.choice(4, 1003, p=[0.5, 0.3, 0.15, 0.05]).astype(np.int32)
    scores = generator.random(1003) + groups  # one group is best throughout
    ids = keep("proportional", scores, domains=Domains(groups, list("abcd")), fraction=0.1)
    assert len(ids) == 100
    for group in range(4):
        members = np.flatnonzero(groups == group)
        kept = ids[groups[ids] == group]
        assert abs(len(kept) - 0.1 * len(members)) < 1
        assert set(kept) == set(members[np.argsort(-scores[members])[: len(kept)]])


def test_quotas_set_the_mixture():
    groups, scores = np.repeat([0, 1, 2], 100), np.arange(300.0)
    domains = Domains(groups, ["prose", "code", "tables"])
    ids = keep("quotas", scores, domains=domains, quotas={"prose": 0.5}, fraction=0.2)
    np.testing.assert_array_equal(ids, [*range(70, 100), *range(270, 300)])  # the rest competes for the other half
    ids = keep("quotas", scores, domains=domains, quotas={"prose": 0.25, "code": 0.75}, fraction=0.2)
    np.testing.assert_array_equal(np.bincount(groups[ids], minlength=3), [15, 45, 0])
    for shares, message in (
        ({"poems": 0.5}, "'poems', expected some of 'prose', 'code', 'tables'"),
        ({"prose": 0.6, "code": 0.6}, "sum to at most 1"),
    ):
        with pytest.raises(ValueError, match=message):
            keep("quotas", scores, domains=domains, quotas=shares, fraction=0.2)
    with pytest.raises(ValueError, match="100 units of prose, but the quota takes 135"):
        keep("quotas", scores, domains=domains, quotas={"prose": 0.9}, fraction=0.5)


@pytest.mark.parametrize("floors", [{"a": 0.5}, {"a": 0.25, "c": 0.3}, {"b": 1.0}, {"c": 0.0}, {"a": 0.34, "b": 0.66}])
def test_floors_keep_the_best_sum_of_scores_that_obeys_them(floors):
    for seed in range(10):
        generator = np.random.default_rng(seed)
        groups, scores = generator.permutation([0, 0, 0, 0, 1, 1, 1, 1, 2, 2]), generator.normal(size=10)
        ids = keep("floors", scores, domains=Domains(groups, list("abc")), fraction=0.4, floors=floors, seed=seed)
        least = [int(floors.get(name, 0.0) * 4 + 1e-9) for name in "abc"]
        obeying = [
            chosen
            for chosen in itertools.combinations(range(10), 4)
            if (np.bincount(groups[list(chosen)], minlength=3) >= least).all()
        ]
        expected = max(obeying, key=lambda chosen: scores[list(chosen)].sum())
        np.testing.assert_array_equal(ids, expected)


def test_floors_that_nothing_can_obey_are_refused():
    domains = Domains(np.repeat([0, 1], 50), ["prose", "code"])
    for floors, message in (
        ({"poems": 0.5}, "'poems', expected some of 'prose', 'code'"),
        ({"prose": 0.6, "code": 0.6}, "sum to at most 1"),
        ({"prose": 0.9}, "50 units of prose, but its floor takes 72"),
    ):
        with pytest.raises(ValueError, match=message):
            keep("floors", np.arange(100.0), domains=domains, floors=floors, fraction=0.8)


def test_floors_draw_among_equal_scores_by_seed():
    domains, scores = Domains(np.repeat([0, 1], 3), ["a", "b"]), np.zeros(6)
    draws = {
        tuple(keep("floors", scores, domains=domains, floors={"a": 0.5}, fraction=0.34, seed=s)) for s in range(60)
    }
    assert len(draws) == 12  # every pair but the three within b


@pytest.mark.parametrize("title, names", [("policy", POLICIES), ("`--combine`", COMBINATIONS)])
def test_the_readme_lists_every_policy_and_combination(title, names):
    text = (Path(__file__).parents[2] / "README.md").read_text()
    table = re.search(rf"^\| {title} \| keeps \|.*?\n\n", text, re.DOTALL | re.MULTILINE).group()
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(names)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_record_is_whole(policy):
    settings = settings_of(policy.settings)
    assert policy.help and policy.to_keep_more and all(one.help for one in settings.values())
    assert set(policy.required) <= set(settings)
    assert set(policy.needs) <= {"lengths", "domains"} and ("domains" in policy.needs) == ("domain_field" in settings)
    assert not {one.name for one in dataclasses.fields(SelectionConfig)} & set(settings)
    assert policy.lowest_score_as not in settings  # or one would hide the other in the manifest
    policy.settings()


def test_a_setting_of_two_policies_is_one_option():
    found = {}
    for policy in POLICIES.values():
        for name, one in settings_of(policy.settings).items():
            assert found.setdefault(name, one) == one
    assert len(found) < sum(len(settings_of(policy.settings)) for policy in POLICIES.values())  # some are shared
