"""Couplings: optimal assignment, its density, entropic plans, learned laws, distances."""

from __future__ import annotations

import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from flowvi.distributions import StandardNormal
from flowvi.flows import cnf, nsf
from flowvi.models import (
    DiagonalPosterior,
    IndependentCoupling,
    LearnedCoupling,
    OptimalTransportCoupling,
    PairedCoupling,
    SinkhornCoupling,
    TransportCost,
    full_posterior,
    normalised_path_energy,
    wasserstein_distance,
)
from flowvi.models.transport import assign

COUPLINGS = {
    "cnf": lambda: LearnedCoupling(cnf(2, 2, hidden_dims=(4,))),
    "diagonal": lambda: LearnedCoupling(DiagonalPosterior(3, 2), nn.Linear(2, 3)),
    "full": lambda: LearnedCoupling(full_posterior(2, 2)),
    "independent": IndependentCoupling,
    "optimal transport": OptimalTransportCoupling,
    "sinkhorn": lambda: SinkhornCoupling(0.5),
    "spline": lambda: LearnedCoupling(nsf(2, 2, num_layers=2, hidden_dims=(4,))),
}


def prior() -> dist.Distribution:
    return StandardNormal(2)()


@pytest.mark.parametrize("name", COUPLINGS)
def test_shapes_expansion_and_gradient(name: str):
    x = torch.randn(7, 2, requires_grad=True)
    law = COUPLINGS[name]()(x, prior(), None)
    assert law.batch_shape == (7,)
    assert law.event_shape == (2,)
    value = law.expand((3, 7)).rsample((5,))
    assert value.shape == (5, 3, 7, 2)
    assert law.expand((3, 7)).log_prob(value).shape == (5, 3, 7)
    assert value.requires_grad == isinstance(COUPLINGS[name](), LearnedCoupling)


@pytest.mark.parametrize("name", ["cnf", "full", "spline"])
def test_learned_laws_begin_at_the_independent_coupling(name: str):
    x, z = torch.randn(7, 2), torch.randn(7, 2)
    law = COUPLINGS[name]()(x, prior(), None)
    torch.testing.assert_close(law.log_prob(z), prior().log_prob(z), rtol=0, atol=0.02)


def cost_of(x: Tensor, z: Tensor) -> float:
    return float((x - z).square().sum())


def test_assignment_is_the_best_of_all_orders():
    x, z = torch.randn(6, 3), torch.randn(6, 3)
    cost = (x.unsqueeze(1) - z.unsqueeze(0)).square().sum(-1)
    found = assign(cost)
    orders = itertools.permutations(range(6))
    least = min(sum(float(cost[i, j]) for i, j in enumerate(order)) for order in orders)
    assert float(cost[torch.arange(6), found].sum()) == pytest.approx(least)
    assert sorted(found.tolist()) == list(range(6))
    assert torch.equal(assign(torch.stack([cost, cost.T]))[0], found)


def test_optimal_transport_deals_out_one_draw_of_the_prior():
    x = torch.randn(8, 2)
    law = OptimalTransportCoupling()(x, prior(), None)
    z = law.sample()
    for i, j in itertools.combinations(range(8), 2):
        swapped = z.clone()
        swapped[[i, j]] = z[[j, i]]
        assert cost_of(x, z) <= cost_of(x, swapped)
    # Over batches the starts follow the prior: 4.5 standard errors of 16,000 draws.
    many = law.expand((2000, 8)).sample().reshape(-1, 2)
    assert (many.mean(0).abs() < 4.5 / 16_000**0.5).all()
    assert ((many.T.cov() - torch.eye(2)).abs() < 4.5 * 2**0.5 / 16_000**0.5).all()


def test_joint_density_of_optimal_transport_integrates_to_one():
    # Two items: the density is 2 p(z_1) p(z_2) on the half space of the best order.
    x = torch.tensor([[-1.0], [2.0]])
    law = OptimalTransportCoupling()(x, StandardNormal(1)(), None)
    axis = torch.linspace(-6, 6, 241)
    z = torch.cartesian_prod(axis, axis).unsqueeze(-1)
    density = law.expand((len(z), 2)).log_prob(z).sum(-1).exp()
    best = cost_of_rows(x, z) <= cost_of_rows(x, z.flip(-2))
    tie = cost_of_rows(x, z) == cost_of_rows(x, z.flip(-2))
    weight = best.to(z) - 0.5 * tie
    total = float((density * weight).sum() * (axis[1] - axis[0]) ** 2)
    assert total == pytest.approx(1.0, abs=1e-4)


def cost_of_rows(x: Tensor, z: Tensor) -> Tensor:
    return (x - z).square().sum((-1, -2))


def test_divergence_of_optimal_transport_is_log_of_the_orders():
    law = OptimalTransportCoupling()(torch.randn(5, 2), prior(), None)
    z = law.sample()
    gain = law.log_prob(z) - prior().log_prob(z)
    assert float(gain.sum()) == pytest.approx(math.log(math.factorial(5)))


def test_sinkhorn_has_the_plan_of_the_schroedinger_bridge():
    # Normal starts and ends: the entropic plan has a known covariance.
    torch.manual_seed(1)
    sigma, n = 1.0, 150
    x = 2 * torch.randn(n, 1)
    z = SinkhornCoupling(2 * sigma**2)(x, StandardNormal(1)(), None).expand((8, n)).sample()
    cross = float((z * x).mean())
    want = ((4 * 4 + sigma**4) ** 0.5 - sigma**2) / 2
    # Eight draws on one batch of 150 points, whose own moments are the largest error.
    assert cross == pytest.approx(want, rel=0.1)
    # A large epsilon gives the independent coupling.
    z = SinkhornCoupling(1e6)(x, StandardNormal(1)(), None).expand((8, n)).sample()
    assert abs(float((z * x).mean())) < 4.5 * 2 / (8 * n) ** 0.5


def test_pairs_bring_their_starts():
    coupling, x = PairedCoupling(), torch.randn(5, 4)
    law = coupling(x, prior(), None)
    assert torch.equal(law.sample(), x[:, :2])
    assert torch.equal(coupling.ends(x), x[:, 2:])
    torch.testing.assert_close(law.log_prob(x[:, :2]), prior().log_prob(x[:, :2]))


def test_wasserstein_distance_against_closed_forms():
    # In one dimension the best order is that of the sorted values.
    x, y = torch.randn(50, 1), 3 + 2 * torch.randn(50, 1)
    want = (x.sort(0).values - y.sort(0).values).square().mean().sqrt()
    torch.testing.assert_close(wasserstein_distance(x, y), want)
    shift = torch.tensor([3.0, 4.0])
    z = torch.randn(40, 2)
    torch.testing.assert_close(wasserstein_distance(z, z + shift), torch.tensor(5.0))


def test_path_energy_and_straightness():
    cost = TransportCost(torch.tensor([5.0, 7.0]), torch.tensor([4.0, 4.0]), 10)
    assert cost.straightness.tolist() == [1.0, 3.0]
    assert float(normalised_path_energy(cost.energy, torch.tensor(4.0))) == pytest.approx(0.5)


def test_errors():
    with pytest.raises(ValueError, match="`epsilon` must be positive and finite; got 0"):
        SinkhornCoupling(0)
    with pytest.raises(ValueError, match=r"`x` and `y` must have the same shape \(n, dim\)"):
        wasserstein_distance(torch.zeros(3, 2), torch.zeros(4, 2))
