"""Gradients of the thermodynamic objective and of the chi upper bound; bad input of the bounds."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from objective_models import NOISE, Guide, Learned, data, log_moment, model, tempered_mean

from flowvi.flows import planar, realnvp
from flowvi.guides import AutoFlow
from flowvi.objectives import CUBO, TVO, Renyi, log_uniform_partition

POINTS = (0.0, 0.1, 0.4, 1.0)


def finite_tvo(log_w, upper=False):
    ends = zip(POINTS, POINTS[1:], strict=False)
    return sum((b - a) * (((b if upper else a) * log_w).softmax(0) * log_w).sum() for a, b in ends)


@pytest.mark.parametrize("upper", [False, True], ids=["left", "right"])
def test_reparameterised_gradient_is_that_of_the_finite_expression(upper):
    problem = Learned(data(4))
    objective = TVO(5, partition=POINTS, upper=upper, reparameterised=True)
    grads, eps = problem.run(objective, 1)
    sign = -1 if upper else 1
    log_w, _ = problem.log_w(eps)
    exact = torch.autograd.grad(sign * finite_tvo(log_w, upper), list(problem.parameters()))
    for ours, truth in zip(grads, exact, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-10)


def covariance_gradient(problem, eps):
    """The covariance formula, one parameter and one point at a time."""
    log_w, z = problem.log_w(eps)
    fixed = Fixed(problem, z.detach())
    params, result = list(problem.parameters()), []
    for param in params:
        log_p_slopes, log_q_slopes = fixed.slopes(param)
        total = torch.zeros_like(param)
        for a, b in zip(POINTS, POINTS[1:], strict=False):
            share = (a * log_w.detach()).softmax(0)
            centred = log_w.detach() - (share * log_w.detach()).sum(0)
            target = a * log_p_slopes + (1 - a) * log_q_slopes
            inner = share[..., None] * (log_p_slopes - log_q_slopes + centred[..., None] * target)
            total = total + (b - a) * inner.sum((0, 1)).reshape(param.shape)
        result.append(total)
    return result


class Fixed:
    """Gradients of log p and log q for every particle and item at given draws."""

    def __init__(self, problem, z):
        self.problem, self.z = problem, z

    def slopes(self, param):
        problem, z = self.problem, self.z
        log_p = dist.Normal(problem.prior, 1.0).log_prob(z) + dist.Normal(
            z, problem.log_noise.exp()
        ).log_prob(problem.x)
        log_q = dist.Normal(problem.loc, problem.log_scale.exp()).log_prob(z)
        return (self._each(value, param) for value in (log_p, log_q))

    def _each(self, value, param):
        rows = []
        for entry in value.flatten():
            (grad,) = torch.autograd.grad(entry, param, retain_graph=True, allow_unused=True)
            rows.append(torch.zeros_like(param) if grad is None else grad)
        return torch.stack(rows).reshape(*value.shape, -1)


def test_covariance_gradient_against_the_formula():
    problem = Learned(data(3))
    grads, eps = problem.run(TVO(5, partition=POINTS), 1)
    for ours, truth in zip(grads, covariance_gradient(problem, eps), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("reparameterised", [False, True], ids=["covariance", "reparameterised"])
@pytest.mark.parametrize("upper", [False, True], ids=["left", "right"])
def test_gradient_for_many_particles_against_the_closed_form(reparameterised, upper):
    # 5000 particles, 40 steps: 4 standard errors and the bias of order 1 / 5000.
    x = data(3)
    guide = Guide(x, shift=0.2, log_factor=0.15)
    params = [guide.loc, guide.log_scale]
    ends = zip(POINTS, POINTS[1:], strict=False)
    exact = sum((b - a) * tempered_mean(x, *params, b if upper else a).sum() for a, b in ends)
    truth = torch.stack(torch.autograd.grad(exact, params))
    objective = TVO(5000, partition=POINTS, upper=upper, reparameterised=reparameterised)
    draws = []
    for _ in range(40):
        loss = objective.differentiable_loss(model, guide, x)
        sign = 1 if upper else -1
        draws.append(torch.stack(torch.autograd.grad(sign * loss, params)))
    draws = torch.stack(draws)
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - truth).abs() < 4 * error + 2e-3).all()


def test_tvo_covers_discrete_sites():
    # Exact by enumeration; 4 standard errors of 4000 copies, bias of order 1 / 200 particles.
    prior, rate = torch.tensor([0.3, 0.7]), torch.tensor([0.5, 2.0])
    start = torch.tensor([0.2, -0.1])
    exact_logits = start.clone().requires_grad_()
    log_q = exact_logits.log_softmax(-1)
    log_w = prior.log() + dist.Exponential(rate).log_prob(torch.tensor(0.8)) - log_q
    exact = sum(
        (b - a) * ((log_q + a * log_w).softmax(-1) * log_w).sum()
        for a, b in zip(POINTS, POINTS[1:], strict=False)
    )
    (truth,) = torch.autograd.grad(exact, exact_logits)
    logits = start.repeat(400, 1).requires_grad_()

    def program():
        with pyro.plate("data", 400):
            k = pyro.sample("k", dist.Categorical(prior))
            pyro.sample("x", dist.Exponential(rate[k]), obs=torch.full((400,), 0.8))

    def guide():
        with pyro.plate("data", 400):
            pyro.sample("k", dist.Categorical(logits=logits))

    loss = TVO(1000, partition=POINTS, max_plate_nesting=1).differentiable_loss(program, guide)
    (grad,) = torch.autograd.grad(-loss, logits)
    error = grad.std(0) / math.sqrt(len(grad))
    assert ((grad.mean(0) - truth).abs() < 4 * error + 2e-3).all()
    assert -float(loss.detach()) / 400 == pytest.approx(float(exact.detach()), abs=0.01)


def test_tvo_trains_flow_guides_by_scoring_given_draws():
    def program():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=torch.tensor(0.6))

    guide = AutoFlow(program, recipe=realnvp)
    guide.initialize()
    loss = TVO(6).differentiable_loss(program, guide)
    loss.backward()
    grads = [p.grad for p in guide.parameters() if p.requires_grad]
    assert any(g is not None and g.abs().max() > 0 for g in grads)
    # Without an inverse given draws cannot be scored; through the draws it works.
    bending = AutoFlow(program, recipe=planar)
    bending.initialize()
    assert TVO(6, reparameterised=True).differentiable_loss(program, bending).requires_grad


def test_cubo_gradient_is_that_of_the_scaled_moment():
    problem = Learned(data(4))
    for order in (2.0, 1.5):
        grads, eps = problem.run(CUBO(6, order=order), 1)
        log_w, _ = problem.log_w(eps)
        powers = (log_w - log_w.detach().max(0).values).exp() ** order
        surrogate = -(powers.mean(0) / order).sum()
        exact = torch.autograd.grad(surrogate, list(problem.parameters()))
        for ours, truth in zip(grads, exact, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-10)


def test_cubo_gradient_points_along_that_of_the_exact_moment():
    # One item, 20000 particles: up to the positive factor of the divisor.
    x = data(3)[-1:]
    guide = Guide(x, shift=0.2, log_factor=0.15)
    params = [guide.loc, guide.log_scale]
    exact = log_moment(x, *params, 2.0).sum() / 2
    truth = torch.cat(torch.autograd.grad(exact, params))
    total = torch.zeros(2)
    for _ in range(20):
        loss = CUBO(20_000).differentiable_loss(model, guide, x)
        total += torch.cat(torch.autograd.grad(loss, params))
    cosine = torch.cosine_similarity(total, truth, dim=0)
    assert cosine > 0.999


def test_cubo_widens_a_guide_that_is_too_narrow():
    x = torch.zeros(1)
    guide = Guide(x, shift=0.0, log_factor=-0.5)
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.02)
    objective = CUBO(500)(model, guide)
    for _ in range(150):
        optimizer.zero_grad()
        objective(x).backward()
        optimizer.step()
    posterior = NOISE / math.sqrt(1 + NOISE**2)
    assert guide.log_scale.exp().item() == pytest.approx(posterior, rel=0.1)


def test_log_uniform_partition():
    assert log_uniform_partition(1) == (0.0, 1.0)
    points = torch.tensor(log_uniform_partition(4, first=0.01))
    torch.testing.assert_close(points[1:].log().diff(), torch.full((3,), math.log(100) / 3))


def test_bad_input():
    for alpha in (math.nan, "half", None, True):
        with pytest.raises(ValueError, match=f"`alpha` must be a number; got {alpha!r}"):
            Renyi(alpha, 4)
    for bound in (CUBO, TVO):
        with pytest.raises(ValueError, match="`num_particles` must be at least 2 for .*; got 1"):
            bound(1)
    for order in (1.0, math.nan, math.inf, "two"):
        with pytest.raises(ValueError, match="`order` must be a finite number above 1; got"):
            CUBO(4, order=order)
    for points in ((0.0,), (0.1, 1.0), (0.0, 0.5), (0.0, 0.7, 0.3, 1.0), (0.0, math.nan, 1.0)):
        with pytest.raises(ValueError, match="`partition` must rise from 0 to 1; got"):
            TVO(4, partition=points)
    with pytest.raises(ValueError, match="`num_partitions` must be an integer of at least 1"):
        log_uniform_partition(0)
    with pytest.raises(ValueError, match=r"`first` must be in \(0, 1\); got 1"):
        log_uniform_partition(3, first=1)


def test_reparameterised_tvo_refuses_discrete_sites_by_name():
    def program():
        pyro.sample("which", dist.Bernoulli(0.5))

    message = "site `which` draws from Bernoulli.* Use TVO without `reparameterised`"
    with pytest.raises(NotImplementedError, match=message):
        TVO(4, reparameterised=True).differentiable_loss(program, program)
    assert math.isfinite(TVO(4).loss(program, program))
