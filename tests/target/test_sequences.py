"""A blend draws every corpus by its share, whatever was drawn before."""

from pathlib import Path

import numpy as np
import pytest

from megatron_bliss.data.corpus_writer import CorpusWriter
from megatron_bliss.target.sequences import SequenceSource, TrainingSequences
from tests.targets import grouped, layout


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
