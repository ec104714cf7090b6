"""The data of a plan: the corpus as it is or is assumed to be, what selections offer, and the disk a run needs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from megatron_bliss.arms import ARMS
from megatron_bliss.base.platform import choose_dtype
from megatron_bliss.bilevel.guide_weightings import GUIDE_WEIGHTINGS
from megatron_bliss.config.config import Config
from megatron_bliss.config.selection import SelectionConfig
from megatron_bliss.data.indexed import IndexedCorpus, chosen
from megatron_bliss.data.manifest import manifest_path, read_manifest
from megatron_bliss.data.splits import parse_split
from megatron_bliss.models.presets import PRESETS, Architecture, parameter_count
from megatron_bliss.models.score_architecture import ScoreArchitecture
from megatron_bliss.run.corpora import deal_units
from megatron_bliss.run.order import ASSUMED_SHARE, round_stages, round_tokens, selection_of
from megatron_bliss.selection.select import in_round, kept_share, repetition_warnings, selection_in_words
from megatron_bliss.target.memory import FP32_BYTES, MOMENT_BYTES, chunk_weights
from megatron_bliss.target.pretrained import pretrained_architecture

DEFAULT_VOCABULARY = 50304
"""Ids where nothing says how many: the padded vocabulary of GPT-NeoX and Pythia."""
VIEW_BYTES = 28
"""A unit in a shard or subset: length, pointer and document in the index (20), and its number in the corpus (8)."""
SCORE_BYTES = 4


@dataclass(frozen=True)
class Corpus:
    """Units and tokens of every shard of a run, the warm-up's first."""

    units: list[int]
    tokens: list[int]
    num_units: int
    num_tokens: int
    is_there: bool
    assumptions: list[str] = field(default_factory=list)


def plan_vocabulary(config: Config, given: int | None) -> tuple[int, str]:
    """Ids of the tokenizer, and where that is from: the corpus, ``given``, a pretrained model or a preset."""
    prefix = config.data.train_prefix
    if prefix and Path(manifest_path(prefix)).is_file():
        tokenizer = read_manifest(prefix).get("tokenizer")
        if tokenizer:
            return int(tokenizer["vocab_size"]), f"vocabulary of {tokenizer['vocab_size']:,} ids: the corpus's"
    if given is not None:
        if given < 2:
            raise ValueError(f"found --vocab-size {given}, expected at least 2")
        return given, f"vocabulary of {given:,} ids, as given"
    for name, model in (("target", config.target), ("proxy", config.proxy)):
        if model.pretrained_checkpoint is not None:
            size = pretrained_architecture(model.pretrained_checkpoint).vocab_size
            return size, f"vocabulary of {size:,} ids: {name}.pretrained_checkpoint's (--vocab-size changes it)"
    presets = [model.preset for model in (config.target, config.proxy) if model.preset in PRESETS]
    if presets:
        size = PRESETS[presets[0]].vocab_size
        return size, f"vocabulary of {size:,} ids: that of preset {presets[0]} (--vocab-size changes it)"
    return DEFAULT_VOCABULARY, f"vocabulary of {DEFAULT_VOCABULARY:,} ids, a guess (--vocab-size changes it)"


def plan_corpus(config: Config, corpus_tokens: int | None) -> Corpus:
    """The corpus dealt to shards as the run will deal it; where it is not there, one of ``corpus_tokens`` tokens, or
    one from which every selection is trained on once (with a schedule of fractions: the smallest one).

    Dealing a corpus that is there takes as long as the run's first stage: a shard's tokens are counted, not guessed.
    """
    prefix, shards = config.data.train_prefix, config.rounds + 1
    if prefix and Path(f"{prefix}.idx").is_file() and Path(manifest_path(prefix)).is_file():
        counts = read_manifest(prefix)["counts"]
        lengths, (_, dealt) = IndexedCorpus(prefix).lengths, deal_units(config.data, config.rounds, config.seed)
        tokens = [sum(int(part.sum(dtype=np.int64)) for part in chosen(lengths, ids)) for ids in dealt]
        return Corpus([len(ids) for ids in dealt], tokens, counts["units"], counts["tokens"], True)
    share = parse_split(config.data.split)[0]
    if corpus_tokens is None:
        shard = int(round_tokens(config) / _assumed_share(config))
        which = "the smallest" if config.selection.fraction_schedule else "every"
        why = f"assumed, such that {which} selection is trained on once"
    else:
        if corpus_tokens < shards:
            raise ValueError(
                f"found --corpus-tokens {corpus_tokens}, expected at least one for each of {shards} shards"
            )
        shard, why = int(corpus_tokens * share / shards), "as given"
    total = int(shard * shards / share)
    text = f"corpus not made yet: {total:,} tokens {why}, in units of {config.data.seq_length} (--corpus-tokens)"
    units = -(-shard // config.data.seq_length)
    return Corpus([units] * shards, [shard] * shards, -(-total // config.data.seq_length), total, False, [text])


def data_plan(config: Config, corpus: Corpus) -> dict:
    """Units and tokens of corpus and shards, what selections offer and are asked for; warnings as the run gives them.

    A selection is counted at its shard's mean length of a unit; what a threshold keeps is not known before scoring.
    """
    needed, rounds, warnings = round_tokens(config), [], []
    for number in range(1, config.rounds + 1):
        selection = in_round(config.selection, number)
        offered = _selected_tokens(selection, corpus.tokens[number], needed)
        rounds.append(
            {
                "round": number,
                "units": corpus.units[number],
                "tokens": corpus.tokens[number],
                "selected_tokens": offered,
                "needed_tokens": needed,
                "epochs": needed / offered if offered else None,
            }
        )
        if offered:
            warnings += repetition_warnings(needed, offered, selection)
    training = config.pretraining
    warmup = training.warmup_iters * training.global_batch_size * config.data.seq_length
    return {
        "is_there": corpus.is_there,
        "units": corpus.num_units,
        "tokens": corpus.num_tokens,
        "warmup": {
            "units": corpus.units[0],
            "tokens": corpus.tokens[0],
            "needed_tokens": warmup,
            "epochs": warmup / max(1, corpus.tokens[0]),
        },
        "rounds": rounds,
        "selection": selection_in_words(in_round(config.selection, 1)),
        "warnings": list(dict.fromkeys(warnings)),
    }


def _assumed_share(config: Config) -> float:
    """Share of a shard of any size that the smallest selection keeps, as far as it can be told."""
    needed, selections = round_tokens(config), _selections(config)
    return min(kept_share(one, needed / ASSUMED_SHARE, needed) or ASSUMED_SHARE for one in selections)


def _selections(config: Config) -> list[SelectionConfig]:
    """What the selection of each round goes by."""
    return [in_round(config.selection, number) for number in range(1, config.rounds + 1)]


def _selected_tokens(selection: SelectionConfig, shard_tokens: int, needed: int) -> int | None:
    """About what a selection holds; None where the scores decide."""
    share = kept_share(selection, shard_tokens, needed)
    return None if share is None else max(1, round(share * shard_tokens))


def disk_plan(
    config: Config, corpus: Corpus, target: Architecture, proxy: Architecture, score: ScoreArchitecture
) -> dict:
    """Bytes of what a run leaves in its folder, by kind, and of one checkpoint of the target.

    Not counted: metrics, TensorBoard, megatron-core's dataset caches, and a checkpoint that is being written.
    """
    arms, selecting = config.arms, corpus.units[1:]
    learning = [ARMS[arm].bilevel_options(config.bilevel) for arm in arms if "bilevel" in round_stages(config, arm)]
    controls = sum(GUIDE_WEIGHTINGS[one.guide_weighting].against_control for one in learning)
    checkpoint, count = checkpoint_bytes(config, target), _checkpoints(config)
    selected = [_selected_units(config, arm, corpus) for arm in arms]
    proxies, scores = parameter_count(proxy), score.parameters
    warmup = (FP32_BYTES + MOMENT_BYTES) * proxies + FP32_BYTES * proxies
    bilevel = (FP32_BYTES + MOMENT_BYTES) * (proxies + scores) + FP32_BYTES * (2 * proxies + scores)  # and z
    control = (FP32_BYTES + MOMENT_BYTES + FP32_BYTES) * proxies
    parts = {
        "target checkpoints": checkpoint * count,
        "proxy and score model": warmup + (bilevel * len(learning) + control * controls) * config.rounds,
        "shards": VIEW_BYTES * corpus.num_units,
        "scores": SCORE_BYTES * sum(selecting) * len(arms),
        "subsets": sum(int(VIEW_BYTES * units) for units in selected),
    }
    return {"parts": parts, "total": sum(parts.values()), "checkpoint": checkpoint, "checkpoints": count}


def _selected_units(config: Config, arm: str, corpus: Corpus) -> float:
    """About how many units an arm selects in all rounds; where the scores decide, at most all of them."""
    needed, total = round_tokens(config), 0.0
    for number in range(1, config.rounds + 1):
        share = kept_share(selection_of(config, arm, number), corpus.tokens[number], needed)
        total += corpus.units[number] * (share or 1.0)
    return total


def checkpoint_bytes(config: Config, target: Architecture) -> int:
    """One checkpoint of the target: weights and moments, and the fp32 weights where the model's are bf16."""
    whole = replace(
        config.target,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=1,
    )
    element_size = choose_dtype(config.platform).itemsize
    each = element_size + MOMENT_BYTES + (FP32_BYTES if element_size < FP32_BYTES else 0)
    return each * sum(weight.size for weight in chunk_weights(whole, target, 0))


def _checkpoints(config: Config) -> int:
    """Checkpoints of the target that a finished run holds: at most ``checkpoint.keep`` per stage that trains it."""
    training, arms = config.pretraining, len(config.arms)
    kept = _kept(config, 0, training.warmup_iters)
    branch = training.decay_branch_iters
    kept += _kept(config, training.warmup_iters, training.warmup_iters + branch)
    for number in range(config.rounds):
        first = training.warmup_iters + number * training.train_iters
        last = first + training.train_iters
        kept += arms * (_kept(config, first, last) + _kept(config, last, last + branch))
    return kept


def _kept(config: Config, first: int, last: int) -> int:
    """Checkpoints that a segment leaves: at multiples of ``save_interval`` and at its end."""
    interval = config.checkpoint.save_interval
    return min(config.checkpoint.keep, (last - 1) // interval - first // interval + 1) if last > first else 0


def reference_tokens(config: Config, samples: int) -> int:
    """Tokens of so many samples of the guide: of mean length where it is there, else of the greatest."""
    prefixes, length = config.data.guide_prefixes, config.data.seq_length
    if not prefixes or not all(Path(manifest_path(prefix)).is_file() for prefix in prefixes):
        return samples * length
    counts = [read_manifest(prefix)["counts"] for prefix in prefixes]
    means = [min(length, one["tokens"] / max(one["units"], 1)) for one in counts]
    mean = np.average(means, weights=config.data.guide_weights or None)
    return int(min(samples, sum(one["units"] for one in counts)) * mean)
