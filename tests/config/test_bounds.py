"""Bounds on fields: what they let pass, how they are said, and that one walk reaches every section."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import pytest

from megatron_bliss.config.bounds import Bounds, bounded, bounded_fields, check_bounds


@dataclass(frozen=True)
class Optimizer:
    lr: float = bounded(1e-3, above=0)
    beta: float = bounded(0.9, minimum=0, below=1)
    style: str = "constant"


@dataclass(frozen=True)
class Run:
    batch_size: int = bounded(8, minimum=1)
    limit: int | None = bounded(None, minimum=1)
    weights: list[float] = bounded(default_factory=list, minimum=0, maximum=1)
    shares: dict[str, float] = bounded(default_factory=dict, minimum=0)
    start: float = bounded(0.0)
    optimizer: Optimizer = field(default_factory=Optimizer)
    arms: dict[str, Optimizer] = field(default_factory=lambda: {"mates": Optimizer()})
    words: dict[str, str] = field(default_factory=lambda: {"a": "b"})


def test_defaults_stay_the_fields_own() -> None:
    assert dataclasses.asdict(Run())["optimizer"] == {"lr": 1e-3, "beta": 0.9, "style": "constant"}
    assert Run().weights is not Run().weights


def test_the_walk_reaches_every_bounded_field() -> None:
    names = [name for name, _, _ in bounded_fields(Run(), "run")]
    own = ["batch_size", "limit", "weights", "shares", "start"]
    optimizers = [f"{section}.{name}" for section in ("optimizer", "arms.mates") for name in ("lr", "beta")]
    assert names == [f"run.{name}" for name in own + optimizers]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "found batch_size 0, expected 1 or more"),
        ({"limit": 0}, "found limit 0, expected 1 or more"),
        ({"weights": [1.0, 1.5]}, r"found weights\[1\] 1.5, expected 0 to 1"),
        ({"shares": {"prose": -0.5}}, "found shares.prose -0.5, expected 0 or more"),
        ({"start": -math.inf}, "found start -inf, expected a finite number"),
        ({"optimizer": Optimizer(lr=0.0)}, "found optimizer.lr 0.0, expected more than 0"),
        ({"optimizer": Optimizer(lr=math.nan)}, "found optimizer.lr nan, expected a finite number"),
        ({"optimizer": Optimizer(lr=math.inf)}, "found optimizer.lr inf, expected a finite number"),
        ({"arms": {"mates": Optimizer(beta=1.0)}}, "found arms.mates.beta 1.0, expected 0 or more, less than 1"),
    ],
)
def test_a_value_outside_is_refused_by_name(change: dict, message: str) -> None:
    check_bounds(Run())
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_bounds(Run(**change))


def test_minimum_and_maximum_belong_above_and_below_do_not() -> None:
    closed, open_ = Bounds(minimum=0, maximum=1), Bounds(above=0, below=1)
    assert [closed.accept(value) for value in (-0.1, 0, 1, 1.1)] == [False, True, True, False]
    assert [open_.accept(value) for value in (0, 0.5, 1)] == [False, True, False]
