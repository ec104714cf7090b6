"""How fast a device trains, against what it could do at best."""

from __future__ import annotations

import torch

from megatron_bliss.config.platform import PlatformConfig

PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "L40S": {"bf16": 362.0, "fp32": 91.6},
    "L4": {"bf16": 121.0, "fp32": 30.3},
    "L40": {"bf16": 181.0, "fp32": 90.5},
    "A100": {"bf16": 312.0, "fp32": 19.5},
    "H100 PCIe": {"bf16": 756.0, "fp32": 51.0},
    "H100 NVL": {"bf16": 835.0, "fp32": 60.0},
    "H100": {"bf16": 989.0, "fp32": 67.0},
    "H200": {"bf16": 989.0, "fp32": 67.0},
    "H200 NVL": {"bf16": 835.0, "fp32": 60.0},
    "H20": {"bf16": 148.0, "fp32": 44.0},
    "GH200": {"bf16": 989.0, "fp32": 67.0},
    "B200": {"bf16": 2250.0, "fp32": 75.0},
    "GB200": {"bf16": 2500.0, "fp32": 80.0},
}
"""NVIDIA's data sheets: matrix products in bf16 (without sparsity) and in fp32 (without TF32), in 10^12 per second."""


def peak_flops(platform: PlatformConfig, device: torch.device, override_tflops: float = 0.0) -> float | None:
    """FLOP/s that one device could do in the run's precision; None where nobody says (a CPU, an unknown GPU)."""
    if override_tflops:
        return override_tflops * 1e12
    if device.type != "cuda":
        return None
    return peak_by_name(torch.cuda.get_device_name(device), platform.params_dtype)


def peak_by_name(name: str, dtype: str) -> float | None:
    """The same from a CUDA device's name, such as ``NVIDIA H100 80GB HBM3``; the longest name that matches counts."""
    words = f" {name.replace('-', ' ')} "
    known = [key for key in PEAK_TFLOPS if f" {key} " in words]
    return PEAK_TFLOPS[max(known, key=len)][dtype] * 1e12 if known else None
