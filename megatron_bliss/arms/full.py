"""No selection: the target trains on a whole shard, for as many tokens as every other arm's.

A random fifth of a shard teaches what the whole shard does, until it is repeated. So this arm is the control where
selections are trained on more than once: what selection gains has to make up for what repetition costs.
"""

from __future__ import annotations

from megatron_bliss.arms.arm import Arm
from megatron_bliss.arms.random import scores

ARM = Arm("uniform noise, and all units are kept: no selection", scores, keeps_all=True)
