"""Hugging Face's folders: read as transformers wrote them, refused where they are not what our models compute."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bliss.models.huggingface import config_json, open_huggingface, read_architecture, write_weights
from megatron_bliss.models.presets import parameter_count
from tests.huggingface import huggingface_logits, save_huggingface
from tests.targets import LLAMA, NEOX


def test_sharded_files_are_read_and_written(tmp_path):
    save_huggingface(NEOX, tmp_path / "in", max_shard_size="20KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 2
    arch, files = open_huggingface(tmp_path / "in")
    folder = tmp_path / "out"
    folder.mkdir()
    count = write_weights(folder, ((name, files(name)) for name in files.shapes), max_shard_bytes=20_000)
    (folder / "config.json").write_text(json.dumps(config_json(arch, torch.float32, 64)))
    assert count == parameter_count(NEOX) and len(list(folder.glob("*.safetensors"))) > 2
    assert torch.equal(huggingface_logits(folder), huggingface_logits(tmp_path / "in"))


@pytest.fixture
def folder(tmp_path) -> Path:
    save_huggingface(LLAMA, tmp_path / "model")
    return tmp_path / "model"


CONFIG_REFUSALS = {
    "rope_scaling": ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "rope scaling"),
    "older rope_scaling": ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "rope scaling"),
    "attention_bias": ({"attention_bias": True}, "attention_bias=True"),
    "head_dim": ({"head_dim": 128}, "head_dim=128"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "family": ({"model_type": "mamba"}, "model_type 'mamba'"),
    "serial GPT-NeoX": ({"model_type": "gpt_neox", "use_parallel_residual": False}, "use_parallel_residual=False"),
    "size": ({"hidden_size": 1 << 40}, "hidden_size="),
    "layers": ({"num_hidden_layers": -1}, "num_hidden_layers=-1"),
    "words": ({"vocab_size": "many"}, "vocab_size='many'"),
    "another size": ({"intermediate_size": 64}, "expected \\(64, 32\\)"),
    "fewer layers": ({"num_hidden_layers": 1}, "too many"),
    "more layers": ({"num_hidden_layers": 3}, "no tensor 'model.layers.2"),
}


@pytest.mark.parametrize("changes, message", CONFIG_REFUSALS.values(), ids=CONFIG_REFUSALS.keys())
def test_what_our_models_do_not_compute_is_refused(folder, changes, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        open_huggingface(folder)


def test_hostile_folders_are_refused(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    outside = tmp_path / "outside.safetensors"
    save_file(tensors, outside)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match="pytorch_model.bin can run a program"):
        open_huggingface(folder)
    for file in ("../outside.safetensors", str(outside), "pytorch_model.bin", ".."):
        index = {"weight_map": dict.fromkeys(tensors, file)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="expected names of safetensors beside it"):
            open_huggingface(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ValueError, match="found no gone.safetensors"):
        open_huggingface(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="damaged file"):
        open_huggingface(folder)
    save_file({name: tensor.to(torch.int32) for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="in I32"):
        open_huggingface(folder)


def test_a_config_as_transformers_4_wrote_it_is_read(tmp_path):
    """The published pythia-70m's config.json: no rope_parameters, other names."""
    described = {
        "architectures": ["GPTNeoXForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_size": 512,
        "initializer_range": 0.02,
        "intermediate_size": 2048,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "model_type": "gpt_neox",
        "num_attention_heads": 8,
        "num_hidden_layers": 6,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_parallel_residual": True,
        "vocab_size": 50304,
    }
    (tmp_path / "config.json").write_text(json.dumps(described))
    arch = read_architecture(tmp_path)
    assert (arch.rotary_channels, parameter_count(arch)) == (16, 70_426_624)


def test_what_hugging_face_has_no_name_for_is_not_written():
    for arch, message in (
        (replace(NEOX, num_query_groups=2), "2 query groups"),
        (replace(LLAMA, rotary_percent=0.5), "rotates 4 of 8 channels"),
        (replace(NEOX, rotary_percent=0.4), "even number"),
    ):
        with pytest.raises(ValueError, match=message):
            config_json(arch, torch.float32, 64)
