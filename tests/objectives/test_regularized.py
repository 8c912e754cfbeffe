"""Penalties count rows as the bound does; everything else is that of the inner objective."""

from __future__ import annotations

import copy
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from flowvi.distributions import Flow
from flowvi.guides import AutoFlow
from flowvi.infer import fit
from flowvi.nn import FunctionField, VectorField
from flowvi.objectives import ELBO, STL, GeometricSchedule, Regularized, Tempered
from flowvi.transforms import (
    JKO,
    RK4,
    Affine,
    Continuous,
    Coupling,
    ExactDivergence,
    JacobianNorm,
    KineticEnergy,
    TriangularAffine,
    compose,
)


class Growing(VectorField):
    """dx/dt = a x + b: y = exp(a) x + b (exp(a) - 1) / a."""

    def __init__(self, input_dim: int, rate: float = 0.4, shift: float = 0.3) -> None:
        super().__init__(input_dim)
        self.rate = nn.Parameter(torch.tensor(rate))
        self.shift = nn.Parameter(torch.tensor(shift))

    def velocity(self, time: Tensor, x: Tensor, prepared: None) -> Tensor:
        return self.rate * x + self.shift


def growing(input_dim: int) -> Flow:
    return Flow(Continuous(Growing(input_dim), ExactDivergence(), RK4(4)))


def latent() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(2), 2.0).to_event(1))


def likelihood(flow: Flow, x: Tensor, batch: int | None = None) -> None:
    pyro.module("flow", flow)
    with pyro.plate("data", len(x), subsample_size=batch) as index:
        pyro.sample("x", flow(), obs=x[index])


def no_guide(*args: object) -> None:
    """Nothing is latent."""


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("kind", [ELBO, STL])
def test_guide_rows_are_averaged_over_particles(kind: type, vectorize: bool):
    guide = AutoFlow(latent, growing).initialize()
    norm = 2 * guide.flow.transform.field.rate.detach() ** 2
    inner = kind(5, vectorize_particles=vectorize)
    objective = Regularized(inner, JacobianNorm(3.0, probe=None))
    pyro.set_rng_seed(1)
    objective.differentiable_loss(latent, guide)
    pyro.set_rng_seed(2)
    loss = objective.differentiable_loss(latent, guide)
    inner.max_plate_nesting = objective.max_plate_nesting
    pyro.set_rng_seed(2)
    plain = inner.differentiable_loss(latent, guide)
    torch.testing.assert_close(loss, plain + 3 * norm)
    assert objective.report["bound"] == -plain.detach()
    torch.testing.assert_close(objective.report["JacobianNorm"], norm)
    assert not loss.isnan()


@pytest.mark.parametrize("batch", [None, 4])
@pytest.mark.parametrize("mask", [None, 3])
def test_likelihood_rows_are_summed_over_the_plate(batch: int | None, mask: int | None):
    flow, x = growing(2), torch.randn(12, 2)
    shown = 1.0 if mask is None else mask / (batch or 12)

    def model(x: Tensor) -> None:
        pyro.module("flow", flow)
        with pyro.plate("data", len(x), subsample_size=batch) as index:
            seen = torch.arange(len(index)) < (len(index) if mask is None else mask)
            with pyro.poutine.mask(mask=seen):
                pyro.sample("x", flow(), obs=x[index])

    objective = Regularized(ELBO(), JacobianNorm(0.5, probe=None))
    loss = objective.differentiable_loss(model, no_guide, x)
    norm = 2 * flow.transform.field.rate.detach() ** 2
    torch.testing.assert_close(loss.detach() + objective.report["bound"], 0.5 * 12 * shown * norm)
    torch.testing.assert_close(objective.report["JacobianNorm"], norm)


def test_subsampling_is_unbiased():
    flow, x = growing(2), torch.randn(12, 2)
    terms = (KineticEnergy(0.5), JKO(2.0))
    full = Regularized(ELBO(), *terms).differentiable_loss(likelihood, no_guide, flow, x)
    objective = Regularized(ELBO(), *terms)
    model = partial(likelihood, batch=3)
    draws = torch.stack(
        [objective.differentiable_loss(model, no_guide, flow, x).detach() for _ in range(100)]
    )
    # 100 batches of 3 of 12 rows; four standard errors.
    assert (draws.mean() - full).abs() < 4 * draws.std() / 10


def test_flows_of_model_and_guide_are_both_counted():
    prior = growing(2)

    def model() -> None:
        pyro.module("prior", prior)
        pyro.sample("z", prior())

    guide = AutoFlow(model, growing).initialize()
    objective = Regularized(ELBO(4), JacobianNorm(1.0, probe=None))
    loss = objective.differentiable_loss(model, guide)
    norm = 2 * 0.4**2
    torch.testing.assert_close(loss + objective.report["bound"], torch.tensor(2 * norm))


def test_a_flow_in_a_stock_transformed_distribution():
    flow = Continuous(Growing(2), ExactDivergence(), RK4(4))

    def model(x: Tensor) -> None:
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.TransformedDistribution(base, [flow]), obs=x)

    objective = Regularized(ELBO(), JacobianNorm(1.0, probe=None))
    loss = objective.differentiable_loss(model, no_guide, torch.randn(5, 2))
    torch.testing.assert_close(loss + objective.report["bound"], torch.tensor(5 * 2 * 0.4**2))


def test_a_draw_scored_again_with_constants_is_not_counted_twice():
    def recipe(dim: int) -> Flow:
        spline = Coupling(dim, Affine(), hidden_dims=(4,))
        return Flow(compose(growing(dim).transform, spline))

    guide = AutoFlow(latent, recipe).initialize()
    field = guide.flow.transform.parts[0].field
    gradients = []
    for kind in (ELBO, STL):
        objective = Regularized(kind(3, max_plate_nesting=0), JacobianNorm(1.0, probe=None))
        loss = objective.differentiable_loss(latent, guide)
        penalty = loss + objective.report["bound"]
        torch.testing.assert_close(penalty, torch.tensor(2 * 0.4**2))
        gradients.append(objective)
    assert field.rate.requires_grad


def test_jko_step_of_a_gaussian_has_the_closed_form_optimum():
    """min KL(N(m, s^2) || N(mu, tau^2)) + (m^2 + (s - 1)^2) / (2 h), a quadratic in m and s."""
    mu, tau, h = 1.5, 2.0, 0.7
    precision = 1 / tau**2
    m = mu * precision / (precision + 1 / h)
    a, b = precision + 1 / h, 1 / h
    s = (b + math.sqrt(b**2 + 4 * a)) / (2 * a)
    rate = math.log(s)
    guide_flow = Flow(Continuous(Growing(1, rate, m * rate / (s - 1)), ExactDivergence(), RK4(8)))

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.full((1,), mu), tau).to_event(1))

    def guide() -> None:
        pyro.sample("z", guide_flow())

    objective = Regularized(ELBO(1000, max_plate_nesting=0), JKO(h))
    parameters = list(guide_flow.parameters())
    draws = []
    for _ in range(25):
        loss = objective.differentiable_loss(model, guide)
        draws.append(torch.stack(torch.autograd.grad(loss, parameters)))
    draws = torch.stack(draws)
    # 25 gradients of 1000 draws each; four standard errors.
    assert (draws.mean(0).abs() < 4 * draws.std(0) / 5).all()
    unregularized = torch.stack(
        torch.autograd.grad(objective.objective.differentiable_loss(model, guide), parameters)
    )
    assert (unregularized.abs() > 10 * draws.std(0) / 5).all()


def test_stock_svi_and_pyro_losses_give_the_same_bound():
    flow, x = growing(2), torch.randn(6, 2)
    objective = Regularized(ELBO(), KineticEnergy(0.1))
    svi = SVI(partial(likelihood, flow), no_guide, pyro.optim.Adam({"lr": 1e-2}), objective)
    before = flow.transform.field.rate.item()
    assert isinstance(svi.step(x), float)
    assert flow.transform.field.rate.item() != before
    stock = Trace_ELBO().loss(likelihood, no_guide, flow, x)
    objective.loss(likelihood, no_guide, flow, x)
    assert objective.report["bound"].item() == pytest.approx(-stock)


def test_fit_keeps_the_history():
    guide = AutoFlow(latent, growing)
    objective = Regularized(STL(8, antithetic=True), KineticEnergy(0.1), JKO(5.0, 0.5))
    result = fit(latent, guide, objective=objective, num_steps=5, start=False, progress_bar=False)
    assert set(result.history) >= {"KineticEnergy", "JKO", "bound"}
    assert objective.num_particles == 8
    assert objective.report == {}


def test_settings_and_state_are_those_of_the_inner_objective():
    inner = Tempered(4, beta=GeometricSchedule(10), max_plate_nesting=1)
    before = (inner.max_plate_nesting, 4, True)
    objective = Regularized(inner, KineticEnergy())
    assert objective.settled_from == inner.settled_from
    objective.max_plate_nesting = 2
    objective.num_particles = 6
    objective.vectorize_particles = False
    assert before == (inner.max_plate_nesting, inner.num_particles, inner.vectorize_particles)
    twin = copy.copy(objective)
    assert (twin.num_particles, twin.max_plate_nesting, twin.vectorize_particles) == (6, 2, False)
    guide = AutoFlow(latent, growing).initialize()
    objective.differentiable_loss(latent, guide)
    assert objective.state_dict()["step"] == 1
    assert twin.state_dict()["step"] == 0
    assert "elbo" in objective.report
    twin.load_state_dict(objective.state_dict())
    assert twin.state_dict()["step"] == 1
    assert objective.log_weight_draws(latent, guide).shape == (6,)


def test_meta_device():
    with pyro.validation_enabled(False), torch.device("meta"):
        guide = AutoFlow(latent, growing).initialize()
        objective = Regularized(ELBO(4, max_plate_nesting=0), KineticEnergy(), JacobianNorm())
        objective.differentiable_loss(latent, guide).backward()
    assert all(p.grad.is_meta for p in guide.parameters())


def test_wrong_arguments():
    with pytest.raises(TypeError, match="`objective` must be a flowvi Objective; got Trace_ELBO"):
        Regularized(Trace_ELBO(), KineticEnergy())
    with pytest.raises(ValueError, match="`regularizers` must hold at least one Regularizer"):
        Regularized(ELBO())
    with pytest.raises(TypeError, match="`regularizers` must hold Regularizer objects; got float"):
        Regularized(ELBO(), 0.1)
    guide = AutoFlow(latent, lambda dim: Flow(TriangularAffine(dim))).initialize()
    with pytest.raises(ValueError, match="must hold a continuous flow to train"):
        Regularized(ELBO(), KineticEnergy()).differentiable_loss(latent, guide)


def test_a_flow_outside_of_sites_counts_once():
    flow = Continuous(FunctionField(2, lambda t, x: torch.ones_like(x)), solver=RK4(2))

    def model() -> None:
        pyro.factor("far", flow(torch.zeros(7, 2)).sum())

    objective = Regularized(ELBO(), KineticEnergy())
    loss = objective.differentiable_loss(model, no_guide)
    torch.testing.assert_close(loss + objective.report["bound"], torch.tensor(1.0))
