"""The launch configurations: each one loads, divides over its ranks, and its target builds and runs when narrowed."""

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest

from megatron_bliss.config.config import Config
from megatron_bliss.data.ingest.preprocess import PreprocessSettings, preprocess
from megatron_bliss.models.presets import parameter_count, resolve_architecture
from megatron_bliss.models.transformer import build_lm
from megatron_bliss.plan.plan import Machine, make_plan
from megatron_bliss.run.checks import check_layout, check_options, parse_arguments
from megatron_bliss.study.description import read_study
from megatron_bliss.study.runs import variant_config
from tests.data.corpora import documents, write_lines

EXAMPLES = Path(__file__).parents[2] / "examples"
LAYOUTS = {
    # parameters of the target, the fewest devices in nodes of eight, and the data-parallel ranks on these
    "pythia_410m_c4": (405_334_016, 8, 8),
    "pythia_1b_c4": (1_011_781_632, 8, 8),
    "pythia_2p8b_c4": (2_775_208_960, 8, 4),
    "pythia_6p9b_c4": (6_857_302_016, 8, 1),
    "llama_0p5b_c4": (494_859_520, 8, 8),
    "llama_13b_c4": (13_015_864_320, 8, 1),
    "llama_70b_c4": (68_976_648_192, 32, 1),
}
STUDIES = [path for path in sorted(EXAMPLES.glob("studies/*/*.yaml")) if path.stem != "base"]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    """A corpus to stand for all that a configuration names."""
    folder = tmp_path_factory.mktemp("corpus")
    source = write_lines(folder / "text.jsonl", documents(5))
    preprocess(PreprocessSettings(inputs=[source], output_prefix=str(folder / "c4"), tokenizer_type="bytes"))
    return str(folder / "c4")


def load(name: str, prefix: str, *options: str) -> Config:
    """The configuration as ``examples/launch.sh`` would read it, on a small corpus."""
    data = ["--data.train_prefix", prefix, "--data.validation_prefix", prefix, "--data.test_prefixes", f"[{prefix}]"]
    return parse_arguments(["--config", str(EXAMPLES / name / "config.yaml"), *data, *options])


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_configuration_loads_and_divides_over_its_nodes(name: str, prefix: str) -> None:
    config, (parameters, devices, replicas) = load(name, prefix), LAYOUTS[name]
    target = config.target
    vocab_size = 32000 if "llama" in name else 50432 if "6p9b" in name else 50304
    assert parameter_count(resolve_architecture(target, vocab_size)) == parameters
    split = target.tensor_model_parallel_size * target.pipeline_model_parallel_size
    assert devices // split == replicas and devices % split == 0
    check_layout(config, world_size=devices, data_parallel_size=replicas)
    architecture = resolve_architecture(target, vocab_size)
    assert architecture.num_attention_heads % target.tensor_model_parallel_size == 0
    stages = target.pipeline_model_parallel_size * target.virtual_pipeline_model_parallel_size
    assert architecture.num_layers % stages == 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_target_and_proxy_build_on_the_meta_device(name: str, prefix: str) -> None:
    """With every weight's shape and none of its memory."""
    config = load(name, prefix)
    for model in (config.target, config.proxy):
        architecture = resolve_architecture(model, 50304)
        built = build_lm(architecture, device="meta")
        assert sum(p.numel() for p in built.parameters()) == parameter_count(architecture)
        assert {p.device.type for p in built.parameters()} == {"meta"}


def test_every_example_configuration_is_known() -> None:
    found = {path.parent.name for path in EXAMPLES.glob("*_c4/config.yaml")}
    assert found == set(LAYOUTS)
    for name in found:
        assert f"run_folder: runs/{name}" in (EXAMPLES / name / "config.yaml").read_text()


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_study_has_runs_that_can_begin_and_that_fit(path: Path, tmp_path: Path, monkeypatch) -> None:
    """All but their data, which the scripts beside them make.

    At paper scale a device has 80 GB, and single_round is of cost alone.
    """
    study = read_study(path)
    assert (len(study.seeds) >= 3 and study.longer) or path == EXAMPLES / "studies/single_round/paper.yaml"
    monkeypatch.chdir(tmp_path)  # where no corpus lies
    for variant in study.variants:
        config = dataclasses.replace(variant_config(study, variant), run_folder="runs/any")
        check_options(config)
        data = config.data
        for prefix in (data.train_prefix, *data.guide_prefixes, *data.test_prefixes, *data.other_prefixes):
            assert is_prepared(Path(prefix)), prefix
        if path.stem == "paper":
            planned = make_plan(config, Machine(study.processes, "h100", memory_gib=80.0))
            assert planned["memory"]["fits"], (variant, planned["memory"]["advice"])


def is_prepared(prefix: Path) -> bool:
    """Whether a script makes this corpus or set; sets of passages and items have the names of the files it is given."""
    folder = "c4" if prefix.parent.name.startswith("c4-") else f"studies/{prefix.parent.name}"
    script, name = (EXAMPLES / folder / "prepare.sh").read_text(), prefix.name
    is_half = name.startswith(("heldout_", "guide_")) or name.endswith(("_heldout", "_guide"))
    return is_half or re.search(rf"\b{name}\b", script) is not None


@pytest.mark.parametrize(
    "script",
    [
        "find_python.sh",
        "launch.sh",
        "c4/prepare.sh",
        "quickstart/run.sh",
        "slurm/pretrain.sbatch",
        "slurm/preprocess.sbatch",
        "slurm/study.sbatch",
        "studies/inputs.sh",
        "studies/arms_small/prepare.sh",
        "studies/scores_small/prepare.sh",
        "studies/corpora/prepare.sh",
        "studies/corpora/run.sh",
    ],
)
def test_scripts_are_valid_shell(script: str) -> None:
    done = subprocess.run(["bash", "-n", str(EXAMPLES / script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_launch_passes_nodes_and_options_on(tmp_path: Path) -> None:
    """What torchrun would be given, seen by a stand-in for Python."""
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "BLISS_PYTHON": str(python), "NNODES": "4", "NODE_RANK": "2"}
    environment |= {"MASTER_ADDR": "node0", "GPUS_PER_NODE": "8"}
    command = ["bash", str(EXAMPLES / "launch.sh"), "pythia_1b_c4", "--rounds", "2"]
    words = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    pairs = dict(zip(words, words[1:], strict=False))
    expected = {"--nnodes": "4", "--node-rank": "2", "--master-addr": "node0", "--nproc-per-node": "8", "--rounds": "2"}
    assert {name: pairs.get(name) for name in expected} == expected
    assert pairs["--config"] == "examples/pythia_1b_c4/config.yaml"
    del environment["MASTER_ADDR"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "without MASTER_ADDR" in done.stderr


@pytest.mark.parametrize("script", ["slurm/pretrain.sbatch", "slurm/preprocess.sbatch", "slurm/study.sbatch"])
def test_slurm_logs_lie_where_the_job_is_submitted(script: str) -> None:
    """Slurm makes no folder for them: a job whose log has none fails without a word."""
    outputs = [line for line in (EXAMPLES / script).read_text().splitlines() if line.startswith("#SBATCH --output=")]
    assert len(outputs) == 1 and "/" not in outputs[0]


def test_slurm_starts_one_launcher_a_node_with_all_of_its_cores(tmp_path: Path) -> None:
    """What srun would be given, seen by stand-ins for Slurm's commands."""
    for name, script in {"srun": 'printf "%s\\n" "$MASTER_ADDR" "$@"', "scontrol": "echo node7; echo node8"}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"NNODES": "2", "JOB_ID": "41000", "JOB_NODELIST": "node[7-8]", "GPUS_ON_NODE": "4", "CPUS_PER_TASK": "48"}
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", **{f"SLURM_{name}": value for name, value in slurm.items()}}
    command = ["bash", str(EXAMPLES / "slurm/pretrain.sbatch"), "pythia_1b_c4", "--rounds", "2"]
    words = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split("\n")
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=48"} <= set(words)
    assert words[0] == "node7" and words[-5:-1] == ["launch", "pythia_1b_c4", "--rounds", "2"]


def test_settings_are_those_of_the_paper(prefix: str) -> None:
    """Of optimiser, schedule, batch, bilevel stage and selection."""
    config = load("pythia_410m_c4", prefix, "--config", str(EXAMPLES / "c4/paper.yaml"))
    optimizer = config.pretraining.optimizer
    found = optimizer.adam_beta1, optimizer.adam_beta2, optimizer.weight_decay, optimizer.clip_grad, optimizer.lr
    assert found == (0.9, 0.95, 0.1, 1.0, 1e-3)
    assert (optimizer.lr_warmup_iters, optimizer.lr_decay_style) == (2000, "constant")
    training = config.pretraining
    assert (training.global_batch_size, config.data.seq_length, training.decay_branch_iters) == (512, 1024, 200)
    assert (training.warmup_iters, training.train_iters, config.rounds) == (10000, 10000, 4)
    bilevel = config.bilevel
    assert (bilevel.upper_iters, bilevel.global_batch_size, bilevel.kl_weight) == (3000, 32, 0.01)
    assert (bilevel.l2_weight, bilevel.damping, bilevel.proxy_optimizer.lr) == (1e-7, 0.01, 1e-5)
    assert config.selection.policy == "top_fraction" and config.selection.settings["fraction"] == 0.2
    assert (config.proxy.restart_each_round, config.score.carry_over) == (True, True)
    assert dataclasses.asdict(bilevel.proxy_optimizer) == dataclasses.asdict(bilevel.score_optimizer)
    assert config.platform.params_dtype == "bf16"
