"""What a run refuses before it starts, each with what to change."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_bliss.data.corpus_writer import CorpusWriter
from megatron_bliss.data.manifest import adopt_manifest
from megatron_bliss.run.checks import check, check_layout, not_ready, parse_arguments
from megatron_bliss.run.options import parse_options
from megatron_bliss.selection import near_duplicates


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--run_folder=", "--run_folder"),
        ("--arms=bliss,magic", "bliss, random"),
        ("--arms=bliss,random,bliss", "expected each of them once"),
        ("--rounds=0", "found rounds 0, expected 1 or more"),
        ("--stage=decay_branch", "decay_branch_iters 0, expected 1 or more for --stage decay_branch"),
        ("--target.pretrained_checkpoint=gone", "target.pretrained_checkpoint 'gone', expected the folder of a model"),
        ("--stage=select", "expected 1 to 4"),
        ("--round=1", "without --stage"),
        ("--selection.fraction=1.5", "selection.fraction"),
        ("--selection.fraction_schedule=[0.2,0.1]", "0.1] for 4 rounds, expected one fraction for each"),
        ("--bilevel.damping=-1", "bilevel.damping"),
        ("--pretraining.train_iters=0", "pretraining.train_iters"),
        ("--pretraining.decay_branch_iters=-1", "decay_branch_iters -1, expected 0 or more"),
        ("--data.train_prefix=/nowhere/x", "PREFIX.idx"),
        ("--data.test_prefixes=[]", "at least one held-out set"),
        ("--data.other_prefixes=[/nowhere/y]", r"data.other_prefixes\[0\] '/nowhere/y', expected a prefix"),
        ("--logging.loss_margin=-0.1", "logging.loss_margin -0.1, expected 0 to 100"),
        ("--target.preset=null", "target.preset"),
        ("--baselines.mates.probe_units=19", "baselines.mates.probe_units 19, expected 20 or more"),
        ("--baselines.mates.regressor_iters=0", "baselines.mates.regressor_iters 0, expected 1 or more"),
        ("--baselines.mates.lr=-1", "baselines.mates.lr -1.0, expected 0 or more"),
        ("--evaluation.tasks=[sciq]", "evaluation.data_dir ''"),
        ("--score.distil_iters=0", "score.distil_iters 0, expected 1 or more"),
        ("--score.distil_batch_size=0", "score.distil_batch_size 0, expected 1 or more"),
        ("--score.distil_optimizer.lr=0", "score.distil_optimizer.lr 0.0, expected more than 0"),
    ],
)
def test_impossible_combinations_say_what_to_change(change: str, message: str, options: list[str]) -> None:
    name = change.split("=")[0]
    with pytest.raises(ValueError, match=message):
        parse_arguments([*[o for o in options if o.split("=")[0] != name], change])


def test_a_stage_that_an_arm_does_not_have_is_refused(options: list[str]) -> None:
    with pytest.raises(ValueError, match="--stage bilevel for arm random, expected one that it has: score, select"):
        parse_arguments([*options, "--stage=bilevel", "--round=1", "--arm=random"])
    parse_arguments([*options, "--stage=bilevel", "--round=1", "--arm=bliss"])


def test_selection_by_domain_and_shards_by_file_need_a_provenance(options: list[str], prefix: str) -> None:
    changes = (["--data.shard_by=file"], ["--selection.policy=proportional"])
    for change in changes:
        with pytest.raises(ValueError, match="provenance.parquet does not exist"):
            parse_arguments([*options, *change])
    pq.write_table(pa.table({"file": ["a.jsonl"], "topic": ["prose"]}), f"{prefix}.provenance.parquet")
    with pytest.raises(ValueError, match="no column 'domain', expected one of file, topic"):
        parse_arguments([*options, *changes[1]])
    parse_arguments([*options, *changes[0], *changes[1], "--selection.domain_field=topic"])


def test_near_duplicates_need_their_library(options: list[str], monkeypatch) -> None:
    parse_arguments([*options, "--selection.near_duplicates=0.8"])
    monkeypatch.setattr(near_duplicates, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="no package datasketch"):
        parse_arguments([*options, "--selection.near_duplicates=0.8"])
    assert len(not_ready(parse_options([*options, "--selection.near_duplicates=0.8"]))) == 1
    parse_arguments(options)


def test_sets_of_another_tokenizer_are_refused(options: list[str], tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    with CorpusWriter(other, 300) as writer:
        writer.add([1, 2, 3], [3])
    adopt_manifest(other, {"kind": "bytes", "sha256": "1", "vocab_size": 257, "eod": 256})
    with pytest.raises(ValueError, match="same --tokenizer-type"):
        parse_arguments([*options, f"--data.validation_prefix={other}"])
    with pytest.raises(ValueError, match="same --tokenizer-type"):
        parse_arguments([*options, f"--data.other_prefixes=[{other}]"])


def test_a_set_of_the_guides_kind_is_no_other_set(options: list[str], prefix: str) -> None:
    with pytest.raises(ValueError, match="data.test_prefixes and data.other_prefixes, expected a last part of its own"):
        parse_arguments([*options, f"--data.other_prefixes=[{prefix}]"])


def test_batches_that_ranks_cannot_share_are_refused(options: list[str]) -> None:
    config = parse_arguments(options)
    check(config)
    assert check_layout(config, world_size=4, data_parallel_size=2) == []
    with pytest.raises(ValueError, match="pretraining.global_batch_size 512, expected a multiple of"):
        check_layout(config, world_size=3, data_parallel_size=3)
    warnings = check_layout(config, world_size=64, data_parallel_size=2)
    assert any("bilevel.global_batch_size 32 on 64 ranks leaves 32 of them without a sample" in w for w in warnings)
