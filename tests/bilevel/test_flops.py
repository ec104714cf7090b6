"""FLOPs of the bilevel stage follow from what a step really does."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_bliss.bilevel import curvature, train
from megatron_bliss.bilevel.flops import WALK_PASSES, bilevel_flops
from megatron_bliss.bilevel.solvers import SOLVERS
from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.config.models import ModelConfig
from megatron_bliss.models.presets import flops_per_token, resolve_architecture
from tests.bilevel.trainers import ALONE, CONFIG, make_trainer

PYTHIA = resolve_architecture(ModelConfig(preset="pythia-31m"), 50304)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("solver", list(SOLVERS))
def test_a_step_makes_the_walks_that_are_counted(solver: str, steps: int, monkeypatch) -> None:
    trainer = make_trainer(dataclasses.replace(CONFIG, solver=solver, solver_steps=steps), torch.float64, ALONE)
    trainer.z.copy_(0.01 * torch.randn(trainer.z.shape, generator=torch.Generator().manual_seed(1)))
    honest, walks = curvature.curvature_product, []

    def counted(*arguments, **options):
        walks.append(honest(*arguments, **options))
        return walks[-1]

    infos, solve = [], train.solve

    def observed(*arguments, **options):
        z, info = solve(*arguments, **options)
        infos.append(info)
        return z, info

    monkeypatch.setattr(curvature, "curvature_product", counted)
    monkeypatch.setattr(train, "solve", observed)
    trainer.step()
    assert len(walks) == SOLVERS[solver].walks(steps)
    assert [info.products for info in infos] == [SOLVERS[solver].products(steps)]


@pytest.mark.parametrize("curvature_name", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("solver", list(SOLVERS))
def test_flops_grow_by_a_walk_for_each_walk(solver: str, curvature_name: str) -> None:
    config = BilevelConfig(solver=solver, curvature=curvature_name, solver_steps=5)
    one_walk = dataclasses.replace(config, solver="sgd", solver_steps=1)
    walk = WALK_PASSES[curvature_name] * flops_per_token(PYTHIA, 1024) * config.global_batch_size * 1024
    found, least = (bilevel_flops(each, PYTHIA, PYTHIA, 1024) for each in (config, one_walk))
    assert found - least == pytest.approx((SOLVERS[solver].walks(5) - 1) * walk * config.upper_iters, rel=1e-12)
