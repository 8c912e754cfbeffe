from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from flowvi.objectives import ELBO, STL, log_weights

OBJECTIVES = {
    "elbo": lambda n: ELBO(n),
    "elbo, loop": lambda n: ELBO(n, vectorize_particles=False),
    "stl": lambda n: STL(n),
    "stl, antithetic": lambda n: STL(n, antithetic=True),
    "stl, clipped": lambda n: STL(n, clip_factor=50.0),
    "stl, loop": lambda n: STL(n, vectorize_particles=False),
}
objectives = pytest.mark.parametrize("make", OBJECTIVES.values(), ids=OBJECTIVES)


def conjugate_model(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 0.7), obs=x)


class ConjugateGuide(torch.nn.Module):
    def __init__(self, loc=0.3, log_scale=-0.4):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.tensor(loc))
        self.log_scale = torch.nn.Parameter(torch.tensor(log_scale))

    def forward(self, x):
        pyro.sample("z", dist.Normal(self.loc, self.log_scale.exp()))


def conjugate_elbo(x, loc, log_scale):
    """Closed form, written out from E_q of quadratics."""
    var = (2 * log_scale).exp()
    prior = -0.5 * (loc**2 + var) - 0.5 * math.log(2 * math.pi)
    lik = -0.5 * ((x - loc) ** 2 + var) / 0.49 - math.log(0.7) - 0.5 * math.log(2 * math.pi)
    return prior + lik.sum() + log_scale + 0.5 * math.log(2 * math.pi * math.e)


@objectives
def test_value_and_gradient_agree_with_the_closed_form(make):
    x = torch.randn(6) + 1.0
    guide = ConjugateGuide()
    exact = conjugate_elbo(x, guide.loc, guide.log_scale)
    expected = torch.autograd.grad(exact, [guide.loc, guide.log_scale])
    losses, grads = [], []
    steps = 600
    module = make(4)(conjugate_model, guide)
    for _ in range(steps):
        loss = module(x)
        losses.append(loss.detach())
        grads.append(torch.stack(torch.autograd.grad(-loss, [guide.loc, guide.log_scale])))
    for draws, truth in [
        (-torch.stack(losses), exact),
        (torch.stack(grads), torch.stack(expected)),
    ]:
        error = draws.std(0) / math.sqrt(steps)
        assert ((draws.mean(0) - truth).abs() < 5 * error + 1e-12).all()


def test_loss_and_grads_through_stock_svi_matches_trace_elbo():
    x = torch.randn(6)
    results = []
    for loss in [Trace_ELBO(num_particles=3, vectorize_particles=True), ELBO(3)]:
        pyro.clear_param_store()
        guide = AutoNormal(conjugate_model)
        guide(x)
        pyro.set_rng_seed(1)
        # The guess of the plate nesting draws too; do it before the seed that counts.
        loss.loss(conjugate_model, guide, x)
        svi = SVI(conjugate_model, guide, pyro.optim.Adam({"lr": 0.02}), loss)
        pyro.set_rng_seed(2)
        results.append([svi.step(x) for _ in range(5)])
        assert all(isinstance(v, float) for v in results[-1])
    assert results[0] == pytest.approx(results[1], rel=1e-12)


def test_loss_is_the_value_of_differentiable_loss():
    x = torch.randn(6)
    for make in (ELBO, STL):
        objective, guide = make(4), ConjugateGuide()
        objective.loss(conjugate_model, guide, x)
        pyro.set_rng_seed(5)
        value = objective.loss(conjugate_model, guide, x)
        pyro.set_rng_seed(5)
        loss = objective.differentiable_loss(conjugate_model, guide, x)
        pyro.set_rng_seed(5)
        draws = objective.log_weight_draws(conjugate_model, guide, x)
        assert value == pytest.approx(loss.item(), rel=1e-13)
        assert draws.shape == (4,)
        assert -draws.mean().item() == pytest.approx(value, rel=1e-13)


@pytest.mark.parametrize("particles", [1, 6])
def test_discrete_site_has_an_unbiased_gradient(particles):
    values = torch.tensor([0.0, 1.5, -0.7])

    def model():
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        pyro.sample("x", dist.Normal(values[k], 1.0), obs=torch.tensor(0.4))

    logits = torch.tensor([0.1, -0.4, 0.3], requires_grad=True)

    def guide():
        pyro.sample("k", dist.Categorical(logits=logits))

    w = logits.softmax(-1)
    joint = torch.tensor([0.2, 0.3, 0.5]).log() + dist.Normal(values, 1.0).log_prob(
        torch.tensor(0.4)
    )
    (exact,) = torch.autograd.grad((w * (joint - w.log())).sum(), logits)
    objective = ELBO(particles, max_plate_nesting=0)
    grads = torch.stack(
        [
            torch.autograd.grad(-objective.differentiable_loss(model, guide), logits)[0]
            for _ in range(3000)
        ]
    )
    error = grads.std(0) / math.sqrt(len(grads))
    assert ((grads.mean(0) - exact).abs() < 4 * error).all()


def test_mean_of_the_other_particles_lowers_the_variance():
    logits = torch.zeros(2, requires_grad=True)

    def model():
        pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])))
        pyro.factor("constant", torch.tensor(-100.0))

    def guide():
        pyro.sample("k", dist.Categorical(logits=logits))

    objective = ELBO(8)
    grads = torch.stack(
        [
            torch.autograd.grad(objective.differentiable_loss(model, guide), logits)[0]
            for _ in range(50)
        ]
    )
    assert grads.abs().max() < 1e-10


def subsampled(size, batch):
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("items", size, subsample_size=batch) as index:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[index])

    return model


class SubsampledGuide(torch.nn.Module):
    def __init__(self, size, batch):
        super().__init__()
        self.size, self.batch = size, batch
        self.mu = torch.nn.Parameter(torch.tensor([0.2, -0.5]))
        self.local = torch.nn.Parameter(torch.randn(size, 2) * 0.3)

    def forward(self, x):
        pyro.sample("mu", dist.Normal(self.mu[0], self.mu[1].exp()))
        with pyro.plate("items", self.size, subsample_size=self.batch) as index:
            local = self.local[index]
            pyro.sample("z", dist.Normal(local[:, 0], local[:, 1].exp()))


def subsampled_elbo(x, guide):
    def cross(mean, var, loc, scale2):
        return -0.5 * ((mean - loc) ** 2 + var) / scale2 - 0.5 * math.log(2 * math.pi * scale2)

    def entropy(log_scale):
        return log_scale + 0.5 * math.log(2 * math.pi * math.e)

    m, s = guide.mu[0], (2 * guide.mu[1]).exp()
    a, v = guide.local[:, 0], (2 * guide.local[:, 1]).exp()
    total = cross(m, s, 0.0, 4.0) + entropy(guide.mu[1])
    local = cross(a, v + s, m, 1.0) + cross(a, v, x, 0.25) + entropy(guide.local[:, 1])
    return total + local.sum()


@pytest.mark.parametrize("make", [ELBO, STL], ids=["elbo", "stl"])
def test_subsampling_is_unbiased(make):
    x = torch.randn(20) + 1
    guide = SubsampledGuide(20, 5)
    params = [guide.mu, guide.local]
    exact = subsampled_elbo(x, guide)
    truth = torch.cat([g.flatten() for g in torch.autograd.grad(exact, params)])
    objective = make(16)
    values, grads = [], []
    for _ in range(1500):
        loss = objective.differentiable_loss(subsampled(20, 5), guide, x)
        values.append(-loss.detach())
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(-loss, params)]))
    values, grads = torch.stack(values), torch.stack(grads)
    assert abs(values.mean() - exact) < 4 * values.std() / math.sqrt(len(values))
    z = (grads.mean(0) - truth) / (grads.std(0) / math.sqrt(len(grads)))
    assert z.abs().max() < 4.5


def test_log_weights_keep_the_plate_scale_apart():
    x = torch.randn(20)
    guide = SubsampledGuide(20, 5)
    objective = ELBO(3)
    ((model_trace, guide_trace),), _ = objective._runs(subsampled(20, 5), guide, (x,), {})
    shared, local = log_weights(model_trace, guide_trace)
    assert shared.scale == 1.0
    assert local.scale == 4.0
    assert local.value.shape == (3, 5)
    z, mu = guide_trace.nodes["z"], guide_trace.nodes["mu"]["value"]
    expected = (
        dist.Normal(mu, 1.0).log_prob(z["value"])
        + dist.Normal(z["value"], 0.5).log_prob(model_trace.nodes["x"]["value"])
        - z["fn"].log_prob(z["value"])
    )
    torch.testing.assert_close(local.value, expected)
    torch.testing.assert_close(local.scaled, 4 * expected)


def test_masked_and_scaled_sites_agree_with_trace_elbo():
    mask = torch.tensor([True, False, True, True])

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.poutine.scale(scale=3.0), pyro.plate("p", 4):
            y = pyro.sample("y", dist.Gamma(2.0, 1.0).mask(mask))
            pyro.sample("x", dist.Normal(z * y, 1.0).mask(mask), obs=torch.ones(4))

    def guide():
        loc = pyro.param("loc", torch.tensor(0.1))
        pyro.sample("z", dist.Normal(loc, 0.5))
        with pyro.poutine.scale(scale=3.0), pyro.plate("p", 4):
            rate = pyro.param("rate", torch.ones(4), constraint=constraints.positive)
            pyro.sample("y", dist.Gamma(2.0, rate).mask(mask))

    values = []
    for objective in [Trace_ELBO(num_particles=2, vectorize_particles=True), ELBO(2)]:
        objective.loss(model, guide)
        pyro.set_rng_seed(3)
        loss = objective.differentiable_loss(model, guide)
        leaves = [p for _, p in pyro.get_param_store().named_parameters()]
        values.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for ours, stock in zip(*values, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [ELBO, STL, lambda n: STL(n, antithetic=True, clip_factor=10)])
def test_meta_device(make):
    x = torch.randn(6, device="meta")
    guide = ConjugateGuide().to("meta")

    def model(x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 0.7), obs=x)

    with pyro.validation_enabled(False):
        loss = make(4).differentiable_loss(model, guide, x)
        loss.backward()
    assert loss.device.type == "meta"
    assert guide.loc.grad.device.type == "meta"


def test_a_site_that_would_be_counted_twice_is_refused():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(z[..., :1], 1.0), obs=torch.zeros(3))

    def guide():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(ValueError, match="Site `y` must have at most 2 batch dimensions"):
        ELBO(4, max_plate_nesting=1).loss(model, guide)


def test_bad_arguments():
    with pytest.raises(
        ValueError, match="`num_particles` must be an integer of at least 1; got 0"
    ):
        ELBO(0)
    with pytest.raises(ValueError, match="`max_plate_nesting` must be at least 0; got -1"):
        ELBO(2, max_plate_nesting=-1)
    with pytest.raises(ValueError, match="`clip_factor` must be positive; got 0"):
        STL(2, clip_factor=0)
    with pytest.raises(
        ValueError, match="`num_particles` must be even for antithetic draws; got 3"
    ):
        STL(3, antithetic=True)
    with pytest.raises(ValueError, match="`model` must have at least one sample site; got none"):
        ELBO(2).loss(lambda: None, lambda: None)
