"""Small targets, corpora and runs that several test files share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from torch import Tensor

from megatron_bliss.base import checkpoint, parallel
from megatron_bliss.base.metrics import MetricsLogger, read_metrics
from megatron_bliss.base.parallel import Groups
from megatron_bliss.config.models import TargetConfig
from megatron_bliss.config.output import CheckpointConfig, LoggingConfig
from megatron_bliss.config.platform import PlatformConfig
from megatron_bliss.config.training import OptimizerConfig, PretrainingConfig
from megatron_bliss.data.batches import Batch
from megatron_bliss.models.presets import Architecture
from megatron_bliss.target.log import MEASURED
from megatron_bliss.target.loss import evaluate_loss
from megatron_bliss.target.model import Target, build_target, last_stage_hidden_states
from megatron_bliss.target.segment import Recording, Segment, SegmentResult, train_segment
from megatron_bliss.target.setup import TargetSetup

VOCAB_SIZE = 100  # not a multiple of 128, and with a part of the padding on each of two ranks' halves
SEQ_LENGTH = 16

NEOX = Architecture(
    architecture="gpt_neox",
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=4,
    vocab_size=VOCAB_SIZE,
    rotary_percent=0.25,
)
LLAMA = replace(
    NEOX,
    architecture="llama",
    ffn_hidden_size=48,
    num_query_groups=2,
    rotary_percent=1.0,
    untie_embeddings_and_output_weights=False,
)


def layout(tensor: int = 1, pipeline: int = 1, sequence_parallel: bool = False) -> TargetConfig:
    return TargetConfig(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, sequence_parallel=sequence_parallel
    )


@contextlib.contextmanager
def grouped(config: TargetConfig, platform: PlatformConfig | None = None) -> Iterator[Groups]:
    try:
        yield parallel.initialize(platform or PlatformConfig(), config, seed=1)
    finally:
        parallel.destroy()


def make_target(config: TargetConfig, groups: Groups, architecture: Architecture = NEOX, seed: int = 3) -> Target:
    return build_target(config, architecture, groups, seq_length=SEQ_LENGTH, params_dtype=torch.float32, seed=seed)


def make_corpus(prefix: Path | str, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> str:
    """Documents in which each token tells much about the next, so that there is something to learn."""
    generator = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(60):
        length = int(generator.integers(5, 40))
        steps = generator.integers(1, 4, length)
        tokens = (generator.integers(vocab_size) + np.cumsum(steps)) % vocab_size
        builder.add_document(torch.from_numpy(tokens), [length])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def make_batches(seed: int = 0) -> list[Batch]:
    """Evaluation batches of different heights and widths with few labels."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for rows, width in ((3, 9), (4, 16), (1, 12)):
        tokens = torch.randint(VOCAB_SIZE, (rows, width), generator=generator)
        mask = torch.rand(rows, width, generator=generator) < 0.5
        mask[:, 0] = False
        batches.append(Batch(tokens, mask, torch.full((rows,), width), torch.arange(rows)))
    return batches


PRETRAINING = PretrainingConfig(
    micro_batch_size=2,
    global_batch_size=8,
    eval_interval=7,
    optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3, lr_decay_style="cosine", lr_warmup_iters=3),
)


SAVING = CheckpointConfig(save_interval=5)
LOGGING = LoggingConfig(log_interval=1, progress="none")


def setup_of(
    groups: Groups,
    config: TargetConfig | None = None,
    architecture: Architecture = NEOX,
    platform: PlatformConfig | None = None,
    seed: int = 5,
) -> TargetSetup:
    return TargetSetup(config or layout(), architecture, groups, platform or PlatformConfig(), SEQ_LENGTH, seed)


def segment_of(
    prefix: str, last: int = 20, *, first: int = 0, total: int | None = None, start: Path | None = None
) -> Segment:
    """Iterations ``first`` to ``last`` of ``total`` (all of them without one)."""
    return Segment(prefix, 5, first, last, total or last, start=start)


def train(
    setup: TargetSetup,
    segment: Segment,
    folder: Path | str,
    *,
    config: PretrainingConfig = PRETRAINING,
    saving: CheckpointConfig = SAVING,
    logging: LoggingConfig = LOGGING,
    evaluate: Callable[[Target], dict[str, float]] | None = None,
) -> tuple[SegmentResult, list[dict]]:
    """Train a segment with a metrics file; returns its result and, on the main rank, what it logged."""
    folder, is_main = Path(folder), setup.groups.is_main
    metrics = MetricsLogger(folder, is_writer=is_main, tensorboard=False)
    recording = Recording(folder / "segment", saving, logging, metrics, evaluate, arm="random")
    try:
        result = train_segment(setup, config, segment, recording)
    finally:
        metrics.close()
    return result, read_metrics(folder / "metrics.jsonl") if is_main else []


def evaluator(groups: Groups) -> Callable[[Target], dict[str, float]]:
    """What a segment measures on its way: the loss on ``make_batches``."""
    return lambda target: {"held_out": evaluate_loss(target, make_batches(), groups)}


def written(path: Path) -> tuple[str, ...]:
    """Digests of a checkpoint's weights and optimizer state, as written by each rank."""
    files = checkpoint.read_manifest(path)["files"]
    return tuple(files[name]["sha256"] for name in sorted(files) if name.endswith(".distcp"))


def without_times(entries: list[dict]) -> list[dict]:
    """What a segment logged, but for what it measured of the machine."""
    return [{name: value for name, value in entry.items() if name not in ("time", *MEASURED)} for entry in entries]


def logged(folder: Path, groups: Groups) -> list[dict]:
    """The lines of a folder's metrics on the main rank, none on others, without times."""
    return without_times(read_metrics(folder / "metrics.jsonl")) if groups.is_main else []


def last_hidden_states(target: Target, tokens: Tensor, groups: Groups, micro_batch_size: int = 8) -> Tensor:
    """tokens [b, s] -> hidden states [b, s, w] after the final norm, on every rank of the model-parallel group."""
    found = last_stage_hidden_states(target, tokens, groups, micro_batch_size)
    if groups.pipeline_model_parallel_size == 1:
        return found
    config = target[0].config
    if found is None:
        found = torch.empty(*tokens.shape, config.hidden_size, dtype=config.params_dtype, device=groups.device)
    found = found.contiguous()
    dist.broadcast(found, src=groups.pipeline_ranks[-1], group=groups.pipeline_model_parallel_group)
    return found
