"""Penalties of paths against closed forms and quadrature of fields that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowvi.nn import FunctionField, MLPField, PotentialField, VectorField
from flowvi.transforms import (
    HJB,
    JKO,
    RK4,
    Continuous,
    DivergenceRate,
    ExactDivergence,
    Hutchinson,
    JacobianNorm,
    KineticEnergy,
    Probe,
    collect_penalties,
)


class Linear(VectorField):
    """dx/dt = A x + b, counting its evaluations."""

    def __init__(self, input_dim: int) -> None:
        super().__init__(input_dim)
        self.matrix = nn.Parameter(torch.randn(input_dim, input_dim))
        self.shift = nn.Parameter(torch.randn(input_dim))
        self.calls = 0

    def velocity(self, time: Tensor, x: Tensor, prepared: None) -> Tensor:
        self.calls += 1
        return x @ self.matrix.T + self.shift


class Spreading(VectorField):
    """Velocity x / (offset + t) or, without time, x."""

    def __init__(self, offset: float | None) -> None:
        super().__init__(2)
        self.offset = offset

    def rate(self, time: Tensor) -> Tensor:
        return torch.ones_like(time) if self.offset is None else 1 / (self.offset + time)

    def velocity(self, time: Tensor, x: Tensor, prepared: None) -> Tensor:
        return self.rate(time) * x

    def potential(self, t: Tensor, x: Tensor, context: None) -> Tensor:
        return -0.5 * self.rate(t) * x.square().sum(-1)


def penalties(flow: Continuous, x: Tensor, *regularizers: object) -> tuple[Tensor, ...]:
    with collect_penalties(regularizers) as found:
        flow.call_and_ladj(x)
    assert len(found) == 1
    assert found[0].flow is flow
    return found[0].values


def kinetic_by_quadrature(field: Linear, x: Tensor) -> Tensor:
    """Integral of |A x_t + b|^2 / 2 with x_t from the matrix exponential of [[A, b], [0, 0]]."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    dim = field.input_dim
    big = torch.zeros(dim + 1, dim + 1)
    big[:dim, :dim], big[:dim, dim] = field.matrix.detach(), field.shift.detach()
    start = torch.cat([x, torch.ones(len(x), 1)], 1)
    total = torch.zeros(len(x))
    for node, weight in zip(nodes, weights, strict=True):
        state = start @ torch.matrix_exp(big * (node + 1) / 2).T
        total += weight / 2 * 0.5 * (state @ big.T).square().sum(1)
    return total


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("backwards", [False, True])
def test_linear_field(dim: int, backwards: bool):
    flow = Continuous(Linear(dim), ExactDivergence(), RK4(64))
    x = torch.randn(7, dim)
    regularizers = [KineticEnergy(), JacobianNorm(probe=None), JKO(0.3)]
    y, ladj = flow.call_and_ladj(x)
    with collect_penalties(regularizers) as found:
        got = flow.inverse_and_ladj(y) if backwards else flow.call_and_ladj(x)
    torch.testing.assert_close(got[1], -ladj if backwards else ladj)
    kinetic, norm, distance = found[0].values
    truth = kinetic_by_quadrature(flow.field, x)
    torch.testing.assert_close(kinetic, truth, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(norm, flow.field.matrix.square().sum().expand(7))
    torch.testing.assert_close(distance, (y - x).square().sum(1) / 0.6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("probe", list(Probe))
@pytest.mark.parametrize("divergence", [ExactDivergence(), Hutchinson(Probe.GAUSSIAN)])
def test_estimated_norm_is_unbiased(probe: Probe, divergence: object):
    flow = Continuous(Linear(4), divergence, RK4(2))
    (norm,) = penalties(flow, torch.randn(40_000, 4), JacobianNorm(probe=probe))
    truth = flow.field.matrix.square().sum()
    # 40000 rows with a probe each; four standard errors.
    assert (norm.mean() - truth).abs() < 4 * norm.std() / math.sqrt(len(norm))
    assert norm.std() > 0.1


def test_norm_takes_the_probe_of_the_divergence():
    flow = Continuous(Linear(3), Hutchinson(), RK4(2))
    x = torch.randn(5, 3)
    torch.manual_seed(3)
    noise = flow.divergence.draw(x)
    torch.manual_seed(3)
    (norm,) = penalties(flow, x, JacobianNorm())
    torch.testing.assert_close(norm, (noise @ flow.field.matrix).square().sum(1))


def test_potential_of_optimal_transport_has_no_residual():
    flow = Continuous(Spreading(1.0), ExactDivergence(), RK4(32))
    x = torch.randn(6, 2)
    residual, kinetic = penalties(flow, x, HJB(), KineticEnergy())
    assert residual.abs().max() < 1e-12
    # Straight paths of constant speed: x_t = (1 + t) x.
    torch.testing.assert_close(kinetic, 0.5 * x.square().sum(1))


def test_residual_of_a_potential_that_stays():
    x = torch.randn(6, 2)
    (residual,) = penalties(Continuous(Spreading(None), ExactDivergence(), RK4(64)), x, HJB())
    truth = 0.5 * x.square().sum(1) * (math.exp(2) - 1) / 2
    torch.testing.assert_close(residual, truth, rtol=1e-6, atol=0)


def test_residual_of_a_learned_potential():
    field = PotentialField(3, 8, context_dim=2)
    for parameter in field.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(5, 3)
    context = torch.randn(5, 2)
    flow = Continuous(field, solver=RK4(32))
    with collect_penalties([HJB()]) as found:
        flow.call_and_ladj(0.1 * x, context)
    # The same by differences of the potential in time, along the path, by the trapezoidal rule.
    ts = torch.linspace(0, 1, 101)
    path = flow.trajectory(0.1 * x, ts, context)
    h, rows = 1e-5, []
    for t, state in zip(ts.clamp(h, 1 - h), path.x, strict=True):
        later, earlier = (field.potential(s, state, context) for s in (t + h, t - h))
        square = field(t, state, context).square().sum(-1)
        rows.append(((later - earlier) / (2 * h) - square / 2).abs())
    truth = torch.trapezoid(torch.stack(rows), ts, dim=0)
    torch.testing.assert_close(found[0].values[0], truth, rtol=1e-2, atol=0)


@pytest.mark.parametrize("divergence", [ExactDivergence(), Hutchinson()])
def test_rate_of_a_divergence_that_is_known(divergence: object):
    flow = Continuous(Spreading(1.0), divergence, RK4(32))
    (found,) = penalties(flow, torch.randn(6, 2), DivergenceRate())
    # The divergence is 2 / (1 + t) everywhere, and so is its estimate by signs.
    torch.testing.assert_close(found, torch.full((6,), 4 * (1 - 1 / 8) / 3), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("hidden_dims", "activation"),
    [((8,), nn.Tanh), ((8, 6), nn.Tanh), ((6, 6, 6), nn.Tanh), ((8, 6), nn.Softplus)],
)
@pytest.mark.parametrize("context_dim", [0, 2])
def test_rate_of_a_learned_divergence(hidden_dims: tuple, activation: type, context_dim: int):
    field = MLPField(3, hidden_dims, context_dim, activation=activation)
    for parameter in field.parameters():
        nn.init.normal_(parameter, std=0.3)
    context = torch.randn(5, 2) if context_dim else None
    x, flow = torch.randn(5, 3), Continuous(field, solver=RK4(25))
    with collect_penalties([DivergenceRate()]) as found:
        flow.call_and_ladj(x, context)
    # The same by differences of the trace of autograd's Jacobian along the path.
    ts = torch.linspace(0, 1, 201)
    path = flow.trajectory(x, ts, context).x
    traces = []
    for t, state in zip(ts, path, strict=True):
        rows = torch.autograd.functional.jacobian(lambda x, t=t: field(t, x, context), state)
        traces.append(torch.einsum("aiai->a", rows).detach())
    (rates,) = torch.gradient(torch.stack(traces), spacing=(ts,), dim=0, edge_order=2)
    truth = torch.trapezoid(rates.square(), ts, dim=0)
    torch.testing.assert_close(found[0].values[0], truth, rtol=1e-2, atol=1e-6)


def test_rate_of_the_divergence_by_hand_has_the_gradient_of_forward_mode():
    field = MLPField(2, (5, 4))
    for parameter in field.parameters():
        nn.init.normal_(parameter)
    x, gradients = torch.randn(6, 2), []
    for divergence in (None, ExactDivergence()):
        flow = Continuous(field, divergence, RK4(3))
        (found,) = penalties(flow, x, DivergenceRate())
        gradients.append(torch.autograd.grad(found.sum(), list(field.parameters())))
    for by_hand, truth in zip(*gradients, strict=True):
        torch.testing.assert_close(by_hand, truth)


def test_gradients_of_penalties_agree_with_finite_differences():
    flow = Continuous(Linear(2), ExactDivergence(), RK4(4))
    x = torch.randn(3, 2)
    regularizers = [KineticEnergy(), JacobianNorm(probe=None), DivergenceRate(), JKO(1.0)]

    def total(matrix: Tensor, shift: Tensor) -> Tensor:
        module = nn.ModuleDict({"flow": flow})
        values = {"flow.field.matrix": matrix, "flow.field.shift": shift}
        with collect_penalties(regularizers) as found:
            torch.func.functional_call(_Call(module), _prefixed(values), (x,))
        return torch.stack([v.sum() for v in found[0].values])

    inputs = [p.detach().clone().requires_grad_() for p in flow.field.parameters()]
    assert torch.autograd.gradcheck(total, inputs)


class _Call(nn.Module):
    def __init__(self, inner: nn.ModuleDict) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["flow"].call_and_ladj(x)[0]


def _prefixed(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"inner.{name}": value for name, value in values.items()}


def test_one_pass():
    flow = Continuous(Linear(2), ExactDivergence(), RK4(3))
    x = torch.randn(3, 2)
    flow.call_and_ladj(x)
    alone, flow.field.calls = flow.field.calls, 0
    penalties(flow, x, KineticEnergy(), JKO(1.0))
    assert flow.field.calls == alone
    flow.field.calls = 0
    penalties(flow, x, JacobianNorm())
    assert flow.field.calls == 2 * alone


def test_value_and_score_are_what_they_are_without():
    flow = Continuous(Linear(2), ExactDivergence(), RK4(5))
    x, score = torch.randn(2, 4, 2)
    plain = flow.call_ladj_and_score(x, score)
    with collect_penalties([KineticEnergy(), JacobianNorm(probe=None)]) as found:
        watched = flow.call_ladj_and_score(x, score)
    for a, b in zip(plain, watched, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    kinetic, norm = found[0].values
    torch.testing.assert_close(kinetic, penalties(flow, x, KineticEnergy())[0])
    assert torch.autograd.grad(kinetic.sum() + norm.sum(), flow.field.matrix)[0].isfinite().all()


def test_checkpointed_score():
    torch.manual_seed(5)
    field = Linear(2)
    x, score = torch.randn(4, 2), torch.randn(4, 2)
    results = []
    for checkpointed in (False, True):
        flow = Continuous(field, solver=RK4(4, checkpointed=checkpointed))
        with collect_penalties([KineticEnergy()]) as found:
            results.append((*flow.call_ladj_and_score(x, score), found[0].values[0]))
    for plain, kept in zip(*results, strict=True):
        torch.testing.assert_close(plain, kept)


def test_what_is_not_collected():
    flow = Continuous(Linear(2), ExactDivergence(), RK4(5))
    x = torch.randn(3, 2)
    with collect_penalties([KineticEnergy()]) as outer:
        with collect_penalties([KineticEnergy(), JKO(1.0)]) as inner:
            flow(x)
        flow.trajectory(x, torch.tensor([0.0, 0.5, 1.0]))
        flow.requires_grad_(False)
        flow(x)
    assert (len(outer), len(inner)) == (0, 1)
    flow.requires_grad_(True)
    flow(x)
    assert len(outer) == 0


def test_shapes_follow_the_batch():
    flow = Continuous(FunctionField(2, lambda t, x, c: x * c, 1), ExactDivergence(), RK4(2))
    regularizers = [KineticEnergy(), JacobianNorm(), DivergenceRate(), JKO(1.0)]
    with collect_penalties(regularizers) as found:
        flow.call_and_ladj(torch.randn(3, 5, 2), torch.randn(3, 1, 1))
    assert {tuple(v.shape) for v in found[0].values} == {(3, 5)}


def test_meta_device():
    field = Linear(2)
    flow = Continuous(field, ExactDivergence(), RK4(2)).to("meta")
    values = penalties(
        flow,
        torch.randn(4, 2, device="meta"),
        *(KineticEnergy(), JacobianNorm(), DivergenceRate(), JKO(1.0)),
    )
    sum(v.sum() for v in values).backward()
    assert field.matrix.grad.is_meta


@pytest.mark.parametrize("weight", [-0.1, math.nan, "1"])
def test_wrong_weights(weight: object):
    with pytest.raises(ValueError, match="`weight` must be a non-negative number; got"):
        KineticEnergy(weight)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="`step_size` must be a positive number; got 0"):
        JKO(0)
    with pytest.raises(TypeError, match="`probe` must be a Probe or None; got 'rademacher'"):
        JacobianNorm(probe="rademacher")
    flow = Continuous(Linear(2), ExactDivergence(), RK4(2))
    with pytest.raises(NotImplementedError, match="Linear has no potential.*PotentialField"):
        penalties(flow, torch.zeros(2), HJB())


def test_repr():
    assert [repr(r) for r in (KineticEnergy(0.5), JKO(2.0))] == [
        "KineticEnergy(0.5)",
        "JKO(2.0, 1.0)",
    ]
