"""Peaks by device name, and the numbers that follow from them."""

from __future__ import annotations

import io
import math

import pytest
import torch

from megatron_bliss.base.metrics import MetricsLogger, progress, read_metrics
from megatron_bliss.config.config import PlatformConfig
from megatron_bliss.target.log import MEASURED, TrainingLog, Workload
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


@pytest.mark.parametrize("peak", [None, 4e12])
def test_speed_counts_each_device_s_share(peak, tmp_path):
    metrics = MetricsLogger(tmp_path, is_writer=True, tensorboard=False)
    labels = {"arm": "bliss", "round": 1, "stage": "pretrain"}
    workload = Workload(tokens=1000, flops=8e12, devices=2, peak_flops=peak)
    log = TrainingLog(metrics, labels, workload, interval=1, show_progress=True, speaks=True)
    for seconds in (1.0, 3.0):
        log.count(seconds)
    speed = log.speed()
    assert set(speed) == set(MEASURED)
    assert speed["tokens_per_second"] == 500 and speed["milliseconds_per_iteration"] == 2000
    assert speed["flops_per_second_per_device"] == 2e12
    assert speed["model_flops_utilisation"] == 0.5 if peak else math.isnan(speed["model_flops_utilisation"])
    assert speed["peak_memory_bytes"] > 1e6
    log.write(1, speed)
    metrics.close()
    assert ("null" in (tmp_path / "metrics.jsonl").read_text()) == (peak is None)
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["tokens_per_second"] == 500
    output = io.StringIO()
    with progress(2, description="x", unit="steps", enabled=True, file=output) as bar:
        log.show(bar, {"loss": 2.5, "grad_norm": 0.7, "lr": 1e-3, "skipped_iterations": 1, **speed})
    for part in ("loss 2.5", "norm 0.7", "lr 0.001", "tokens/s 500", "TFLOP/s 2", "GiB ", "skipped 1"):
        assert part in output.getvalue()
    assert ("MFU 0.5" in output.getvalue()) == (peak is not None)
