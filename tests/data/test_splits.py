"""Parts of a corpus and blends: bounds, what a blend draws, wrong options."""

from pathlib import Path

import numpy as np
import pytest

from megatron_bliss.config.config import DataConfig
from megatron_bliss.data.indexed import CorpusWriter
from megatron_bliss.data.splits import check_blend, check_sets, parse_split, split_bounds
from megatron_bliss.target.sequences import SequenceSource, TrainingSequences
from tests.targets import grouped, layout


def test_parts_follow_each_other_and_cover_the_corpus() -> None:
    assert parse_split("949,50,1") == pytest.approx((0.949, 0.05, 0.001))
    assert split_bounds(1000, parse_split("949,50,1")) == [949, 999, 1000]
    assert split_bounds(7, parse_split("1,0,0")) == [7, 7, 7]
    assert split_bounds(10, parse_split("0.5,0,0.5")) == [5, 5, 10]


@pytest.mark.parametrize("split", ["", "1", "1,2", "a,b,c", "0,1,1", "1,-1,1", "1,nan,1", "1,2,3,4", "1,inf,0"])
def test_other_splits_are_refused(split: str) -> None:
    with pytest.raises(ValueError, match="expected three numbers for train, validation and test"):
        parse_split(split)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_prefix": ""}, "found no data.validation_prefix, .* data.split"),
        ({"test_prefixes": []}, "found no data.test_prefixes, .* data.split"),
        ({"blend_prefixes": ["a"]}, r"found data.blend_weights \[\] for 1 data.blend_prefixes"),
        ({"blend_prefixes": ["a"], "blend_weights": [1.0]}, "leaves the rest of the sequences to the selection"),
        ({"blend_prefixes": ["a"], "blend_weights": [-0.1]}, "above 0 for each"),
    ],
    ids=["no guide", "nothing held out", "no weight", "nothing left", "negative"],
)
def test_what_a_run_would_lack_is_said_at_its_start(changes: dict, message: str) -> None:
    options = {"train_prefix": "x", "validation_prefix": "v", "test_prefixes": ["t"]}
    with pytest.raises(ValueError, match=message):
        data = DataConfig(**{**options, **changes})
        check_sets(data)
        check_blend(data)
    check_sets(DataConfig(train_prefix="x", split="8,1,1"))


def draw(folder: Path, groups, cache: Path, blend: list[tuple[str, float]], first: int = 0) -> np.ndarray:
    """Tokens [sequences, 8] of the corpus ``one`` and what is blended in, from sequence ``first``."""
    others = [(str(folder / name), share) for name, share in blend]
    source = SequenceSource(str(folder / "one"), vocab_size=100, seq_length=8, num_samples=200, seed=3, blend=others)
    data = TrainingSequences(source, groups, cache_folder=cache)
    return np.concatenate([batch.tokens.numpy() for batch in data.micro_batches(first, 4, 4)])


def test_a_blend_draws_every_corpus_by_its_share_and_resumes_in_place(tmp_path: Path) -> None:
    """Corpora of tokens 0-29, 30-59 and 60-89: a sequence's tokens tell where it is from."""
    for number, name in enumerate(("one", "two", "three")):
        with CorpusWriter(str(tmp_path / name), 100) as writer:
            writer.add(np.tile(30 * number + np.arange(50) % 30, 20), np.full(20, 50))
    blend = [("two", 0.3), ("three", 0.1)]
    with grouped(layout()) as groups:
        whole = draw(tmp_path, groups, tmp_path / "cache", blend)
        again = draw(tmp_path, groups, tmp_path / "cache", blend, first=120)
        alone = draw(tmp_path, groups, tmp_path / "alone", [])
        with pytest.raises(ValueError, match="expected different prefixes"):
            draw(tmp_path, groups, tmp_path / "wrong", [("one", 0.3)])
    sources = whole[:, 0] // 30
    for count in (50, 100, 200):  # after any number of sequences, to within one or two
        shares = np.bincount(sources[:count], minlength=3) / count
        np.testing.assert_allclose(shares, [0.6, 0.3, 0.1], atol=2.01 / count)
    assert (whole // 30 == sources[:, None]).all()
    np.testing.assert_array_equal(again, whole[120:])
    assert len(alone) == 200 and (alone < 30).all()
