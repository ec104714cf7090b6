"""Shards: disjoint, together everything, about equal; files stay whole where they have to."""

import numpy as np
import pytest

from megatron_bliss.data.deal import deal_shards


def test_shards_by_file_keep_files_together_and_are_about_equal():
    files = np.random.default_rng(0).permutation(np.repeat(np.arange(12), np.arange(1, 13) * 10))
    dealt = deal_shards(len(files), 3, by="file", seed=1, files=files)
    np.testing.assert_array_equal(np.sort(np.concatenate(dealt)), np.arange(len(files)))
    owners = [set(files[ids]) for ids in dealt]
    assert sum(map(len, owners)) == 12 and {len(ids) for ids in dealt} <= set(range(250, 271))
    with pytest.raises(ValueError, match="12 source files for 13 shards"):
        deal_shards(len(files), 13, by="file", files=files)


@pytest.mark.parametrize("by", ["random", "range"])
def test_shards_are_disjoint_and_cover_everything(by):
    dealt = deal_shards(103, 5, by=by, seed=4)
    np.testing.assert_array_equal(np.sort(np.concatenate(dealt)), np.arange(103))
    assert {len(ids) for ids in dealt} == {20, 21}
    assert all((np.diff(ids) > 0).all() for ids in dealt)
    if by == "range":
        assert all(a[-1] < b[0] for a, b in zip(dealt, dealt[1:], strict=False))
    else:
        others = deal_shards(103, 5, by=by, seed=5)
        assert any(set(one.tolist()) != set(other.tolist()) for one, other in zip(dealt, others, strict=True))
        np.testing.assert_array_equal(dealt[2], deal_shards(103, 5, by=by, seed=4)[2])


def test_more_shards_than_units():
    with pytest.raises(ValueError, match="6 shards of 5 units"):
        deal_shards(5, 6)
