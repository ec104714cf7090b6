"""The selection policies: one module each with its record ``POLICY``. A new one takes its file and its name here."""

from megatron_bliss.config.choices import Choices
from megatron_bliss.selection.policy import Policy

POLICIES: Choices[Policy] = Choices(
    "megatron_bliss.selection.policies",
    "POLICY",
    ("top_fraction", "threshold", "token_budget", "soft", "gumbel", "mixed", "proportional", "floors", "quotas"),
)
