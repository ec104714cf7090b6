"""What a study's file means, and what is refused in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_bliss.study.description import Study, read_study
from megatron_bliss.study.options import merged

GIVEN = {"arms": ["bliss", "random"], "seeds": [3, 1]}


def read(tmp_path: Path, content: object, **options) -> Study:
    path = tmp_path / "study.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return read_study(path, **options)


def test_what_is_not_said_has_a_default(tmp_path: Path) -> None:
    study = read(tmp_path, GIVEN)
    assert (study.arms, study.seeds, study.base, study.variants) == (["bliss", "random"], [3, 1], {}, {"base": {}})
    assert (study.control, study.processes) == ("base/random", 1)
    assert study.is_control("base", "random") and not study.is_control("base", "bliss")
    assert yaml.safe_load(study.to_yaml())["control"] == "base/random"


def test_options_are_nested_and_stand_over_the_file_they_begin_from(tmp_path: Path) -> None:
    begun = {"seed": 5, "arms": ["mates"], "rounds": 4, "selection": {"fraction": 0.2, "policy": "soft"}}
    (tmp_path / "begun.yaml").write_text(yaml.safe_dump(begun))
    over = {"rounds": 3, "selection.policy": "gumbel"}
    (tmp_path / "over.yaml").write_text(yaml.safe_dump(over))
    base = {"config": ["begun.yaml", "over.yaml"], "rounds": 2, "selection.fraction": 0.1}
    variants = {"a": None, "b": {"selection": {"fraction": 0.3}, "arms": ["bliss"]}}
    study = read(tmp_path, {**GIVEN, "base": base, "variants": variants}, seeds=[7])
    assert study.base == {"rounds": 2, "selection": {"fraction": 0.1, "policy": "gumbel"}}
    assert study.variants == {"a": {}, "b": {"selection": {"fraction": 0.3}, "arms": ["bliss"]}}
    assert study.arms_of("a") == ["bliss", "random"] and study.arms_of("b") == ["bliss"] and study.seeds == [7]


def test_the_control_is_the_first_arm_of_its_name_or_the_one_named(tmp_path: Path) -> None:
    variants = {"a": {"arms": ["bliss"]}, "b": {}, "c": {}}
    for given, meant in {"random": "b/random", "c/random": "c/random", "bliss": "a/bliss"}.items():
        assert read(tmp_path, {**GIVEN, "variants": variants, "control": given}).control == meant


def test_arms_that_train_on_are_variants_with_the_options_of_the_control(tmp_path: Path) -> None:
    variants = {"a": {"arms": ["bliss"]}, "b": {"selection.fraction": 0.3, "rounds": 1}}
    longer = {"random": {"pretraining.train_iters": 9, "selection.fraction": 0.6}, "dsir": {"rounds": 2}}
    study = read(tmp_path, {**GIVEN, "variants": variants, "longer": longer})
    assert study.longer == {"random": "longer-random/random", "dsir": "longer-dsir/dsir"}
    assert study.variants["longer-random"] == {
        "selection": {"fraction": 0.6},
        "rounds": 1,
        "pretraining": {"train_iters": 9},
        "arms": ["random"],
    }
    assert study.variants["longer-dsir"] == {"selection": {"fraction": 0.3}, "rounds": 2, "arms": ["dsir"]}
    assert study.is_reference("b", "random") and study.is_reference("longer-random", "random")
    assert not study.is_reference("longer-dsir", "dsir") and not study.is_reference("b", "bliss")


def test_all_arms_that_look_at_something_can_be_held_against_each_other(tmp_path: Path) -> None:
    variants = {"a": {"arms": ["bliss"]}, "b": {}}
    longer = {"random": {"rounds": 2}}
    study = read(tmp_path, {**GIVEN, "variants": variants, "longer": longer, "agreement": True})
    assert study.agreement == ["a/bliss", "b/bliss"]
    assert read(tmp_path, {**GIVEN, "variants": variants}).agreement == []
    assert read(tmp_path, {**GIVEN, "agreement": ["base/random", "base/bliss"]}).agreement == [
        "base/random",
        "base/bliss",
    ]


def test_a_sweep_makes_variants_and_runs_a_control_without_part_in_it_once(tmp_path: Path) -> None:
    study = read(tmp_path, {**GIVEN, "sweep": {"bilevel.upper_iters": [25, 100]}})
    assert study.variants == {
        "upper_iters_25": {"bilevel": {"upper_iters": 25}, "arms": ["bliss", "random"]},
        "upper_iters_100": {"bilevel": {"upper_iters": 100}, "arms": ["bliss"]},
    }
    assert study.control == "upper_iters_25/random"
    assert study.sweep == {"option": "bilevel.upper_iters", "series": {"upper_iters_25": "", "upper_iters_100": ""}}
    variants = {"a": {"selection.policy": "soft"}, "b": {"arms": ["bliss"]}}
    study = read(tmp_path, {**GIVEN, "variants": variants, "sweep": {"selection.fraction": [0.1, 0.4]}})
    assert list(study.variants) == ["a_fraction_0.1", "a_fraction_0.4", "b_fraction_0.1", "b_fraction_0.4"]
    assert study.variants["a_fraction_0.4"]["selection"] == {"policy": "soft", "fraction": 0.4}
    assert study.arms_of("a_fraction_0.4") == ["bliss", "random"] and study.arms_of("b_fraction_0.4") == ["bliss"]
    assert study.sweep["series"]["b_fraction_0.4"] == "b" and read(tmp_path, GIVEN).sweep == {}


def test_merging_leaves_both_as_they_were() -> None:
    first, second = {"a": {"x": 1, "y": {"z": 2}}, "b": 3}, {"a": {"y": {"z": 4, "w": 5}}, "b": {"c": 6}}
    assert merged(first, second) == {"a": {"x": 1, "y": {"z": 4, "w": 5}}, "b": {"c": 6}}
    assert first == {"a": {"x": 1, "y": {"z": 2}}, "b": 3} and second["a"] == {"y": {"z": 4, "w": 5}}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"arm": []}, "found arm in .*expected only base, arms, variants"),
        ({"arms": None}, "found None as arms in .*expected a list of different arms"),
        ({"arms": ["bliss", "bliss"]}, "list of different arms"),
        ({"seeds": None}, "found seeds None"),
        ({"seeds": [1, 1]}, "expected each of them once"),
        ({"seeds": [1.5]}, "expected whole numbers"),
        ({"seeds": [True]}, "expected whole numbers"),
        ({"variants": ["a"]}, "found variants"),
        ({"variants": {"a/b": {}}}, "found a variant 'a/b'"),
        ({"variants": {0.2: {}}}, "found a variant 0.2 .*quoted"),
        ({"variants": {"a": 3}}, "found 3 as variant a in .*expected options"),
        ({"variants": {"a": {"seed": 3}}}, "found seed in variant a .*the study sets it"),
        ({"variants": {"a": {"arms": "bliss"}}}, "found 'bliss' as arms of variant a"),
        ({"base": {"run_folder": "x"}}, "found run_folder in base .*take it out"),
        ({"base": {"arms": ["bliss"]}}, "found arms in base"),
        ({"base": {"config": "nowhere.yaml"}}, "found no file .*nowhere.yaml"),
        (
            {"control": "dsir"},
            r"found control 'dsir' .*expected an arm that the study runs \(base/bliss, base/random\)",
        ),
        ({"longer": ["random"]}, "found longer .*expected arms, random among them, each with the options"),
        ({"longer": {"bliss": {}}}, "found longer .*expected arms, random among them"),
        ({"longer": {"random": 3}}, "found 3 as longer of random in .*expected options"),
        ({"longer": {"random": {"arms": ["bliss"]}}}, "found arms in longer of random .*take it out"),
        ({"variants": {"longer-random": {}}}, "found a variant 'longer-random' .*no longer- before it"),
        ({"agreement": ["base/bliss"]}, r"expected two or more that the study runs \(base/bliss, base/random\)"),
        ({"agreement": ["base/bliss", "base/dsir"]}, "found agreement .*expected two or more"),
        ({"agreement": True}, r"found agreement \['base/bliss'\]"),
        ({"agreement": "bliss"}, "found 'bliss' as agreement .*expected a list of different VARIANT/ARM, or true"),
        (
            {"sweep": {"bilevel.upper_iters": [25]}},
            "found sweep .*one option with two or more different values",
        ),
        ({"sweep": {"bilevel.upper_iters": [25, 25]}}, "found sweep"),
        ({"sweep": {"bilevel.upper_iters": [25, 50], "rounds": [1, 2]}}, "found sweep"),
        ({"sweep": {"bilevel.upper_iters": 25}}, "found sweep"),
        ({"sweep": {"seed": [1, 2]}}, "found sweep of seed .*the study sets seed"),
        ({"sweep": {"data.train_prefix": ["a/b", "c"]}}, "found a variant 'train_prefix_a/b'"),
        ({"processes": 0}, "found processes 0"),
        ({"processes": True}, "found processes True"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, {**GIVEN, **change})


@pytest.mark.parametrize("content, message", [("- bliss\n", "found no keys"), ("a: [\n", "is not valid YAML")])
def test_a_file_without_options_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, content)
