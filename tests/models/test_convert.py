"""Hugging Face's GPT-NeoX and LLaMA, the target and the proxy are the same function of the same weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bliss.models.convert import (
    converted,
    huggingface_layout,
    proxy_layout,
    reader,
    shapes,
    target_layout,
)
from megatron_bliss.models.huggingface import config_json, open_huggingface, read_architecture, write_weights
from megatron_bliss.models.presets import Architecture, parameter_count
from megatron_bliss.models.transformer import build_lm
from megatron_bliss.target.model import last_hidden_states, output_weight
from megatron_bliss.target.weights import full_weights, load_full_weights
from tests.distributed import run_distributed
from tests.huggingface import huggingface_logits, save_huggingface, some_tokens
from tests.targets import LLAMA, NEOX, VOCAB_SIZE, grouped, layout, make_target

CASES = {
    "neox": NEOX,
    "neox with other settings": replace(NEOX, rotary_percent=0.5, rotary_base=500.0, norm_epsilon=1e-3),
    "llama": LLAMA,
    "llama, untied, theta, epsilon": replace(
        LLAMA, untie_embeddings_and_output_weights=True, rotary_base=5e5, norm_epsilon=1e-3, num_query_groups=4
    ),
}
ARCHITECTURES = pytest.mark.parametrize("arch", CASES.values(), ids=CASES.keys())
LAYOUTS = [(layout(2, 2, sequence_parallel), arch) for sequence_parallel in (False, True) for arch in (NEOX, LLAMA)]
LAYOUTS.append((replace(layout(2, 2), virtual_pipeline_model_parallel_size=2), replace(NEOX, num_layers=4)))


@torch.no_grad()
def target_logits(target, groups) -> torch.Tensor:
    return last_hidden_states(target, some_tokens(), groups) @ output_weight(target, groups, VOCAB_SIZE).t()


def write_folder(folder: Path, arch: Architecture, tensors) -> Path:
    folder.mkdir(parents=True)
    write_weights(folder, tensors)
    (folder / "config.json").write_text(json.dumps(config_json(arch, torch.float32, 64)))
    return folder


def loaded_target(folder: Path, config, groups):
    """A target with other initial weights, then a folder's."""
    arch, files = open_huggingface(folder)
    target = make_target(config, groups, arch, seed=99)
    load_full_weights(target, reader(files, huggingface_layout(arch), target_layout(arch)), groups)
    return arch, target


def exported(target, arch: Architecture, groups):
    whole = dict(full_weights(target, list(target_layout(arch)), groups))
    return converted(whole.__getitem__, target_layout(arch), huggingface_layout(arch))


@ARCHITECTURES
def test_target_computes_hugging_faces_logits_and_gives_its_weights_back(arch, tmp_path):
    save_huggingface(arch, tmp_path / "in")
    expected = huggingface_logits(tmp_path / "in")
    with grouped(layout()) as groups:
        found, target = loaded_target(tmp_path / "in", layout(), groups)
        logits = target_logits(target, groups)
        folder = write_folder(tmp_path / "out", found, exported(target, found, groups))
    assert found == arch
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(huggingface_logits(folder), expected, atol=0, rtol=0)
    first, second = (load_file(path / "model.safetensors") for path in (tmp_path / "in", folder))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@ARCHITECTURES
@torch.no_grad()
def test_a_target_of_ours_is_the_same_model_in_hugging_face_and_comes_back_bit_equal(arch, tmp_path):
    with grouped(layout()) as groups:
        target = make_target(layout(), groups, arch)
        generator = torch.Generator().manual_seed(8)
        for name, parameter in target[0].named_parameters():
            rows = VOCAB_SIZE if name.endswith(("word_embeddings.weight", "output_layer.weight")) else None
            parameter[:rows].add_(torch.randn(parameter[:rows].shape, generator=generator), alpha=0.2)
        logits = target_logits(target, groups)
        folder = write_folder(tmp_path / "out", arch, exported(target, arch, groups))
        found, again = loaded_target(folder, layout(), groups)
        assert found == arch
        for (name, one), other in zip(target[0].named_parameters(), again[0].parameters(), strict=True):
            assert torch.equal(one, other), name
    torch.testing.assert_close(huggingface_logits(folder), logits, atol=1e-4, rtol=0)


def checks_on_four_ranks(rank: int, world_size: int, folders: list[str], out: str) -> list[np.ndarray]:
    """Load at TP=2 x PP=2, take the logits, export again from the main rank."""
    outcomes = []
    for case, ((config, _), folder) in enumerate(zip(LAYOUTS, folders, strict=True)):
        with grouped(config) as groups:
            arch, target = loaded_target(Path(folder), config, groups)
            outcomes.append(target_logits(target, groups).numpy())
            tensors = list(exported(target, arch, groups))
            if groups.is_main:
                write_folder(Path(out) / str(case), arch, tensors)
    return outcomes


def test_through_tensor_and_pipeline_parallelism(tmp_path):
    folders = []
    for case, (_, arch) in enumerate(LAYOUTS):
        folders.append(tmp_path / f"in{case}")
        save_huggingface(arch, folders[-1])
    outcomes = run_distributed(checks_on_four_ranks, 4, [str(folder) for folder in folders], str(tmp_path / "out"))
    for case, folder in enumerate(folders):
        expected = huggingface_logits(folder)
        for outcome in outcomes:
            np.testing.assert_allclose(outcome[case], expected.numpy(), atol=1e-4, rtol=0)
        first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out" / str(case)))
        assert all(torch.equal(first[name], second[name]) for name in first)


@ARCHITECTURES
@torch.no_grad()
def test_proxy_computes_hugging_faces_logits_and_gives_its_weights_back(arch, tmp_path):
    save_huggingface(arch, tmp_path / "in")
    found, files = open_huggingface(tmp_path / "in")
    proxy = build_lm(found, seed=1)
    proxy.load_state_dict(dict(converted(files, huggingface_layout(arch), proxy_layout(arch))))
    expected = huggingface_logits(tmp_path / "in")
    torch.testing.assert_close(proxy(some_tokens()), expected, atol=1e-4, rtol=0)
    back = dict(converted(proxy.state_dict().__getitem__, proxy_layout(arch), huggingface_layout(arch)))
    assert back.keys() == files.shapes.keys()
    assert all(torch.equal(back[name], files(name)) for name in back)


@ARCHITECTURES
def test_every_layout_holds_every_parameter_once(arch):
    for layout_of in (target_layout, proxy_layout, huggingface_layout):
        found = shapes(arch, layout_of(arch))
        assert sum(int(np.prod(shape)) for shape in found.values()) == parameter_count(arch)


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


def test_sizes_of_pythia_as_transformers_4_wrote_them(tmp_path):
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
