"""Continuous flows against closed forms: linear fields, estimates, paths, errors."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from building import NAMES, context_of, redraw
from registry import TRANSFORMS
from torch import Tensor

from flowvi.distributions import Flow
from flowvi.flows import cnf
from flowvi.nn import ConcatSquashField, FunctionField, MLPField
from flowvi.transforms import (
    RK4,
    Adaptive,
    ClosedFormDivergence,
    Continuous,
    DormandPrince,
    ExactDivergence,
    Hutchinson,
    Probe,
)

DIVERGENCES = [ClosedFormDivergence(), ExactDivergence()]


def linear_field(dim: int) -> tuple[MLPField, Tensor, Tensor]:
    """The field A x + b, with A and b."""
    matrix, shift = 0.8 * torch.randn(dim, dim) / dim**0.5, torch.randn(dim)
    field = MLPField(dim, ())
    with torch.no_grad():
        field.layers[0].weight.copy_(matrix)
        field.layers[0].bias.copy_(shift)
    return field, matrix, shift


def law_of(matrix: Tensor, shift: Tensor, t: float = 1.0) -> dist.MultivariateNormal:
    """Law at time t of dx/dt = A x + b from a standard normal, by one matrix exponential."""
    dim = len(shift)
    joint = torch.zeros(dim + 1, dim + 1)
    joint[:dim, :dim], joint[:dim, dim] = matrix, shift
    flow = torch.linalg.matrix_exp(t * joint)
    return dist.MultivariateNormal(flow[:dim, dim], flow[:dim, :dim] @ flow[:dim, :dim].T)


def drawn_field(dim: int = 2, scale: float = 0.6) -> MLPField:
    return redraw(MLPField(dim, (6, 6)), scale)


# Linear fields.


@pytest.mark.parametrize("dim", [2, 5, 32])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_linear_field_gives_the_normal_law_of_the_matrix_exponential(dim, divergence):
    field, matrix, shift = linear_field(dim)
    q = Flow(Continuous(field, divergence, DormandPrince(30)))()
    law = law_of(matrix, shift)
    with torch.no_grad():
        z, log_q = q.rsample_and_log_prob((50,))
        torch.testing.assert_close(log_q, law.log_prob(z), rtol=0, atol=1e-6)
        x = 2 * torch.randn(50, dim)
        torch.testing.assert_close(q.log_prob(x), law.log_prob(x), rtol=0, atol=1e-6)


def test_linear_field_by_an_adaptive_solver():
    field, matrix, shift = linear_field(3)
    q = Flow(Continuous(field, solver=Adaptive(rtol=1e-9, atol=1e-9)))()
    x = 2 * torch.randn(50, 3)
    with torch.no_grad():
        expected = law_of(matrix, shift).log_prob(x)
        torch.testing.assert_close(q.log_prob(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dim", [2, 32])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_score_of_a_linear_field(dim, divergence):
    field, matrix, shift = linear_field(dim)
    transform, law = Continuous(field, divergence, DormandPrince(30)), law_of(matrix, shift)
    x = torch.randn(20, dim)
    y, _, score = transform.call_ladj_and_score(x, -x)
    expected = torch.linalg.solve(law.covariance_matrix, (law.mean - y).T).T
    torch.testing.assert_close(score, expected, rtol=1e-6, atol=1e-6)


def test_path_of_a_linear_field():
    field, matrix, shift = linear_field(3)
    transform = Continuous(field, solver=DormandPrince(30))
    x, ts = torch.randn(20, 3), torch.tensor([0.0, 0.21, 0.5, 1.0])
    with torch.no_grad():
        path = transform.trajectory(x, ts, score=-x)
    assert path.x.shape == path.score.shape == (4, 20, 3)
    for i, t in enumerate(ts.tolist()):
        law = law_of(matrix, shift, t)
        log_q = dist.Normal(0.0, 1.0).log_prob(x).sum(-1) - path.ladj[i]
        torch.testing.assert_close(log_q, law.log_prob(path.x[i]), rtol=0, atol=1e-6)
        expected = torch.linalg.solve(law.covariance_matrix, (law.mean - path.x[i]).T).T
        torch.testing.assert_close(path.score[i], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(path.entropy_change, ts * matrix.trace(), rtol=0, atol=1e-9)
    back = transform.trajectory(path.x[-1], ts.flip(0))
    torch.testing.assert_close(back.x[-1], x, rtol=0, atol=1e-6)


def test_entropy_of_a_curved_field_is_minus_the_mean_log_density():
    """4000 draws; both sides are means over the same draws, so 4 standard errors of the gap."""
    transform = Continuous(drawn_field(), solver=DormandPrince(20))
    x = torch.randn(4000, 2)
    with torch.no_grad():
        path = transform.trajectory(x, torch.tensor([0.0, 1.0]))
        log_q = Flow(transform)().log_prob(path.x[-1])
    entropy = 1 + math.log(2 * math.pi) + path.entropy_change[-1]
    gap = entropy + log_q
    assert gap.mean().abs() < 4 * gap.std() / 4000**0.5


# Steep fields.


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("continuous")])
def test_parameters_from_a_standard_normal_with_enough_steps(name):
    """Fields too steep for the few steps of the registry's cases, which draw smaller ones."""
    case = TRANSFORMS[name]
    transform = redraw(case.make(), 1.0)
    transform.solver = DormandPrince(400)
    x, context = torch.randn(6, case.input_dim), context_of(case, 6)
    args = (x,) if context is None else (x, context)
    with torch.no_grad():
        y, ladj = transform.call_and_ladj(*args)
        jacobian = torch.func.vmap(torch.func.jacfwd(transform))(*args)
        back, back_ladj = transform.inverse_and_ladj(y, context)
    expected = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(ladj, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-7)
    torch.testing.assert_close(back_ladj, -ladj, rtol=0, atol=1e-7)


# Estimates of the divergence.


@pytest.mark.parametrize("probe", list(Probe))
def test_hutchinson_is_unbiased(probe):
    """4000 probes at each of three points, within 3 standard errors."""
    field = drawn_field(3)
    x = torch.randn(3, 3).expand(4000, 3, 3)
    with torch.no_grad():
        exact = Continuous(field, solver=RK4(8)).call_and_ladj(x[0])[1]
        found = Continuous(field, Hutchinson(probe), RK4(8)).call_and_ladj(x)[1]
    assert found.std(0).min() > 0.01
    errors = (found.mean(0) - exact).abs() / (found.std(0) / 4000**0.5)
    assert errors.max() < 3


def test_one_probe_for_a_whole_solve(monkeypatch):
    field, matrix, _ = linear_field(3)
    probe, draws = torch.randn(5, 3), []

    def draw(self, x):
        draws.append(x)
        return probe

    monkeypatch.setattr(Hutchinson, "draw", draw)
    _, ladj = Continuous(field, Hutchinson()).call_and_ladj(torch.randn(5, 3))
    expected = torch.einsum("bi,ij,bj->b", probe, matrix, probe)
    torch.testing.assert_close(ladj, expected, rtol=0, atol=1e-9)
    assert len(draws) == 1


def test_laws_of_the_probes():
    noise = Probe.RADEMACHER.draw(torch.zeros(1000))
    assert set(noise.tolist()) == {-1.0, 1.0}
    assert Probe.GAUSSIAN.draw(torch.zeros(1000)).unique().numel() == 1000


def test_default_divergence_is_exact_where_that_is_affordable():
    rotate = lambda dim: FunctionField(dim, lambda t, x: x.flip(-1))  # noqa: E731
    assert isinstance(Continuous(MLPField(100)).divergence, ClosedFormDivergence)
    assert isinstance(Continuous(rotate(64)).divergence, ExactDivergence)
    with pytest.warns(UserWarning, match="FunctionField has no divergence .* 65 dimensions"):
        assert isinstance(Continuous(rotate(65)).divergence, Hutchinson)
    with pytest.raises(NotImplementedError, match="no divergence in closed form. Use Exact"):
        Continuous(rotate(2), ClosedFormDivergence())
    with pytest.raises(TypeError, match="`probe` must be a Probe; got 'gaussian'"):
        Hutchinson("gaussian")


# Integrals along the path.


def test_integrals_along_the_path_have_the_same_sign_in_both_directions():
    transform = Continuous(drawn_field(), solver=DormandPrince(20))
    terms = [
        lambda stage: stage.divergence,
        lambda stage: stage.velocity.square().sum(-1),
        lambda stage: (stage.velocity * stage.function(stage.x)).sum(-1),
        lambda stage: stage.t + torch.zeros_like(stage.divergence),
    ]
    x = torch.randn(5, 2)
    y, ladj, integrals = transform.call_with_integrals(x, terms)
    _, _, backwards = transform.inverse_with_integrals(y, terms)
    torch.testing.assert_close(integrals[0], ladj)
    torch.testing.assert_close(integrals[1], integrals[2])
    torch.testing.assert_close(integrals[3], torch.full((5,), 0.5))
    torch.testing.assert_close(backwards, integrals, rtol=1e-4, atol=2e-5)
    # The kinetic energy by quadrature over a fine path.
    ts = torch.linspace(0, 1, 201)
    path = transform.trajectory(x, ts).x
    speed = torch.stack([transform.field(t, x) for t, x in zip(ts, path, strict=True)])
    expected = torch.trapezoid(speed.square().sum(-1), ts, dim=0)
    torch.testing.assert_close(integrals[1], expected, rtol=1e-3, atol=1e-4)


# Reports.


def test_report_estimates_the_error():
    transform = Continuous(drawn_field(scale=0.9), solver=RK4(6))
    x = torch.randn(20, 2)
    with torch.no_grad():
        exact = Continuous(transform.field, solver=DormandPrince(200)).call_and_ladj(x)
        y, ladj = transform.call_and_ladj(x)
    report = transform.report(x)
    error, ladj_error = (y - exact[0]).norm(dim=-1).max(), (ladj - exact[1]).abs().max()
    assert 0.5 < report.error / error < 2
    assert 0.5 < report.ladj_error / ladj_error < 2
    assert report.num_evaluations == transform.last_solve.num_evaluations == 24
    assert "RK4(num_steps=6" in report.solver


def test_the_solver_of_evaluation_mode():
    transform = Continuous(MLPField(2), eval_solver=Adaptive())
    x = torch.randn(3, 2)
    transform(x)
    assert "DormandPrince" in transform.last_solve.solver
    transform.eval()(x)
    assert "Adaptive" in transform.last_solve.solver


def test_recipe_takes_any_field_and_several_of_them():
    flow = cnf(3, 2, num_layers=2, hidden_dims=(4,), field=ConcatSquashField, solver=RK4(3))
    parts = flow.transform.parts
    assert [type(p.field).__name__ for p in parts[:2]] == ["ConcatSquashField"] * 2
    assert parts[1].name == "cnf(3), field 2 of 2"
    assert flow(torch.zeros(5, 2)).sample((4,)).shape == (4, 5, 3)


# Errors.


def test_wrong_velocities_are_named():
    transform = Continuous(FunctionField(2, lambda t, x: x.sum(-1)), name="likelihood")
    message = (
        r"`field` must give velocities of the shape of its states, \(5, 2\); got shape \(5,\)"
    )
    with pytest.raises(ValueError, match=message):
        transform(torch.zeros(5, 2))
    with pytest.raises(ValueError, match=message):
        transform.call_ladj_and_score(torch.zeros(5, 2), torch.zeros(5, 2))


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="`field` must be a VectorField; got function"):
        Continuous(lambda t, x: x)
    with pytest.raises(TypeError, match="`solver` must be a Solver; got str"):
        Continuous(MLPField(2), solver="dopri5")
    transform, x = Continuous(MLPField(2)), torch.zeros(3, 2)
    for ts in ([0.0, 1.2], [-0.1, 1.0], [0.5]):
        with pytest.raises(
            ValueError, match=r"`ts` must hold at least two times in \[0, 1\]; got"
        ):
            transform.trajectory(x, torch.tensor(ts))


def test_values_that_are_not_finite_are_named_in_evaluation_mode():
    field = FunctionField(2, lambda t, x: x / (x - 1))
    transform = Continuous(field, solver=RK4(4), name="prior")
    x = torch.tensor([[1.0, 1.0], [0.5, 0.5]])
    # A training step must not look at numbers: whoever guards it finds the loss not finite.
    assert not transform(x).isfinite().all()
    with pytest.raises(
        RuntimeError, match="prior gave 1 of 2 results that are not finite with RK4"
    ):
        transform.eval()(x)


def test_a_stiff_field_is_named_in_evaluation_mode():
    transform = Continuous(FunctionField(1, lambda t, x: -1e8 * x), solver=RK4(40)).eval()
    with pytest.raises(RuntimeError, match="too stiff for these steps: take more, or an Adaptive"):
        transform(torch.ones(3, 1))
