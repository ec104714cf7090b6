"""The guard lets a precision through when its products point the right way, and names what does not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megatron_bliss.bilevel import precision
from megatron_bliss.bilevel.precision import ComputeCopy, precision_warnings, product_cosines
from megatron_bliss.models.transformer import build_lm
from tests.bilevel.trainers import ALONE, CONFIG, SIZES, VOCABULARY, RandomUnits, make_trainer


@pytest.fixture
def model():
    return build_lm(SIZES, vocab_size=VOCABULARY, seed=1)


@pytest.fixture
def batch():
    return RandomUnits(4, 1).batch(np.arange(4))


@pytest.mark.parametrize("kind", ["gauss_newton", "hessian"])
def test_fp32_passes_and_bf16_is_close(model, batch, kind: str) -> None:
    assert min(product_cosines(model, batch, torch.float32, kind).values()) > 0.99999
    cosines = product_cosines(model, batch, torch.bfloat16, kind)
    assert 0.9 < min(cosines.values()) < 0.99999
    assert precision_warnings(model, batch, torch.float32, kind) == []


def test_a_product_that_is_off_names_its_layer(model, batch, monkeypatch) -> None:
    honest = precision._product

    def broken(strength: float):
        def product(model, dtype, batch, weights, z, kind):
            result = honest(model, dtype, batch, weights, z, kind)
            if dtype == torch.float32:
                name = "blocks.1.feed_forward_in.weight"
                noise = torch.randn(result[name].shape, generator=torch.Generator().manual_seed(1))
                result[name].add_(noise * strength * result[name].norm() / noise.norm())
            return result

        return product

    monkeypatch.setattr(precision, "_product", broken(0.3))
    (warning,) = precision_warnings(model, batch, torch.float32, "hessian")
    assert "blocks.1.feed_forward_in.weight 0.9" in warning
    monkeypatch.setattr(precision, "_product", broken(3.0))
    with pytest.raises(ValueError, match="blocks.1.feed_forward_in.weight.*set bilevel.params_dtype to fp32"):
        precision_warnings(model, batch, torch.float32, "hessian")


def test_the_copy_follows_its_master(model) -> None:
    assert ComputeCopy(model, torch.float32).refresh() is model
    low = ComputeCopy(model, torch.bfloat16)
    with torch.no_grad():
        model.final_norm.weight.mul_(2.0)
    assert torch.equal(low.refresh().final_norm.weight, model.final_norm.weight.bfloat16())
    assert model.final_norm.weight.dtype == torch.float32


def test_steps_in_bf16_stay_near_those_in_fp32() -> None:
    exact = make_trainer(CONFIG, torch.float32, ALONE)
    low = make_trainer(dataclasses.replace(CONFIG, params_dtype="bf16"), torch.float32, ALONE)
    for _ in range(3):
        expected, found = exact.step(), low.step()
    assert found["validation_loss"] == pytest.approx(expected["validation_loss"], rel=0.02)
    assert torch.nn.functional.cosine_similarity(exact.z, low.z, dim=0) > 0.95
    assert next(low.proxy.parameters()).dtype == torch.float32
    assert exact.check_precision() == []
