"""Device choice, threads, determinism, memory, and the patches that megatron-core needs on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from megatron_bliss.base import platform
from megatron_bliss.config.platform import PlatformConfig

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are for machines without a GPU")


@without_cuda
def test_auto_takes_the_cpu_where_there_is_no_gpu():
    assert platform.choose_device(PlatformConfig(), 0) == torch.device("cpu")
    with pytest.raises(ValueError, match="found no CUDA device.*platform.device=auto"):
        platform.choose_device(PlatformConfig(device="cuda"), 0)


def test_weights_are_in_the_precision_that_was_asked_for():
    assert platform.choose_dtype(PlatformConfig()) == torch.float32
    assert platform.choose_dtype(PlatformConfig(params_dtype="bf16")) == torch.bfloat16


@without_cuda
def test_importing_changes_nothing_and_patches_apply_once():
    """In a process of its own, because the patches stay."""
    program = """
import resource
import torch
from megatron_bliss.base import platform
from megatron_bliss.config.platform import PlatformConfig
assert torch.ones(1).type() == "torch.FloatTensor"
platform.prepare(PlatformConfig(), 0, 1)
current_device, type_name = torch.cuda.current_device, torch.Tensor.type
platform.prepare(PlatformConfig(), 0, 1)
assert torch.cuda.current_device is current_device and torch.Tensor.type is type_name
assert torch.cuda.current_device() == torch.device("cpu")
weight = torch.ones(2)
assert weight.cuda() is weight
assert weight.type() == "torch.cuda.FloatTensor" and weight.bfloat16().type() == "torch.cuda.BFloat16Tensor"
assert weight.type(torch.float64).dtype == torch.float64 and weight.long().type() == "torch.LongTensor"
torch.cuda.synchronize()
from megatron.core.pipeline_parallel import schedules
assert schedules.torch.zeros([], dtype=torch.int, device="cuda").device.type == "cpu"
assert schedules.torch.Tensor is torch.Tensor and torch.zeros is not schedules.torch.zeros
assert torch.are_deterministic_algorithms_enabled()
def page_faults():
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2**24)  # 64 MiB: 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
if platform.keep_freed_memory():
    # The first few may each open a new place between other blocks; returned memory would be mapped anew all ten times.
    assert min(page_faults() for _ in range(10)) < 1000
print(torch.get_num_threads())
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    run = [sys.executable, "-c", program]
    outcome = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert outcome.stdout.split() == [str(platform.available_cores())], outcome.stderr
    assert "Apex" not in outcome.stderr and "deprecated" not in outcome.stderr


def test_cores_are_shared_by_the_ranks_of_a_machine(monkeypatch):
    asked = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(platform, "available_cores", lambda: 8)
    for ranks in (1, 2, 3, 16):
        platform.set_threads(ranks)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    platform.set_threads(1)
    assert asked == [8, 4, 2, 1]


@without_cuda
def test_peak_memory_sees_a_large_array_and_can_be_reset():
    before = platform.peak_memory_bytes()
    array = np.ones(before // 8 + 2**23)  # twice what there is, and 64 MiB more
    assert platform.peak_memory_bytes() >= before + 2**25
    size = array.nbytes
    del array
    high = platform.peak_memory_bytes()
    if platform.reset_peak_memory():
        assert platform.peak_memory_bytes() < high - size // 2
    else:
        assert platform.peak_memory_bytes() >= high


def test_machine_description_is_plain():
    machine = platform.describe_machine()
    assert machine["torch"] == torch.__version__ and machine["megatron_core"].startswith("0.")
    assert machine["cores"] >= 1 and machine["threads"] >= 1 and machine["device"]
    assert all(isinstance(value, (str, int)) for value in machine.values())


def test_cuda_gets_only_kernels_that_have_a_deterministic_form() -> None:
    """With a warning instead, attention's backward pass would add in any order."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        for device, warns in (("cpu", True), ("cuda", False)):
            platform.set_deterministic(True, torch.device(device))
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.is_deterministic_algorithms_warn_only_enabled() is warns
        platform.set_deterministic(False, torch.device("cuda"))
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
