"""What a way to weight the sets of a guide is.

No module of these imports torch before it computes: the options read their names and help lines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from megatron_bliss.bilevel.upper_level import UpperLevel


@dataclass(frozen=True)
class GuideWeighting:
    """One way to weight the sets of a guide."""

    settings: ClassVar[None] = None
    """Its options are fields of the section ``bilevel``."""
    help: str
    """One line for the command line."""
    upper_level: Callable[..., UpperLevel]
    """The arguments of ``UpperLevel`` -> one whose weights are of this kind."""
    options: tuple[str, ...] = ()
    """Fields of the section that say something to it, of those that do not hold for every way."""
    against_control: bool = False
    """Whether a control proxy is trained beside the proxy, and every set of the guide and of data.reference_prefix is
    held against it."""
