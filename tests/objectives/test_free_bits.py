"""Free bits: floors per group and per dimension."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from ladder_models import (
    LadderGuide,
    ladder,
    mean_loss_and_gradient,
    subsampled,
)

from flowvi.guides import AutoFlow
from flowvi.objectives import BetaELBO, FreeBits


def test_free_bits_by_group_agree_with_a_hand_computation():
    x, guide = torch.randn(4) + 1, LadderGuide(4)
    floors = {"top": 5.0, "z": 0.01}
    objective = BetaELBO(4, beta={"top": 0.5, "z": 0.7}, free_bits=FreeBits(floors))
    loss = objective.differentiable_loss(ladder, guide, x)
    report = objective.report
    assert report["kl/top"] < 5.0
    assert report["kl/z"] > 4 * 0.01
    expected = -report["log_likelihood"] + 0.5 * 5.0 + 0.7 * report["kl/z"]
    torch.testing.assert_close(loss.detach(), expected)
    (grad,) = torch.autograd.grad(loss, guide.top, retain_graph=True)
    # What is left of the gradient of `top` comes through the prior of `z`.
    plain = BetaELBO(4, beta={"top": 0.0, "z": 0.7}, max_plate_nesting=2)
    values, grads = mean_loss_and_gradient(plain, ladder, guide, x, 200)
    _, floored = mean_loss_and_gradient(objective, ladder, guide, x, 200)
    difference = floored[:, :2].mean(0) - grads[:, :2].mean(0)
    error = (floored[:, :2].var(0) / 200 + grads[:, :2].var(0) / 200).sqrt()
    assert (difference.abs() < 4.5 * error).all()
    assert grad.shape == (2,)


def test_floor_is_per_item_of_the_whole_data_under_subsampling():
    x, guide = torch.randn(20) + 1, LadderGuide(20, 5)
    objective = BetaELBO(4, free_bits=FreeBits({"z": 100.0}))
    loss = objective.loss(subsampled(20, 5), guide, x)
    report = objective.report
    assert loss == pytest.approx(float(2000 + report["kl/top"] - report["log_likelihood"]))


def test_a_group_of_several_plates_counts_the_items_of_each():
    x = torch.randn(3)
    guide = AutoFlow(ladder).initialize(x)
    objective = BetaELBO(4, free_bits=FreeBits(50.0))
    loss = objective.loss(ladder, guide, x)
    assert loss == pytest.approx(float(50 * (1 + 3) - objective.report["log_likelihood"]))


def vectors(x):
    with pyro.plate("items", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


class VectorGuide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.tensor([0.0, 1.5, -2.0]))

    def forward(self, x):
        with pyro.plate("items", len(x)):
            pyro.sample("z", dist.Normal(self.loc.expand(len(x), 3), 0.9).to_event(1))


@pytest.mark.parametrize("vectorize", [True, False])
def test_free_bits_per_dimension_agree_with_a_hand_computation(vectorize):
    x, guide = torch.randn(5), VectorGuide()
    floor, beta, particles = 0.8, 0.5, 6
    free_bits = FreeBits(floor, per_dimension=True)
    objective = BetaELBO(particles, beta=beta, free_bits=free_bits, vectorize_particles=vectorize)
    objective.loss(vectors, guide, x)
    pyro.set_rng_seed(2)
    loss = objective.differentiable_loss(vectors, guide, x)
    (grad,) = torch.autograd.grad(loss, guide.loc)
    pyro.set_rng_seed(2)
    traces, _ = objective._runs(vectors, guide, (x,), {})
    z = torch.cat([g.nodes["z"]["value"].reshape(-1, 5, 3) for _, g in traces])
    log_q = dist.Normal(guide.loc, 0.9).log_prob(z)
    kl = (log_q - dist.Normal(0.0, 1.0).log_prob(z)).mean((0, 1))
    assert kl[0] < floor < kl[1] < kl[2]
    likelihood = dist.Normal(z.sum(-1), 1.0).log_prob(x).sum() / particles
    expected = beta * 5 * kl.clamp(min=floor).sum() - likelihood
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, guide.loc)[0])
    elbo = likelihood - 5 * kl.sum()
    torch.testing.assert_close(objective.report["elbo"], elbo.detach())


def test_floor_does_not_count_masked_items():
    mask = torch.tensor([True, False, True, False, False])

    def model(x):
        with pyro.plate("items", 5), pyro.poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("items", 5), pyro.poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(0.1, 1.0))

    objective = BetaELBO(4, free_bits=FreeBits(50.0))
    loss = objective.loss(model, guide, torch.zeros(5))
    assert loss == pytest.approx(float(100 - objective.report["log_likelihood"]))
