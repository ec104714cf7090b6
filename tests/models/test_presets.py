"""Named sizes hold what their names say."""

import pytest

from megatron_bliss.config.models import ModelConfig, ProxyConfig
from megatron_bliss.models.presets import PRESETS, parameter_count, resolve_architecture
from megatron_bliss.models.transformer import build_lm

PUBLISHED = {  # Biderman et al. 2023, table 1, and the model cards; LLaMA 2's weights on Hugging Face (13.0B, 69B)
    "pythia-14m": 14_067_712,
    "pythia-31m": 30_494_720,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "llama-13b": 13_015_864_320,
    "llama-70b": 68_976_648_192,
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_parameters_that_its_name_says(name):
    count = parameter_count(PRESETS[name])
    assert count == PUBLISHED.get(name, count)
    size = name.split("-")[1]
    nominal = float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
    assert abs(count / nominal - 1) < 0.025


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_counted_as_a_built_model_holds_them(name):
    for tied in (False, True):
        config = ModelConfig(preset=name, untie_embeddings_and_output_weights=not tied)
        model = build_lm(config, device="meta")
        assert sum(p.numel() for p in model.parameters()) == parameter_count(model.architecture)


def test_fields_override_a_preset_and_derive_what_follows():
    config = ProxyConfig(preset="pythia-70m", hidden_size=256, num_attention_heads=4, init_method_std=0.01)
    arch = resolve_architecture(config, 1000)
    assert (arch.ffn_hidden_size, arch.num_query_groups, arch.num_layers) == (1024, 4, 6)
    assert (arch.vocab_size, arch.init_method_std, arch.rotary_percent) == (1000, 0.01, 0.25)
    llama = ModelConfig(architecture="llama", num_layers=2, hidden_size=96, num_attention_heads=4, num_query_groups=2)
    arch = resolve_architecture(llama, 64)
    assert (arch.ffn_hidden_size, arch.rotary_percent, arch.kv_channels) == (256, 1.0, 24)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "no preset and no architecture, num_layers, hidden_size, num_attention_heads"),
        ({"preset": "pythia-31M"}, "preset 'pythia-31M', expected one of pythia-14m"),
        ({"preset": "pythia-14m", "hidden_size": 130}, "change hidden_size or num_attention_heads"),
        ({"preset": "llama-1b", "num_query_groups": 5}, "change num_query_groups"),
        ({"preset": "llama-1b", "num_layers": 0}, "change num_layers"),
        ({"preset": "llama-1b", "rotary_percent": 1.5}, "change rotary_percent"),
    ],
)
def test_errors_name_the_option(fields, message):
    with pytest.raises(ValueError, match=message):
        resolve_architecture(ModelConfig(**fields), 100)
