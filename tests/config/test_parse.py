"""The command line: YAML below single options, types and combinations checked, the resolved file reads back."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_bliss.arms import BASELINES
from megatron_bliss.config.baselines import BASELINE_NAMES
from megatron_bliss.config.config import Config, DataConfig, ModelConfig
from megatron_bliss.config.parse import dump_yaml, read_config
from megatron_bliss.run.checks import parse_arguments

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*/config.yaml"))


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
    code = "import sys, megatron_bliss.arguments; sys.exit('megatron.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert set(BASELINE_NAMES) == set(BASELINES)
