"""Multi-sample bounds in a conjugate model: order, exact values, subsampling, K = 1."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from objective_models import (
    GivenNoise,
    GivenNoiseGuide,
    Guide,
    data,
    hermite,
    log_evidence,
    log_moment,
    log_weight,
    model,
    tempered_mean,
)

from flowvi.objectives import CUBO, ELBO, IWAE, STLIWAE, TVO, VIMCO, DReG, Renyi, VRMax

SIZE, BATCH = 20, 5
LOWER = {
    "iwae": IWAE,
    "dreg": DReG,
    "stl-iwae": STLIWAE,
    "vimco": VIMCO,
    "renyi 0.5": lambda k, **kw: Renyi(0.5, k, **kw),
    "renyi 2": lambda k, **kw: Renyi(2.0, k, **kw),
    "renyi inf": lambda k, **kw: Renyi(math.inf, k, **kw),
    "tvo": TVO,
    "tvo, reparameterised": lambda k, **kw: TVO(k, reparameterised=True, **kw),
}
UPPER = {
    "cubo": CUBO,
    "cubo 1.5": lambda k, **kw: CUBO(k, order=1.5, **kw),
    "tvo, upper": lambda k, **kw: TVO(k, upper=True, **kw),
}
NEITHER = {"vr-max": VRMax, "renyi -1": lambda k, **kw: Renyi(-1.0, k, **kw)}
EVERY = {**LOWER, **UPPER, **NEITHER}
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)


def value_of(objective, guide, x, **kwargs):
    """The bound itself."""
    loss = objective.loss(model, guide, x, **kwargs)
    return loss if objective.is_upper_bound else -loss


def draws_of(objective, guide, x, number, **kwargs):
    return torch.tensor([value_of(objective, guide, x, **kwargs) for _ in range(number)])


@pytest.mark.parametrize("batch", [None, BATCH], ids=["full", "subsampled"])
@pytest.mark.parametrize("make", LOWER.values(), ids=LOWER)
def test_lower_bounds_are_below_the_evidence(make, batch):
    # Near the posterior, so that the bounds are close to log p: 60 draws of 16 particles.
    x = data(SIZE)
    guide = Guide(x, shift=0.1, log_factor=0.1)
    if batch is None:
        draws, exact = draws_of(make(16), guide, x, 60), log_evidence(x).sum()
    else:
        # Against the same minibatch's share of the evidence, or its noise would hide a violation.
        draws, exact = minibatch_gaps(make(16), guide, x), 0.0
    error = draws.std() / math.sqrt(len(draws))
    assert draws.mean() < exact + 4 * error
    assert draws.mean() > exact - 20.0


@pytest.mark.parametrize("batch", [None, BATCH], ids=["full", "subsampled"])
@pytest.mark.parametrize("make", UPPER.values(), ids=UPPER)
def test_upper_bounds_are_above_the_evidence(make, batch):
    # With 2000 particles the estimate's own bias is far below the gap.
    x = data(SIZE)
    guide = Guide(x, shift=0.2, log_factor=0.2)
    if batch is None:
        draws, exact = draws_of(make(2000), guide, x, 30), log_evidence(x).sum()
    else:
        draws, exact = minibatch_gaps(make(2000), guide, x), 0.0
    error = draws.std() / math.sqrt(len(draws))
    assert draws.mean() > exact - 4 * error
    assert draws.mean() > exact + 0.05, "the guide is off, so there must be a gap"


def minibatch_gaps(objective, guide, x, number=60):
    gaps = []
    for _ in range(number):
        index = torch.randperm(SIZE)[:BATCH]
        value = value_of(objective, guide, x, index=index)
        gaps.append(value - SIZE / BATCH * log_evidence(x[index]).sum())
    return torch.stack(gaps)


@every
@pytest.mark.parametrize("vectorize_particles", [True, False], ids=["batched", "loop"])
def test_minibatches_average_to_the_full_batch(make, vectorize_particles):
    # Disjoint minibatches with fixed noise: an identity, for the value and for the gradient.
    x, particles = data(SIZE), 4
    if vectorize_particles:
        guide = GivenNoiseGuide(x, particles)
    else:
        guide = _NoiseInTurn(x, particles)
    objective = make(particles, vectorize_particles=vectorize_particles)
    objective.max_plate_nesting = 2 if vectorize_particles else 1
    parameters = [guide.loc, guide.log_scale]

    def evaluate(index):
        loss = objective.differentiable_loss(model, guide, x, index=index)
        grads = torch.autograd.grad(loss, parameters)
        return torch.stack([loss.detach().expand(SIZE), *grads])

    full = evaluate(torch.arange(SIZE))
    parts = torch.stack([evaluate(i) for i in torch.arange(SIZE).reshape(BATCH, -1).T])
    torch.testing.assert_close(parts.mean(0), full, rtol=1e-10, atol=1e-10)


class _NoiseInTurn(GivenNoiseGuide):
    """One row of the given noise per run."""

    def __init__(self, x, num_particles):
        super().__init__(x, num_particles)
        self.rows, self.turn = self.eps, -1

    def forward(self, x, batch=None, index=None):
        self.turn = (self.turn + 1) % len(self.rows)
        self.eps = self.rows[self.turn]
        with pyro.plate("data", len(x), subsample=index) as rows:
            law = GivenNoise(self.loc[rows], self.log_scale[rows].exp())
            law.eps = self.eps[rows]
            pyro.sample("z", law)


@pytest.mark.slow
@every
def test_random_subsamples_are_unbiased(make):
    # 1500 minibatches of one draw each against 400 full batches: within 4 standard errors.
    x = data(SIZE)
    guide = Guide(x)
    part = draws_of(make(3), guide, x, 1500, batch=BATCH)
    full = draws_of(make(3), guide, x, 400)
    error = (part.var() / len(part) + full.var() / len(full)).sqrt()
    assert (part.mean() - full.mean()).abs() < 4 * error


ONE = {
    "iwae": IWAE(1),
    "dreg": DReG(1),
    "stl-iwae": STLIWAE(1),
    "vr-max": VRMax(1),
    "renyi 0.5": Renyi(0.5, 1),
    "renyi -inf": Renyi(-math.inf, 1),
    "renyi 0.9999": Renyi(0.9999, 1),
    "tvo": TVO(1, reparameterised=True),
    "tvo, upper": TVO(1, reparameterised=True, upper=True),
}


@pytest.mark.parametrize("batch", [None, BATCH], ids=["full", "subsampled"])
@pytest.mark.parametrize("objective", ONE.values(), ids=ONE)
def test_one_particle_is_the_elbo(objective, batch):
    x = data(SIZE)
    guide = Guide(x)
    values = []
    for one in (objective, ELBO(1)):
        one.max_plate_nesting = 1
        pyro.set_rng_seed(3)
        values.append(value_of(one, guide, x, batch=batch))
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_two_points_of_the_partition_are_the_elbo():
    x = data(SIZE)
    guide = Guide(x)
    values = []
    for objective in (TVO(6, partition=(0.0, 1.0)), ELBO(6)):
        objective.max_plate_nesting = 2
        pyro.set_rng_seed(3)
        values.append(value_of(objective, guide, x))
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def log_weight_sample(particles, number):
    """Log-weights ``(particles, number)`` of one item, by the formula written out."""
    x = data(SIZE)
    guide = Guide(x)
    loc, log_scale = guide.loc[:1].detach(), guide.log_scale[:1].detach()
    z = loc + log_scale.exp() * torch.randn(particles, number)
    return log_weight(x[:1], z, loc, log_scale)


def test_iwae_renyi_and_vrmax_are_ordered_on_the_same_draws():
    log_w = log_weight_sample(8, 500)
    orders = (-math.inf, -2.0, 0.0, 0.3, 0.9995, 1.0, 1.0005, 3.0, math.inf)
    values = torch.stack([Renyi(alpha, 8)._bound(log_w) for alpha in orders])
    assert (values.diff(dim=0) <= 1e-9).all()
    torch.testing.assert_close(values[0], log_w.max(0).values)
    torch.testing.assert_close(values[-1], log_w.min(0).values)
    torch.testing.assert_close(values[2], IWAE(8)._bound(log_w))
    torch.testing.assert_close(values[5], log_w.mean(0))


def test_bounds_grow_with_the_number_of_particles():
    # Means over 20000 groups of draws; each step up is larger than 4 standard errors.
    log_w = log_weight_sample(16, 20_000)
    for objective in (IWAE(1), Renyi(0.5, 1), TVO(2), Renyi(-1.0, 1)):
        number = torch.tensor([1, 2, 4, 8, 16])
        draws = torch.stack([objective._bound(log_w[:k]) for k in number])
        steps = draws.diff(dim=0)
        assert (steps.mean(1) > 4 * steps.std(1) / math.sqrt(steps.shape[1])).all()
    steps = torch.stack([CUBO(2)._bound(log_w[:k]) for k in (2, 8, 16)]).diff(dim=0)
    assert (steps.mean(1) > 0).all()


def test_renyi_limits():
    log_w = log_weight_sample(6, 50)
    for alpha, limit in [(1 + 1e-9, 1.0), (1 - 1e-9, 1.0), (1e-9, 0.0), (-1e-9, 0.0)]:
        near, at = Renyi(alpha, 6)._bound(log_w), Renyi(limit, 6)._bound(log_w)
        torch.testing.assert_close(near, at, rtol=0, atol=1e-6)
    for alpha, limit in [(1e5, math.inf), (-1e5, -math.inf)]:
        near, at = Renyi(alpha, 6)._bound(log_w), Renyi(limit, 6)._bound(log_w)
        torch.testing.assert_close(near, at, rtol=0, atol=1e-4)
    # No jump where the formula changes.
    below, above = (Renyi(1 - 1e-3 * f, 6)._bound(log_w) for f in (0.999999, 1.000001))
    torch.testing.assert_close(below, above, rtol=0, atol=1e-6)


QUADRATURE = {
    "iwae": (IWAE, lambda w: (w.exp().mean(-1)).log()),
    "renyi 0.5": (LOWER["renyi 0.5"], lambda w: 2 * (w / 2).exp().mean(-1).log()),
    "vr-max": (VRMax, lambda w: w.max(-1).values),
    "cubo": (CUBO, lambda w: 0.5 * (2 * w).exp().mean(-1).log()),
}


@pytest.mark.parametrize("name", QUADRATURE)
def test_mean_of_two_particles_against_quadrature(name):
    make, formula = QUADRATURE[name]
    # 20 draws of 150 copies of four items.
    x, copies = data(4), 150
    guide = Guide(x)
    nodes, weights = hermite(60, 2)
    z = guide.loc[:, None, None] + guide.log_scale.exp()[:, None, None] * nodes
    log_w = log_weight(
        x[:, None, None], z, guide.loc[:, None, None], guide.log_scale[:, None, None]
    )
    exact = (formula(log_w) * weights).sum(-1).sum()
    guide.loc.data, guide.log_scale.data = guide.loc.repeat(copies), guide.log_scale.repeat(copies)
    draws = draws_of(make(2), guide, x.repeat(copies), 20) / copies
    # The maximum has a kink, which the rule resolves to about 0.01.
    slack = 0.02 if name == "vr-max" else 0.0
    assert (draws.mean() - exact).abs() < 4 * draws.std() / math.sqrt(len(draws)) + slack


@pytest.mark.parametrize(
    ("make", "power"),
    [(IWAE, 1.0), (LOWER["renyi 0.5"], 0.5), (LOWER["renyi 2"], -1.0), (CUBO, 2.0)],
    ids=["iwae", "renyi 0.5", "renyi 2", "cubo"],
)
def test_many_particles_against_the_closed_form(make, power):
    x = data(4)
    guide = Guide(x, shift=0.2, log_factor=0.15)
    exact = (log_moment(x, guide.loc, guide.log_scale, power) / power).sum().detach()
    draws = draws_of(make(20_000), guide, x, 20)
    error = draws.std() / math.sqrt(len(draws))
    assert (draws.mean() - exact).abs() < 4 * error + 2e-3
    if power == 1:
        assert exact == pytest.approx(float(log_evidence(x).sum()), rel=1e-10)


@pytest.mark.parametrize("upper", [False, True], ids=["left", "right"])
def test_tvo_against_the_closed_form(upper):
    x = data(4)
    guide = Guide(x, shift=0.2, log_factor=0.15)
    points = (0.0, 0.05, 0.3, 1.0)
    ends = zip(points, points[1:], strict=False)
    exact = sum(
        (b - a) * tempered_mean(x, guide.loc, guide.log_scale, b if upper else a).sum()
        for a, b in ends
    )
    draws = draws_of(TVO(20_000, partition=points, upper=upper), guide, x, 20)
    error = draws.std() / math.sqrt(len(draws))
    assert (draws.mean() - exact).abs() < 4 * error + 2e-3
    evidence = log_evidence(x).sum()
    assert exact > evidence if upper else exact < evidence


def test_a_fine_partition_closes_the_gap():
    x = data(4)
    guide = Guide(x)
    ends = torch.linspace(0, 1, 201)
    means = [tempered_mean(x, guide.loc, guide.log_scale, b).sum() for b in ends[:-1]]
    left = float(sum(means).detach()) / 200
    value = value_of(TVO(20_000, partition=ends.tolist()), guide, x)
    assert value == pytest.approx(left, abs=0.05)
    assert left == pytest.approx(float(log_evidence(x).sum()), abs=0.02)


def global_model(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    loading = torch.tensor([[1.0, 0.5], [-0.3, 0.8], [0.2, 0.2]])
    with pyro.plate("rows", 3):
        mean = z[..., 0] * loading[:, 0] + z[..., 1] * loading[:, 1]
        pyro.sample("x", dist.Normal(mean, 0.7), obs=x)


def global_guide(x):
    pyro.sample("z", dist.Normal(torch.tensor([0.1, 0.2]), 0.8).to_event(1))


@pytest.mark.parametrize("make", [IWAE, DReG, VIMCO, TVO], ids=["iwae", "dreg", "vimco", "tvo"])
def test_linear_gaussian_model_with_a_global_latent(make):
    # The whole weight is one item; 20000 particles against the exact evidence.
    x = torch.tensor([0.4, -0.2, 0.9])
    loading = torch.tensor([[1.0, 0.5], [-0.3, 0.8], [0.2, 0.2]])
    law = dist.MultivariateNormal(torch.zeros(3), loading @ loading.T + 0.49 * torch.eye(3))
    objective = make(20_000)
    draws = torch.tensor([-objective.loss(global_model, global_guide, x) for _ in range(10)])
    exact = law.log_prob(x)
    error = draws.std() / math.sqrt(len(draws))
    assert draws.mean() < exact + 4 * error + 1e-3
    if make is not TVO:
        assert draws.mean() == pytest.approx(float(exact), abs=0.02)


@every
def test_meta_device(make):
    x = data(6).to("meta")
    guide = Guide(data(6)).to("meta")
    with pyro.validation_enabled(False):
        loss = make(4).differentiable_loss(model, guide, x)
        loss.backward()
    assert loss.device.type == "meta"
    assert guide.loc.grad.device.type == "meta"


@every
def test_loss_draws_and_gradient_agree(make):
    x = data(6)
    guide = Guide(x)
    objective = make(4, max_plate_nesting=1)
    seeded = []
    for evaluate in (objective.loss, objective.differentiable_loss):
        pyro.set_rng_seed(5)
        seeded.append(float(torch.as_tensor(evaluate(model, guide, x)).detach()))
    assert seeded[0] == pytest.approx(seeded[1], rel=1e-12)
    assert objective.log_weight_draws(model, guide, x).shape == (4,)


@pytest.mark.gpu
@every
def test_cuda(make):
    x = data(6).cuda()
    guide = Guide(data(6)).cuda()
    loss = make(4).differentiable_loss(model, guide, x)
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(guide.loc.grad.isfinite().all())
