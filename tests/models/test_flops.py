"""FLOPs against a count by hand."""

from megatron_bliss.config.models import ModelConfig
from megatron_bliss.models.flops import flops_per_token
from megatron_bliss.models.presets import resolve_architecture


def test_flops_of_one_block_are_those_counted_by_hand():
    arch = resolve_architecture(
        ModelConfig(architecture="gpt_neox", num_layers=1, hidden_size=8, num_attention_heads=2), 16
    )
    # per token: 4 + 8 matrices of 8 x 8, scores and mixing over (3 + 1) / 2 keys of 8 channels, 16 logits
    assert flops_per_token(arch, 3) == 2 * (12 * 64 + 2 * 8 * 2 + 16 * 8)
