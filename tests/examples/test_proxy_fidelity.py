"""The study of how faithful a proxy is: the models and ties that it says it compares, and what the ties cost."""

import dataclasses
from pathlib import Path

import pytest

from megatron_bliss.models.presets import parameter_count, resolve_architecture
from megatron_bliss.plan.plan import Machine, make_plan
from megatron_bliss.study.description import Study, read_study
from megatron_bliss.study.runs import variant_config

FOLDER = Path(__file__).parents[2] / "examples" / "studies" / "proxy_fidelity"


def bilevel_flops(study: Study, variant: str) -> float:
    """Of all rounds, as the plan of the variant's run has them."""
    config = dataclasses.replace(variant_config(study, variant), run_folder="runs/any")
    planned = make_plan(config, Machine(study.processes, "h100", memory_gib=80.0))
    assert planned["memory"]["fits"], planned["memory"]["advice"]
    return sum(one["flops"] for one in planned["stages"] if (one["arm"], one["stage"]) == ("bliss", "bilevel"))


@pytest.mark.parametrize("scale", ["study", "paper"])
def test_variants_differ_in_the_tie_alone(scale: str) -> None:
    study = read_study(FOLDER / f"{scale}.yaml")
    configs = {name: variant_config(study, name) for name in study.variants if not name.startswith("longer-")}
    assert {name: config.bilevel.kl_weight for name, config in configs.items()} == {
        "untied": 0.0, "tied_0.01": 0.01, "tied_0.1": 0.1,
    }  # fmt: skip
    for config in configs.values():
        assert (config.score.family, config.score.init_from) == ("transformer", "proxy")
        assert "bliss" in config.arms and config.bilevel.upper_iters == {"study": 100, "paper": 3000}[scale]
    assert study.control == "untied/random" and study.seeds == [1, 2, 3]


def test_the_paper_scale_has_the_models_it_names() -> None:
    config = variant_config(read_study(FOLDER / "paper.yaml"), "untied")
    sizes = [parameter_count(resolve_architecture(model, 32000)) for model in (config.proxy, config.target)]
    assert sizes == [134_105_856, 298_886_144]
    assert (config.proxy.warmup_iters, config.rounds, config.pretraining.train_iters) == (3000, 4, 10000)


def test_a_tie_costs_a_forward_pass_of_the_target(tmp_path: Path, monkeypatch) -> None:
    study = read_study(FOLDER / "paper.yaml")
    monkeypatch.chdir(tmp_path)  # where no corpus lies
    untied, small, large = (bilevel_flops(study, name) for name in ("untied", "tied_0.01", "tied_0.1"))
    assert small == large > untied > 0
    target = resolve_architecture(variant_config(study, "untied").target, 32000)
    tokens = 4 * 3000 * 32 * 1024
    forward = 2 * (parameter_count(target) - 32000 * target.hidden_size) * tokens  # attention's products come on top
    assert forward < small - untied < 1.2 * forward
