"""Gradients of the path laws against a closed form, differentiated."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from flowvi.distributions import PathPosterior, PathPrior, SDEPath
from flowvi.objectives import ELBO, STL
from flowvi.paths import BrownianBridge, DensityTimes, GaussianPath, UniformTimes

REPEATS, ITEMS = 100, 64
START = {
    "a0": 0.3, "a1": -0.8, "a2": 0.5, "b0": -0.5, "b1": 0.4, "d0": -0.3, "d1": 0.6,
    "w": -0.7, "u": 0.9, "m0": 0.2, "s0": 0.1,
}  # fmt: skip


def parameters() -> dict[str, torch.nn.Parameter]:
    return {k: torch.nn.Parameter(torch.tensor(v)) for k, v in START.items()}


def laws(p, y, times, num_times):
    path = GaussianPath(
        1,
        lambda y, t: p["a0"] + p["a1"] * t + p["a2"] * y * t**2,
        lambda y, t: (p["b0"] + p["b1"] * t).exp(),
        lambda t: (p["d0"] + p["d1"] * t).exp(),
    )
    start = dist.Normal(p["m0"].reshape(1), p["s0"].exp()).to_event(1)
    shared = {"times": times, "num_times": num_times}
    q = PathPosterior(path, y, **shared)
    return q, PathPrior(path, lambda x, t: p["w"] * x + p["u"] * t, start, **shared)


def divergence(p, y):
    """Same model by hand: two Gaussians at the start, Gauss-Legendre over time."""
    m, s = p["a0"], p["b0"].exp()
    m0, s0 = p["m0"], p["s0"].exp()
    start = (s0 / s).log() + (s**2 + (m - m0) ** 2) / (2 * s0**2) - 0.5
    nodes, weights = (torch.tensor(a) for a in np.polynomial.legendre.leggauss(30))
    t, weights = (nodes + 1) / 2, weights / 2
    mean = p["a0"] + p["a1"] * t + p["a2"] * y * t**2
    rate = p["a1"] + 2 * p["a2"] * y * t
    scale = (p["b0"] + p["b1"] * t).exp()
    b2 = (2 * (p["d0"] + p["d1"] * t)).exp()
    # f - g is linear in the noise.
    constant = p["w"] * mean + p["u"] * t - rate
    slope = p["w"] * scale - p["b1"] * scale + b2 / (2 * scale)
    return (start + (weights * (constant**2 + slope**2) / (2 * b2)).sum(-1)).mean()


CASES = {
    "Trace_ELBO": (lambda: Trace_ELBO(), UniformTimes, 1),
    "Trace_ELBO, vectorised, times": (
        lambda: Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=1), UniformTimes, 3,
    ),
    "TraceMeanField_ELBO": (lambda: TraceMeanField_ELBO(), UniformTimes, 1),
    "ELBO, importance": (lambda: ELBO(2), lambda: DensityTimes(lambda t: 0.3 + t), 1),
    "STL": (lambda: STL(2), UniformTimes, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_unbiased(name):
    make, times, num_times = CASES[name]
    p, y = parameters(), torch.linspace(-1, 1, ITEMS).unsqueeze(-1)
    times = times()

    def model():
        with pyro.plate("items", ITEMS):
            pyro.sample("z", laws(p, y, times, num_times)[1])

    def guide():
        with pyro.plate("items", ITEMS):
            pyro.sample("z", laws(p, y, times, num_times)[0])

    loss, grads = make(), []
    for _ in range(REPEATS):
        value = loss.differentiable_loss(model, guide) / ITEMS
        grads.append(torch.stack(torch.autograd.grad(value, list(p.values()))))
    grads = torch.stack(grads)
    want = torch.stack(torch.autograd.grad(divergence(p, y), list(p.values())))
    error = grads.std(0) / REPEATS**0.5
    z = (grads.mean(0) - want) / error
    # 11 parameters at 4 standard errors of 100 repetitions.
    assert z.abs().max() < 4, dict(zip(p, z.tolist(), strict=True))
    assert (want.abs() > 5 * error).sum() >= 8


def test_path_gradient_of_the_start_is_zero_at_the_optimum():
    """STL: at q = p every single draw has gradient zero."""
    mean = torch.nn.Parameter(torch.tensor(0.4))
    # Brownian motion from N(m, 1): marginals N(m, 1 + t).
    path = GaussianPath(1, lambda y, t: mean + 0 * t, lambda y, t: (1 + t).sqrt(), 1.0)
    start = dist.Normal(mean.detach().reshape(1), 1.0).to_event(1)

    def model():
        pyro.sample("z", PathPrior(path, lambda x, t: 0 * x, start))

    def guide():
        pyro.sample("z", PathPosterior(path))

    for loss, zero in ((STL(), True), (ELBO(), False)):
        (grad,) = torch.autograd.grad(loss.differentiable_loss(model, guide), mean)
        assert (abs(grad) < 1e-12) == zero


def test_gradients_of_a_bridge_and_its_start():
    """Bound (B) for one data point with a Gaussian start, by hand."""
    p = {
        k: torch.nn.Parameter(torch.tensor(v))
        for k, v in {"loc": 0.3, "scale": -0.4, "sigma": -0.2, "w": 0.5}.items()
    }
    end = torch.tensor([1.2])

    def bound():
        """Moments by hand: z_t = (1-t) z_0 + t z_1 + noise, u = (z_1 - z_t) / (1 - t)."""
        s2, v = (2 * p["sigma"]).exp(), (2 * p["scale"]).exp()
        m = p["loc"]
        nodes, weights = (torch.tensor(a) for a in np.polynomial.legendre.leggauss(30))
        t, weights = (nodes + 1) / 2, weights / 2
        mean = (1 - t) * m + t * end
        var = (1 - t) ** 2 * v + s2 * t * (1 - t)
        f2 = p["w"] ** 2 * (mean**2 + var)
        fu = p["w"] * (mean * (end - m) - (1 - t) * v - s2 * t)
        path = (weights * (f2 - 2 * fu)).sum() / (2 * s2)
        log_2pi = math.log(2 * math.pi)
        prior = -(m**2 + v) / 2 - log_2pi / 2
        entropy = p["scale"] + 0.5 + log_2pi / 2
        reference = -((end - m) ** 2 + v) / (2 * s2) - log_2pi / 2 - p["sigma"]
        return (prior + entropy + reference - path).sum()

    def model():
        path = BrownianBridge(1, p["sigma"].exp())
        start = dist.Normal(torch.zeros(1), 1.0).to_event(1)
        pyro.sample("z", PathPrior(path, lambda x, t: p["w"] * x, start))

    def guide():
        path = BrownianBridge(1, p["sigma"].exp())
        start = dist.Normal(p["loc"].reshape(1), p["scale"].exp()).to_event(1)
        pyro.sample("z", PathPosterior(path, end, start=start))

    loss = Trace_ELBO(2000, vectorize_particles=True, max_plate_nesting=0)
    values, grads = [], []
    for _ in range(60):
        value = -loss.differentiable_loss(model, guide)
        values.append(value.detach())
        grads.append(torch.stack(torch.autograd.grad(value, list(p.values()))))
    for got, want in (
        (torch.stack(values), bound().detach()),
        (torch.stack(grads), torch.stack(torch.autograd.grad(bound(), list(p.values())))),
    ):
        z = (got.mean(0) - want) / (got.std(0) / 60**0.5)
        assert z.abs().max() < 4, z


@pytest.mark.parametrize("make", [lambda: Trace_ELBO(), lambda: STL()], ids=["ELBO", "STL"])
def test_gradients_of_grid_paths(make):
    """Divergence of two discretised linear processes, moments carried through by hand."""
    p = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in (("m", 0.5), ("c", 0.8), ("w", -0.6))}
    times, b = torch.tensor([0.0, 0.1, 0.35, 0.6, 1.0]), 0.7

    def kl():
        mean, var = p["m"], torch.tensor(0.25)
        total = math.log(2) + (var + mean**2) / 2 - 0.5
        for dt in times.diff():
            gap = p["w"] * mean - p["c"]
            total = total + dt * (gap**2 + p["w"] ** 2 * var) / (2 * b**2)
            mean, var = mean + p["c"] * dt, var + b**2 * dt
        return total

    def model():
        start = dist.Normal(torch.zeros(1), 1.0).to_event(1)
        with pyro.plate("items", ITEMS):
            pyro.sample("x", SDEPath(times, lambda x, t: p["w"] * x, b, start))

    def guide():
        start = dist.Normal(p["m"].reshape(1), 0.5).to_event(1)
        with pyro.plate("items", ITEMS):
            pyro.sample("x", SDEPath(times, lambda x, t: p["c"] + 0 * x, b, start))

    loss, grads = make(), []
    for _ in range(REPEATS):
        value = loss.differentiable_loss(model, guide) / ITEMS
        grads.append(torch.stack(torch.autograd.grad(value, list(p.values()))))
    grads = torch.stack(grads)
    want = torch.stack(torch.autograd.grad(kl(), list(p.values())))
    z = (grads.mean(0) - want) / (grads.std(0) / REPEATS**0.5)
    assert z.abs().max() < 4, z
