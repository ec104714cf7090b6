"""What a run refuses before any work: options that cannot work together, and data that are not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from megatron_bliss.arms import ARMS
from megatron_bliss.bilevel.guide_weightings import GUIDE_WEIGHTINGS, check_guide_weighting
from megatron_bliss.config.bounds import check_bounds
from megatron_bliss.config.config import Config
from megatron_bliss.config.models import ProxyConfig, TargetConfig
from megatron_bliss.config.stages import ROUND_STAGES
from megatron_bliss.data.manifest import check_same_tokenizer
from megatron_bliss.data.provenance import require_field
from megatron_bliss.data.splits import check_blend, check_guide, check_set_names, check_sets
from megatron_bliss.evaluation.checks import check_evaluation
from megatron_bliss.models.families import check_family
from megatron_bliss.models.families.family import TABLE_STARTS
from megatron_bliss.models.presets import is_sized
from megatron_bliss.run.options import parse_options
from megatron_bliss.run.order import distils, round_stages
from megatron_bliss.selection.near_duplicates import check_library
from megatron_bliss.selection.select import check_schedule, check_selection, domain_field


def parse_arguments(arguments: Sequence[str] | None = None) -> Config:
    """Read the command line (``sys.argv`` by default) into a checked configuration.

    Ends the program with a usage message on unknown keys or wrong types, and raises ``ValueError`` for combinations
    that cannot work.
    """
    config = parse_options(arguments)
    check(config)
    return config


def check(config: Config) -> None:
    """Refuse what cannot work, before any work; errors name the option to change."""
    check_options(config)
    for data_check in _data_checks(config):
        data_check()


def check_options(config: Config) -> None:
    """Refuse what cannot work whatever lies on this machine's disk."""
    check_bounds(config)
    check_selection(config.selection)
    check_schedule(config.selection, config.rounds)
    _check_run(config)
    _check_sections(config)
    check_blend(config.data)
    check_set_names(config.data)
    check_guide(config.data)


def not_ready(config: Config) -> list[str]:
    """What :func:`check` would refuse for want of data, a line each: all of them, not the first."""
    found = []
    for data_check in _data_checks(config):
        try:
            data_check()
        except ValueError as error:
            found.append(str(error))
    return list(dict.fromkeys(found))


def check_layout(config: Config, *, world_size: int, data_parallel_size: int) -> list[str]:
    """Refuse a target's batch that its replicas cannot share; warnings of small models' batches that leave ranks idle.

    Proxy and score model are data-parallel over all ranks. One that has no sample takes part in the sums with none.
    """
    training = config.pretraining
    if training.global_batch_size % (training.micro_batch_size * data_parallel_size):
        raise ValueError(
            f"found pretraining.global_batch_size {training.global_batch_size}, expected a multiple of "
            f"pretraining.micro_batch_size {training.micro_batch_size} x data-parallel size {data_parallel_size}"
        )
    _check_every_rank_draws(config, world_size)
    warnings = []
    names = ["bilevel.global_batch_size", "bilevel.validation_batch_size", "proxy.warmup_batch_size"]
    for name in [*names, "score.distil_batch_size"] if distils(config.score, 1) else names:
        section, key = name.split(".")
        value = getattr(getattr(config, section), key)
        if value < world_size:
            warnings.append(
                f"{name} {value} on {world_size} ranks leaves {world_size - value} of them without a sample: a batch "
                f"of {world_size} costs small models no more time"
            )
    return warnings


def _check_every_rank_draws(config: Config, world_size: int) -> None:
    fewest = min(config.bilevel.global_batch_size, config.bilevel.validation_batch_size)
    needing = [arm for arm in config.arms if ARMS[arm].scheme.every_rank_draws]
    if needing and fewest < world_size:
        raise ValueError(
            f"found bilevel.global_batch_size {config.bilevel.global_batch_size} and bilevel.validation_batch_size "
            f"{config.bilevel.validation_batch_size} on {world_size} ranks, expected a sample of both for every rank: "
            f"raise them, or leave out the arm {', '.join(needing)}"
        )


def _check_run(config: Config) -> None:
    if not config.run_folder:
        raise ValueError("found no run folder, expected a path for everything the run writes: set --run_folder")
    if not config.arms or not all(name in ARMS for name in config.arms):
        raise ValueError(f"found arms {config.arms}, expected a choice of {', '.join(ARMS)}")
    if len(set(config.arms)) < len(config.arms):
        raise ValueError(f"found arms {config.arms}, expected each of them once: take out what stands there twice")
    if config.stage is None and (config.round is not None or config.arm is not None):
        raise ValueError("found --round or --arm without --stage, expected --stage with them (one stage alone)")
    if config.stage == "decay_branch" and not config.pretraining.decay_branch_iters:
        raise ValueError("found pretraining.decay_branch_iters 0, expected 1 or more for --stage decay_branch")
    if config.stage in ROUND_STAGES:
        if config.stage == "evaluate" and config.round == 0 and config.evaluation.tasks:
            return  # the warm-up's target, shared by all arms
        if config.round is None or not 1 <= config.round <= config.rounds:
            raise ValueError(f"found round {config.round} for --stage {config.stage}, expected 1 to {config.rounds}")
        if config.arm not in config.arms:
            raise ValueError(
                f"found arm {config.arm!r} for --stage {config.stage}, expected one of {', '.join(config.arms)}"
            )
        stages = round_stages(config, config.arm)
        if config.stage not in stages:
            raise ValueError(
                f"found --stage {config.stage} for arm {config.arm}, expected one that it has: {', '.join(stages)}"
            )


def _check_sections(config: Config) -> None:
    if config.bilevel.micro_batch_size and config.bilevel.memory_limit_gib:
        raise ValueError("found bilevel.micro_batch_size and bilevel.memory_limit_gib, expected only one: drop one")
    check_family(config.score)
    check_guide_weighting(config.bilevel, config.data.reference_prefixes)
    _check_upper_steps(config)
    _check_guide_sets(config)
    for name in ("target", "proxy"):
        _check_model(name, getattr(config, name))


def _check_upper_steps(config: Config) -> None:
    """Without a step, scores are those that the score model starts with."""
    learning = [arm for arm in config.arms if "bilevel" in ARMS[arm].stages]
    if config.bilevel.upper_iters or not learning:
        return
    if config.score.init_from not in TABLE_STARTS:
        raise ValueError(
            f"found bilevel.upper_iters 0 with score.init_from {config.score.init_from}, expected at least one step, "
            f"or score.init_from {' or '.join(TABLE_STARTS)}: all scores would be equal"
        )
    without = [arm for arm in learning if not ARMS[arm].scheme.learns_scores]
    if without:
        raise ValueError(f"found bilevel.upper_iters 0, expected at least one step for the arm {', '.join(without)}")


def _check_guide_sets(config: Config) -> None:
    """A guide of several sets needs a sample of each in a batch, and arms that weigh them."""
    sets, size = len(config.data.guide_prefixes), config.bilevel.validation_batch_size
    references = len(config.data.reference_prefixes)
    if max(sets, 1) + references > size:
        options = "data.validation_prefix" + " and data.reference_prefix" * bool(references)
        raise ValueError(
            f"found bilevel.validation_batch_size {size} with {max(sets, 1) + references} sets in {options}, expected "
            "at least a sample of each"
        )
    single = [arm for arm in config.arms if not ARMS[arm].scheme.weighs_guide_sets]
    if sets > 1 and single:
        raise ValueError(
            f"found {sets} sets in data.validation_prefix with the arm {', '.join(single)}, expected one set for it: "
            "make a mixture of them by tools/prepare_validation.py --weights, or leave out the arm"
        )
    weighting = config.bilevel.guide_weighting
    if single and GUIDE_WEIGHTINGS[weighting].against_control:
        raise ValueError(
            f"found bilevel.guide_weighting {weighting} with the arm {', '.join(single)}, expected fixed for it: "
            "change bilevel.guide_weighting, or leave out the arm"
        )
    learning = [ARMS[arm].bilevel_options(config.bilevel) for arm in config.arms if "bilevel" in ARMS[arm].stages]
    if GUIDE_WEIGHTINGS[weighting].against_control and not any(
        one.upper_iters and one.guide_weighting == weighting for one in learning
    ):
        raise ValueError(
            f"found bilevel.guide_weighting {weighting} where no arm makes a bilevel step by it, expected fixed: "
            "nothing would hold the sets; raise bilevel.upper_iters and take an arm such as bliss, or change "
            "bilevel.guide_weighting"
        )


def _check_model(name: str, model: TargetConfig | ProxyConfig) -> None:
    if model.pretrained_checkpoint is not None:
        if not Path(model.pretrained_checkpoint).is_dir():
            raise ValueError(
                f"found {name}.pretrained_checkpoint {model.pretrained_checkpoint!r}, expected the folder of a model"
            )
        if not is_sized(model):
            return
    sizes = (model.architecture, model.num_layers, model.hidden_size, model.num_attention_heads)
    if model.preset is None and None in sizes:
        raise ValueError(
            f"found no size for the {name}, expected {name}.preset or all of {name}.architecture, {name}.num_layers, "
            f"{name}.hidden_size, {name}.num_attention_heads"
        )


def _data_checks(config: Config) -> Iterator[Callable[[], None]]:
    """One check per thing that has to lie on this machine's disk, which raises ValueError where it does not."""
    data = config.data
    yield partial(check_sets, data)
    prefixes = {"data.train_prefix": data.train_prefix}
    several = len(data.guide_prefixes) > 1
    for i, prefix in enumerate(data.guide_prefixes):
        prefixes["data.validation_prefix" + f"[{i}]" * several] = prefix
    several = len(data.reference_prefixes) > 1
    for i, prefix in enumerate(data.reference_prefixes):
        prefixes["data.reference_prefix" + f"[{i}]" * several] = prefix
    for option in ("test_prefixes", "other_prefixes", "blend_prefixes"):
        prefixes |= {f"data.{option}[{i}]": prefix for i, prefix in enumerate(getattr(data, option))}
    for name, prefix in prefixes.items():
        yield partial(_check_prefix, name, prefix, data.train_prefix)
    for arm in config.arms:
        yield partial(ARMS[arm].check, config.baselines.get(arm), data.train_prefix)
    if data.shard_by == "file":
        yield partial(require_field, data.train_prefix, "file")
    if config.selection.near_duplicates:
        yield check_library
    if (column := domain_field(config.selection)) is not None:
        yield partial(require_field, data.train_prefix, column)
    if config.evaluation.tasks:
        yield partial(check_evaluation, config.evaluation, data.train_prefix)


def _check_prefix(name: str, prefix: str, train_prefix: str) -> None:
    if not prefix or not Path(f"{prefix}.idx").is_file():
        raise ValueError(f"found {name} {prefix!r}, expected a prefix such that PREFIX.idx and PREFIX.bin exist")
    check_same_tokenizer(train_prefix, prefix)
