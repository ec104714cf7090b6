"""What each policy keeps, and that its record says all that others must know of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from megatron_bliss.config.selection import SelectionConfig
from megatron_bliss.config.settings import settings_of
from megatron_bliss.selection.policies import POLICIES
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
