"""A family of score models: one record that says what f in (1) s = a(f(theta_s; xi)) is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from megatron_bliss.config.models import ScoreConfig
from megatron_bliss.models.presets import Architecture
from megatron_bliss.models.score_architecture import NgramArchitecture, ScoreArchitecture


@dataclass(frozen=True)
class Family:
    """One family."""

    settings: ClassVar[None] = None
    """A family's options are fields of the section ``score``; two families may share some."""
    help: str
    """One line for the command line."""
    architecture: Callable[[ScoreConfig, Architecture], ScoreArchitecture]
    """(the section ``score``, the proxy) -> the parts that a model of this family has."""
    options: tuple[str, ...]
    """Fields of the section that say something to it, of those that do not hold for every family."""
    starts: tuple[str, ...]
    """What score.init_from may be; a family without a trunk or a table ignores that part of it."""
    start_options: Mapping[str, tuple[str, ...]]
    """Option -> the values of score.init_from that it says something to, of those that do not hold for all."""
    has_trunk: bool = True
    """Whether a model of it has the warmed-up proxy's trunk."""
    distils: bool = False
    """Whether it has no table: with a start from counts, it learns the scores of one."""


def ngram_architecture(config: ScoreConfig) -> NgramArchitecture:
    """The table of n-grams that the options describe."""
    return NgramArchitecture(config.ngram_max, config.ngram_buckets, config.ngram_scale)


TRUNK_STARTS = ("proxy", "fresh")
TABLE_STARTS = ("importance", "counts")
START_OPTIONS = {"start_deviation": TABLE_STARTS, "count_smoothing": TABLE_STARTS, "count_prior": ("counts",)}
"""Option -> the values of score.init_from that it says something to."""
DISTIL_OPTIONS = dict.fromkeys(
    ("ngram_max", "ngram_buckets", "distil_iters", "distil_batch_size", "distil_optimizer"), TABLE_STARTS
)
"""The same of a family that has no table of its own."""
TRUNK_OPTIONS = ("head_init_std",)
NGRAM_OPTIONS = ("ngram_max", "ngram_buckets", "ngram_scale", *START_OPTIONS)
