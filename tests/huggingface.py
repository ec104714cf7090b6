"""Small models as Hugging Face's transformers builds, saves and computes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_bliss.models.presets import Architecture
from tests.targets import VOCAB_SIZE

transformers = pytest.importorskip("transformers", reason="needs the [eval] extra")


def some_tokens() -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (3, 14), generator=torch.Generator().manual_seed(0))


def huggingface_config(arch: Architecture):
    """transformers' own description of the architecture, written by hand: independent of ``config_json``."""
    shared = {
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_attention_heads,
        "tie_word_embeddings": not arch.untie_embeddings_and_output_weights,
        "attn_implementation": "eager",
    }
    if arch.architecture == "gpt_neox":
        return transformers.GPTNeoXConfig(
            **shared,
            layer_norm_eps=arch.norm_epsilon,
            rotary_pct=arch.rotary_percent,
            rotary_emb_base=arch.rotary_base,
        )
    return transformers.LlamaConfig(
        **shared,
        rms_norm_eps=arch.norm_epsilon,
        num_key_value_heads=arch.num_query_groups,
        rope_parameters={"rope_type": "default", "rope_theta": arch.rotary_base},
    )


def save_huggingface(arch: Architecture, folder: Path, **options) -> None:
    """A randomly initialised model, biases and norms random, too, in a folder as transformers saves it."""
    generator = torch.Generator().manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(huggingface_config(arch))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    model.save_pretrained(folder, **options)


@torch.no_grad()
def huggingface_logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(some_tokens()).logits
