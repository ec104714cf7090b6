"""Small random models, batches and teachers for the engine's tests."""

import torch

from megatron_bliss.bilevel.head import Teacher
from megatron_bliss.bilevel.objective import Loss, Objective
from megatron_bliss.data.batches import Batch
from megatron_bliss.models.presets import Architecture
from megatron_bliss.models.score import TrunkScoreModel
from megatron_bliss.models.transformer import build_lm


def architecture(family="gpt_neox", *, tied=False, vocab=23, width=12, heads=2, groups=None, layers=2, ffn=20):
    return Architecture(
        family,
        layers,
        width,
        ffn,
        heads,
        groups or heads,
        vocab,
        rotary_percent=0.5 if family == "gpt_neox" else 1.0,
        untie_embeddings_and_output_weights=not tied,
        init_method_std=0.3,
    )


@torch.no_grad()
def jitter(model, seed=0):
    """Norm weights and biases away from 1 and 0, so that no term vanishes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def language_model(*args, seed=0, dtype=torch.float64, **sizes):
    return jitter(build_lm(architecture(*args, **sizes), seed=seed, dtype=dtype), seed)


def score_model(*args, seed=0, dtype=torch.float64, activation="sigmoid", **sizes):
    return jitter(TrunkScoreModel(architecture(*args, **sizes), activation, 1.0, seed, dtype=dtype), seed)


def random_batch(samples, length, vocab=23, *, seed=0, labelled=0.7):
    """Ragged lengths, a ragged label mask, and (of two samples or more) one sample with a single label."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (samples,), generator=generator)
    lengths[0] = length
    columns = torch.arange(length)
    real = columns < lengths[:, None]
    tokens = torch.randint(0, vocab, (samples, length), generator=generator) * real
    mask = real & (torch.rand(samples, length, generator=generator) < labelled) & (columns > 0)
    mask[-1] = columns == lengths[-1] - 1
    return Batch(tokens, mask, lengths, 100 + torch.arange(samples))


def random_teacher(samples, length, vocab=23, width=7, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = (samples, length, width), (vocab, width)
    return Teacher(*(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes))


def lower_loss(batch, weights, *, teacher=None, num_samples=0, **options):
    """G (eq. 3) on a batch, with the options of ``reference.lower``; n is the batch's size where nothing is said."""
    return Loss(Objective(num_samples=num_samples or len(batch), **options), batch, weights, teacher)


def random_weights(samples, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn(samples, generator=generator, dtype=torch.float64), 0).to(dtype)


def random_vector(model, seed=0):
    parameter = next(model.parameters())
    size = sum(p.numel() for p in model.parameters())
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(parameter.dtype)


def relative_error(found, expected):
    """Largest difference over the largest expected magnitude."""
    return float((found.detach() - expected.detach()).abs().max() / expected.detach().abs().max())
