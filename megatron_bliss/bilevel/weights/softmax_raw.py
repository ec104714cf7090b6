"""P_i = exp(f_i) / sum_j exp(f_j) over the global batch: the softmax of raw scores."""

from megatron_bliss.bilevel.weights.softmax import coefficients, softmax
from megatron_bliss.bilevel.weights.weighting import Weighting

WEIGHTING = Weighting(
    help="the same of raw scores f",
    weights=softmax,
    coefficients=coefficients,
    sums_to_one=True,
)
