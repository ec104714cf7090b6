"""Ways to weight the sets of a guide in Phi = sum_k w_k Phi_k: one module each, by name in one table.

A way is its module ``NAME.py`` with a record ``GUIDE_WEIGHTING`` (guide_weighting.py says what one is), and its name in
the table.
"""

from collections.abc import Sequence
from dataclasses import fields

from megatron_bliss.bilevel.guide_weightings.guide_weighting import GuideWeighting
from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.config.choices import Choices

GUIDE_WEIGHTINGS: Choices[GuideWeighting] = Choices(
    "megatron_bliss.bilevel.guide_weightings", "GUIDE_WEIGHTING", ("fixed", "minimax")
)
"""bilevel.guide_weighting → :class:`~megatron_bliss.bilevel.guide_weightings.guide_weighting.GuideWeighting`."""


def check_guide_weighting(config: BilevelConfig, references: Sequence[str]) -> None:
    """ValueError for an option of other ways that is set, or sets to hold against drift without a control: they would
    do nothing."""
    chosen = config.guide_weighting
    for one in fields(BilevelConfig):
        owners = [name for name, record in GUIDE_WEIGHTINGS.items() if one.name in record.options]
        value = getattr(config, one.name)
        if owners and chosen not in owners and value != one.default:
            raise ValueError(
                f"found bilevel.{one.name} {value} with bilevel.guide_weighting {chosen}, expected its default "
                f"{one.default}: it is for {' and '.join(owners)} alone; leave it out, or set bilevel.guide_weighting"
            )
    if references and not GUIDE_WEIGHTINGS[chosen].against_control:
        holding = [name for name, record in GUIDE_WEIGHTINGS.items() if record.against_control]
        raise ValueError(
            f"found data.reference_prefix {', '.join(references)} with bilevel.guide_weighting {chosen}, expected "
            f"{' or '.join(holding)}, which alone holds sets against drift: set it, or leave out data.reference_prefix"
        )
