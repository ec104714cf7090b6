"""The proxy's trunk, a masked mean over tokens and one linear unit, as in the paper."""

from megatron_bliss.models.families.family import (
    DISTIL_OPTIONS,
    START_OPTIONS,
    TABLE_STARTS,
    TRUNK_OPTIONS,
    TRUNK_STARTS,
    Family,
)
from megatron_bliss.models.score_architecture import ScoreArchitecture

FAMILY = Family(
    help="the proxy's trunk with a linear unit on the mean over tokens",
    architecture=lambda config, proxy: ScoreArchitecture(trunk=proxy),
    options=(*TRUNK_OPTIONS, *START_OPTIONS, *DISTIL_OPTIONS),
    starts=(*TRUNK_STARTS, *TABLE_STARTS),
    start_options=START_OPTIONS | DISTIL_OPTIONS,
    distils=True,
)
