"""Model and guide must have the same latent sites; bad numbers of particles."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from flowvi.objectives import CUBO, ELBO, IWAE, STL, STLIWAE, TVO, VIMCO, DReG, Renyi, VRMax

EVERY = {
    "cubo": CUBO,
    "dreg": DReG,
    "elbo": ELBO,
    "iwae": IWAE,
    "renyi": lambda k: Renyi(0.5, k),
    "stl": STL,
    "stl-iwae": STLIWAE,
    "tvo": TVO,
    "vimco": VIMCO,
    "vr-max": VRMax,
}
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)


def program(*names, observed=(), auxiliary=(), subsample=None):
    def run():
        for name in names:
            pyro.sample(name, dist.Normal(0.0, 1.0))
        for name in auxiliary:
            pyro.sample(name, dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        for name in observed:
            pyro.sample(name, dist.Normal(0.0, 1.0), obs=torch.tensor(0.5))

    return run


@every
def test_sites_that_differ_are_named(make):
    objective = make(3)
    with pytest.raises(ValueError, match=r"every latent site of the model; got none of \['b'\]"):
        objective.loss(program("a", "b"), program("a"))
    with pytest.raises(ValueError, match=r"no latent site that the model lacks; got \['c'\].*aux"):
        objective.loss(program("a"), program("a", "c"))
    with pytest.raises(ValueError, match=r"must not draw sites that the model observes.*\['x'\]"):
        objective.loss(program("a", observed="x"), program("a", "x"))
    with pytest.raises(ValueError, match=r"auxiliary sites names .* does not use; got \['a'\]"):
        objective.loss(program("a"), program(auxiliary=["a"]))


@every
def test_auxiliary_and_subsample_sites_are_no_mismatch(make):
    x = torch.arange(6.0)

    def model():
        with pyro.plate("data", 6, 3) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide():
        with pyro.plate("data", 6, 3):
            u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u))

    assert math.isfinite(make(3).loss(model, guide))


@every
@pytest.mark.parametrize("number", [0, -1, 2.0, None])
def test_bad_number_of_particles(make, number):
    with pytest.raises(ValueError, match="`num_particles` must be an integer of at least 1; got"):
        make(number)
