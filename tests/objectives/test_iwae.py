"""Gradients of the importance-weighted bound: full, doubly reparameterised, path only."""

from __future__ import annotations

import copy
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from objective_models import GivenNoiseGuide, Learned, data, log_weight, model
from pyro.infer import SVI
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn

from flowvi.flows import maf, realnvp
from flowvi.guides import AutoFlow, AutoMixtureFlow, AutoPlateFlow
from flowvi.objectives import ELBO, IWAE, STL, STLIWAE, DReG, Renyi

PATH = {"dreg": DReG, "stl-iwae": STLIWAE}
path_only = pytest.mark.parametrize("make", PATH.values(), ids=PATH)


def by_hand(problem, eps, power):
    """Weights of power 1 for the model and of ``power`` for the guide, particle by particle."""
    log_w, z = problem.log_w(eps, constant=True)
    share = log_w.detach().softmax(0)
    (slope,) = torch.autograd.grad(log_w.sum(), z, retain_graph=True)
    of_model = (share * log_w).sum()
    of_guide = (share**power * slope.detach() * z).sum()
    params = list(problem.parameters())
    direct = torch.autograd.grad(of_model, params[:2], retain_graph=True)
    return (*direct, *torch.autograd.grad(of_guide, params[2:]))


def test_iwae_gradient_is_that_of_the_finite_expression():
    problem = Learned(data(4))
    grads, eps = problem.run(IWAE(5), 1)
    log_w, _ = problem.log_w(eps)
    exact = torch.autograd.grad((log_w.exp().mean(0)).log().sum(), list(problem.parameters()))
    for ours, truth in zip(grads, exact, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-10)


def test_iwae_gradient_against_finite_differences():
    problem = Learned(data(3))
    grads, _ = problem.run(IWAE(5), 1)
    step = 1e-5
    for param, grad in zip(problem.parameters(), grads, strict=True):
        flat = param.data.view(-1)
        for i in range(flat.numel()):
            values = []
            for sign in (1, -1):
                flat[i] += sign * step
                objective = IWAE(5, max_plate_nesting=1)
                pyro.set_rng_seed(1)
                values.append(-objective.loss(problem.model, problem.guide))
                flat[i] -= sign * step
            assert (values[0] - values[1]) / (2 * step) == pytest.approx(
                float(grad.view(-1)[i]), rel=1e-6, abs=1e-7
            )


@pytest.mark.parametrize(("make", "power"), [(DReG, 2), (STLIWAE, 1)], ids=["dreg", "stl-iwae"])
def test_path_gradients_against_the_formula(make, power):
    problem = Learned(data(4))
    grads, eps = problem.run(make(5), 1)
    for ours, truth in zip(grads, by_hand(problem, eps, power), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.5, -1.0, 3.0, 0.9999])
def test_renyi_gradient_is_that_of_the_finite_expression(alpha):
    problem = Learned(data(4))
    grads, eps = problem.run(Renyi(alpha, 5), 1)
    log_w, _ = problem.log_w(eps)
    bound = (((1 - alpha) * log_w).exp().mean(0)).log().sum() / (1 - alpha)
    exact = torch.autograd.grad(bound, list(problem.parameters()))
    for ours, truth in zip(grads, exact, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-7, atol=1e-8)


def guide_gradients(objective, guide, x, number):
    params = [guide.loc, guide.log_scale]
    grads = []
    for _ in range(number):
        guide.eps = torch.randn_like(guide.eps)
        loss = objective.differentiable_loss(model, guide, x)
        grads.append(torch.stack(torch.autograd.grad(-loss, params)))
    return torch.stack(grads)


def copies(particles, number, scale):
    """One item ``number`` times, so that one call gives as many independent gradients."""
    x = data(3)[-1:].repeat(number)
    guide = GivenNoiseGuide(x, particles)
    with torch.no_grad():
        guide.loc.copy_(guide.loc[:1].expand(number))
        guide.log_scale.fill_(float(guide.log_scale[0]) + scale)
    return x, guide


@pytest.mark.parametrize("particles", [2, 8])
def test_dreg_and_iwae_agree_in_the_mean(particles):
    # 40000 independent gradients of each, for location and scale: within 3 standard errors.
    x, guide = copies(particles, 40_000, 0.0)
    draws = [
        guide_gradients(make(particles, max_plate_nesting=1), guide, x, 1)[0]
        for make in (DReG, IWAE, STLIWAE)
    ]
    means = [d.mean(1) for d in draws]
    errors = [d.std(1) / math.sqrt(d.shape[1]) for d in draws]
    assert ((means[0] - means[1]).abs() < 3 * (errors[0] ** 2 + errors[1] ** 2).sqrt()).all()
    # The bias of the path gradient alone is there, and found by the same test.
    biased = (means[2] - means[1]).abs() / (errors[2] ** 2 + errors[1] ** 2).sqrt()
    assert biased.max() > 6
    assert (draws[0].std(1) < draws[1].std(1)).all()


def test_signal_to_noise_of_dreg_grows_with_k_where_that_of_iwae_falls():
    # Mean over spread of 20000 gradients of the guide's location, K = 1, 10, 100.
    ratios = {DReG: [], IWAE: []}
    for particles in (1, 10, 100):
        for make, found in ratios.items():
            x, guide = copies(particles, 20_000 if particles < 100 else 4_000, 0.0)
            if particles == 1:
                make = {DReG: STL, IWAE: ELBO}[make]
                guide.eps = guide.eps[0]
                guide.forward = _single(guide)
            objective = make(particles, max_plate_nesting=1)
            grads = guide_gradients(objective, guide, x, 1)[0, 0]
            found.append(float(grads.mean().abs() / grads.std()))
    assert ratios[DReG][0] < ratios[DReG][1] < ratios[DReG][2]
    assert ratios[IWAE][0] > ratios[IWAE][1] > ratios[IWAE][2]
    # As the square root of K, up and down.
    assert ratios[DReG][2] / ratios[DReG][1] == pytest.approx(math.sqrt(10), rel=0.35)
    assert ratios[IWAE][1] / ratios[IWAE][2] == pytest.approx(math.sqrt(10), rel=0.5)


def _single(guide):
    def forward(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(guide.loc, guide.log_scale.exp()))

    return forward


def perturbed(flow):
    with torch.no_grad():
        for p in flow.parameters():
            p.normal_(0, 0.3)
    return flow


@path_only
@pytest.mark.parametrize("recipe", [realnvp, maf], ids=["realnvp", "maf"])
def test_gradient_of_a_flow_guide_is_zero_at_the_model(make, recipe):
    flow = perturbed(recipe(3))
    frozen = copy.deepcopy(flow).requires_grad_(False)

    def target():
        pyro.sample("z", frozen())

    def guide():
        pyro.sample("z", flow())

    make(6).differentiable_loss(target, guide).backward()
    assert max(p.grad.abs().max() for p in flow.parameters()) < 1e-10
    flow.zero_grad()
    IWAE(6).differentiable_loss(target, guide).backward()
    assert max(p.grad.abs().max() for p in flow.parameters()) > 1e-3


@path_only
def test_gradient_is_zero_at_the_posterior_of_an_automatic_guide(make):
    covariance = torch.tensor([[1.0, 0.4], [0.4, 0.8]])

    def target():
        pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), covariance))

    guide = AutoMultivariateNormal(target)
    guide()
    tril = torch.linalg.cholesky(covariance)
    guide.loc.data = torch.zeros(2)
    guide.scale = tril.diagonal()
    guide.scale_tril = tril / tril.diagonal()[:, None]
    make(6).differentiable_loss(target, guide).backward()
    assert all(p.grad.abs().max() < 1e-10 for p in guide.parameters())


def scale_model(x):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, scale), obs=x)


def plate_model(x):
    with pyro.plate("data", 6):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


@pytest.mark.parametrize("program", [scale_model, plate_model], ids=["global", "local"])
@pytest.mark.parametrize(
    "make_guide",
    [AutoNormal, AutoMultivariateNormal, pytest.param(AutoFlow, marks=pytest.mark.slow)],
    ids=["normal", "mvn", "flow"],
)
def test_dreg_agrees_with_iwae_for_automatic_guides(program, make_guide):
    # 250 gradients of 4 particles through constrained sites; 4.5 standard errors over all.
    x = torch.tensor([0.5, 1.4, 0.8, 2.0, 1.1, 0.3])
    guide = make_guide(program, init_scale=0.3)
    guide(x)
    params = [p for p in guide.parameters() if p.requires_grad]
    results = []
    for make in (DReG, IWAE):
        objective = make(4)
        objective.loss(program, guide, x)
        pyro.set_rng_seed(2)
        grads = []
        for _ in range(250):
            loss = objective.differentiable_loss(program, guide, x)
            found = torch.autograd.grad(loss, params, allow_unused=True)
            pairs = zip(found, params, strict=True)
            grads.append(torch.cat([_flat(g, p) for g, p in pairs]))
        results.append(torch.stack(grads))
    means = [r.mean(0) for r in results]
    error = sum(r.var(0) / len(r) for r in results).sqrt()
    assert ((means[0] - means[1]).abs() < 4.5 * error + 1e-9).all()


def _flat(grad, param):
    return torch.zeros_like(param).flatten() if grad is None else grad.flatten()


def test_a_parameter_behind_a_delta_gets_the_gradient_of_iwae():
    # The guide's scale enters through a Delta, not through a random site.
    log_scale = torch.tensor(-0.3, requires_grad=True)

    def target():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=torch.tensor(0.7))

    def guide():
        u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        z = log_scale.exp() * u
        pyro.sample("z", dist.Delta(z, log_density=-log_scale))

    grads = []
    for make in (DReG, IWAE):
        objective = make(5, max_plate_nesting=1)
        pyro.set_rng_seed(0)
        loss = objective.differentiable_loss(target, guide)
        grads.append(torch.autograd.grad(loss, log_scale)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-12)


@path_only
def test_discrete_sites_are_refused_by_name(make):
    def program():
        pyro.sample("which", dist.Categorical(torch.ones(3) / 3))

    message = "site `which` draws from Categorical, which is not. Use ELBO or VIMCO"
    for objective in (make(2), IWAE(2), Renyi(0.5, 2)):
        with pytest.raises(NotImplementedError, match=message):
            objective.differentiable_loss(program, program)
        assert objective.loss(program, program) == pytest.approx(0.0, abs=1e-12)


class Chain(nn.Module):
    """Guide of two layers in a plate: the law of the second draw is a network of the first."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.first = nn.Parameter(torch.tensor([0.2, -0.3]))
        self.second = nn.Parameter(torch.tensor([0.1, 0.6, -0.2, 0.3]))

    def draw(self, rows: int) -> None:
        with pyro.plate("data", rows):
            a = pyro.sample("a", dist.Normal(self.first[0], self.first[1].exp()))
            shift, slope, log_scale, bend = self.second
            scale = (log_scale + bend * a.tanh()).exp()
            b = pyro.sample("b", dist.Normal(shift + slope * a, scale))
            return a, b

    def forward(self) -> None:
        self.draw(self.size)

    def target(self) -> None:
        with pyro.plate("data", self.size):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(a + b, 0.7), obs=torch.full((self.size,), 0.8))


@pytest.mark.parametrize("vectorize_particles", [True, False], ids=["batched", "loop"])
def test_dreg_agrees_with_iwae_where_draws_depend_on_each_other(vectorize_particles):
    # 300 steps of 100 items: 3.5 standard errors of the difference over six parameters.
    guide = Chain(100)
    params, results = list(guide.parameters()), []
    for make in (DReG, IWAE, STLIWAE):
        objective = make(4, max_plate_nesting=1, vectorize_particles=vectorize_particles)
        pyro.set_rng_seed(1)
        grads = []
        for _ in range(300 if vectorize_particles else 80):
            loss = objective.differentiable_loss(guide.target, guide)
            grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]))
        results.append(torch.stack(grads))
    dreg, iwae, stl = results
    error = ((dreg.var(0) + iwae.var(0)) / len(dreg)).sqrt()
    assert ((dreg.mean(0) - iwae.mean(0)).abs() < 3.5 * error).all()
    assert ((stl.mean(0) - iwae.mean(0)).abs() / error).max() > 6


@path_only
def test_gradient_of_a_chain_is_zero_at_the_model(make):
    guide, frozen = Chain(5), Chain(5).requires_grad_(False)
    make(4).differentiable_loss(frozen, guide).backward()
    assert all(p.grad.abs().max() < 1e-10 for p in guide.parameters())
    guide.zero_grad()
    IWAE(4).differentiable_loss(frozen, guide).backward()
    assert all(p.grad.abs().max() > 1e-3 for p in guide.parameters())


def hierarchical_model(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


@pytest.mark.slow
def test_dreg_agrees_with_iwae_for_local_flows_given_a_global_one():
    # 250 gradients of 3 particles; 4.5 standard errors over all parameters.
    x = torch.tensor([0.5, 1.4, -0.8])
    narrow = partial(realnvp, num_layers=2, hidden_dims=(8,))
    guide = AutoPlateFlow(hierarchical_model, recipe=narrow, local_recipe=narrow)
    guide.initialize(x)
    perturbed(guide)
    params = [p for p in guide.parameters() if p.requires_grad]
    results = []
    for make in (DReG, IWAE):
        objective = make(3)
        objective.loss(hierarchical_model, guide, x)
        grads = []
        for _ in range(250):
            loss = objective.differentiable_loss(hierarchical_model, guide, x)
            found = torch.autograd.grad(loss, params, allow_unused=True)
            pairs = zip(found, params, strict=True)
            grads.append(torch.cat([_flat(g, p) for g, p in pairs]))
        results.append(torch.stack(grads))
    difference = results[0].mean(0) - results[1].mean(0)
    error = sum(r.var(0) / len(r) for r in results).sqrt()
    assert (difference.abs() < 4.5 * error + 1e-9).all()


@path_only
def test_guides_that_lack_what_is_needed_are_refused_by_name(make):
    x = torch.zeros(6)
    mixture = AutoMixtureFlow(scale_model, recipe=realnvp)
    mixture.initialize(x)
    with pytest.raises(NotImplementedError, match=f"{make.__name__} needs reparameterised"):
        make(4).differentiable_loss(scale_model, mixture, x)
    assert math.isfinite(make(4).loss(scale_model, mixture, x))


def test_local_flows_with_subsampling():
    x = data(12)

    def program(x):
        with pyro.plate("data", len(x), 4) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.6), obs=x[index])

    guide = AutoPlateFlow(program, recipe=realnvp, local_recipe=realnvp)
    guide.initialize(x)
    for make in (IWAE, DReG):
        svi = SVI(program, guide, pyro.optim.Adam({"lr": 1e-3}), make(3))
        assert math.isfinite(svi.step(x))


def test_dreg_learns_as_a_module():
    x = data(4)
    problem = Learned(x)
    problem.loc.data += 2.0
    before = DReG(50).loss(problem.model, problem.guide)
    optimizer = torch.optim.Adam(problem.parameters(), lr=0.05)
    loss = DReG(8)(problem.model, problem.guide)
    for _ in range(100):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert DReG(50).loss(problem.model, problem.guide) < before - 0.3


def test_log_weight_of_the_tests_is_that_of_the_objective():
    x = data(3)
    guide = GivenNoiseGuide(x, 2)
    z = guide.loc + guide.log_scale.exp() * guide.eps
    log_w = log_weight(x, z, guide.loc, guide.log_scale)
    draws = IWAE(2, max_plate_nesting=1).log_weight_draws(model, guide, x)
    torch.testing.assert_close(draws, log_w.sum(1).detach())
