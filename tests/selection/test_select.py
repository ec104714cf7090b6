"""What a run selects: policies with what they need of the corpus, warnings, and shards by file."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

from megatron_bliss.base.files import read_json
from megatron_bliss.config.selection import SelectionConfig
from megatron_bliss.data.indexed import IndexedCorpus
from megatron_bliss.data.ingest.preprocess import PreprocessSettings, preprocess
from megatron_bliss.data.manifest import read_manifest
from megatron_bliss.data.provenance import read_provenance
from megatron_bliss.data.subset import write_subset
from megatron_bliss.selection.policies import POLICIES
from megatron_bliss.selection.scored_text import ScoredText
from megatron_bliss.selection.select import (
    apply_policy,
    apply_to_units,
    check_schedule,
    check_selection,
    in_round,
    kept_share,
    repetition_warnings,
    selection_in_words,
)
from tests.data.corpora import documents, write_lines
from tests.runs import run, write_texts
from tests.selection.scored_texts import source, write_scored_text


@pytest.fixture
def pool(tmp_path):
    """A corpus of 60 documents in three domains."""
    source = write_lines(tmp_path / "a.jsonl", documents(60))
    preprocess(PreprocessSettings(inputs=[source], output_prefix=str(tmp_path / "X"), tokenizer_type="bytes"))
    return str(tmp_path / "X")


def selecting(policy="top_fraction", epoch_warning=4.0, **settings):
    return SelectionConfig(policy=policy, epoch_warning=epoch_warning, settings=settings)


def test_every_policy_can_be_chosen_and_is_recorded(pool):
    scores = np.random.default_rng(0).random(60).astype(np.float32)
    for name in POLICIES:
        own_shares = {name: {"letter": 0.5}} if name in ("quotas", "floors") else {}
        selection = selecting(name, fraction=0.25, threshold=0.7, tokens=900, **own_shares)
        check_selection(selection)
        ids, policy, label = apply_policy(pool, scores, selection, seed=5)
        assert (np.diff(ids) > 0).all() and 0 < len(ids) < 60 and "." not in label
        assert policy["name"] == name and policy["seed"] == 5 and json.loads(json.dumps(policy)) == policy
        own = {field.name for field in dataclasses.fields(POLICIES[name].settings)}
        assert own < policy.keys() and policy.get("fraction", 0.25) == 0.25 and own_shares.items() <= policy.items()
        assert policy.get("lowest_score_kept", policy.get("threshold")) == scores[ids].min()
        np.testing.assert_array_equal(ids, apply_policy(pool, scores, selection, seed=5)[0])


def test_a_subset_knows_the_domains_and_lengths_of_its_units(pool, tmp_path):
    shard = write_subset(pool, np.arange(0, 60, 2), tmp_path, label="shard")
    scores = np.zeros(30, dtype=np.float32)
    ids, _, _ = apply_policy(shard, scores, selecting("quotas", fraction=0.2, quotas={"river": 1.0}), seed=0)
    assert read_provenance(shard, ids).column("domain").to_pylist() == ["river"] * 6
    lengths = IndexedCorpus(shard).lengths
    excluded = np.flatnonzero(lengths > np.median(lengths))
    selection = selecting("token_budget", tokens=500)
    ids, _, _ = apply_policy(shard, scores, selection, seed=0, excluded=excluded)
    assert lengths[ids].sum() <= 500 and not np.isin(ids, excluded).any()
    with pytest.raises(ValueError, match="all 30 units of .* are excluded"):
        apply_policy(shard, scores, selection, seed=0, excluded=np.arange(30))
    with pytest.raises(ValueError, match="excluded units 30 to 30, but .* has 0 to 29"):
        apply_policy(shard, scores, selection, seed=0, excluded=np.array([30]))


@pytest.fixture
def scored_text(tmp_path):
    """The folder of 60 scored documents that have no index."""
    texts = [f"text {number}" + " word" * (number % 7) for number in range(60)]
    scores = np.random.default_rng(0).random(60).astype(np.float32)
    write_scored_text(tmp_path / "S", [source(tmp_path / "a.jsonl", texts, 0)], scores)
    return tmp_path / "S"


def test_every_policy_applies_to_text_without_an_index(scored_text):
    found = ScoredText(scored_text)
    scores, lengths = np.array(found.scores), np.array([2 + number % 7 for number in range(60)])
    np.testing.assert_array_equal(found.lengths(), lengths)
    for name in POLICIES:
        own_shares = {name: {"letter": 0.5}} if name in ("quotas", "floors") else {}
        selection = selecting(name, fraction=0.25, threshold=0.7, tokens=50, **own_shares)
        for excluded in (None, np.arange(0, 60, 4)):
            ids, policy, _ = apply_to_units(found, scores, selection, seed=5, excluded=excluded)
            assert (np.diff(ids) > 0).all() and 0 < len(ids) < 60 and policy["name"] == name
            assert excluded is None or not np.isin(ids, excluded).any()
            assert name != "token_budget" or lengths[ids].sum() <= 50
            assert not own_shares or (ids % 3 == 1).mean() >= 0.45
    with pytest.raises(ValueError, match=r"found selection.near_duplicates for .*S, which is text without an index"):
        apply_to_units(found, scores, dataclasses.replace(selecting(), near_duplicates=0.8), seed=0)
    with pytest.raises(ValueError, match="no unit of .*S has a label"):
        apply_to_units(found, scores, selecting("proportional", fraction=0.5, domain_field="label"), seed=0)
    with pytest.raises(ValueError, match="has no column 'colour'"):
        apply_to_units(found, scores, selecting("proportional", fraction=0.5, domain_field="colour"), seed=0)
    with pytest.raises(ValueError, match="excluded units 60 to 60, but .*S has 0 to 59"):
        apply_to_units(found, scores, selecting(), seed=0, excluded=np.array([60]))


def test_folders_that_are_no_scored_text(scored_text, tmp_path):
    for name, values, message in (
        ("scores.npy", np.zeros(59, np.float32), "found 59 scores, 60 lengths, 60 rows of provenance in"),
        ("scores.npy", np.zeros((60, 1)), r"found float64\[60, 1\] in .*, expected scores, one per document"),
        ("lengths.npy", np.zeros(60), r"found float64\[60\] in .*, expected numbers of tokens, one per document"),
        ("lengths.npy", np.array([None]), "expected a .npy file of numbers"),
    ):
        folder = shutil.copytree(scored_text, tmp_path / "T", dirs_exist_ok=True)
        np.save(folder / name, values, allow_pickle=True)
        with pytest.raises(ValueError, match=message):
            ScoredText(folder)
    for name in ("scores.npy", "lengths.npy", "provenance.parquet"):
        folder = shutil.copytree(scored_text, tmp_path / "T", dirs_exist_ok=True)
        (folder / name).unlink()
        with pytest.raises(ValueError, match=f"found no {name} in .*T, expected a folder of scored text"):
            ScoredText(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fraction": 0.0}, "selection.fraction 0.0"),
        ({"temperature": 0.0}, "selection.temperature 0.0"),
        ({"tokens": -1}, "selection.tokens -1"),
        ({"epoch_warning": 0.0}, "selection.epoch_warning 0.0"),
        ({"policy": "quotas"}, "expected quotas with the policy quotas"),
        ({"quotas": {"a": 0.5}}, "with no other"),
        ({"policy": "quotas", "quotas": {"a": 0.6, "b": 0.6}}, "sum to at most 1"),
        ({"policy": "floors"}, "expected floors with the policy floors"),
        ({"floors": {"a": 0.5}}, "with no other"),
        ({"random_share": 1.1}, "selection.random_share 1.1"),
        ({"policy": "luck"}, "selection.policy 'luck', expected one of top_fraction, "),
        ({"fractoin": 0.2}, "selection.fractoin, which no policy has, expected settings of fraction, "),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(ValueError, match=message):
        check_selection(selecting(**changes))


def test_repetition_is_warned_of():
    assert repetition_warnings(4000, 1000, selecting()) == []
    (warning,) = repetition_warnings(5000, 1000, selecting())
    assert "5,000 tokens of a selection that has 1,000: 5.0 epochs" in warning and "raise selection.fraction" in warning
    assert "lower selection.threshold" in repetition_warnings(5000, 1000, selecting("threshold"))[0]
    assert repetition_warnings(5000, 1000, selecting(epoch_warning=5.0)) == []


def test_a_run_fills_the_token_budget_with_a_round(pool):
    scores = np.random.default_rng(0).random(60).astype(np.float32)
    lengths = IndexedCorpus(pool).lengths
    for tokens, round_tokens, budget in ((0, 900, 900), (500, 900, 500)):
        ids, policy, label = apply_policy(
            pool, scores, selecting("token_budget", tokens=tokens), seed=0, round_tokens=round_tokens
        )
        assert policy["tokens"] == budget and label == f"tokens{budget}"
        assert budget - lengths.max() < lengths[ids].sum() <= budget
        assert kept_share(selecting("token_budget", tokens=tokens), 2000, round_tokens) * 2000 == budget
    with pytest.raises(ValueError, match="token budget is 0"):
        apply_policy(pool, scores, selecting("token_budget"), seed=0)


def test_what_a_plan_is_told_to_be_kept():
    for name in ("top_fraction", "soft", "gumbel", "mixed", "proportional", "floors", "quotas"):
        assert kept_share(selecting(name, fraction=0.3), 1000, 77) == 0.3
    assert kept_share(selecting("threshold"), 1000, 77) is None
    assert kept_share(selecting("token_budget", tokens=2000), 1000, 77) == 1.0


def test_a_schedule_has_a_fraction_for_every_round():
    scheduled = dataclasses.replace(selecting("mixed", fraction=0.9), fraction_schedule=[0.4, 0.1])
    check_schedule(scheduled, 2)
    for number, fraction in ((1, 0.4), (2, 0.1)):
        selection = in_round(scheduled, number)
        assert selection.settings == {"fraction": fraction} and kept_share(selection, 1000, 77) == fraction
    assert "raise selection.fraction_schedule, " in repetition_warnings(5000, 1000, scheduled)[0]
    assert in_round(selecting(fraction=0.3), 2) == selecting(fraction=0.3)
    with pytest.raises(
        ValueError, match=r"fraction_schedule \[0.4, 0.1\] for 3 rounds, expected one fraction for each"
    ):
        check_schedule(scheduled, 3)
    with pytest.raises(ValueError, match="with selection.policy threshold, expected a policy that keeps a fraction"):
        check_schedule(dataclasses.replace(scheduled, policy="threshold"), 2)


def test_a_run_keeps_what_its_schedule_says(corpus, tmp_path):
    options = ["--arms", "random", "--selection.policy", "gumbel", "--selection.fraction_schedule", "[0.5, 0.1]"]
    options += ["--evaluation.tasks", "[]", "--selection.near_duplicates", "0.2"]
    done = run(corpus, tmp_path / "run", *options)
    assert done.returncode == 0, done.stderr
    shards = read_json(tmp_path / "run/shards/done.json")["prefixes"]
    for number, fraction in ((1, 0.5), (2, 0.1)):
        folder = tmp_path / f"run/random/round_{number:02d}/select"
        record = read_json(folder / "done.json")
        shard = read_manifest(tmp_path / "run/shards" / shards[number])["counts"]["units"]
        assert record["units"] == round(fraction * shard)
        policy = read_manifest(folder / record["prefix"])["policy"]
        assert policy["fraction"] == fraction and 0 < policy["effective_sample_share"] < 1
        left_out = policy["near_duplicates_left_out"]
        assert left_out > 0 and f"random, round {number}: left out: {left_out:,} near-duplicates" in done.stderr
        share = f"{policy['effective_sample_share']:.2%}"
        assert f"random, round {number}: gumbel, temperature 1: the effective sample size is {share}" in done.stderr
    shutil.rmtree(folder)
    again = run(corpus, tmp_path / "run", *options, "--stage", "select", "--round", "2", "--arm", "random")
    assert again.returncode == 0 and read_json(folder / "done.json")["prefix"] == record["prefix"]


def test_a_run_with_shards_by_file_and_quotas(corpus, tmp_path):
    for number in range(3):
        write_texts(tmp_path / f"part{number}.jsonl", 30 + 10 * number, number)
    inputs = [str(tmp_path / f"part{number}.jsonl") for number in range(3)]
    preprocess(
        PreprocessSettings(
            inputs=inputs, output_prefix=str(tmp_path / "pool"), tokenizer_type="bytes", unit="window", window_length=32
        )
    )
    options = ["--data.train_prefix", str(tmp_path / "pool"), "--data.shard_by", "file", "--arms", "random"]
    options += ["--selection.policy", "quotas", "--selection.quotas", "{words: 0.25, digits: 0.75}"]
    options += ["--selection.fraction", "0.05", "--pretraining.train_iters", "24", "--rounds", "1"]
    done = run(corpus, tmp_path / "run", *options)
    assert done.returncode == 0, done.stderr
    shards = read_json(tmp_path / "run/shards/done.json")["prefixes"]
    files = [set(read_provenance(tmp_path / "run/shards" / shard).column("file").to_pylist()) for shard in shards]
    assert not files[0] & files[1] and sum(map(len, files)) == 3
    record = read_json(tmp_path / "run/random/round_01/select/done.json")
    shares = record["domains"]["domain"]
    assert shares["words"] == pytest.approx(0.25, abs=0.05) and "epochs" in record["warnings"][0]
    assert f"warning: {record['warnings'][0]}" in done.stderr
    manifest = read_manifest(tmp_path / "run/random/round_01/select" / record["prefix"])
    assert manifest["policy"]["quotas"] == {"words": 0.25, "digits": 0.75}
    assert record["tokens"] == manifest["counts"]["tokens"]


def test_a_selection_is_said_in_words():
    soft = selection_in_words(SelectionConfig(settings={"fraction": 0.1, "softness": 1.0}))
    assert (
        soft.startswith("soft (fraction 0.1, softness 1): a random draw by rank") and "loses less on other text" in soft
    )
    assert 0.5 < float(re.search(r"about ([\d.]+)% of the kept are among the best 10%", soft).group(1)) / 100 < 0.6
    hard = selection_in_words(SelectionConfig("top_fraction", settings={"fraction": 0.2}))
    assert hard == "top_fraction (fraction 0.2): the best units"
    whole = selection_in_words(SelectionConfig(settings={"fraction": 1.0}))
    assert whole == "soft (fraction 1, softness 2): a random draw by rank: the better, the likelier"
    assert "among the best 0.1%" in selection_in_words(SelectionConfig(settings={"fraction": 0.001}))
    with pytest.raises(ValueError, match=r"selection\.softness"):
        selection_in_words(SelectionConfig(settings={"softness": 0.0}))
