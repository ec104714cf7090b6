"""megatron-core's own GPTDataset on selections: nothing but the units of the selection, whatever was cached before."""

import numpy as np
import pytest

from megatron_bliss.data.corpus_writer import CorpusWriter
from megatron_bliss.data.deal import deal_shards
from megatron_bliss.data.manifest import adopt_manifest
from megatron_bliss.data.merge import merge_corpora
from megatron_bliss.data.subset import root_units, write_subset
from megatron_bliss.selection.policies import POLICIES
from tests.data.corpora import gpt_dataset, write_named_units

SEQUENCE = 8


def keep(policy, scores, seed=0, **settings):
    """Units that a policy keeps."""
    record = POLICIES[policy]
    return record.keep(scores, record.settings(**settings), seed=seed)


def top(folder, lengths):
    """The best fifth of a shard."""
    shard = write_subset(folder / "X", deal_shards(len(lengths), 2, seed=5)[1], folder / "run", label="shard")
    scores = np.random.default_rng(0).random(len(root_units(shard)))
    return write_subset(shard, keep("top_fraction", scores, fraction=0.4), folder / "run", label="top40")


def gumbel(folder, lengths):
    """A random draw that favours high scores."""
    ids = keep("gumbel", np.arange(len(lengths), dtype=np.float32), fraction=0.3, temperature=10.0, seed=2)
    return write_subset(folder / "X", ids, folder / "run", label="gumbel30")


def merged(folder, lengths):
    """Two selections of one corpus: an index alone."""
    parts = [write_subset(folder / "X", ids, folder / "run", label="part") for ids in ([3, 4, 17], [0, 25, 39])]
    return merge_corpora(parts, folder / "run")


def compact(folder, lengths):
    """A selection with a .bin of its own."""
    return write_subset(folder / "X", np.arange(1, len(lengths), 3), folder / "run", label="third", compact=True)


def merged_copies(folder, lengths):
    """Selections of two corpora: one .bin after the other. The second corpus's tokens are those of the first."""
    write_named_units(folder / "Y", count=len(lengths))
    parts = [
        write_subset(folder / name, ids, folder / "run", label="part") for name, ids in (("X", [5, 6]), ("Y", [9, 30]))
    ]
    return merge_corpora(parts, folder / "run")


CASES = [(top, None), (gumbel, None), (compact, None), (merged, None), (merged_copies, [5, 6, 9, 30])]


@pytest.mark.parametrize("select, expected", CASES)
def test_two_epochs_see_every_chosen_unit_twice_and_no_other(tmp_path, select, expected):
    lengths = write_named_units(tmp_path / "X")  # unit u holds only the token u + 1
    prefix = select(tmp_path, lengths)
    ids = np.array(expected) if expected else np.asarray(root_units(prefix))
    total = 2 * int(lengths[ids].sum())
    samples = (total - 1) // SEQUENCE
    dataset = gpt_dataset(prefix, tmp_path / "cache", samples, SEQUENCE)
    seen = np.concatenate([dataset[number]["tokens"].numpy() for number in range(samples)])
    counts = np.bincount(seen, minlength=len(lengths) + 1)[1:]
    assert set(np.flatnonzero(counts)) <= set(ids.tolist())
    missing = 2 * lengths[ids] - counts[ids]
    assert (missing >= 0).all() and missing.sum() == total - SEQUENCE * samples <= SEQUENCE


def test_selections_under_one_parent_never_share_a_cache(tmp_path):
    with CorpusWriter(tmp_path / "X", 1000) as writer:  # equal lengths: nothing but the name tells selections apart
        writer.add(np.repeat(np.arange(1, 41), 6), np.full(40, 6))
    adopt_manifest(tmp_path / "X", None)
    prefixes, dealt = [], []
    for seed in range(2):
        for ids in (
            keep("top_fraction", np.random.default_rng(seed).random(40), fraction=0.3),
            keep("gumbel", np.zeros(40, np.float32), fraction=0.3, temperature=1.0, seed=seed),
        ):
            prefixes.append(write_subset(tmp_path / "X", ids, tmp_path, label="chosen"))
            dealt.append(ids)
    prefixes.append(merge_corpora(prefixes[:2], tmp_path, label="chosen", drop_repeated=True))
    dealt.append(np.union1d(dealt[0], dealt[1]))
    assert len(set(prefixes)) == len(prefixes)
    for prefix, ids in zip(prefixes, dealt, strict=True):
        dataset = gpt_dataset(prefix, tmp_path / "cache", 6, SEQUENCE)
        seen = {int(token) - 1 for number in range(6) for token in dataset[number]["tokens"]}
        assert seen <= set(ids.tolist()) and len(seen) > 3
    descriptions = list((tmp_path / "cache").glob("*-description.txt"))
    assert len(descriptions) == len(prefixes)
