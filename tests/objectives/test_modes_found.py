"""Two separated modes: where the plain ELBO finds one, other objectives find both."""

from __future__ import annotations

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

from flowvi.flows import nsf, realnvp
from flowvi.guides import AutoFlow, AutoMixtureFlow
from flowvi.infer import fit
from flowvi.objectives import ELBO, ForwardKL, GeometricSchedule, Tempered

WEIGHT = 0.3
SMALL = partial(nsf, num_layers=2, hidden_dims=(16, 16))


def two_normals(separation):
    """Posterior with 0.3 on the left and 0.7 on the right, both of unit scale, in 2-D."""
    left = torch.tensor([-separation / 2, 0.0])
    prior = dist.Normal(torch.zeros(2), 10.0).to_event(1)

    def model():
        x = pyro.sample("x", prior)
        sides = [dist.Normal(loc, 1.0).log_prob(x).sum(-1) for loc in (left, -left)]
        log_p = torch.logaddexp(sides[0] + math.log(WEIGHT), sides[1] + math.log1p(-WEIGHT))
        pyro.factor("likelihood", log_p - prior.log_prob(x))

    return model


def share_on_the_left(separation, objective, num_steps, seed, recipe, scale, *, mixture=False):
    """Train from a start at the origin and count draws on the left."""
    model = two_normals(separation)
    pyro.set_rng_seed(seed)
    make = AutoMixtureFlow if mixture else AutoFlow
    guide = make(model, recipe=recipe, init_scale=scale)
    options = {"num_steps": num_steps, "start": False, "tolerance": None, "progress_bar": False}
    result = fit(model, guide, objective=objective, seed=seed, **options)
    return (result.sample(20_000)["x"][:, 0] < 0).double().mean().item()


def is_one_mode(share):
    return min(share, 1 - share) < 0.02


def test_forward_kl_finds_both_modes_where_the_elbo_finds_one():
    start = (SMALL, 5.0)
    assert is_one_mode(share_on_the_left(12.0, ELBO(64), 250, 0, *start))
    share = share_on_the_left(12.0, ForwardKL(200), 250, 0, *start)
    assert share == pytest.approx(WEIGHT, abs=0.05)


def test_tempered_fit_finds_both_modes_where_the_elbo_finds_one():
    start = (SMALL, 1.0)
    assert is_one_mode(share_on_the_left(8.0, ELBO(64), 200, 0, *start))
    objective = Tempered(64, beta=GeometricSchedule(350))
    share = share_on_the_left(8.0, objective, 500, 0, *start)
    assert share == pytest.approx(WEIGHT, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("separation", "scale"), [(4.0, 2.0), (8.0, 4.0), (12.0, 5.0)])
def test_forward_kl_finds_both_modes(separation, scale, seed):
    share = share_on_the_left(separation, ForwardKL(200), 400, seed, nsf, scale)
    assert share == pytest.approx(WEIGHT, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tempered_mixture_of_flows_finds_both_modes_from_the_default_start(seed):
    # Weights of components can still move when the modes have parted, bridges cannot.
    start = (realnvp, 0.1)
    plain = share_on_the_left(8.0, ELBO(32), 500, seed, *start, mixture=True)
    assert is_one_mode(plain)
    objective = Tempered(32, beta=GeometricSchedule(300), path_gradient=True)
    share = share_on_the_left(8.0, objective, 500, seed, *start, mixture=True)
    assert share == pytest.approx(WEIGHT, abs=0.05)
