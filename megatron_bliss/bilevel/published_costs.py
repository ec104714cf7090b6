"""What the published upper step (published.py) costs: FLOPs that a stage records, and memory that a plan counts on."""

from __future__ import annotations

from megatron_bliss.bilevel.flops import GRADIENT_PASSES
from megatron_bliss.bilevel.memory import StepShape, block_elements
from megatron_bliss.bilevel.published import SOLVER_STEPS
from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.models.presets import Architecture, flops_per_token, parameter_count
from megatron_bliss.models.score_architecture import ScoreArchitecture

PRODUCT_PASSES = 6
"""Forward passes F of a Hessian product on a retained graph: back through a gradient, which is 3 F."""
VECTORS = 8
"""Vectors as large as the proxy at the peak of a product: the gradient, grad Phi, z, the product, its sums."""
LOGITS, ATTENTION, BLOCKS = 7, 7, 2.5
"""Copies of logits, attention weights and a block's activations in the graph of a gradient and in its product."""
TEACHER_LOGITS = 5
"""More copies of the logits with a KL term."""


def published_flops(
    config: BilevelConfig,
    proxy: Architecture,
    target: Architecture,
    seq_length: int,
    score: ScoreArchitecture | None = None,
) -> float:
    """The bilevel stage of one round, counted in forward passes F over a batch.

    T lower steps and the outer batch take a gradient of the proxy each, a forward pass of the score model and of the
    target; the outer batch three Hessian products and full gradients of both models, sample by sample; and the
    validation gradient. With T = 1 about 30 F, the target's not counted. ``score``: the score model's parts; None: the
    proxy's trunk.
    """
    tokens, batches = config.global_batch_size * seq_length, config.lower_iters + 1
    score, forward = score or ScoreArchitecture(trunk=proxy), flops_per_token(proxy, seq_length)
    teacher = flops_per_token(target, seq_length) if config.kl_weight > 0 else 0.0
    passes = (GRADIENT_PASSES * (batches + 1) + PRODUCT_PASSES * SOLVER_STEPS) * forward
    passes += batches * score.flops_per_token(seq_length) + score.gradient_flops_per_token(seq_length)
    passes += batches * teacher
    validation = GRADIENT_PASSES * config.validation_batch_size * seq_length * forward
    return config.upper_iters * (tokens * passes + validation)


def published_bytes(shape: StepShape, samples: int) -> int:
    """Estimated peak of an upper step over a rank's ``samples``, above what is held between two steps.

    The larger of the Hessian products, whose graph of a graph holds attention weights and logits many times, and the
    gradients of both models for every sample.
    """
    arch, size, tokens = shape.arch, shape.element_size, samples * shape.seq_length
    score = shape.score or ScoreArchitecture(trunk=arch)
    vector, score_vector = parameter_count(arch), score.parameters
    logits = (LOGITS + TEACHER_LOGITS * shape.teacher) * tokens * arch.vocab_size
    attention = ATTENTION * arch.num_attention_heads * shape.seq_length
    blocks = arch.num_layers * tokens * (BLOCKS * block_elements(arch) + attention)
    products = VECTORS * vector + logits + blocks
    gradients = samples * (vector + score_vector) + 2 * vector
    return int(size * max(products, gradients))
