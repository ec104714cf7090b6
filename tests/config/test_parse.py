"""The command line: YAML below single options, types and combinations checked, the resolved file reads back."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from megatron_bliss.arms import BASELINES
from megatron_bliss.config.baselines import BASELINE_NAMES
from megatron_bliss.config.config import Config, DataConfig, ModelConfig
from megatron_bliss.config.parse import dump_yaml, read_config
from megatron_bliss.data.indexed import CorpusWriter
from megatron_bliss.data.manifest import adopt_manifest
from megatron_bliss.run.checks import check, check_layout, parse_arguments

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*/config.yaml"))


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """A corpus of one unit."""
    path = str(tmp_path / "corpus")
    with CorpusWriter(path, 300) as writer:
        writer.add([1, 2, 3], [3])
    adopt_manifest(path, {"kind": "bytes", "sha256": "0", "vocab_size": 257, "eod": 256})
    return path


@pytest.fixture
def options(prefix: str) -> list[str]:
    """The shortest command line that passes."""
    data = [f"--data.{name}={prefix}" for name in ("train_prefix", "validation_prefix")]
    models = ["--target.preset=pythia-14m", "--proxy.preset=pythia-14m"]
    return ["--run_folder=run", *data, f"--data.test_prefixes=[{prefix}]", *models]


def test_options_stand_over_the_file(options: list[str], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"rounds": 3, "target": {"tensor_model_parallel_size": 2, "num_layers": 5}}))
    config = parse_arguments([*options, "--config", str(path), "--target.tensor_model_parallel_size", "4"])
    assert (config.rounds, config.target.num_layers, config.target.tensor_model_parallel_size) == (3, 5, 4)
    assert isinstance(config.target, ModelConfig) and isinstance(config.data, DataConfig)


def test_the_resolved_file_reads_back_the_same(options: list[str], tmp_path: Path) -> None:
    config = parse_arguments([*options, "--bilevel.proxy_optimizer.lr", "0.25", "--seed=7"])
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    assert parse_arguments(["--config", str(path)]) == config
    assert config.bilevel.proxy_optimizer.lr == 0.25


def test_a_pretrained_checkpoint_needs_no_sizes(options: list[str], tmp_path: Path) -> None:
    unsized = [option for option in options if not option.startswith("--target")]
    config = parse_arguments([*unsized, f"--target.pretrained_checkpoint={tmp_path}"])
    assert config.target.preset is None and config.target.pretrained_checkpoint == str(tmp_path)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_every_example_file_is_understood(path: Path, options: list[str]) -> None:
    own = [option for option in options if option.startswith(("--data", "--run"))]
    config = parse_arguments(["--config", str(path), *own, "--evaluation.tasks=[]"])  # their data are not made yet
    assert read_config(path).data.seq_length == config.data.seq_length
    assert config.rounds >= 1 and config.data.seq_length > 0


@pytest.mark.parametrize("wrong", ["--target.nonsense=1", "--rounds=many", "--bilevel.solver=magic"])
def test_unknown_keys_and_wrong_types_end_the_program(wrong: str, options: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        parse_arguments([*options, wrong])
    assert wrong.split("=")[0].split(".")[-1].lstrip("-") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--run_folder=", "--run_folder"),
        ("--arms=bliss,magic", "bliss, random"),
        ("--rounds=0", "found rounds 0, expected 1 or more"),
        ("--stage=decay_branch", "decay_branch_iters 0, expected 1 or more for --stage decay_branch"),
        ("--target.pretrained_checkpoint=gone", "target.pretrained_checkpoint 'gone', expected the folder of a model"),
        ("--stage=select", "expected 1 to 4"),
        ("--round=1", "without --stage"),
        ("--selection.fraction=1.5", "selection.fraction"),
        ("--bilevel.damping=-1", "bilevel.damping"),
        ("--pretraining.train_iters=0", "pretraining.train_iters"),
        ("--pretraining.decay_branch_iters=-1", "decay_branch_iters -1, expected 0 or more"),
        ("--data.train_prefix=/nowhere/x", "PREFIX.idx"),
        ("--data.test_prefixes=[]", "at least one held-out set"),
        ("--target.preset=null", "target.preset"),
        ("--baselines.mates.probe_units=19", "baselines.mates.probe_units 19, expected 20 or more"),
        ("--baselines.mates.regressor_iters=0", "baselines.mates.regressor_iters 0, expected 1 or more"),
        ("--baselines.mates.lr=-1", "baselines.mates.lr -1.0, expected 0 or more"),
        ("--evaluation.tasks=[sciq]", "evaluation.data_dir ''"),
    ],
)
def test_impossible_combinations_say_what_to_change(change: str, message: str, options: list[str]) -> None:
    name = change.split("=")[0]
    with pytest.raises(ValueError, match=message):
        parse_arguments([*[o for o in options if o.split("=")[0] != name], change])


def test_selection_by_domain_and_shards_by_file_need_a_provenance(options: list[str], prefix: str) -> None:
    changes = (["--data.shard_by=file"], ["--selection.policy=proportional"])
    for change in changes:
        with pytest.raises(ValueError, match="provenance.parquet does not exist"):
            parse_arguments([*options, *change])
    pq.write_table(pa.table({"file": ["a.jsonl"], "topic": ["prose"]}), f"{prefix}.provenance.parquet")
    with pytest.raises(ValueError, match="no column 'domain', expected one of file, topic"):
        parse_arguments([*options, *changes[1]])
    parse_arguments([*options, *changes[0], *changes[1], "--selection.domain_field=topic"])


def test_sets_of_another_tokenizer_are_refused(options: list[str], tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    with CorpusWriter(other, 300) as writer:
        writer.add([1, 2, 3], [3])
    adopt_manifest(other, {"kind": "bytes", "sha256": "1", "vocab_size": 257, "eod": 256})
    with pytest.raises(ValueError, match="same --tokenizer-type"):
        parse_arguments([*options, f"--data.validation_prefix={other}"])


def test_batches_that_ranks_cannot_share_are_refused(options: list[str]) -> None:
    config = parse_arguments(options)
    check(config)
    assert check_layout(config, world_size=4, data_parallel_size=2) == []
    with pytest.raises(ValueError, match="pretraining.global_batch_size 512, expected a multiple of"):
        check_layout(config, world_size=3, data_parallel_size=3)
    warnings = check_layout(config, world_size=64, data_parallel_size=2)
    assert any("bilevel.global_batch_size 32 on 64 ranks leaves 32 of them without a sample" in w for w in warnings)


def test_every_option_has_a_line_of_help(capsys) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    text = capsys.readouterr().out
    for part in ("|B|, samples per step over all ranks", "gamma, weight of the KL term", "Ranks that share one layer"):
        assert part in text
    for section in dataclasses.fields(Config):
        if dataclasses.is_dataclass(section.default_factory):
            for option in dataclasses.fields(section.default_factory):
                assert f"--{section.name}.{option.name}" in text


def test_options_are_read_without_loading_megatron_core() -> None:
    code = "import sys, megatron_bliss.run.checks; sys.exit('megatron.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert set(BASELINE_NAMES) == set(BASELINES)
