"""What a run will take, before it runs: FLOPs, tokens and time of every stage, memory of a rank, data and disk.

Nothing of a run is built or written, so that a laptop plans any size. FLOPs are the numbers that the stages record when
they are done, by the same functions (flops.py of models and bilevel), where the corpus is there; time is those numbers
over what the devices are assumed to reach; memory of activations and of the bilevel stage is estimated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from megatron_bliss.arms import ARMS
from megatron_bliss.arms.arm import Shard
from megatron_bliss.arms.distilled_start import held_back_units
from megatron_bliss.base.parallel import check_world_size
from megatron_bliss.bilevel.flops import distillation_flops, distillation_tokens
from megatron_bliss.config.config import Config
from megatron_bliss.config.platform import PlatformConfig
from megatron_bliss.models.families import FAMILIES
from megatron_bliss.models.flops import proxy_warmup_flops, training_flops
from megatron_bliss.models.presets import Architecture, parameter_count
from megatron_bliss.plan.corpus import Corpus, data_plan, disk_plan, plan_corpus, plan_vocabulary, reference_tokens
from megatron_bliss.plan.memory import Models, memory_plan
from megatron_bliss.plan.sharing import busy_share, teacher_share
from megatron_bliss.plan.traffic import traffic_plan
from megatron_bliss.run.checks import check_layout, check_options, not_ready
from megatron_bliss.run.order import distils, needs_proxy, round_stages
from megatron_bliss.target.layout import check_layout as check_target_layout
from megatron_bliss.target.learning_rate import learning_rate_at
from megatron_bliss.target.pretrained import configured_architecture
from megatron_bliss.target.throughput import PEAK_TFLOPS, peak_by_name
from megatron_bliss.target.trainer import data_parallel_config, num_micro_batches

SMALL_MODEL_STAGES = ("warmup proxy", "bilevel", "score")
"""What a run of the control arm alone would not need."""


@dataclass(frozen=True)
class Machine:
    """What a run is planned for: so many ranks, and what one device can do."""

    world_size: int
    device: str | None = None
    """A name in PEAK_TFLOPS in any case, or ``cpu``; None: not said."""
    peak_tflops: float = 0.0
    """Peak in platform.params_dtype, in place of the device's (0: the device's)."""
    mfu: float = 0.4
    """Share of the peak that the target's training reaches."""
    proxy_mfu: float = 0.0
    """The same of the stages of proxy and score model (0: as much)."""
    memory_gib: float = 0.0
    """Memory of one device (0: not said)."""

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ValueError(f"found --world-size {self.world_size}, expected 1 or more")
        for option, share in (("--mfu", self.mfu), ("--proxy-mfu", self.proxy_mfu or self.mfu)):
            if not 0 < share <= 1:
                raise ValueError(f"found {option} {share}, expected a share above 0 and at most 1")
        if self.peak_tflops < 0 or self.memory_gib < 0:
            raise ValueError(
                f"found --peak-tflops {self.peak_tflops} and --memory-gib {self.memory_gib}, expected positive numbers"
            )
        if self.device and self.device.lower() != "cpu" and peak_by_name(_spelled(self.device), "bf16") is None:
            known = ", ".join(name.lower() for name in PEAK_TFLOPS)
            raise ValueError(f"found --device {self.device!r}, expected cpu or one of {known}; or give --peak-tflops")

    def peak(self, platform: PlatformConfig, dtype: str) -> float | None:
        """FLOP/s of one device in ``dtype``; None where nobody says."""
        if self.peak_tflops and (dtype == platform.params_dtype or not self.device):
            return self.peak_tflops * 1e12
        return peak_by_name(_spelled(self.device), dtype) if self.device else None

    def kind(self, platform: PlatformConfig) -> str:
        """cpu or cuda; a run whose platform is ``auto`` is planned for CUDA unless the device is said to be a CPU."""
        return "cpu" if "cpu" in (platform.device, (self.device or "").lower()) else "cuda"


def _spelled(device: str) -> str:
    """A device as the table spells it: ``h100 pcie`` is ``H100 PCIe``."""
    return next((name for name in PEAK_TFLOPS if name.lower() == device.lower()), device.upper())


def make_plan(
    config: Config, machine: Machine, *, corpus_tokens: int | None = None, vocab_size: int | None = None
) -> dict:
    """The plan as plain data (README.md, "Before a run"); bytes, seconds and FLOPs as numbers.

    corpus_tokens, vocab_size: of a corpus that is not made yet. Raises the ValueErrors of a run for options that do
    not fit each other or the layout; data that is not there yet is listed under ``not_ready``.
    """
    check_options(config)
    models, source = _models(config, vocab_size)
    target, proxy, score = models.target, models.proxy, models.score
    layout, warnings = _layout(config, machine, target)
    corpus = plan_corpus(config, corpus_tokens)
    stages = [_timed(record, config, machine, models, layout) for record in _stages(config, models, corpus)]
    data = data_plan(config, corpus)
    return {
        "machine": asdict(machine),
        "layout": layout,
        "models": {
            "target": _model(target),
            "proxy": _model(proxy),
            "score model": {"family": config.score.family, "parameters": score.parameters},
        },
        "not_ready": not_ready(config),
        "assumptions": [*_assumptions(config, machine), source, *corpus.assumptions],
        "warnings": [*warnings, *data.pop("warnings")],
        "stages": stages,
        **_totals(stages, machine),
        "memory": memory_plan(config, machine.kind(config.platform), layout, machine.memory_gib, models),
        "traffic": traffic_plan(config, layout, models),
        "data": data,
        "disk": disk_plan(config, corpus, target, proxy, score),
    }


def planned_stages(config: Config) -> list[dict]:
    """Every stage of a run as {arm, round, stage, tokens, flops}, named as ``summary.json`` names them.

    tokens: those that a model trains on, draws or reads, every sample of the small models' batches taken as
    ``data.seq_length`` long.
    """
    return list(_stages(config, _models(config, None)[0], plan_corpus(config, None)))


def _models(config: Config, vocab_size: int | None) -> tuple[Models, str]:
    """The architectures, and where their vocabulary is from."""
    vocabulary, source = plan_vocabulary(config, vocab_size)
    target = configured_architecture("target", config.target, vocabulary)
    proxy = configured_architecture("proxy", config.proxy, vocabulary)
    return Models(target, proxy, FAMILIES[config.score.family].architecture(config.score, proxy)), source


def _model(arch: Architecture) -> dict:
    return {**asdict(arch), "parameters": parameter_count(arch)}


def _layout(config: Config, machine: Machine, target: Architecture) -> tuple[dict, list[str]]:
    """Sizes of the parallel groups, and warnings; ValueError for what a run refuses when its ranks have met."""
    check_world_size(config.target, machine.world_size)
    tensor, pipeline = config.target.tensor_model_parallel_size, config.target.pipeline_model_parallel_size
    replicas, chunks = machine.world_size // (tensor * pipeline), config.target.virtual_pipeline_model_parallel_size
    warnings = check_layout(config, world_size=machine.world_size, data_parallel_size=replicas)
    check_target_layout(config.target, target, config.data.seq_length)
    count = num_micro_batches(config.pretraining, replicas, pipeline, chunks)
    data_parallel_config(config.pretraining)
    training = config.pretraining
    total = training.warmup_iters + config.rounds * training.train_iters
    learning_rate_at(training.optimizer, 0, total)
    layout = {
        "world_size": machine.world_size,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "data_parallel_size": replicas,
        "micro_batches": count,
    }
    return layout, warnings


def _stages(config: Config, models: Models, corpus: Corpus) -> Iterator[dict]:
    """Every stage of the run as {arm, round, stage, tokens, flops}, named as ``summary.json`` names them."""
    seq_length, training, proxy, target = config.data.seq_length, config.pretraining, models.proxy, models.target
    iteration_tokens, iteration = training.global_batch_size * seq_length, training_flops(training, target, seq_length)
    branch = training.decay_branch_iters
    fixed = {
        "pretrain": (training.train_iters * iteration_tokens, training.train_iters * iteration),
        "decay_branch": (branch * iteration_tokens, branch * iteration),
    }
    warmup = {"target": (training.warmup_iters * iteration_tokens, training.warmup_iters * iteration)}
    warmup |= {"decay_branch": fixed["decay_branch"]} if branch else {}
    if needs_proxy(config):
        proxy_tokens = config.proxy.warmup_iters * config.proxy.warmup_batch_size * seq_length
        warmup["proxy"] = proxy_tokens, proxy_warmup_flops(config.proxy, proxy, seq_length)
    warmup |= {"evaluate": (0, 0.0)} if config.evaluation.tasks else {}
    for stage, cost in warmup.items():
        yield _record("shared", 0, f"warmup {stage}", *cost)
    for arm in config.arms:
        for number in range(1, config.rounds + 1):
            costs = {**fixed, "score": _scoring(config, arm, number, models, corpus)}
            costs["bilevel"] = _learning(config, arm, number, models, corpus)
            for stage in round_stages(config, arm):
                yield _record(arm, number, stage, *costs.get(stage, (0, 0.0)))


def _learning(config: Config, arm: str, number: int, models: Models, corpus: Corpus) -> tuple[int, float]:
    """Tokens that an arm's bilevel stage draws, and its FLOPs; those of a distillation at its start with them."""
    settings, seq_length = ARMS[arm].bilevel_options(config.bilevel), config.data.seq_length
    scheme = ARMS[arm].scheme
    samples = scheme.batches(settings) * settings.global_batch_size + settings.validation_batch_size
    start_tokens, start_flops = _distillation(config, arm, number, models, corpus)
    flops = scheme.flops(settings, models.proxy, models.target, seq_length, models.score)
    return settings.upper_iters * samples * seq_length + start_tokens, flops + start_flops


def _distillation(config: Config, arm: str, number: int, models: Models, corpus: Corpus) -> tuple[int, float]:
    """Tokens and FLOPs of teaching a round's score model what counts say; 0 where it starts otherwise."""
    if not (ARMS[arm].scheme.learns_scores and distils(config.score, number)):
        return 0, 0.0
    seq_length, held_back = config.data.seq_length, held_back_units(corpus.units[number])
    tokens = distillation_tokens(config.score, seq_length, held_back)
    return tokens, distillation_flops(config.score, models.score, seq_length, held_back)


def _scoring(config: Config, arm: str, number: int, models: Models, corpus: Corpus) -> tuple[int, float]:
    """Tokens of the shard that a model reads, and all FLOPs of the stage, as the arm says."""
    tokens_of = partial(reference_tokens, config)
    sizes = corpus.units[number], corpus.tokens[number], config.data.seq_length
    shard = Shard(*sizes, models.target, models.proxy, models.score, tokens_of)
    return ARMS[arm].work(config.baselines.get(arm), shard)


def _record(arm: str, number: int, stage: str, tokens: int, flops: float) -> dict:
    return {"arm": arm, "round": number, "stage": stage, "tokens": tokens, "flops": flops}


def _timed(record: dict, config: Config, machine: Machine, models: Models, layout: dict) -> dict:
    """A record with its seconds: FLOPs / (ranks x peak in the precision x utilisation) of each of its parts; None
    without a peak."""
    seconds = 0.0
    for dtype, flops, share in _parts(record, config, machine, models, layout):
        peak = machine.peak(config.platform, dtype)
        if peak is None:
            return {**record, "seconds": None}
        seconds += flops / (machine.world_size * peak * share)
    return {**record, "seconds": seconds}


def _parts(
    record: dict, config: Config, machine: Machine, models: Models, layout: dict
) -> list[tuple[str, float, float]]:
    """A stage's work as (precision, FLOPs, utilisation) of the models that do it.

    The utilisation of batches of small models is that of the ranks that have samples x their share of the time; the
    teaching of counts at a bilevel stage's start is taken to be dealt as its batches are.
    """
    platform, flops, small = config.platform, record["flops"], machine.proxy_mfu or machine.mfu
    if record["stage"] == "warmup proxy":
        dealt = busy_share(config.proxy.warmup_batch_size, machine.world_size)
        return [(config.proxy.warmup_params_dtype, flops, small * dealt)]
    if record["stage"] == "score":
        return [(_scoring_dtype(config, record["arm"]), flops, small)]
    if record["stage"] == "bilevel":  # the frozen target runs in its own precision, and is no small model
        arm = ARMS[record["arm"]]
        settings = arm.bilevel_options(config.bilevel)
        sizes = models.proxy, models.target, config.data.seq_length, models.score
        frozen = arm.scheme.flops(settings, *sizes) - arm.scheme.flops(replace(settings, kl_weight=0.0), *sizes)
        samples = settings.global_batch_size, settings.validation_batch_size
        dealt = min(busy_share(batch, machine.world_size) for batch in samples)
        held = teacher_share(settings.global_batch_size, layout, config.target)
        own = settings.params_dtype, flops - frozen, small * dealt
        return [(platform.params_dtype, frozen, machine.mfu * held), own]
    return [(platform.params_dtype, flops, machine.mfu)]


def _scoring_dtype(config: Config, arm: str) -> str:
    """The precision of an arm's score stage."""
    return ARMS[arm].params_dtype or config.scoring.params_dtype


def _assumptions(config: Config, machine: Machine) -> list[str]:
    """What the times rest on."""
    small = machine.proxy_mfu or machine.mfu
    alone = [config.scoring.params_dtype, config.proxy.warmup_params_dtype]
    alone += [_scoring_dtype(config, arm) for arm in config.arms]
    alone += [ARMS[arm].bilevel_options(config.bilevel).params_dtype for arm in config.arms]
    dtypes = dict.fromkeys((config.platform.params_dtype, config.bilevel.params_dtype, *alone))
    peaks = {dtype: machine.peak(config.platform, dtype) for dtype in dtypes}
    if None in peaks.values():
        return ["no times: nothing says what a device can do (--device or --peak-tflops)"]
    described = " and ".join(f"{peak / 1e12:g} TFLOP/s in {dtype}" for dtype, peak in peaks.items())
    return [
        f"time = FLOPs / (ranks x peak x utilisation), with a peak of {described} and a utilisation of "
        f"{machine.mfu:.0%} for the target, {small:.0%} for proxy and score model (--mfu, --proxy-mfu) on ranks that "
        "have samples; evaluations, checkpoints, selection, start-up and waiting for the network come on top"
    ]


def _totals(stages: Sequence[Mapping], machine: Machine) -> dict:
    """Sums per arm and over the run, and what BLISS costs on top of a run of the control arm alone."""
    names = list(dict.fromkeys(record["arm"] for record in stages))
    arms = {name: _sum([record for record in stages if record["arm"] == name]) for name in names}
    total = _sum(stages)
    seconds = total["seconds"]
    total["device_hours"] = None if seconds is None else seconds * machine.world_size / 3600
    return {"arms": arms, "total": total, "overhead": _overhead(stages)}


def _sum(records: Sequence[Mapping]) -> dict:
    seconds = [record["seconds"] for record in records]
    return {
        "tokens": sum(record["tokens"] for record in records),
        "flops": sum(record["flops"] for record in records),
        "seconds": None if None in seconds else sum(seconds),
    }


def _overhead(stages: Sequence[Mapping]) -> dict | None:
    """{arm, flops, seconds}: work of proxy and score model ÷ work of the target's training in one arm, or None."""
    chosen = next((record["arm"] for record in stages if record["stage"] == "bilevel"), None)
    if chosen is None:
        return None
    arm = [record for record in stages if record["arm"] in ("shared", chosen)]
    extra = _sum([record for record in arm if record["stage"] in SMALL_MODEL_STAGES])
    control = _sum([record for record in arm if record["stage"] not in SMALL_MODEL_STAGES])
    ratio = None if extra["seconds"] is None else extra["seconds"] / control["seconds"]
    return {"arm": chosen, "flops": extra["flops"] / control["flops"], "seconds": ratio}
