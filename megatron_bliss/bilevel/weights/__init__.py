"""Ways to make weights of scores, equation (2): one module each, by name in one table.

A way is its module ``NAME.py`` with a record ``WEIGHTING`` (weighting.py says what one is), and its name in the table.
"""

from megatron_bliss.config.choices import Choices

WEIGHTINGS = Choices("megatron_bliss.bilevel.weights", "WEIGHTING", ("softmax", "softmax_raw", "sigmoid", "raw"))
"""bilevel.weights → :class:`~megatron_bliss.bilevel.weights.weighting.Weighting`."""
