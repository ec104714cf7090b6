"""What a segment logs of its speed, and shows of it."""

from __future__ import annotations

import io
import math

import pytest

from megatron_bliss.base.metrics import MetricsLogger, read_metrics
from megatron_bliss.base.progress import progress
from megatron_bliss.target.log import MEASURED, TrainingLog, Workload


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
