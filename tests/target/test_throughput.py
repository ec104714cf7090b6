"""Peaks of devices, by their names."""

from __future__ import annotations

import pytest
import torch

from megatron_bliss.config.platform import PlatformConfig
from megatron_bliss.target.throughput import PEAK_TFLOPS, peak_by_name, peak_flops


@pytest.mark.parametrize(
    "name, key",
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
    ],
)
def test_devices_are_known_by_the_names_cuda_gives_them(name, key):
    assert peak_by_name(name, "bf16") == PEAK_TFLOPS[key]["bf16"] * 1e12
    assert peak_by_name(name, "fp32") < peak_by_name(name, "bf16")


def test_no_peak_is_made_up():
    assert peak_by_name("NVIDIA GeForce RTX 9090", "bf16") is None
    assert peak_flops(PlatformConfig(), torch.device("cpu")) is None
    assert peak_flops(PlatformConfig(), torch.device("cpu"), 2.5) == 2.5e12
