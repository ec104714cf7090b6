"""Solvers of (C + delta) z = b against dense linear algebra."""

import pytest
import torch

from megatron_bliss.bilevel.solve import SOLVERS, SolverState, sgd_step, solve

SIZE = 12


def system(low=0.1, high=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))[0]
    matrix = basis @ torch.diag(torch.linspace(low, high, SIZE, dtype=torch.float64)) @ basis.T
    b = torch.randn(SIZE, generator=generator, dtype=torch.float64)
    return matrix, b, torch.linalg.solve(matrix + 0.05 * torch.eye(SIZE, dtype=torch.float64), b)


@pytest.mark.parametrize(("solver", "steps"), [("sgd", 1500), ("neumann", 1500), ("conjugate_gradient", 13)])
def test_converges_to_the_solution(solver, steps):
    matrix, b, exact = system()
    z, info = solve(lambda z: matrix @ z, b, 0 * b, solver=solver, steps=steps)
    torch.testing.assert_close(z, exact, rtol=1e-6, atol=1e-6)
    assert info.relative_residual < 1e-6 and info.products <= steps
    assert 0.5 < info.state.eigenvalue <= 4.0 + 1e-9


def test_conjugate_gradient_is_exact_in_as_many_products_as_eigenvalues():
    matrix, b, exact = system()
    z, info = solve(lambda z: matrix @ z, b, 0 * b, solver="conjugate_gradient", steps=SIZE)
    torch.testing.assert_close(z, exact, rtol=1e-10, atol=1e-10)
    warm, info = solve(lambda z: matrix @ z, b, exact, solver="conjugate_gradient", steps=5)
    torch.testing.assert_close(warm, exact, rtol=1e-10, atol=1e-10)
    assert info.products <= 3


def test_conjugate_gradient_stops_at_negative_curvature():
    matrix, b, _ = system(low=-2.0)
    z, info = solve(lambda z: matrix @ z, b, 0 * b, solver="conjugate_gradient", steps=50)
    assert info.negative_curvature and torch.isfinite(z).all() and z.norm() > 0
    value = 0.5 * z @ (matrix @ z + 0.05 * z) - b @ z
    assert value < 0  # what it has is better than nothing
    z, info = solve(lambda z: -z, b, 0 * b, solver="conjugate_gradient", steps=5)
    assert info.negative_curvature and torch.equal(z, b)


def test_identity_makes_no_product():
    def forbidden(z):
        raise AssertionError("a product was made")

    b = torch.ones(3)
    z, info = solve(forbidden, b, torch.zeros(3), solver="identity", steps=5)
    assert torch.equal(z, b) and z is not b and info.products == 0


def test_sgd_step_size_rule():
    state = SolverState()
    z, C = torch.tensor([3.0, 4.0]), torch.diag(torch.tensor([2.0, 2.0]))
    b = torch.tensor([1.0, 0.0])
    new, info = sgd_step(z, C @ z, b, state, 0.5, 10.0)
    assert info.state.eigenvalue == pytest.approx(2.0) and info.step_size == pytest.approx(0.5 / 2.5)
    torch.testing.assert_close(new, z + 0.2 * (b - 2.5 * z))
    assert z.tolist() == [3.0, 4.0]
    assert info.relative_residual == pytest.approx(float((b - 2.5 * z).norm()))
    _, capped = sgd_step(z, C @ z, b, state, 0.5, 0.01)
    assert capped.step_size == 0.01
    _, later = sgd_step(z, 0.1 * z, b, info.state, 0.5, 10.0)
    assert later.state.eigenvalue == pytest.approx(2.0 * 0.995)
    _, first = sgd_step(0 * z, 0 * z, b, info.state, 0.5, 10.0)
    assert first.state.eigenvalue == info.state.eigenvalue


def test_sgd_is_stable_with_a_warm_start_across_changing_matrices():
    """z follows a moving positive semi-definite system whose curvature is twenty times what max_step_size allows."""
    z, state = torch.zeros(SIZE, dtype=torch.float64), SolverState()
    for seed in range(300):
        matrix, _, _ = system(0.0, 20.0, seed)
        b = system(seed=0)[1]
        z, info = solve(lambda z: matrix @ z, b, z, steps=1, state=state)  # noqa: B023
        state = info.state
    assert z.norm() < 2 * b.norm() and state.eigenvalue <= 20.0 + 1e-9
    assert SolverState.from_state_dict(state.state_dict()) == state


def test_errors():
    b = torch.ones(3)
    with pytest.raises(ValueError, match="solver 'newton'.*change bilevel.solver"):
        solve(lambda z: z, b, b, solver="newton")
    with pytest.raises(FloatingPointError, match="non-finite z after 1 products of solver sgd.*raise bilevel.damping"):
        solve(lambda z: z * float("nan"), b, b)


def test_all_solvers_share_one_signature():
    matrix, b, _ = system()
    for solver in SOLVERS:
        z, info = solve(lambda z: matrix @ z, b, 0 * b, solver=solver, steps=2, state=SolverState(4.0))
        assert z.shape == b.shape and info.products <= 2
