"""w_k = (a_k + u_k) / (1 + sum_j u_j) with a multiplier u_k that grows while set k is worse than the control."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_bliss.bilevel.guide_weightings.guide_weighting import GuideWeighting

if TYPE_CHECKING:
    from megatron_bliss.bilevel.upper_level import UpperLevel


def upper_level(*arguments: Any) -> UpperLevel:
    """Phi with multipliers, and the control that they are learnt against."""
    from megatron_bliss.bilevel.minimax import MinimaxLevel

    return MinimaxLevel(*arguments)


GUIDE_WEIGHTING = GuideWeighting(
    help="the same, plus what it takes that no set is worse than with equal weights of samples, then the best mean",
    upper_level=upper_level,
    options=("minimax_rate", "minimax_slack"),
    against_control=True,
)
