"""What each stage takes on a device, for a plan: what is held between steps, what a step makes, and whether it fits.

The target's training state is exact (target/memory.py); ``working`` memory is estimated from shapes. What CUDA,
NCCL and the allocator's fragments take comes on top: ROOM is left for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap

from megatron_bliss.arms import ARMS
from megatron_bliss.arms.arm import Memory, Sizes
from megatron_bliss.base.platform import DTYPES, choose_dtype
from megatron_bliss.bilevel.guide_weightings import GUIDE_WEIGHTINGS
from megatron_bliss.bilevel.memory import (
    GIB,
    StepShape,
    block_elements,
    kept_bytes,
    planned_gradient_bytes,
    score_bytes,
)
from megatron_bliss.bilevel.scheme import ENGINE, Scheme
from megatron_bliss.bilevel.teacher import TEACHER_MICRO_BATCH
from megatron_bliss.bilevel.train import split_batch
from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.config.config import Config
from megatron_bliss.models.families.family import ngram_architecture
from megatron_bliss.models.presets import Architecture, parameter_count
from megatron_bliss.models.score_architecture import ScoreArchitecture
from megatron_bliss.run.order import distils, needs_proxy
from megatron_bliss.target.memory import (
    FP32_BYTES,
    MOMENT_BYTES,
    activation_bytes,
    forward_bytes,
    training_state,
    weight_count,
)

STAGE = "distillation"
ROOM = 0.1
"""Share of a device's memory that a plan leaves to what it does not count."""


@dataclass(frozen=True)
class Models:
    """The three models of a run."""

    target: Architecture
    proxy: Architecture
    score: ScoreArchitecture


def memory_plan(config: Config, device: str, layout: dict, memory_gib: float, models: Models) -> dict:
    """{"stages": [{stage, parameters, gradients, optimizer, working, total}], "largest", "fits", "advice"}, in bytes.

    Each stage on the pipeline rank that holds most. ``fits``: True, False, or None where the memory is not known.
    """
    sizing = _Sizing(config, device, layout, memory_gib, models)
    learning = bilevel_stages(config)
    stages = [sizing.training()]
    stages += [sizing.proxy_warmup()] if needs_proxy(config) else []
    stages += starmap(sizing.bilevel, learning.items())
    if distils(config.score, 1) and any(
        "bilevel" in arm.stages and arm.scheme.learns_scores for arm in map(ARMS.__getitem__, config.arms)
    ):
        stages.append(sizing.distillation())
    stages += [sizing.score(), sizing.evaluate()]
    own = sizing.arms()
    stages += [_entry(one.stage, one.parameters, one.gradients, one.optimizer, one.working) for one in own]
    usable = memory_gib * (1 - ROOM)
    changes = {one.stage: [one.advice] for one in own}
    changes |= {
        one["stage"]: _bilevel_changes(*learning[one["stage"]], one, usable)
        for one in stages
        if one["stage"] in learning
    }
    largest = max(stages, key=lambda stage: stage["total"])
    too_large = [stage for stage in stages if memory_gib and stage["total"] > memory_gib * GIB * (1 - ROOM)]
    return {
        "stages": stages,
        "largest": largest["stage"],
        "fits": not too_large if memory_gib else None,
        "advice": [_advice(config, stage, memory_gib, changes) for stage in too_large],
    }


def bilevel_stages(config: Config) -> dict[str, tuple[BilevelConfig, Scheme]]:
    """The bilevel stages that make steps: that of the options, and by their names those of arms that differ from it."""
    stages = {}
    for name in config.arms:
        own = ARMS[name].bilevel_options(config.bilevel), ARMS[name].scheme
        if "bilevel" in ARMS[name].stages and own[0].upper_iters:
            stages["bilevel" if own == (config.bilevel, ENGINE) else f"{name} bilevel"] = own
    return stages


def _entry(stage: str, parameters: int, gradients: int, optimizer: int, working: int) -> dict:
    parts = {"parameters": parameters, "gradients": gradients, "optimizer": optimizer, "working": working}
    return {"stage": stage, **parts, "total": sum(parts.values())}


class _Sizing:
    """The sizes that all stages' memory follows from."""

    def __init__(self, config: Config, device: str, layout: dict, memory_gib: float, models: Models) -> None:
        self.config, self.device, self.layout = config, device, layout
        self.target, self.proxy, self.score_model = models.target, models.proxy, models.score
        self.seq_length = config.data.seq_length
        self.element_size = choose_dtype(config.platform).itemsize
        self.kept_bytes = kept_bytes(int(memory_gib * GIB) if device == "cuda" else 0)
        self.proxy_count = parameter_count(self.proxy)
        stages = range(config.target.pipeline_model_parallel_size)
        self.weights = self.element_size * max(weight_count(config.target, self.target, stage) for stage in stages)

    def share(self, batch: int) -> int:
        """Samples of a batch on the rank that has most."""
        return -(-batch // self.layout["world_size"])

    def training(self) -> dict:
        """The target's warm-up, its training on a selection and its decay branches, with their evaluations."""
        config, entries = self.config, []
        for stage in range(config.target.pipeline_model_parallel_size):
            states = training_state(
                config.target,
                config.pretraining,
                self.target,
                stage=stage,
                replicas=self.layout["data_parallel_size"],
                element_size=self.element_size,
            )
            state = max(states, key=lambda one: one.optimizer)
            activations = activation_bytes(
                config.target,
                self.target,
                stage=stage,
                micro_batches=self.layout["micro_batches"],
                tokens=config.pretraining.micro_batch_size * self.seq_length,
                element_size=self.element_size,
            )
            working = max(activations, self._evaluation_bytes())
            entries.append(
                _entry("target training", state.parameters, state.gradients, state.optimizer, working)
                | {"pipeline_stage": stage}
            )
        return max(entries, key=lambda entry: entry["total"])

    def proxy_warmup(self) -> dict:
        """Plain training of the proxy, a rank's samples all at once or in micro-batches."""
        settings = self.config.proxy
        samples, dtype = self.share(settings.warmup_batch_size), DTYPES[settings.warmup_params_dtype]
        samples = min(samples, settings.warmup_micro_batch_size or samples)
        parameters = (FP32_BYTES + dtype.itemsize * (dtype.itemsize < FP32_BYTES)) * self.proxy_count
        shape = StepShape(self.proxy, self.seq_length, dtype.itemsize, self.device)
        working = planned_gradient_bytes(shape, samples, None, self.kept_bytes)
        return _entry("proxy warm-up", parameters, 0, MOMENT_BYTES * self.proxy_count, working)

    def bilevel(self, name: str, stage: tuple[BilevelConfig, Scheme]) -> dict:
        """Proxy, any control, score model, their optimizers, z, the frozen target and the larger of a step and its
        forward pass."""
        settings, scheme = stage
        element_size = DTYPES[settings.params_dtype].itemsize
        learned = self.score_model.parameters if scheme.learns_scores else 0
        proxies = self.proxy_count * (1 + GUIDE_WEIGHTINGS[settings.guide_weighting].against_control)
        count = proxies + learned
        copied = self._pass_bytes(element_size) if learned and self.score_model.trunk_parameters else 0
        copies = element_size * proxies + copied
        parameters = FP32_BYTES * count + (copies if element_size < FP32_BYTES else 0)
        optimizer = MOMENT_BYTES * count + FP32_BYTES * scheme.held_vectors * self.proxy_count
        samples = max(self.share(settings.global_batch_size), self.share(settings.validation_batch_size))
        tied, score = settings.kl_weight > 0, self.score_model
        shape = StepShape(self.proxy, self.seq_length, element_size, self.device, teacher=tied, score=score)
        at_once, working = scheme.working(settings, shape, samples, self.kept_bytes)
        if tied:
            held, forward = self._teacher_bytes(samples)
            parameters += 0 if settings.offload_target else self.weights
            working = held + max(working, forward + (self.weights if settings.offload_target else 0))
        return _entry(name, parameters, 0, optimizer, working) | {"micro_batch_size": at_once}

    def distillation(self) -> dict:
        """The score model learns a table's scores beside the idle proxy, before the bilevel stage's first step."""
        config, score = self.config.bilevel, self.score_model
        element_size, samples = DTYPES[config.params_dtype].itemsize, self.share(self.config.score.distil_batch_size)
        sizes = self.proxy, samples, self.seq_length
        at_once = split_batch(config, *sizes, device=self.device, score=score)[0] or samples
        table = ngram_architecture(self.config.score)
        parameters = FP32_BYTES * (self.proxy_count + score.parameters + table.buckets)
        parameters += self._pass_bytes(element_size) if element_size < FP32_BYTES else 0
        tokens = min(at_once, samples) * self.seq_length
        working = score_bytes(score, tokens, element_size)
        working = max(working, ScoreArchitecture(ngrams=table).table_pass_bytes(tokens))
        return _entry(STAGE, parameters, 0, MOMENT_BYTES * score.parameters, working)

    def _teacher_bytes(self, samples: int) -> tuple[int, int]:
        """(output matrix and this rank's hidden states, a forward pass over the model-parallel group's samples)."""
        target, config = self.target, self.config.target
        ranks = config.tensor_model_parallel_size * config.pipeline_model_parallel_size
        states = target.hidden_size * self.seq_length * self.element_size
        held = target.vocab_size * target.hidden_size * self.element_size + samples * states
        tokens = min(TEACHER_MICRO_BATCH, samples * ranks) * self.seq_length
        forward = forward_bytes(config, target, tokens, self.element_size, with_logits=False)
        return held, 2 * ranks * samples * states + forward  # the union of the group's samples, in parts and joined

    def score(self) -> dict:
        """One forward pass of the score model at a time."""
        tokens = self.config.scoring.micro_batch_size * self.seq_length
        element_size = DTYPES[self.config.scoring.params_dtype].itemsize
        trunk, working = self.score_model.trunk, self.score_model.table_pass_bytes(tokens)
        working += 0 if trunk is None else block_elements(trunk) * tokens * element_size
        return _entry("score", self._pass_bytes(element_size), 0, 0, working)

    def _pass_bytes(self, element_size: int) -> int:
        """The score model as a pass reads it."""
        return element_size * self.score_model.trunk_parameters + FP32_BYTES * self.score_model.table_parameters

    def arms(self) -> list[Memory]:
        """What the score stages of arms take beside a score model's pass."""
        config, count = self.config, self.weights // self.element_size
        sizes = Sizes(self.seq_length, config.target, self.target, self.proxy, count, config.scoring, self.device)
        needs = {name: ARMS[name].memory for name in config.arms}
        return [memory(config.baselines.get(name), sizes) for name, memory in needs.items() if memory is not None]

    def evaluate(self) -> dict:
        """The target as read back from disk, on test sets and tasks; the latter make their logits in small chunks."""
        working, evaluation = self._evaluation_bytes(), self.config.evaluation
        if evaluation.tasks:
            sizes = evaluation.batch_tokens, self.element_size
            working = max(working, forward_bytes(self.config.target, self.target, *sizes, with_logits=False))
        return _entry("evaluate", self.weights, 0, 0, working)

    def _evaluation_bytes(self) -> int:
        """A forward pass over a micro-batch of test samples, at most ``data.seq_length`` tokens each."""
        tokens = self.config.evaluation.micro_batch_size * self.seq_length
        return forward_bytes(self.config.target, self.target, tokens, self.element_size, with_logits=True)


def _advice(config: Config, entry: dict, memory_gib: float, arms: dict[str, list[str]]) -> str:
    """What to change where a stage does not fit."""
    usable = memory_gib * (1 - ROOM)
    text = f"{entry['stage']}: {entry['total'] / GIB:.1f} GiB against {usable:.1f} of {memory_gib:g} GiB"
    changes = arms.get(entry["stage"]) or _changes(config, entry, usable)
    return f"{text}: {'; '.join(changes)}"


def _changes(config: Config, entry: dict, usable: float) -> Sequence[str]:
    held = (entry["total"] - entry["working"]) / GIB
    if entry["stage"] == "target training":
        return _training_changes(config, held, usable)
    return {
        "proxy warm-up": ["set proxy.warmup_micro_batch_size"],
        STAGE: ["lower score.distil_batch_size, or set bilevel.memory_limit_gib or bilevel.micro_batch_size"],
        "score": ["lower scoring.micro_batch_size"],
        "evaluate": ["lower evaluation.micro_batch_size and evaluation.batch_tokens"],
    }[entry["stage"]]


def _bilevel_changes(settings: BilevelConfig, scheme: Scheme, entry: dict, usable: float) -> list[str]:
    held, changes = (entry["total"] - entry["working"]) / GIB, []
    if settings.kl_weight > 0 and not settings.offload_target:
        changes.append("set bilevel.offload_target, or raise target.tensor_model_parallel_size")
    if held < usable:
        changes.append(scheme.to_shrink.format(room=usable - held))
    return changes or ["take a smaller proxy"]


def _training_changes(config: Config, held: float, usable: float) -> list[str]:
    target, training, changes = config.target, config.pretraining, []
    if training.micro_batch_size > 1 and held < usable:
        changes.append("lower pretraining.micro_batch_size")
    if target.recompute_granularity != "full" and held < usable:
        changes.append("set target.recompute_granularity full (or selective with recompute_modules [mlp])")
    if not training.use_distributed_optimizer:
        changes.append("set pretraining.use_distributed_optimizer")
    if target.tensor_model_parallel_size > 1 and not target.sequence_parallel and held < usable:
        changes.append("set target.sequence_parallel")
    changes.append("raise target.tensor_model_parallel_size or target.pipeline_model_parallel_size")
    return changes
