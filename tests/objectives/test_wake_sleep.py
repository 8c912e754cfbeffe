from __future__ import annotations

import math
from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer import ReweightedWakeSleep as StockRWS
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import nn

from flowvi.flows import realnvp
from flowvi.guides import AmortizedFlow, AutoFlow
from flowvi.infer import fit
from flowvi.objectives import IWAE, ReweightedWakeSleep

X = torch.tensor([0.7, -1.2, 2.0], dtype=torch.float64)
# Items are independent, so many copies of them in one step are as many draws.
COPIES = X.repeat(50)


class Mixture(nn.Module):
    """One discrete latent per item; the guide's logits are linear in the data."""

    def __init__(self):
        super().__init__()
        self.means = nn.Parameter(torch.tensor([-1.0, 1.5]))
        self.log_odds = nn.Parameter(torch.tensor(0.4))
        self.slope = nn.Parameter(torch.tensor(0.3))
        self.offset = nn.Parameter(torch.tensor(-0.2))

    @property
    def theta(self):
        return [self.means, self.log_odds]

    @property
    def phi(self):
        return [self.slope, self.offset]

    def model(self, x, batch=None):
        with pyro.plate("items", len(x), subsample_size=batch) as rows:
            z = pyro.sample("z", dist.Bernoulli(logits=self.log_odds))
            pyro.sample("x", dist.Normal(self.means[z.long()], 1.0), obs=x[rows] if batch else x)

    def guide(self, x, batch=None):
        with pyro.plate("items", len(x), subsample_size=batch) as rows:
            pyro.sample("z", dist.Bernoulli(logits=self.offset + self.slope * x[rows]))

    def log_p(self, x, z):
        """Joint density, written out: prior by the sigmoid, likelihood by the square."""
        log_prior = -torch.nn.functional.softplus(torch.where(z > 0, -1, 1) * self.log_odds)
        mean = torch.where(z > 0, self.means[1], self.means[0])
        return log_prior - 0.5 * (x - mean) ** 2 - 0.5 * math.log(2 * math.pi)

    def log_q(self, x, z):
        logit = self.offset + self.slope * x
        return -torch.nn.functional.softplus(torch.where(z > 0, -1, 1) * logit)


def expected(mixture, x, particles):
    """Mean wake losses and gradients, by enumeration of all draws of an item."""
    draws = torch.tensor(list(product([0.0, 1.0], repeat=particles)))[..., None]
    log_p, log_q = mixture.log_p(x, draws), mixture.log_q(x, draws)
    chance = log_q.sum(1).exp().detach()
    log_w = log_p - log_q.detach()
    bound = log_w.logsumexp(1) - math.log(particles)
    theta_loss = -(chance * bound).sum()
    phi_loss = -(chance * (log_w.detach().softmax(1) * log_q).sum(1)).sum()
    return theta_loss, phi_loss


def gradient(loss, params):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])


def repeat(objective, mixture, steps, *args):
    params = [*mixture.theta, *mixture.phi]
    rows, reports = [], []
    for _ in range(steps):
        loss = objective.differentiable_loss(mixture.model, mixture.guide, *args)
        rows.append(torch.cat([loss.detach().reshape(1), gradient(loss, params)]))
        reports.append(objective.report)
    return torch.stack(rows), {n: torch.stack([r[n] for r in reports]) for n in reports[0]}


def check_mean(draws, truth, errors=4.5):
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - truth).abs() < errors * error + 1e-12).all()


@pytest.mark.parametrize("vectorize", [True, False])
def test_wake_gradients_agree_with_enumeration(vectorize):
    # 80 steps of 150 items and 3 particles; 4.5 standard errors.
    mixture, particles = Mixture(), 3
    theta_loss, phi_loss = expected(mixture, COPIES, particles)
    truth = torch.cat(
        [
            theta_loss.detach().reshape(1),
            gradient(theta_loss, mixture.theta),
            gradient(phi_loss, mixture.phi),
        ]
    )
    objective = ReweightedWakeSleep(particles, vectorize_particles=vectorize)
    rows, reports = repeat(objective, mixture, 80, COPIES)
    check_mean(rows, truth)
    check_mean(reports["wake_phi"], phi_loss.detach())
    torch.testing.assert_close(reports["wake_theta"], rows[:, 0])
    evidence = mixture.log_p(COPIES, torch.tensor([[0.0], [1.0]])).logsumexp(0).sum()
    assert theta_loss > -evidence


def test_subsampling_is_unbiased():
    # B = N / 4, as 5 of 20; 100 steps of 2 particles; 4.5 standard errors.
    mixture, x = Mixture(), torch.linspace(-2, 2.5, 200)
    theta_loss, phi_loss = expected(mixture, x, 2)
    truth = torch.cat(
        [
            theta_loss.detach().reshape(1),
            gradient(theta_loss, mixture.theta),
            gradient(phi_loss, mixture.phi),
        ]
    )
    rows, _ = repeat(ReweightedWakeSleep(2), mixture, 100, x, 50)
    check_mean(rows, truth)


def sleep_loss(mixture, size):
    """-E log q(z | x) under the model, by quadrature over x, with constant model."""
    import numpy as np

    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    nodes, weights = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    total = 0.0
    for z in (0, 1):
        x = mixture.means[z].detach() + nodes
        sign = 1.0 if z else -1.0
        prior = torch.sigmoid(sign * mixture.log_odds.detach())
        total = total - prior * (weights * mixture.log_q(x, torch.tensor(float(z)))).sum()
    return size * total


def test_sleep_gradient_agrees_with_quadrature():
    # 100 steps of 150 items; 4.5 standard errors.
    mixture = Mixture()
    exact = sleep_loss(mixture, len(COPIES))
    truth = gradient(exact, mixture.phi)
    objective = ReweightedWakeSleep(2, insomnia=0.0, model_has_params=False)
    rows = []
    for _ in range(100):
        loss = objective.differentiable_loss(mixture.model, mixture.guide, COPIES)
        rows.append(torch.cat([loss.detach().reshape(1), gradient(loss, mixture.phi)]))
    check_mean(torch.stack(rows), torch.cat([exact.detach().reshape(1), truth]))
    assert list(objective.report) == ["sleep_phi"]
    assert mixture.means.grad is None


def test_phases_mix_by_the_insomnia():
    # 100 steps of 150 items; 4.5 standard errors.
    mixture = Mixture()
    theta_loss, phi_loss = expected(mixture, COPIES, 2)
    sleep = sleep_loss(mixture, len(COPIES))
    truth = torch.cat(
        [
            theta_loss.detach().reshape(1),
            gradient(theta_loss, mixture.theta),
            gradient(0.3 * phi_loss + 0.7 * sleep, mixture.phi),
        ]
    )
    rows, reports = repeat(ReweightedWakeSleep(2, insomnia=0.3), mixture, 100, COPIES)
    check_mean(rows, truth)
    check_mean(reports["sleep_phi"], sleep.detach())


def by_keyword(mixture):
    """The same programs in the convention of Pyro's own class."""

    def model(observations=None):
        return mixture.model(observations["x"])

    def guide(observations=None):
        # Simulated data come with a dimension of simulations on the left.
        x = observations["x"]
        with pyro.plate("items", 3):
            pyro.sample("z", dist.Bernoulli(logits=mixture.offset + mixture.slope * x))

    return model, guide


def test_observations_keyword_of_pyro_and_a_batch_of_simulations():
    # 150 steps of 32 simulations in one batch; 4.5 standard errors.
    mixture = Mixture()
    model, guide = by_keyword(mixture)
    exact = sleep_loss(mixture, len(X))
    objective = ReweightedWakeSleep(2, insomnia=0.0, num_sleep_particles=32)
    rows = []
    for _ in range(150):
        loss = objective.differentiable_loss(model, guide, observations={"x": X})
        rows.append(gradient(loss, mixture.phi))
    check_mean(torch.stack(rows), gradient(exact, mixture.phi))


@pytest.mark.parametrize("insomnia", [1.0, 0.5, 0.0])
def test_gradients_agree_with_those_of_pyro_in_the_mean(insomnia):
    # Full batch with one item, where both define the same thing. 300 steps; 4.5 errors.
    mixture = Mixture()

    def model(observations=None):
        z = pyro.sample("z", dist.Bernoulli(logits=mixture.log_odds))
        pyro.sample("x", dist.Normal(mixture.means[z.long()], 1.0), obs=observations["x"])

    def guide(observations=None):
        logits = mixture.offset + mixture.slope * observations["x"]
        pyro.sample("z", dist.Bernoulli(logits=logits))

    params = [*mixture.theta, *mixture.phi]
    ours = ReweightedWakeSleep(3, insomnia=insomnia, num_sleep_particles=3)
    stock = StockRWS(3, insomnia=insomnia, num_sleep_particles=3, max_plate_nesting=0)
    rows = ([], [])
    for _ in range(300):
        data = {"x": X[0]}
        loss = ours.differentiable_loss(model, guide, observations=data)
        rows[0].append(gradient(loss, params))
        rows[1].append(
            gradient(sum(stock._loss(model, guide, (), {"observations": data})), params)
        )
    a, b = torch.stack(rows[0]), torch.stack(rows[1])
    error = ((a.var(0) + b.var(0)) / len(a)).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() < 4.5 * error + 1e-12).all()


# Guides.


def normals(x):
    with pyro.plate("items", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def normals_by_keyword(observations=None):
    normals(X)


def amortised(model, x):
    encoder = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 4))

    def recipe(dim, context_dim=0):
        return realnvp(dim, context_dim, num_layers=2, hidden_dims=(8,))

    return AmortizedFlow(model, encoder, recipe, init_scale=0.5).initialize(x)


def test_flow_guide_is_scored_where_pyro_gives_infinity():
    guide = amortised(normals, X)
    stock = StockRWS(2, insomnia=0.0, vectorize_particles=False, max_plate_nesting=1)
    objective = ReweightedWakeSleep(2, insomnia=0.0, num_sleep_particles=3)
    loss = objective.differentiable_loss(normals, guide, X)
    assert loss.isfinite()
    assert objective.report["sleep_phi"].isfinite()
    loss.backward()
    grads = [p.grad for p in guide.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in grads)
    assert any(g.abs().max() > 0 for g in grads)
    other = AutoMultivariateNormal(normals)
    other(X)
    _, phi = stock._loss(normals_by_keyword, lambda observations=None: other(X), (), {})
    assert phi == math.inf


def test_sleep_score_of_an_amortised_flow_is_its_log_density():
    guide = amortised(normals, X)
    objective = ReweightedWakeSleep(2, insomnia=0.0, model_has_params=False, max_plate_nesting=1)
    pyro.set_rng_seed(4)
    loss = objective.loss(normals, guide, X)
    pyro.set_rng_seed(4)
    trace = pyro.poutine.trace(pyro.poutine.uncondition(normals)).get_trace(X)
    simulated = {name: trace.nodes[name]["value"] for name in ("z", "x")}
    log_q = guide.log_q({"z": simulated["z"]}, simulated["x"])
    assert loss == pytest.approx(-log_q.item(), rel=1e-12)


@pytest.mark.parametrize("insomnia", [1.0, 0.0])
def test_amortised_flow_learns_the_posterior(insomnia):
    x = torch.linspace(-2, 2, 12)
    guide = amortised(normals, x)
    objective = ReweightedWakeSleep(8, insomnia=insomnia, num_sleep_particles=2)
    options = {"num_steps": 150, "seed": 0, "start": False, "progress_bar": False}
    result = fit(normals, guide, x, objective=objective, lr=0.03, **options)
    z = result.sample(2000)["z"]
    assert (z.mean(0) - 0.8 * x).abs().max() < 0.15
    assert (z.std(0) - math.sqrt(0.2)).abs().max() < 0.15
    phases = {"wake_theta", "wake_phi"} | (set() if insomnia == 1 else {"sleep_phi"})
    assert set(result.history) == phases
    evidence = dist.Normal(0.0, math.sqrt(1.25)).log_prob(x).sum()
    assert -result.losses[-50:].mean() == pytest.approx(evidence.item(), abs=0.5)


def test_joint_flow_guide_in_the_wake_phase():
    guide = AutoFlow(normals).initialize(X)
    objective = ReweightedWakeSleep(16, max_plate_nesting=2)
    objective.loss(normals, guide, X)
    pyro.set_rng_seed(1)
    loss = objective.differentiable_loss(normals, guide, X)
    pyro.set_rng_seed(1)
    assert loss.item() == pytest.approx(IWAE(16, max_plate_nesting=2).loss(normals, guide, X))
    assert all(p.grad is None for p in guide.parameters())
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in guide.parameters())


def test_stock_svi_takes_a_step():
    mixture = Mixture()
    svi = SVI(mixture.model, mixture.guide, pyro.optim.Adam({"lr": 0.01}), ReweightedWakeSleep(4))
    pyro.module("mixture", mixture)
    assert isinstance(svi.step(X), float)


def test_feed_puts_simulated_data_in_their_place():
    mixture, seen = Mixture(), []

    def model(data):
        return mixture.model(data["rows"][0] * 1.0)

    def guide(data):
        seen.append(data["rows"][0])
        return mixture.guide(data["rows"][0])

    def feed(simulated, args, kwargs):
        return ({"rows": [simulated["x"]]},), kwargs

    objective = ReweightedWakeSleep(2, insomnia=0.0, model_has_params=False, feed=feed)
    objective.loss(model, guide, {"rows": [X]})
    assert seen[-1].shape == X.shape
    assert not torch.equal(seen[-1], X)


@pytest.mark.parametrize("insomnia", [1.0, 0.5])
def test_meta_device(insomnia):
    x = torch.zeros(3, device="meta")
    mixture = Mixture().to("meta")
    objective = ReweightedWakeSleep(4, insomnia=insomnia)
    with pyro.validation_enabled(False):
        loss = objective.differentiable_loss(mixture.model, mixture.guide, x)
        loss.backward()
    assert loss.device.type == "meta"
    assert mixture.slope.grad.device.type == "meta"
    assert mixture.means.grad.device.type == "meta"


# Refusals.


def test_guides_that_do_not_see_the_data_are_refused_in_the_sleep_phase():
    objective = ReweightedWakeSleep(2, insomnia=0.5)
    for make in (AutoFlow, AutoNormal):
        with pytest.raises(NotImplementedError, match=f"{make.__name__} does not depend on the"):
            objective.loss(normals, make(normals), X)


def test_points_are_refused_in_the_wake_phase():
    with pytest.raises(NotImplementedError, match="site `z` of AutoDelta is a point"):
        ReweightedWakeSleep(2).loss(normals, AutoDelta(normals), X)


def test_factor_cannot_be_simulated():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("likelihood", -((x - z) ** 2))

    def guide(x):
        pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(NotImplementedError, match="model site `likelihood` is a pyro.factor"):
        ReweightedWakeSleep(2, insomnia=0.5).loss(model, guide, X[0])


def test_data_without_a_place_are_refused():
    mixture = Mixture()
    with pytest.raises(NotImplementedError, match="observed value of site `x` is not an argument"):
        ReweightedWakeSleep(2, insomnia=0.5).loss(mixture.model, mixture.guide, X, 2)


def test_guide_with_other_sites_is_refused_in_the_sleep_phase():
    def guide(x):
        pyro.sample("other", dist.Normal(0.0, 1.0))

    objective = ReweightedWakeSleep(2, insomnia=0.0, model_has_params=False, max_plate_nesting=2)
    with pytest.raises(ValueError, match=r"`guide` must draw every latent site of the model"):
        objective.loss(normals, guide, X)


def test_bad_arguments():
    with pytest.raises(ValueError, match="`num_particles` must be at least 2 for self-normalised"):
        ReweightedWakeSleep(1)
    for bad in (-0.1, 1.5, math.nan, "wake"):
        with pytest.raises(ValueError, match=r"`insomnia` must be in \[0, 1\]; got"):
            ReweightedWakeSleep(2, insomnia=bad)
    with pytest.raises(ValueError, match="`num_sleep_particles` must be an integer of at least 1"):
        ReweightedWakeSleep(2, num_sleep_particles=0)
    with pytest.raises(TypeError, match="`feed` must be callable; got dict"):
        ReweightedWakeSleep(2, feed={})
