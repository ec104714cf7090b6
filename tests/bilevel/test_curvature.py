"""The engine against plain double backward, and the laws of its products."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_bliss.bilevel import attention, curvature
from megatron_bliss.bilevel.execution import Execution
from megatron_bliss.bilevel.objective import validation_loss
from tests.bilevel import reference
from tests.bilevel.problems import (
    language_model,
    lower_loss,
    random_batch,
    random_teacher,
    random_vector,
    random_weights,
    relative_error,
)

FAMILIES = {"gpt_neox": 4, "llama": 2}


def problem(family, *, tied=False, samples=3, length=9, seed=0, **sizes):
    model = language_model(family, tied=tied, heads=4, groups=FAMILIES[family], seed=seed, **sizes)
    return model, random_batch(samples, length, seed=seed), random_weights(samples, seed=seed), random_vector(model)


def kl_options(direction, samples, length, weight=0.6):
    teacher = random_teacher(samples, length)
    return {"teacher": teacher, "kl_weight": weight, "kl_direction": direction, "l2_weight": 0.01}


def check_all(model, batch, P, z, options, execution, tolerance):
    """Every public function against the reference."""
    G = lower_loss(batch, P, **options)
    loss, gradient = reference.gradient(model, batch, P, **options)
    d = reference.influences(model, batch, z)
    references = {
        "hessian": reference.hessian_product(model, batch, P, z, **options),
        "gauss_newton": reference.gauss_newton_product(model, batch, P, z, **options),
    }
    for name, product in references.items():
        found = curvature.curvature_product(model, G, z, execution, curvature=name)
        pairs = [(found.loss, loss), (found.gradient.flat, gradient), (found.product.flat, product)]
        for value, expected in [*pairs, (found.influence, d)]:
            assert relative_error(value, expected) < tolerance
    found = curvature.gradient(model, G, execution)
    assert relative_error(found.loss, loss) < tolerance and relative_error(found.gradient.flat, gradient) < tolerance


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("direction", ["none", "proxy_to_target", "target_to_proxy"])
@pytest.mark.parametrize("recompute", [True, False])
def test_equals_double_backward(family, tied, direction, recompute):
    model, batch, P, z = problem(family, tied=tied)
    options = {} if direction == "none" else kl_options(direction, 3, 9)
    check_all(model, batch, P, z, options, Execution(recompute=recompute, micro_batch_size=2), 1e-9)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_equals_double_backward(family):
    model, batch, P, z = problem(family)
    execution = Execution(compiled=True, recompute=True)
    check_all(model, batch, P, z, kl_options("proxy_to_target", 3, 9), execution, 1e-9)


@pytest.mark.parametrize("direction", ["proxy_to_target", "target_to_proxy"])
def test_weights_of_any_sign(direction):
    """One is negative, and one cancels the weight of its sample's KL."""
    model, batch, P, z = problem("llama")
    P = torch.tensor([-0.7, -0.6 / 3, 0.4], dtype=P.dtype)
    check_all(model, batch, P, z, kl_options(direction, 3, 9, weight=0.6), Execution(), 1e-9)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    samples=st.integers(1, 4),
    length=st.integers(2, 14),
    layers=st.integers(1, 2),
    micro=st.integers(0, 3),
    direction=st.sampled_from(["proxy_to_target", "target_to_proxy"]),
    seed=st.integers(0, 1000),
)
def test_equals_double_backward_on_random_shapes(family, samples, length, layers, micro, direction, seed):
    model, batch, P, z = problem(family, samples=samples, length=length, layers=layers, seed=seed)
    check_all(model, batch, P, z, kl_options(direction, samples, length), Execution(micro_batch_size=micro), 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_several_attention_blocks(family, monkeypatch):
    """Blocks of queries and of heads, and chunks of positions, put together to the same answer."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    monkeypatch.setitem(attention.BLOCK_ELEMENTS, "cpu", 40)
    model, batch, P, z = problem(family, samples=4, length=14)
    check_all(model, batch, P, z, kl_options("proxy_to_target", 4, 14), Execution(recompute=True), 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_single_precision(family):
    model, batch, P, z = problem(family)
    options = kl_options("proxy_to_target", 3, 9)
    expected = reference.hessian_product(model, batch, P, z, **options)
    gauss_newton = reference.gauss_newton_product(model, batch, P, z, **options)
    options["teacher"] = random_teacher(3, 9, dtype=torch.float32)
    model.float()
    for name, product in (("hessian", expected), ("gauss_newton", gauss_newton)):
        found = curvature.curvature_product(model, lower_loss(batch, P.float(), **options), z.float(), curvature=name)
        assert relative_error(found.product.flat.double(), product) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_keeps_direction_and_sums_in_single_precision(family):
    model, batch, P, z = problem(family)
    options = kl_options("proxy_to_target", 3, 9)
    expected = curvature.curvature_product(model, lower_loss(batch, P, **options), z, curvature="gauss_newton")
    options["teacher"] = random_teacher(3, 9, dtype=torch.bfloat16)
    model.bfloat16()
    for recompute in (False, True):
        G, execution = lower_loss(batch, P, **options), Execution(recompute=recompute)
        found = curvature.curvature_product(model, G, z.bfloat16(), execution, curvature="gauss_newton")
        for name in ("gradient", "product"):
            low, high = getattr(found, name).flat, getattr(expected, name).flat.float()
            assert low.dtype == torch.float32
            assert torch.cosine_similarity(low, high, dim=0) > 0.99


@pytest.mark.parametrize("name", ["hessian", "gauss_newton"])
def test_symmetric_and_linear(name):
    model, batch, P, u = problem("llama")
    v, G = random_vector(model, 1), lower_loss(batch, P, **kl_options("proxy_to_target", 3, 9))

    def product(z):
        return curvature.curvature_product(model, G, z, curvature=name).product.flat

    left, right = product(u), product(v)
    assert abs(float(v @ left - u @ right)) < 1e-11 * float(left.norm() * v.norm())
    assert relative_error(product(2.0 * u - 0.5 * v), 2.0 * left - 0.5 * right) < 1e-11


@pytest.mark.parametrize("direction", ["proxy_to_target", "target_to_proxy"])
def test_gauss_newton_is_positive_semi_definite(direction):
    model, batch, P, _ = problem("gpt_neox", layers=1)
    G = lower_loss(batch, P, **kl_options(direction, 3, 9) | {"l2_weight": 0.0})
    basis = torch.linalg.qr(torch.stack([random_vector(model, seed) for seed in range(12)], 1))[0]
    columns = [curvature.curvature_product(model, G, z, curvature="gauss_newton").product.flat for z in basis.T]
    projected = basis.T @ torch.stack(columns, 1)
    eigenvalues = torch.linalg.eigvalsh((projected + projected.T) / 2)
    assert eigenvalues.min() > -1e-12 and eigenvalues.max() > 1e-6


def test_hessian_can_be_indefinite_where_gauss_newton_is_not():
    """The two curvatures differ: a sign error in the coupling terms would show here."""
    model, batch, P, z = problem("gpt_neox")
    G = lower_loss(batch, P)
    hessian, gauss_newton = (
        curvature.curvature_product(model, G, z, curvature=c).product.flat for c in ("hessian", "gauss_newton")
    )
    assert relative_error(hessian, gauss_newton) > 1e-2


def test_micro_batches_change_nothing_and_vector_may_be_named():
    model, batch, P, z = problem("llama", samples=5)
    named = {n: t.view_as(p) for (n, p), t in zip(model.named_parameters(), z.split(sizes(model)), strict=True)}
    G = lower_loss(batch, P, **kl_options("target_to_proxy", 5, 9))
    whole = curvature.curvature_product(model, G, z)
    for size in (1, 2, 5):
        part = curvature.curvature_product(model, G, named, Execution(micro_batch_size=size))
        for found, expected in zip(part, whole, strict=True):
            found, expected = getattr(found, "flat", found), getattr(expected, "flat", expected)
            assert relative_error(found, expected) < 1e-12


def sizes(model):
    return [p.numel() for p in model.parameters()]


def test_sample_losses_and_named_views():
    model, batch, P, _ = problem("gpt_neox")
    options = kl_options("target_to_proxy", 3, 9)
    losses, kl = reference.losses(model, dict(model.named_parameters()), batch, options["teacher"], "target_to_proxy")
    result = curvature.gradient(model, lower_loss(batch, P, **options), Execution(micro_batch_size=2))
    assert relative_error(result.sample_losses, losses) < 1e-12
    assert relative_error(result.sample_kl, kl) < 1e-12
    assert relative_error(result.kl, kl.mean()) < 1e-12
    assert {n: t.shape for n, t in result.gradient.items()} == {n: p.shape for n, p in model.named_parameters()}
    result.gradient.flat.zero_()
    assert not any(tensor.any() for tensor in result.gradient.values())


def test_samples_without_labels_and_last_word_labels():
    """A sample without labels has loss and influence 0; one label a sample needs only the tokens before it."""
    model, batch, P, z = problem("llama")
    batch.label_mask.zero_()
    batch.label_mask[0, 4] = True
    found = curvature.curvature_product(model, lower_loss(batch, P), z)
    loss, gradient = reference.gradient(model, batch, P)
    assert relative_error(found.gradient.flat, gradient) < 1e-12 and relative_error(found.loss, loss) < 1e-12
    assert found.sample_losses[1:].tolist() == [0.0, 0.0] and found.influence[1:].tolist() == [0.0, 0.0]
    batch.label_mask.zero_()
    empty = curvature.curvature_product(model, lower_loss(batch, P), z, curvature="gauss_newton")
    assert not empty.gradient.flat.any() and not empty.product.flat.any() and float(empty.loss) == 0.0


def test_validation_weights_average_over_tokens():
    model, batch, _, _ = problem("gpt_neox")
    found = curvature.gradient(model, validation_loss(batch, dtype=torch.float64))
    assert relative_error(found.loss, reference.upper(model, dict(model.named_parameters()), batch)) < 1e-12
    assert relative_error(found.gradient.flat, reference.upper_gradient(model, batch)) < 1e-9


class Largest(TorchDispatchMode):
    """The most elements that any tensor made by any operation has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("direction", ["proxy_to_target", "target_to_proxy"])
def test_no_tensor_of_batch_by_sequence_by_vocabulary(recompute, direction):
    samples, length, vocab = 4, 64, 512
    model = language_model("gpt_neox", vocab=vocab, width=8, ffn=16)
    batch = random_batch(samples, length, vocab, labelled=1.1)
    batch.label_mask[:, 1:] = True
    P, z, teacher = random_weights(samples), random_vector(model), random_teacher(samples, length, vocab)
    G = lower_loss(batch, P, teacher=teacher, kl_weight=0.1, kl_direction=direction)
    execution = Execution(recompute=recompute)
    with Largest() as engine:
        curvature.curvature_product(model, G, z, execution)
        curvature.curvature_product(model, G, z, execution, curvature="gauss_newton")
        curvature.gradient(model, G, execution)
    with Largest() as naive:
        reference.gradient(model, batch, P)
    assert naive.elements >= samples * (length - 1) * vocab
    assert engine.elements < 0.6 * samples * length * vocab


def test_attention_never_holds_the_scores_of_the_whole_batch():
    model = language_model("gpt_neox", vocab=16, width=8, ffn=16, layers=1)
    G, z = lower_loss(random_batch(2, 256, 16), random_weights(2)), random_vector(model)
    with Largest() as engine:
        curvature.curvature_product(model, G, z, Execution(recompute=True))
        curvature.curvature_product(model, G, z, Execution(recompute=False), curvature="gauss_newton")
    assert engine.elements < 0.6 * 2 * 2 * 256 * 256


def test_errors_say_what_to_change():
    model, batch, P, z = problem("gpt_neox")
    G = lower_loss(batch, P)
    with pytest.raises(ValueError, match="curvature 'fisher'.*change bilevel.curvature"):
        curvature.curvature_product(model, G, z, curvature="fisher")
    with pytest.raises(ValueError, match="teacher with 30 tokens, expected the proxy's 23"):
        curvature.gradient(model, lower_loss(batch, P, kl_weight=0.1, teacher=random_teacher(3, 9, 30)))
    with pytest.raises(ValueError, match="one element a parameter"):
        curvature.curvature_product(model, G, z[:-1])
    with pytest.raises(ValueError, match="differs from the model's parameters in extra"):
        named = {n: p.detach() for n, p in model.named_parameters()}
        curvature.curvature_product(model, G, named | {"extra": z})
