"""w_k = a_k: the guide's own weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_bliss.bilevel.guide_weightings.guide_weighting import GuideWeighting

if TYPE_CHECKING:
    from megatron_bliss.bilevel.upper_level import UpperLevel


def upper_level(*arguments: Any) -> UpperLevel:
    """Phi with fixed weights."""
    from megatron_bliss.bilevel.upper_level import UpperLevel

    return UpperLevel(*arguments)


GUIDE_WEIGHTING = GuideWeighting(help="by data.guide_weights", upper_level=upper_level)
