"""Parts of a corpus and blends: bounds, wrong options."""

import pytest

from megatron_bliss.config.data import DataConfig
from megatron_bliss.data.splits import check_blend, check_set_names, check_sets, parse_split, split_bounds


def test_parts_follow_each_other_and_cover_the_corpus() -> None:
    assert parse_split("949,50,1") == pytest.approx((0.949, 0.05, 0.001))
    assert split_bounds(1000, parse_split("949,50,1")) == [949, 999, 1000]
    assert split_bounds(7, parse_split("1,0,0")) == [7, 7, 7]
    assert split_bounds(10, parse_split("0.5,0,0.5")) == [5, 5, 10]


@pytest.mark.parametrize("split", ["", "1", "1,2", "a,b,c", "0,1,1", "1,-1,1", "1,nan,1", "1,2,3,4", "1,inf,0"])
def test_splits_that_are_not_three_shares_are_refused(split: str) -> None:
    with pytest.raises(ValueError, match="expected three numbers for train, validation and test"):
        parse_split(split)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_prefix": ""}, "found no data.validation_prefix, .* data.split"),
        ({"test_prefixes": []}, "found no data.test_prefixes, .* data.split"),
        ({"blend_prefixes": ["a"]}, r"found data.blend_weights \[\] for 1 data.blend_prefixes"),
        ({"blend_prefixes": ["a"], "blend_weights": [1.0]}, "leaves the rest of the sequences to the selection"),
    ],
    ids=["no guide", "nothing held out", "no weight", "nothing left"],
)
def test_what_a_run_would_lack_is_said_at_its_start(changes: dict, message: str) -> None:
    options = {"train_prefix": "x", "validation_prefix": "v", "test_prefixes": ["t"]}
    with pytest.raises(ValueError, match=message):
        data = DataConfig(**{**options, **changes})
        check_sets(data)
        check_blend(data)
    check_sets(DataConfig(train_prefix="x", split="8,1,1"))


@pytest.mark.parametrize(("tests", "others"), [(["a/x", "b/x"], []), (["a/x"], ["a/x"]), (["a/y"], ["a/x", "b/x"])])
def test_two_held_out_sets_of_one_name_are_refused(tests: list[str], others: list[str]) -> None:
    with pytest.raises(ValueError, match="found '[ab]/x' and '[ab]/x' in data.test_prefixes and data.other_prefixes"):
        check_set_names(DataConfig(test_prefixes=tests, other_prefixes=others))
    check_set_names(DataConfig(test_prefixes=["a/x", "a/y"], other_prefixes=["a/z"]))
