"""Solvers of (C + delta) z = b against dense linear algebra, and what their records say of them."""

import math
import subprocess
import sys

import pytest
import torch

from megatron_bliss.bilevel.solvers import SOLVERS, solve
from megatron_bliss.bilevel.solvers.solver import LinearSystem, SolverState

SIZE = 12


def system(low=0.1, high=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))[0]
    matrix = basis @ torch.diag(torch.linspace(low, high, SIZE, dtype=torch.float64)) @ basis.T
    b = torch.randn(SIZE, generator=generator, dtype=torch.float64)
    return matrix, b, torch.linalg.solve(matrix + 0.05 * torch.eye(SIZE, dtype=torch.float64), b)


def run(product, b, z, *, solver="sgd", steps=1, damping=0.05, max_step_size=1.0, state=None):
    """``solve`` on copies: z and b may be overwritten."""
    linear_system = LinearSystem(product, b.clone(), damping)
    return solve(solver, linear_system, z.clone(), state or SolverState(), steps=steps, max_step_size=max_step_size)


@pytest.mark.parametrize(("solver", "steps"), [("sgd", 1500), ("neumann", 1500), ("conjugate_gradient", 13)])
def test_converges_to_the_solution(solver, steps):
    matrix, b, exact = system()
    z, info = run(lambda z: matrix @ z, b, 0 * b, solver=solver, steps=steps)
    torch.testing.assert_close(z, exact, rtol=1e-6, atol=1e-6)
    assert info.relative_residual < 1e-6 and info.products <= steps
    assert 0.5 < info.state.eigenvalue <= 4.0 + 1e-9


def test_conjugate_gradient_is_exact_in_as_many_products_as_eigenvalues():
    matrix, b, exact = system()
    z, info = run(lambda z: matrix @ z, b, 0 * b, solver="conjugate_gradient", steps=SIZE)
    torch.testing.assert_close(z, exact, rtol=1e-10, atol=1e-10)
    warm, info = run(lambda z: matrix @ z, b, exact, solver="conjugate_gradient", steps=5)
    torch.testing.assert_close(warm, exact, rtol=1e-10, atol=1e-10)
    assert info.products <= 3


def test_conjugate_gradient_stops_at_negative_curvature():
    matrix, b, _ = system(low=-2.0)
    z, info = run(lambda z: matrix @ z, b, 0 * b, solver="conjugate_gradient", steps=50)
    assert info.negative_curvature and torch.isfinite(z).all() and z.norm() > 0
    value = 0.5 * z @ (matrix @ z + 0.05 * z) - b @ z
    assert value < 0  # what it has is better than nothing
    z, info = run(lambda z: -z, b, 0 * b, solver="conjugate_gradient", steps=5)
    assert info.negative_curvature and torch.equal(z, b)


def test_identity_makes_no_product():
    def forbidden(z):
        raise AssertionError("a product was made")

    linear_system = LinearSystem(forbidden, torch.ones(3), 0.05)
    z, info = solve("identity", linear_system, torch.zeros(3), SolverState(), steps=5, max_step_size=1.0)
    assert torch.equal(z, linear_system.b) and z is not linear_system.b and info.products == 0


def test_sgd_step_size_rule():
    z, C = torch.tensor([3.0, 4.0]), torch.diag(torch.tensor([2.0, 2.0]))
    b = torch.tensor([1.0, 0.0])
    new, info = run(lambda z: C @ z, b, z, damping=0.5, max_step_size=10.0)
    assert info.state.eigenvalue == pytest.approx(2.0) and info.step_size == pytest.approx(0.5 / 2.5)
    torch.testing.assert_close(new, z + 0.2 * (b - 2.5 * z))
    assert info.relative_residual == pytest.approx(float((b - 2.5 * z).norm()))
    _, capped = run(lambda z: C @ z, b, z, damping=0.5, max_step_size=0.01)
    assert capped.step_size == 0.01
    _, later = run(lambda z: 0.1 * z, b, z, damping=0.5, max_step_size=10.0, state=info.state)
    assert later.state.eigenvalue == pytest.approx(2.0 * 0.995)
    _, first = run(lambda z: 0 * z, b, 0 * z, damping=0.5, max_step_size=10.0, state=info.state)
    assert first.state.eigenvalue == info.state.eigenvalue


def test_several_steps_of_sgd_are_as_many_single_ones_with_one_matrix():
    """The running maximum decays once per upper step only, when C is new."""
    matrix, b, _ = system()
    together, info = run(lambda z: matrix @ z, b, 0 * b, steps=3, state=SolverState(9.0))
    z, eigenvalue = 0 * b, 0.995 * 9.0
    for step in range(3):
        eigenvalue = max(eigenvalue, float((matrix @ z).norm() / z.norm())) if step else 9.0
        z = z + min(1.0, 0.5 / (eigenvalue + 0.05)) * (b - matrix @ z - 0.05 * z)
    torch.testing.assert_close(together, z, rtol=1e-12, atol=0)
    assert info.state.eigenvalue == pytest.approx(eigenvalue)


def test_sgd_makes_no_further_vector():
    """z is updated in place and b is used up: a step holds nothing of the model's size but C z."""
    matrix, b, _ = system()
    z = torch.zeros_like(b)
    found, _ = solve("sgd", LinearSystem(lambda z: matrix @ z, b, 0.0), z, SolverState(), steps=1, max_step_size=1.0)
    assert found is z and torch.equal(z, b)  # z was 0: the residual is b, times a step size of 1


def test_sgd_is_stable_with_a_warm_start_across_changing_matrices():
    """z follows a moving positive semi-definite system whose curvature is twenty times what max_step_size allows."""
    z, state = torch.zeros(SIZE, dtype=torch.float64), SolverState()
    for seed in range(300):
        matrix, _, _ = system(0.0, 20.0, seed)
        b = system(seed=0)[1]
        z, info = run(lambda z: matrix @ z, b, z, steps=1, state=state)  # noqa: B023
        state = info.state
    assert z.norm() < 2 * b.norm() and state.eigenvalue <= 20.0 + 1e-9
    assert SolverState.from_state_dict(state.state_dict()) == state


def test_errors():
    b = torch.ones(3)
    with pytest.raises(ValueError, match="solver 'newton'.*change bilevel.solver"):
        run(lambda z: z, b, b, solver="newton")
    with pytest.raises(FloatingPointError, match="non-finite z after 1 products of solver sgd.*raise bilevel.damping"):
        run(lambda z: z * float("nan"), b, b)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("solver", list(SOLVERS))
def test_a_solver_makes_the_products_that_its_record_declares(solver, steps):
    matrix, b, _ = system()
    calls = []

    def product(z):
        calls.append(z)
        return matrix @ z

    z, info = run(product, b, 0.1 * b, solver=solver, steps=steps, state=SolverState(4.0))
    assert z.shape == b.shape and math.isfinite(info.step_size)
    assert len(calls) == info.products == SOLVERS[solver].products(steps)


def test_names_and_help_lines_are_read_without_torch():
    code = "import sys; from megatron_bliss.bilevel.solvers import SOLVERS; "
    code += "print([len(record.help.splitlines()) for record in SOLVERS.values()], 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[1, 1, 1, 1] False"
