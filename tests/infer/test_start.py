from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from flowvi.infer._gaussian import Gaussian, antithetic, lower_factor, robust_cholesky
from flowvi.infer._searches import together
from flowvi.infer.batch_and_match import batch_and_match
from flowvi.infer.laplace import laplace
from flowvi.infer.natural_gradient import natural_gradient
from flowvi.infer.pathfinder import choose
from flowvi.infer.quasi_newton import ascend
from flowvi.infer.start import Start, warm_start
from flowvi.infer.target import Target


def gaussian_density(loc: Tensor, covariance: Tensor) -> object:
    """Log-density and gradient of a normal law, through a generic linear solve."""
    precision = torch.linalg.inv(covariance)

    def density(z: Tensor) -> tuple[Tensor, Tensor]:
        offset = z - loc
        pull = offset @ precision
        return -0.5 * (offset * pull).sum(-1), -pull

    return density


def ill_conditioned(dim: int, condition: float, seed: int) -> Tensor:
    """A covariance with a random rotation and eigenvalues spread over ``condition``."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    spread = math.log10(condition) / 2
    return rotation @ torch.diag(10 ** torch.linspace(-spread, spread, dim)) @ rotation.T


def whitened_error(found: Gaussian, loc: Tensor, covariance: Tensor) -> float:
    """Largest entry of the mean and covariance error in coordinates where the truth is N(0, I)."""
    chol = torch.linalg.cholesky(covariance)
    factor = torch.linalg.solve_triangular(chol, found.scale_tril, upper=False)
    shift = torch.linalg.solve_triangular(chol, (found.loc - loc)[:, None], upper=False)
    eye = torch.eye(len(loc))
    return float(torch.maximum((factor @ factor.T - eye).abs().max(), shift.abs().max()))


def regression(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, 0.5), obs=y)


def test_conjugate_regression_gives_the_exact_posterior_and_evidence() -> None:
    x, y = torch.randn(30, 3) * torch.tensor([1.0, 10.0, 0.1]), torch.randn(30)
    start = warm_start(Target(regression, (x, y)), seed=0)
    precision = torch.eye(3) / 4 + x.T @ x / 0.25
    covariance = torch.linalg.inv(precision)
    loc = covariance @ x.T @ y / 0.25
    assert whitened_error(Gaussian(start.loc, start.scale_tril), loc, covariance) < 1e-4
    marginal = dist.MultivariateNormal(torch.zeros(30), 0.25 * torch.eye(30) + 4 * x @ x.T)
    assert start.elbo == pytest.approx(float(marginal.log_prob(y)), abs=1e-3)
    assert start.elbo_se < 1e-3
    assert len(start.modes) == 1


@pytest.mark.parametrize("seed", range(3))
def test_badly_scaled_correlated_gaussian_is_recovered(seed: int) -> None:
    covariance = ill_conditioned(6, 1e8, seed)
    scale_tril = torch.linalg.cholesky(covariance)
    loc = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, -1.0])

    def model() -> None:
        pyro.sample("x", dist.MultivariateNormal(loc, scale_tril=scale_tril))

    start = warm_start(Target(model), seed=seed)
    assert whitened_error(Gaussian(start.loc, start.scale_tril), loc, covariance) < 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_centred_funnel_reaches_the_best_gaussian(seed: int) -> None:
    """The density is unbounded, so that every mode finder runs away; the ELBO must not.

    The best full-rank Gaussian has KL 1.8628 to this funnel, an exact value.
    """

    def model() -> None:
        z0 = pyro.sample("z0", dist.Normal(0.0, 3.0))
        with pyro.plate("rest", 9):
            pyro.sample("z", dist.Normal(0.0, (z0 / 2).exp()))

    target = Target(model)
    start = warm_start(target, seed=seed)
    gaussian = Gaussian(start.loc, start.scale_tril)
    eps = antithetic(20_000, 10, torch.Generator().manual_seed(seed))
    log_w = target.guarded_log_prob(gaussian.at(eps)) - gaussian.log_prob_of_noise(eps)
    # Standard error of the mean below 0.03 with 20,000 draws.
    assert -2.05 < float(log_w.mean()) < -1.75


def test_the_mean_is_found_where_the_mode_is_elsewhere() -> None:
    """log x of x ~ Gamma(1/2, 1): mode log(1/2), but the best Gaussian has another mean.

    With z = log x the ELBO of N(m, s^2) is m / 2 - exp(m + s^2 / 2) + log s + const, which is
    greatest at m + s^2 / 2 = log(1/2) and s^2 = 2.
    """
    target = Target(lambda: pyro.sample("x", dist.Gamma(torch.tensor(0.5), 1.0)))
    start = warm_start(target, seed=0)
    loc, variance = float(start.loc), float(start.scale_tril) ** 2

    def elbo(loc: float, variance: float) -> float:
        entropy = 0.5 * math.log(2 * math.pi * math.e * variance)
        return loc / 2 - math.exp(loc + variance / 2) - math.lgamma(0.5) + entropy

    best = elbo(math.log(0.5) - 1.0, 2.0)
    assert elbo(math.log(0.5), 2.0) < best - 0.3  # at the mode
    assert elbo(loc, variance) > best - 0.01


def test_same_seed_same_start_and_global_generator_otherwise() -> None:
    target = Target(lambda: pyro.sample("x", dist.Gamma(torch.full((2,), 2.0), 1.0).to_event(1)))
    first, second = warm_start(target, seed=3), warm_start(target, seed=3)
    assert torch.equal(first.loc, second.loc)
    assert torch.equal(first.scale_tril, second.scale_tril)
    pyro.set_rng_seed(7)
    third = warm_start(target)
    pyro.set_rng_seed(7)
    assert torch.equal(third.loc, warm_start(target).loc)
    state = torch.random.get_rng_state()
    warm_start(target, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_float32_model_gives_a_float32_start() -> None:
    loc = torch.tensor([1.0, -2.0], dtype=torch.float32)
    scale = torch.tensor([1e-3, 1e2], dtype=torch.float32)
    target = Target(lambda: pyro.sample("x", dist.Normal(loc, scale).to_event(1)))
    start = warm_start(target, seed=0)
    assert start.loc.dtype == start.scale_tril.dtype == torch.float32
    torch.testing.assert_close(start.scale_tril.diagonal(), scale, rtol=1e-2, atol=0.0)
    assert float(((start.loc - loc) / scale).abs().max()) < 0.02


def test_a_model_finite_in_a_small_region_only() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 0.1).to_event(1))
        pyro.factor("wall", torch.where(x.norm(dim=-1) < 0.5, 0.0, torch.nan))

    start = warm_start(Target(model), seed=0)
    assert torch.isfinite(start.loc).all()
    torch.testing.assert_close(start.scale_tril, 0.1 * torch.eye(2), rtol=0.1, atol=0.01)


def test_density_finite_nowhere_is_refused_with_the_models_error() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("nothing", x.sum(-1) * torch.nan)

    with pytest.raises(RuntimeError, match="finite at no start"):
        warm_start(Target(model), seed=0)


def test_given_starts() -> None:
    start = Start.from_loc(torch.tensor([1.0, 2.0]), 0.5)
    torch.testing.assert_close(start.scale_tril, 0.5 * torch.eye(2))
    covariance = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    start = Start.from_moments(torch.zeros(2), covariance)
    torch.testing.assert_close(start.scale_tril @ start.scale_tril.T, covariance)
    assert math.isnan(start.elbo)


BAD_CALLS = {
    "loc shape": (lambda: Start.from_loc(torch.zeros(2, 2)), r"`loc` must be a finite vector"),
    "loc nan": (lambda: Start.from_loc(torch.tensor([math.nan])), "`loc` must be a finite"),
    "scale": (lambda: Start.from_loc(torch.zeros(2), -1.0), "`scale` must be positive"),
    "covariance shape": (
        lambda: Start.from_moments(torch.zeros(2), torch.eye(3)),
        r"`covariance` must have shape \(2, 2\); got \(3, 3\)",
    ),
    "covariance": (
        lambda: Start.from_moments(torch.zeros(2), -torch.eye(2)),
        "`covariance` must be symmetric and positive definite",
    ),
    "num_starts": (
        lambda: warm_start(Target(lambda: pyro.sample("x", dist.Normal(0.0, 1.0))), num_starts=0),
        "`num_starts` must be at least 1; got 0",
    ),
    "radius": (
        lambda: warm_start(Target(lambda: pyro.sample("x", dist.Normal(0.0, 1.0))), radius=-1.0),
        "`radius` must not be negative; got -1.0",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name: str) -> None:
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call()


# The stages on their own.


def test_ascend_finds_the_minimum_of_rosenbrock() -> None:
    def density(z: Tensor) -> tuple[Tensor, Tensor]:
        z = z.clone().requires_grad_()
        value = -(100 * (z[:, 1] - z[:, 0] ** 2) ** 2 + (1 - z[:, 0]) ** 2)
        return value.detach(), torch.autograd.grad(value.sum(), z)[0]

    starts = torch.tensor([[-1.2, 1.0], [0.0, 0.0], [2.0, 2.0]])
    (ascent,) = together(density, ascend(starts, tolerance=1e-12, grace=9))
    assert ascent.converged.all()
    torch.testing.assert_close(ascent.loc, torch.ones(3, 2), rtol=0, atol=1e-5)
    hessian = torch.tensor([[802.0, -400.0], [-400.0, 200.0]])
    torch.testing.assert_close(
        ascent.inverse_hessian[0], torch.linalg.inv(hessian), rtol=0.2, atol=0.0
    )


def test_ascend_survives_an_unbounded_density_and_bad_starts() -> None:
    def density(z: Tensor) -> tuple[Tensor, Tensor]:
        log_p = z[:, 0].exp() - z[:, 1] ** 2
        grad = torch.stack([z[:, 0].exp(), -2 * z[:, 1]], -1)
        bad = ~torch.isfinite(log_p)
        return log_p.masked_fill(bad, -torch.inf), grad.masked_fill(bad[:, None], 0.0)

    starts = torch.tensor([[0.0, 1.0], [1e4, 0.0]])
    (ascent,) = together(density, ascend(starts, max_evaluations=40))
    assert torch.isfinite(ascent.loc).all()
    assert ascent.log_prob[0] > 1.0
    assert ascent.log_prob[1] == -torch.inf


def test_laplace_is_exact_for_a_badly_scaled_gaussian() -> None:
    covariance, loc = ill_conditioned(5, 1e8, 0), torch.randn(5)
    scale = torch.diag(covariance.diagonal().sqrt() * 3)
    density = gaussian_density(loc, covariance)
    (found,) = together(density, laplace(Gaussian(loc + 1.0, scale)))
    assert whitened_error(found, loc, covariance) < 1e-5


@pytest.mark.parametrize("method", [batch_and_match, natural_gradient])
def test_gaussian_refiners_are_exact_for_a_gaussian(method: object) -> None:
    covariance, loc = ill_conditioned(5, 1e4, 1), torch.randn(5)
    start = Gaussian(torch.zeros(5), torch.eye(5))
    generator = torch.Generator().manual_seed(0)
    search = method(start, generator=generator, num_steps=60)
    (found,) = together(gaussian_density(loc, covariance), search)
    assert whitened_error(found, loc, covariance) < 1e-3


def test_one_batch_and_match_step_solves_its_optimality_condition() -> None:
    """Sigma U Sigma + Sigma = V with Sigma = the new covariance, from its defining equation.

    One step from N(m, C) in unwhitened coordinates: U = lam cov(g) + lam/(1+lam) g g^T and
    V = C + lam cov(z) + lam/(1+lam) (m - z)(m - z)^T (Cai et al. 2024, equations 6 and 7).
    """
    dim, num_draws = 3, 64
    start = Gaussian(torch.randn(dim), torch.linalg.cholesky(ill_conditioned(dim, 20.0, 2)))
    target = gaussian_density(torch.randn(dim), ill_conditioned(dim, 50.0, 3))
    seen = {}

    def density(z: Tensor) -> tuple[Tensor, Tensor]:
        seen["z"], (seen["log_p"], seen["g"]) = z, target(z)
        return seen["log_p"], seen["g"]

    generator = torch.Generator().manual_seed(0)
    search = batch_and_match(start, generator=generator, num_steps=1, num_draws=num_draws)
    (found,) = together(density, search)
    lam, z, g = float(num_draws), seen["z"], seen["g"]
    ratio = lam / (1 + lam)
    z_mean, g_mean = z.mean(0), g.mean(0)
    u = lam * torch.cov(g.T, correction=0) + ratio * torch.outer(g_mean, g_mean)
    v = start.scale_tril @ start.scale_tril.T + lam * torch.cov(z.T, correction=0)
    v = v + ratio * torch.outer(start.loc - z_mean, start.loc - z_mean)
    sigma = found.scale_tril @ found.scale_tril.T
    torch.testing.assert_close(sigma @ u @ sigma + sigma, v)
    mean = start.loc / (1 + lam) + ratio * (sigma @ g_mean + z_mean)
    torch.testing.assert_close(found.loc, mean)


def test_refiners_keep_their_start_when_nothing_is_finite() -> None:
    def density(z: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full((len(z),), -torch.inf), torch.zeros_like(z)

    start = Gaussian(torch.ones(2), torch.eye(2))
    for method in (batch_and_match, natural_gradient):
        search = method(start, generator=torch.Generator().manual_seed(0))
        (found,) = together(density, search)
        torch.testing.assert_close(found.loc, start.loc)
        torch.testing.assert_close(found.scale_tril, start.scale_tril)


def test_choose_takes_the_highest_elbo_and_bears_impossible_draws() -> None:
    def log_density(z: Tensor) -> Tensor:
        log_p = -0.5 * (z**2).sum(-1)
        return log_p.masked_fill(z[:, 0] > 3.0, -torch.inf)

    loc = torch.zeros(2)
    options = [Gaussian(loc + 5.0, torch.eye(2)), Gaussian(loc, torch.eye(2))]
    options.append(Gaussian(loc, 0.1 * torch.eye(2)))
    eps = antithetic(64, 2, torch.Generator().manual_seed(0)).clamp(-2.5, 2.5)
    assert choose(log_density, options, eps)[0] == 1
    assert choose(log_density, options[:1], eps)[0] == 0


def test_factors() -> None:
    factor = torch.randn(4, 6)
    lower = lower_factor(factor)
    torch.testing.assert_close(lower @ lower.T, factor @ factor.T)
    assert (lower.diagonal() > 0).all()
    assert torch.equal(lower, lower.tril())
    scales = torch.tensor([1e-8, 1.0, 1e8])
    correlation = torch.tensor([[1.0, 0.9, 0.1], [0.9, 1.0, 0.3], [0.1, 0.3, 1.0]])
    covariance = scales[:, None] * correlation * scales
    chol = robust_cholesky(covariance) / scales[:, None]
    torch.testing.assert_close(chol @ chol.T, correlation)
    indefinite = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    assert torch.isfinite(robust_cholesky(indefinite)).all()
