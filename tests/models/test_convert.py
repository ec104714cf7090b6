"""Hugging Face's GPT-NeoX and LLaMA, the target and the proxy are the same function of the same weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_bliss.models.convert import (
    converted,
    huggingface_layout,
    proxy_layout,
    reader,
    shapes,
    target_layout,
)
from megatron_bliss.models.huggingface import config_json, open_huggingface, write_weights
from megatron_bliss.models.presets import Architecture, parameter_count
from megatron_bliss.models.transformer import build_lm
from megatron_bliss.target.model import output_weight
from megatron_bliss.target.weights import full_weights, load_full_weights
from tests.distributed import run_distributed
from tests.huggingface import huggingface_logits, save_huggingface, some_tokens
from tests.targets import LLAMA, NEOX, VOCAB_SIZE, grouped, last_hidden_states, layout, make_target

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


def test_weights_come_through_tensor_and_pipeline_parallelism(tmp_path):
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
