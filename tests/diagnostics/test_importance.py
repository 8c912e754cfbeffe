from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from diagnostics_models import DIM, LOG_Z, SCALE_TRIL, exact_draws, guide_law

from flowvi.diagnostics import (
    effective_sample_size,
    elbo,
    iw_elbo,
    pareto_k,
    pareto_k_threshold,
    resample,
    smoothed_log_weights,
)
from flowvi.infer.draws import Draws


def test_elbo_is_evidence_minus_kl():
    draws = exact_draws(200_000, scale=0.7, shift=0.2)
    posterior = guide_law()
    exact = LOG_Z - float(torch.distributions.kl_divergence(guide_law(0.7, 0.2), posterior))
    bound = elbo(draws.log_weights)
    assert abs(bound.value - exact) < 5 * bound.se
    # Var log w for q = N(m + L d, c^2 I), p = N(m, I) in whitened coordinates:
    # log w = a |e|^2 / 2 - c e.d + const with a = 1 - c^2.
    d = torch.linalg.solve_triangular(
        SCALE_TRIL, 0.2 * SCALE_TRIL.square().sum(-1).sqrt()[:, None], upper=False
    )
    variance = DIM * (1 - 0.7**2) ** 2 / 2 + 0.7**2 * float(d.square().sum())
    assert bound.se == pytest.approx(math.sqrt(variance / 200_000), rel=0.02)


def test_bounds_are_ordered_and_below_the_evidence():
    log_w = exact_draws(200_000, scale=1.3).log_weights
    bounds = [iw_elbo(log_w, n) for n in (1, 4, 32, 256)]
    for low, high in zip(bounds, bounds[1:], strict=False):
        assert low.value < high.value
    assert all(b.value < LOG_Z + 4 * b.se for b in bounds)
    assert abs(bounds[-1].value - LOG_Z) < 0.01
    assert iw_elbo(log_w, 1).value == pytest.approx(elbo(log_w).value)


def test_exact_posterior_has_zero_variance_and_full_sample_size():
    log_w = exact_draws(1000).log_weights
    torch.testing.assert_close(log_w, torch.full_like(log_w, LOG_Z))
    assert elbo(log_w).se < 1e-9
    assert effective_sample_size(log_w) == pytest.approx(1000)
    smoothed, k = smoothed_log_weights(log_w)
    assert k == -math.inf
    torch.testing.assert_close(smoothed, torch.full_like(smoothed, -math.log(1000)))


def test_effective_sample_size_formula():
    weights = torch.tensor([1.0, 2.0, 3.0, 0.0])
    assert effective_sample_size(weights.log()) == pytest.approx(36 / 14)
    # Invariant to a factor that would overflow.
    assert effective_sample_size(weights.log() + 2000) == pytest.approx(36 / 14)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_pareto_k_of_exact_pareto_weights(k):
    # w = u^-k has a generalised Pareto tail of shape k exactly, and -log u is exponential. One
    # fit has error (1 + k) / sqrt(424 tail draws), at most 0.09; the mean of ten 0.03.
    runs = [k * torch.empty(20_000).exponential_() for _ in range(10)]
    found = [pareto_k(log_w) for log_w in runs]
    assert sum(found) / 10 == pytest.approx(k, abs=0.1)
    assert pareto_k(runs[0] + 700) == pytest.approx(found[0], abs=1e-6)


def test_pareto_k_of_a_narrow_guide():
    # Scale c < 1 gives a weight tail of shape 1 - c^2 per dimension; approached slowly.
    z = 0.5 * torch.randn(400_000)
    log_w = dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(0.0, 0.5).log_prob(z)
    assert 0.6 < pareto_k(log_w) < 0.9


@pytest.mark.parametrize(("size", "threshold"), [(100, 0.5), (1000, 1 - 1 / 3), (10_000, 0.7)])
def test_threshold(size, threshold):
    assert pareto_k_threshold(size) == pytest.approx(threshold)


def test_smoothed_weights_keep_dead_draws_dead():
    log_w = torch.randn(500)
    log_w[::50] = -math.inf
    smoothed, k = smoothed_log_weights(log_w)
    assert bool((smoothed[::50] == -math.inf).all())
    assert float(smoothed.logsumexp(0)) == pytest.approx(0, abs=1e-9)
    assert math.isfinite(k)
    assert smoothed_log_weights(torch.randn(10))[1] == math.inf


def test_resampled_draws_have_the_posterior_moments():
    draws = exact_draws(40_000, scale=1.4, shift=0.3)
    better = resample(draws, 20_000)
    assert isinstance(better, Draws)
    sd = SCALE_TRIL.square().sum(-1).sqrt()
    ess = effective_sample_size(draws.log_weights)
    error = 5 / math.sqrt(ess)
    assert float(((better.z.mean(0) - guide_law().loc) / sd).abs().max()) < error
    assert float((better.z.std(0) / sd - 1).abs().max()) < error
    # Any leading part is a fair sample too.
    part = better.z[:2000]
    assert float(((part.mean(0) - guide_law().loc) / sd).abs().max()) < 0.15


def test_messages():
    with pytest.raises(ValueError, match=r"`log_weights` must have shape \(num_draws,\)"):
        elbo(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="`log_weights` must be finite or -inf; got 1"):
        pareto_k(torch.tensor([0.0, math.nan, 1.0]))
    with pytest.raises(ValueError, match="must have a finite value; got only -inf"):
        elbo(torch.full((4,), -math.inf))
    with pytest.raises(ValueError, match=r"`num_particles` must be from 1 to .* \(5\); got 6"):
        iw_elbo(torch.zeros(10), 6)
    with pytest.raises(ValueError, match="`num_draws` must be at least 1; got 0"):
        resample(exact_draws(30), 0)
    with pytest.raises(ValueError, match="`num_draws` must be at least 2; got 1"):
        pareto_k_threshold(1)


def test_bounded_weights_that_reach_their_bound_are_trusted():
    # Half of the draws have the largest weight: there is no tail to fit.
    log_w = torch.cat([torch.zeros(500), torch.linspace(-3.0, -0.5, 500)])
    smoothed, k = smoothed_log_weights(log_w)
    assert k == -math.inf
    torch.testing.assert_close(smoothed, log_w - log_w.logsumexp(0))
