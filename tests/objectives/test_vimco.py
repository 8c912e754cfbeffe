"""VIMCO against exact enumeration."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from flowvi.flows import realnvp
from flowvi.guides import AutoMixtureFlow
from flowvi.objectives import IWAE, VIMCO
from flowvi.objectives.vimco import leave_one_out

PRIOR = torch.tensor([0.2, 0.3, 0.5])
CENTRES = torch.tensor([0.0, 1.5, -0.7])


def categorical_model(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(PRIOR))
        pyro.sample("x", dist.Normal(CENTRES[k], 0.8), obs=x)


def categorical_guide(logits):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=logits))

    return guide


def exact_bound(x, logits, particles):
    """Mean of the log of the mean weight over all outcomes of all particles."""
    log_q = logits.log_softmax(-1)
    log_p = PRIOR.log() + dist.Normal(CENTRES, 0.8).log_prob(x[:, None])
    total = 0.0
    for outcome in itertools.product(range(3), repeat=particles):
        outcome = list(outcome)
        log_w = (log_p - log_q)[:, outcome]
        value = log_w.logsumexp(-1) - math.log(particles)
        total = total + log_q[:, outcome].sum(-1).exp() * value
    return total.sum()


@pytest.mark.parametrize("vectorize_particles", [True, False], ids=["batched", "loop"])
@pytest.mark.parametrize("particles", [2, 4])
def test_value_and_gradient_are_unbiased(particles, vectorize_particles):
    # 4000 copies of two items in one call: 4 standard errors.
    copies = 4000 if vectorize_particles else 2000
    x = torch.tensor([0.4, -1.0])
    start = torch.tensor([[0.1, -0.4, 0.3], [-0.5, 0.2, 0.0]])
    exact_logits = start.clone().requires_grad_()
    exact = exact_bound(x, exact_logits, particles)
    (truth,) = torch.autograd.grad(exact, exact_logits)
    logits = start.repeat(copies, 1).requires_grad_()
    objective = VIMCO(particles, max_plate_nesting=1, vectorize_particles=vectorize_particles)
    loss = objective.differentiable_loss(
        categorical_model, categorical_guide(logits), x.repeat(copies)
    )
    (grad,) = torch.autograd.grad(-loss, logits)
    draws = grad.reshape(copies, 2, 3)
    error = draws.std(0) / math.sqrt(copies)
    assert ((draws.mean(0) - truth).abs() < 4 * error).all()
    assert -float(loss.detach()) / copies == pytest.approx(float(exact.detach()), abs=0.05)


def test_value_is_that_of_iwae():
    x, logits = torch.tensor([0.4, -1.0]), torch.zeros(2, 3)
    values = []
    for make in (VIMCO, IWAE):
        pyro.set_rng_seed(0)
        values.append(
            make(5, max_plate_nesting=1).loss(categorical_model, categorical_guide(logits), x)
        )
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_mixed_sites_are_unbiased():
    # A discrete and a normal site: 20000 copies, against quadrature over the normal one.
    copies, particles = 20_000, 2
    x = torch.tensor(0.4)
    logit0, loc0 = torch.tensor(0.3), torch.tensor(0.2)

    def program(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.4))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + 1.5 * k, 0.8), obs=x)

    logit, loc = (t.repeat(copies).requires_grad_() for t in (logit0, loc0))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(logits=logit))
            pyro.sample("z", dist.Normal(loc, 0.7))

    objective = VIMCO(particles, max_plate_nesting=1)
    loss = objective.differentiable_loss(program, guide, x.repeat(copies))
    grads = torch.autograd.grad(-loss, [logit, loc])
    truth = _mixed_truth(x, logit0, loc0)
    for grad, exact in zip(grads, truth, strict=True):
        assert (grad.mean() - exact).abs() < 4 * grad.std() / math.sqrt(copies)


def _mixed_truth(x, logit, loc):
    from objective_models import hermite

    logit, loc = logit.clone().requires_grad_(), loc.clone().requires_grad_()
    nodes, weights = hermite(40, 2)
    z = loc + 0.7 * nodes
    total = 0.0
    for k in itertools.product((0.0, 1.0), repeat=2):
        k = torch.tensor(k)
        log_q_k = dist.Bernoulli(logits=logit).log_prob(k)
        log_w = (
            dist.Bernoulli(0.4).log_prob(k)
            + dist.Normal(0.0, 1.0).log_prob(z)
            + dist.Normal(z + 1.5 * k, 0.8).log_prob(x)
            - log_q_k
            - dist.Normal(loc, 0.7).log_prob(z)
        )
        value = log_w.logsumexp(-1) - math.log(2)
        total = total + log_q_k.sum().exp() * (value * weights).sum()
    return torch.autograd.grad(total, [logit, loc])


def test_leave_one_out_is_what_it_says():
    log_w = torch.randn(5, 3)
    result = leave_one_out(log_w)
    for j in range(5):
        others = log_w[[i for i in range(5) if i != j]]
        replaced = torch.cat([others, others.mean(0, keepdim=True)])
        torch.testing.assert_close(result[j], replaced.logsumexp(0) - math.log(5))


def test_an_impossible_draw_leaves_the_others_finite():
    log_w = torch.tensor([-torch.inf, 0.3, -0.2])
    result = leave_one_out(log_w)
    assert result.isfinite().all()
    assert result[1] == pytest.approx(-0.2 - math.log(3), abs=1e-12)


def test_masked_and_subsampled_items_have_unbiased_gradients():
    # Minibatches of fixed size, items masked out: 400 steps, 4.5 standard errors.
    x = torch.tensor([0.4, -1.0, 1.2, 0.1])
    keep = torch.tensor([True, True, False, True])
    logits = torch.tensor([[0.1, -0.4, 0.3]]).repeat(4, 1).requires_grad_()

    def program():
        with pyro.plate("data", 4, 2) as index, pyro.poutine.mask(mask=keep[index]):
            k = pyro.sample("k", dist.Categorical(PRIOR))
            pyro.sample("x", dist.Normal(CENTRES[k], 0.8), obs=x[index])

    def guide():
        with pyro.plate("data", 4, 2) as index, pyro.poutine.mask(mask=keep[index]):
            pyro.sample("k", dist.Categorical(logits=logits[index]))

    objective = VIMCO(2, max_plate_nesting=1)
    grads = []
    for _ in range(400):
        loss = objective.differentiable_loss(program, guide)
        grads.append(torch.autograd.grad(-loss, logits)[0])
    grads = torch.stack(grads)
    (truth,) = torch.autograd.grad(exact_bound(x[keep], logits[keep], 2), logits)
    error = grads.std(0) / math.sqrt(len(grads))
    assert ((grads.mean(0) - truth).abs() < 4.5 * error + 1e-12).all()


def test_bad_input():
    with pytest.raises(ValueError, match="`num_particles` must be at least 2 for VIMCO; got 1"):
        VIMCO(1)

    def program():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    mixture = AutoMixtureFlow(program, recipe=realnvp)
    mixture.initialize()
    with pytest.raises(NotImplementedError, match="VIMCO needs independent particles"):
        VIMCO(4).differentiable_loss(program, mixture)
