"""Every number of a run has bounds, which its command line obeys; every word that an option takes has its meaning."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest

from megatron_bliss.base.learning_rate import rate_after
from megatron_bliss.base.platform import DTYPES
from megatron_bliss.config import models, platform, stages, training
from megatron_bliss.config.bounds import METADATA_KEY, Bounds
from megatron_bliss.config.training import OptimizerConfig
from megatron_bliss.models.score import ACTIVATIONS
from megatron_bliss.models.transformer import BLOCKS
from megatron_bliss.run.checks import parse_arguments
from megatron_bliss.run.options import TABLES, parse_options

ANY_FINITE_NUMBER = {"selection.threshold", "bilevel.minimax_slack"}
"""Scores have either sign and any size, and so has the lowest that is kept; a slack below 0 asks for a gain."""


def numeric_options(section: Any, prefix: str = "") -> Iterator[tuple[str, set[type], dataclasses.Field]]:
    """(Name, types, field) of every option of a section and those inside that holds numbers, bounded or not."""
    hints = get_type_hints(type(section))
    for field in dataclasses.fields(section):
        name, value = prefix + field.name, getattr(section, field.name)
        types = set(leaves(hints[field.name]))
        if types & {int, float}:
            yield name, types, field
        inside = value if isinstance(value, Mapping) else {"": value}
        for key, entry in inside.items():
            if dataclasses.is_dataclass(entry):
                yield from numeric_options(entry, f"{name}.{key}." if key else f"{name}.")


def leaves(hint: Any) -> Iterator[Any]:
    """The types that an annotation is made of: of dict[str, float] | None str, float and NoneType."""
    arguments = get_args(hint)
    for argument in arguments:
        yield from leaves(argument)
    if not arguments:
        yield hint


def all_options() -> Iterator[tuple[str, set[type], dataclasses.Field]]:
    """Those of every section, of every arm, and of every record that one option chooses from."""
    yield from numeric_options(parse_options([]))
    for option, table in TABLES.items():
        section, _, chooses_one = option.partition(".")
        for record in table.values() if chooses_one else ():
            if record.settings is not None:
                yield from numeric_options(record.settings(), f"{section}.")


OPTIONS = {name: (types, field) for name, types, field in all_options()}


def values_outside(bounds: Bounds, types: set[type]) -> Iterator[float]:
    """The nearest value below that is not allowed, and the nearest above where there is a bound above."""
    step = 1 if float not in types else 1e-3
    if bounds == Bounds():
        yield math.nan
    if bounds.minimum is not None or bounds.above is not None:
        yield bounds.above if bounds.minimum is None else bounds.minimum - step
    if bounds.maximum is not None or bounds.below is not None:
        yield bounds.below if bounds.maximum is None else bounds.maximum + step


def written(value: float, types: set[type], field: dataclasses.Field) -> str:
    """A value as the command line takes it, inside a list or a dict where the option is one."""
    text = ".nan" if math.isnan(value) else str(value)
    if field.default_factory is dict:
        return f"{{a: {text}}}"
    return f"[{text}]" if field.default_factory is list else text


def test_the_walk_finds_options_of_every_kind() -> None:
    some = {"seed", "round", "data.blend_weights", "selection.quotas", "proxy.warmup_optimizer.lr", "target.num_layers"}
    some |= {"selection.threshold", "selection.tokens", "selection.epoch_warning", "baselines.mates.lr"}
    assert some <= set(OPTIONS) and "bilevel.compile" not in OPTIONS and "data.split" not in OPTIONS


@pytest.mark.parametrize("name", OPTIONS)
def test_every_number_has_bounds(name: str) -> None:
    bounds = OPTIONS[name][1].metadata.get(METADATA_KEY)
    assert bounds is not None, f"{name} takes any number: say which make sense, by bounded()"
    assert (bounds == Bounds()) == (name in ANY_FINITE_NUMBER)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_number_outside_its_bounds_is_refused_by_name(name: str) -> None:
    types, field = OPTIONS[name]
    for value in values_outside(field.metadata[METADATA_KEY], types):
        number = float(value) if float in types else value
        with pytest.raises(ValueError, match=rf"^found {name}(\[0\]|\.a)? {number}, expected "):
            parse_arguments([f"--{name}={written(value, types, field)}"])


def test_the_help_shows_bounds(capsys) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "T, lower-level steps of the proxy per upper-level step. [1 or more] (type: int, default: 1)" in text
    assert "Decay of the second moment. [0 or more, less than 1] (type: float, default: 0.95)" in text


@pytest.mark.parametrize(
    "words, table",
    [
        (platform.Precision, DTYPES),
        (models.Family, BLOCKS),
        (models.Activation, ACTIVATIONS),
    ],
    ids=["precision", "family", "activation"],
)
def test_every_word_has_a_meaning_and_none_is_left_over(words: Any, table: Mapping) -> None:
    assert set(get_args(words)) == set(table)


def test_every_decay_is_one_that_the_schedule_knows() -> None:
    """To min_lr at the end of the run, but for constant."""
    wsd = OptimizerConfig(lr=2.0, min_lr=1.0, lr_decay_style="WSD", lr_wsd_decay_iters=5)
    ends = {style: replace(wsd, lr_decay_style=style) for style in get_args(training.DecayStyle)}
    ends |= {f"WSD {style}": replace(wsd, lr_wsd_decay_style=style) for style in get_args(training.WsdDecayStyle)}
    assert {name for name, one in ends.items() if rate_after(one, 10, 10) != 1.0} == {"constant"}
    assert set(get_args(training.BranchDecayStyle)) <= set(get_args(training.WsdDecayStyle))


def test_a_stage_alone_is_the_warm_up_or_one_of_a_round() -> None:
    assert get_args(stages.Stage) == ("warmup", *stages.ROUND_STAGES)
