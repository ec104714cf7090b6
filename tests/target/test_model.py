"""The target is the architecture it says, causal, and the same model at every parallel layout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_bliss.models.presets import Architecture, parameter_count
from megatron_bliss.target.layers import VocabularyParallelCrossEntropy, softmax_
from megatron_bliss.target.model import build_target, output_weight, padded_vocab_size
from tests.distributed import run_distributed
from tests.targets import LLAMA, NEOX, SEQ_LENGTH, VOCAB_SIZE, grouped, last_hidden_states, layout, make_target

ARCHITECTURES = pytest.mark.parametrize("architecture", [NEOX, LLAMA], ids=["neox", "llama"])


def some_tokens(rows: int = 5, width: int = 13) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (rows, width), generator=torch.Generator().manual_seed(0))


def target_logits(target, tokens, groups) -> torch.Tensor:
    return (
        last_hidden_states(target, tokens, groups, micro_batch_size=2) @ output_weight(target, groups, VOCAB_SIZE).t()
    )


def randomized(target) -> dict[str, torch.Tensor]:
    """Give every weight (norms and biases, too) random numbers, and return them by name."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in target[0].parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return {name: parameter.detach().double() for name, parameter in target[0].named_parameters()}


def rotate(x: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """Rotary embedding as GPT-NeoX and LLaMA define it, on x [b, n, s, d]: the first channels turn, in two halves."""
    size = int(architecture.kv_channels * architecture.rotary_percent)
    frequencies = architecture.rotary_base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.outer(torch.arange(x.shape[2], dtype=torch.float64), frequencies).repeat(1, 2)
    turned, kept = x[..., :size], x[..., size:]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat((turned * angles.cos() + torch.cat((-second, first), -1) * angles.sin(), kept), -1)


def reference_logits(
    weights: dict[str, torch.Tensor], tokens: torch.Tensor, architecture: Architecture
) -> torch.Tensor:
    """The published formulas of GPT-NeoX and LLaMA in fp64, with the weights in megatron-core's layout."""
    neox = architecture.architecture == "gpt_neox"

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x, name):
        weight, shape = weights[f"{name}.weight"], (architecture.hidden_size,)
        if neox:
            return F.layer_norm(x, shape, weight, weights[f"{name}.bias"], architecture.norm_epsilon)
        return x * (x.square().mean(-1, keepdim=True) + architecture.norm_epsilon).rsqrt() * weight

    def attention(x, name):
        groups, size = architecture.num_query_groups, architecture.kv_channels
        per_group = architecture.num_attention_heads // groups
        packed = linear(x, f"{name}.linear_qkv").unflatten(-1, (groups, per_group + 2, size))
        query, key, value = packed.split((per_group, 1, 1), dim=-2)
        query, key, value = (
            part.expand(-1, -1, -1, per_group, -1).flatten(2, 3).transpose(1, 2) for part in (query, key, value)
        )
        scores = rotate(query, architecture) @ rotate(key, architecture).transpose(-1, -2) / size**0.5
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weighted = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value
        return linear(weighted.transpose(1, 2).flatten(2), f"{name}.linear_proj")

    def mlp(x, name):
        inner = linear(x, f"{name}.linear_fc1")
        if not neox:
            gate, inner = inner.chunk(2, dim=-1)
            return linear(F.silu(gate) * inner, f"{name}.linear_fc2")
        return linear(F.gelu(inner), f"{name}.linear_fc2")

    x = weights["embedding.word_embeddings.weight"][tokens]
    for i in range(architecture.num_layers):
        layer = f"decoder.layers.{i}"
        first = attention(norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attention")
        y = x if neox else x + first
        x = y + mlp(norm(y, f"{layer}.pre_mlp_layernorm"), f"{layer}.mlp") + (first if neox else 0.0)
    output = weights.get("output_layer.weight", weights["embedding.word_embeddings.weight"])[: architecture.vocab_size]
    return norm(x, "decoder.final_layernorm") @ output.t()


@ARCHITECTURES
@torch.no_grad()
def test_logits_are_the_published_formula(architecture):
    with grouped(layout()) as groups:
        target = make_target(layout(), groups, architecture)
        weights = randomized(target)
        logits = target_logits(target, some_tokens(), groups)
    expected = reference_logits(weights, some_tokens(), architecture)
    assert expected.std() > 1
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=1e-4)


@ARCHITECTURES
def test_a_token_moves_no_logit_before_it(architecture):
    """Changing token t moves no logit before t, and does move those from t on."""
    with grouped(layout()) as groups:
        target = make_target(layout(), groups, architecture)
        randomized(target)
        tokens = some_tokens(1)
        logits = target_logits(target, tokens, groups)
        for t in range(tokens.shape[1]):
            changed = tokens.clone()
            changed[0, t] = (changed[0, t] + 1) % VOCAB_SIZE
            moved = (target_logits(target, changed, groups) != logits).any(-1)[0]
            assert moved.tolist() == [False] * t + [True] * (tokens.shape[1] - t)


@ARCHITECTURES
def test_it_has_the_parameters_that_the_preset_counts(architecture):
    with grouped(layout()) as groups:
        target = make_target(layout(), groups, architecture)
        count = sum(parameter.numel() for parameter in target[0].parameters())
    matrices = 2 if architecture.untie_embeddings_and_output_weights else 1
    padding = matrices * (padded_vocab_size(VOCAB_SIZE, 128) - VOCAB_SIZE) * architecture.hidden_size
    assert count - padding == parameter_count(architecture)


@ARCHITECTURES
def test_initial_weights_follow_the_seed_and_their_scale(architecture):
    with grouped(layout()) as groups:
        first, again, other = (make_target(layout(), groups, architecture, seed)[0] for seed in (3, 3, 4))
    for (name, one), same, different in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(one, same), name
        if one.dim() == 1:
            assert torch.equal(one, torch.full_like(one, 0.0 if name.endswith("bias") else 1.0)), name
            continue
        assert not torch.equal(one, different), name
        real = one[:VOCAB_SIZE] if one.shape[0] == padded_vocab_size(VOCAB_SIZE, 128) else one
        scaled = "linear_proj" in name or "linear_fc2" in name
        assert real.std().item() == pytest.approx(0.02 / (2 if scaled else 1), rel=0.1), name  # 2 = sqrt(2 x layers)
        assert torch.equal(one[len(real) :], torch.zeros_like(one[len(real) :])), name


def sharded_logits(configs: list) -> list[np.ndarray]:
    """Single-process logits of the same tokens at each layout."""
    outcomes = []
    for config, architecture in configs:
        with grouped(config) as groups:
            target = make_target(config, groups, architecture)
            outcomes.append(target_logits(target, some_tokens(), groups).numpy())
    return outcomes


@pytest.fixture(scope="module")
def two_ranks() -> list[dict]:
    """One start of two ranks for all checks of this file."""
    return run_distributed(checks_on_two_ranks, 2, LAYOUTS)


LAYOUTS = [(layout(*size), a) for size in ((2, 1, False), (2, 1, True), (1, 2, False)) for a in (NEOX, LLAMA)]
INTERLEAVED = replace(layout(1, 2), virtual_pipeline_model_parallel_size=2)
LAYOUTS += [(INTERLEAVED, replace(architecture, num_layers=4)) for architecture in (NEOX, LLAMA)]
SMALL_VOCAB_SIZE = 50
"""Of 128 padded rows the second of two ranks holds padding only."""


def checks_on_two_ranks(rank: int, world_size: int, cases: list) -> dict:
    return {
        "logits": sharded_logits(cases),
        "refusals": refusals(),
        "cross entropy": [cross_entropy_halves(rank, vocab_size) for vocab_size in (VOCAB_SIZE, SMALL_VOCAB_SIZE)],
    }


def test_logits_do_not_depend_on_the_layout(two_ranks):
    architectures = list(dict.fromkeys(architecture for _, architecture in LAYOUTS))
    single = dict(zip(architectures, sharded_logits([(layout(), a) for a in architectures]), strict=True))
    for outcome in two_ranks:
        for (config, architecture), logits in zip(LAYOUTS, outcome["logits"], strict=True):
            np.testing.assert_allclose(logits, single[architecture], atol=2e-6, rtol=0, err_msg=str(config))


def test_cross_entropy_and_its_gradient_are_torchs_without_the_padding():
    with grouped(layout()) as groups:
        logits = torch.randn(3, 4, 128, requires_grad=True) * 5
        logits.retain_grad()
        labels = torch.randint(VOCAB_SIZE, (3, 4))
        own = VocabularyParallelCrossEntropy.apply(
            logits.clone(), labels, VOCAB_SIZE, groups.tensor_model_parallel_group
        )
        expected = F.cross_entropy(logits[..., :VOCAB_SIZE].flatten(0, 1), labels.flatten(), reduction="none").view(
            3, 4
        )
        torch.testing.assert_close(own, expected)
        weights = torch.rand(3, 4)
        (gradient,) = torch.autograd.grad((own * weights).sum(), logits, retain_graph=True)
        (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), logits)
    torch.testing.assert_close(gradient, expected_gradient)
    assert not gradient[..., VOCAB_SIZE:].any()


def test_softmax_in_place_gives_the_normalizer():
    values = 20 * torch.randn(2, 37, 20, generator=torch.Generator().manual_seed(0))
    values[..., 17:] = -torch.inf
    expected, memory = values.clone(), values.data_ptr()
    normalizer = softmax_(values)
    assert values.data_ptr() == memory and not values[..., 17:].any()
    torch.testing.assert_close(values, expected.softmax(-1))
    torch.testing.assert_close(normalizer, expected.logsumexp(-1))


def cross_entropy_halves(rank: int, vocab_size: int) -> tuple[np.ndarray, ...]:
    """(losses, this rank's gradient) of two ranks with half of the logits each, and torch's of the whole."""
    generator = torch.Generator().manual_seed(2)
    logits = 5 * torch.randn(3, 4, 128, generator=generator)
    labels, weights = torch.randint(vocab_size, (3, 4), generator=generator), torch.rand(3, 4, generator=generator)
    with grouped(layout(2)) as groups:
        half = logits[..., 64 * rank : 64 * (rank + 1)].clone().requires_grad_()
        losses = VocabularyParallelCrossEntropy.apply(
            half.clone(), labels, vocab_size, groups.tensor_model_parallel_group
        )
        (gradient,) = torch.autograd.grad((losses * weights).sum(), half)
    logits.requires_grad_()
    whole = F.cross_entropy(logits[..., :vocab_size].transpose(1, 2), labels, reduction="none")
    (expected,) = torch.autograd.grad((whole * weights).sum(), logits)
    parts = losses, gradient, whole, expected[..., 64 * rank : 64 * (rank + 1)]
    return tuple(part.detach().numpy() for part in parts)


def test_cross_entropy_in_two_halves_is_torchs(two_ranks):
    for outcome in two_ranks:
        for losses, gradient, expected_losses, expected_gradient in outcome["cross entropy"]:
            np.testing.assert_allclose(losses, expected_losses, atol=1e-5)
            np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)
    assert not two_ranks[1]["cross entropy"][1][1].any()  # padding has no gradient


def refusals() -> list[str]:
    messages = []
    with grouped(layout(2)) as groups:
        for config, architecture, length in (
            (replace(layout(2), make_vocab_size_divisible_by=101), NEOX, SEQ_LENGTH),
            (layout(2), replace(NEOX, num_attention_heads=1, num_query_groups=1), SEQ_LENGTH),
            (layout(2), replace(LLAMA, num_query_groups=1), SEQ_LENGTH),
            (layout(2), replace(NEOX, ffn_hidden_size=63), SEQ_LENGTH),
            (layout(2, 1, True), NEOX, 15),
            (layout(1, 3), NEOX, SEQ_LENGTH),
            (replace(layout(1, 2), virtual_pipeline_model_parallel_size=2), NEOX, SEQ_LENGTH),
        ):
            with pytest.raises(ValueError) as error:
                build_target(config, architecture, groups, seq_length=length, params_dtype=torch.float32, seed=0)
            messages.append(str(error.value))
    return messages


def test_sizes_that_do_not_divide_are_refused(two_ranks):
    for messages in (outcome["refusals"] for outcome in two_ranks):
        for message, option in zip(
            messages,
            (
                "make_vocab_size_divisible_by=101",
                "num_attention_heads=1",
                "num_query_groups=1",
                "ffn_hidden_size=63",
                "seq_length",
                "num_layers=2",
                "num_layers=2",
            ),
            strict=True,
        ):
            assert f"found {'data' if option == 'seq_length' else 'target'}.{option}" in message
            assert "change one of the two" in message


@pytest.mark.parametrize(
    "options, message",
    [
        ({"virtual_pipeline_model_parallel_size": 2}, "with target.pipeline_model_parallel_size=1, expected 1"),
        ({"virtual_pipeline_model_parallel_size": 0}, "virtual_pipeline_model_parallel_size=0"),
        ({"recompute_granularity": "full", "recompute_num_layers": 3}, "recompute_num_layers=3, expected a divisor of"),
        (
            {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3},
            "recompute_num_layers=3, expected at most the 2 layers",
        ),
        ({"recompute_granularity": "selective", "recompute_modules": ["moe"]}, r"recompute_modules=\['moe'\]"),
        ({"transformer_impl": "transformer_engine"}, "transformer_impl=transformer_engine on cpu"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with grouped(layout()) as groups, pytest.raises(ValueError, match=message):
        make_target(replace(layout(), **options), groups)


def test_recomputation_keeps_fewer_activations():
    """What autograd holds between forward and backward pass shrinks from none to selective to full."""
    held = {}
    for granularity in ("none", "selective", "full"):
        config = replace(layout(), recompute_granularity=granularity, recompute_modules=["core_attn", "mlp"])
        with grouped(config) as groups:
            target = make_target(config, groups)
            seen: dict[int, int] = {}

            def keep(tensor, seen=seen):
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            tokens = some_tokens(4, 16)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                losses = target[0](tokens, tokens)
            held[granularity] = sum(seen.values())
            losses.sum().backward()
    assert held["none"] > held["selective"] > held["full"]
