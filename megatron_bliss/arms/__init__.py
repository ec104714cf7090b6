"""The ways to score units: one file and one record (arm.py) each."""

from megatron_bliss.arms.arm import Arm
from megatron_bliss.config.choices import Choices

ARMS: Choices[Arm] = Choices(
    "megatron_bliss.arms",
    "ARM",
    (
        *("bliss", "random", "dsir", "mates"),
        *("perplexity", "classifier", "external", "full"),
        *("identity", "single_level", "published", "mates_kl"),
    ),
)
"""The arms by the names that ``--arms`` knows."""
