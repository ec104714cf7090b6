"""The small language model: causal, the same by every path, the family's formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_bliss.config.models import ModelConfig
from megatron_bliss.models.operations import rotary_table, rotate
from megatron_bliss.models.transformer import build_lm
from tests.bilevel.problems import architecture, language_model

FAMILIES = {"gpt_neox": 4, "llama": 2}


def model_and_tokens(family, **options):
    model = language_model(family, heads=4, groups=FAMILIES[family], **options)
    return model, torch.randint(0, 23, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_changing_a_token_changes_no_logit_before_it(family):
    model, tokens = model_and_tokens(family)
    before, hidden = model(tokens), model.hidden_states(tokens)
    for position in (1, 7, 11):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % 23
        assert torch.equal(model(changed)[:, :position], before[:, :position])
        assert (model(changed)[:, position] - before[:, position]).abs().max() > 1e-3
        later = model.hidden_states(changed)[:, :position]
        torch.testing.assert_close(later, hidden[:, :position], atol=1e-13, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_fused_and_elementary_kernels_agree(family, tied):
    model, tokens = model_and_tokens(family, tied=tied)
    hidden = model.hidden_states(tokens, fused=True)
    torch.testing.assert_close(hidden @ model.output_weight.T, model(tokens), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_can_be_differentiated_twice(family):
    model, tokens = model_and_tokens(family, layers=1)
    weight = model.blocks[0]["query_key_value"].weight
    (first,) = torch.autograd.grad(model(tokens).square().sum(), weight, create_graph=True)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
    (second,) = torch.autograd.grad(first, weight, direction)
    step = 1e-5 * direction
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(step, alpha=sign)
        sides.append(torch.autograd.grad(model(tokens).square().sum(), weight)[0])
        with torch.no_grad():
            weight.sub_(step, alpha=sign)
    torch.testing.assert_close((sides[0] - sides[1]) / 2e-5, second, rtol=1e-5, atol=1e-5)


def test_a_gpt_neox_block_is_the_papers_formulas():
    """One head, one block, against the formulas of the paper written out."""
    arch = architecture("gpt_neox", heads=1, width=8, layers=1)
    model = build_lm(arch, dtype=torch.float64)
    p = dict(model.named_parameters())
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    x = p["embedding.weight"][tokens]
    norm = lambda x, n: F.layer_norm(x, (8,), p[n + ".weight"], p[n + ".bias"], 1e-5)  # noqa: E731
    linear = lambda x, n: x @ p[n + ".weight"].T + p[n + ".bias"]  # noqa: E731
    q, k, v = linear(norm(x, "blocks.0.attention_norm"), "blocks.0.query_key_value").chunk(3, -1)
    cos, sin = rotary_table(arch, 5, torch.float64, "cpu")
    scores = rotate(q, cos, sin) @ rotate(k, cos, sin).mT / math.sqrt(8)
    mixed = (scores + torch.full((5, 5), -torch.inf).triu(1)).softmax(-1) @ v
    inner = linear(norm(x, "blocks.0.feed_forward_norm"), "blocks.0.feed_forward_in")
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    x = x + linear(mixed, "blocks.0.attention_output") + linear(inner, "blocks.0.feed_forward_out")
    torch.testing.assert_close(norm(x, "final_norm") @ p["output.weight"].T, model(tokens))


def test_rotation_is_relative_and_orthogonal():
    arch = architecture("llama", heads=1, width=8)
    cos, sin = rotary_table(arch, 20, torch.float64, "cpu")
    q, k = torch.randn(2, 8, dtype=torch.float64)
    rotated_q, rotated_k = (rotate(x.expand(20, 8), cos, sin) for x in (q, k))
    scores = rotated_q @ rotated_k.T
    torch.testing.assert_close(scores[5:, 5:], scores[:-5, :-5])
    torch.testing.assert_close(rotate(rotated_q, cos, -sin), q.expand(20, 8))
    assert (scores[0] - scores[0, 0])[1:].abs().max() > 1e-3


def test_rotary_angles_are_those_of_the_family():
    arch = architecture("gpt_neox", heads=1, width=8)  # half of 8 channels are rotated: 2 frequencies
    cos, sin = rotary_table(arch, 4, torch.float64, "cpu")
    torch.testing.assert_close(sin[3], torch.sin(3 * torch.tensor([1.0, 0.01], dtype=torch.float64)))
    x = torch.arange(8.0, dtype=torch.float64).expand(4, 8)
    turned = rotate(x, cos, sin)
    torch.testing.assert_close(turned[:, 4:], x[:, 4:])
    torch.testing.assert_close(turned[3, 0], 0 * cos[3, 0] - 2 * sin[3, 0])
    torch.testing.assert_close(turned[3, 2], 2 * cos[3, 0] + 0 * sin[3, 0])


def test_one_seed_gives_one_set_of_weights_at_the_papers_scale():
    first, second, other = (build_lm("pythia-14m", vocab_size=512, seed=seed) for seed in (1, 1, 2))
    for (name, a), (_, b), (_, c) in zip(*(m.named_parameters() for m in (first, second, other)), strict=True):
        assert torch.equal(a, b)
        assert a.ndim == 1 or not torch.equal(a, c), name
    block = first.blocks[0]
    assert float(block["query_key_value"].weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert float(block["feed_forward_out"].weight.detach().std()) == pytest.approx(0.02 / math.sqrt(12), rel=0.02)
    assert not torch.equal(first.output_weight, first.embedding.weight)


def test_build_lm_takes_a_name_a_config_or_an_architecture():
    config = ModelConfig(architecture="llama", num_layers=1, hidden_size=16, num_attention_heads=2)
    assert build_lm(config, vocab_size=9)(torch.tensor([[1, 2]])).shape == (1, 2, 9)
    assert build_lm(architecture(), vocab_size=9).output_weight.shape == (9, 12)
    assert build_lm(architecture(tied=True)).output_weight.shape == (23, 12)
    with pytest.raises(ValueError, match="no vocab_size"):
        build_lm(config)
    with pytest.raises(ValueError, match="expected one of pythia-14m"):
        build_lm("gpt2")
