"""The command line: YAML below single options, types and combinations checked, the resolved file reads back."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_bliss.arms import ARMS
from megatron_bliss.config.config import Config
from megatron_bliss.config.data import DataConfig
from megatron_bliss.config.models import ModelConfig
from megatron_bliss.config.parse import dump_yaml, to_dict
from megatron_bliss.config.settings import merged_settings
from megatron_bliss.run.checks import parse_arguments
from megatron_bliss.run.options import TABLES, read_config

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


def test_a_section_may_have_several_choices(options: list[str], tmp_path: Path) -> None:
    config = parse_arguments([*options, "--bilevel.weights", "sigmoid", "--bilevel.solver", "neumann"])
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    assert read_config(path).bilevel == config.bilevel
    assert (config.bilevel.weights, config.bilevel.solver) == ("sigmoid", "neumann")
    for option in ("--bilevel.weights", "--bilevel.solver", "--score.family"):
        with pytest.raises(SystemExit):
            parse_arguments([*options, option, "none"])


@pytest.mark.parametrize("written", ["bliss,dsir", "[bliss,dsir]", " bliss, dsir ,"])
def test_arms_are_a_list_however_they_are_written(written: str, options: list[str], tmp_path: Path) -> None:
    config = parse_arguments([*options, "--arms", written])
    assert config.arms == ["bliss", "dsir"] and yaml.safe_load(dump_yaml(config))["arms"] == ["bliss", "dsir"]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"arms": written}))
    assert read_config(path).arms == ["bliss", "dsir"]


def test_options_of_arms_stand_over_the_file_as_others_do(options: list[str], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"baselines": {"dsir": {"buckets": 7, "noise": 0.5}}}))
    config = parse_arguments([*options, "--config", str(path), "--baselines.dsir.buckets", "9"])
    assert config.baselines["dsir"] == ARMS["dsir"].settings(buckets=9, noise=0.5)
    assert config.baselines["mates"] == ARMS["mates"].settings()
    path.write_text(yaml.safe_dump({"baselines": {"dsir": {"bucket": 7}}}))
    with pytest.raises(SystemExit):
        parse_arguments([*options, "--config", str(path)])


def test_settings_of_choices_are_options_of_their_section(options: list[str], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"selection": {"policy": "gumbel", "temperature": 0.5, "fraction": 0.3}}))
    config = parse_arguments([*options, "--config", str(path), "--selection.fraction", "0.4"])
    assert config.selection.policy == "gumbel" and config.selection.epoch_warning == 4.0
    assert config.selection.settings["temperature"] == 0.5 and config.selection.settings["fraction"] == 0.4
    flat = to_dict(config)["selection"]
    own = {"policy": "gumbel", "epoch_warning": 4.0, "fraction_schedule": [], "near_duplicates": 0.0}
    assert flat == {**own, **config.selection.settings}
    assert flat.keys() == {*own, *merged_settings(TABLES["selection.policy"])}
    whole = parse_arguments([*options, "--selection", yaml.safe_dump(flat, default_flow_style=True)])
    assert whole.selection == config.selection


def test_a_pretrained_checkpoint_needs_no_sizes(options: list[str], tmp_path: Path) -> None:
    unsized = [option for option in options if not option.startswith("--target")]
    config = parse_arguments([*unsized, f"--target.pretrained_checkpoint={tmp_path}"])
    assert config.target.preset is None and config.target.pretrained_checkpoint == str(tmp_path)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_every_example_file_is_understood(path: Path, options: list[str]) -> None:
    own = [option for option in options if option.startswith(("--data", "--run"))]
    missing = ["--data.other_prefixes=[]", "--evaluation.tasks=[]"]  # their data are not made yet
    config = parse_arguments(["--config", str(path), *own, *missing])
    assert read_config(path).data.seq_length == config.data.seq_length
    assert config.rounds >= 1 and config.data.seq_length > 0


@pytest.mark.parametrize(
    "wrong",
    [
        "--target.nonsense=1",
        "--rounds=many",
        "--bilevel.solver=magic",
        "--selection.policy=luck",
        "--selection.fractoin=1",
        "--bilevel.upper_iter=3",  # no abbreviations: a new option could change what one means
    ],
)
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
    sections = {section.name: section.default_factory for section in dataclasses.fields(Config)}
    sections |= {f"baselines.{name}": arm.settings for name, arm in ARMS.items()}
    for name, section in sections.items():
        if dataclasses.is_dataclass(section):
            for option in dataclasses.fields(section):
                assert (f"--{name}.{option.name}" in text) == (option.name != "settings")
    words = " ".join(text.split())
    assert "m, buckets that n-grams are hashed into. [1 or more]" in words
    for name, arm in ARMS.items():
        assert f"{name}: {arm.help}" in words
    for setting in merged_settings(TABLES["selection.policy"]).values():
        assert f"--selection.{setting.name}" in text
        assert "".join(setting.described().split()) in "".join(text.split())


def test_options_are_read_without_loading_torch() -> None:
    code = """import sys, megatron_bliss.run.checks as checks
config = checks.parse_options(["--selection.policy=quotas", "--selection.quotas={prose: 0.5}", "--arms=bliss,mates"])
assert config.selection.settings["quotas"] == {"prose": 0.5}
sys.exit(", ".join({"torch", "megatron.core"} & sys.modules.keys()) or 0)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
