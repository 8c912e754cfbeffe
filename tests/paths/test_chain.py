"""Chains: transitions and their divergences against explicit normal laws; limit of many layers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pyro.distributions import Normal
from torch.distributions import kl_divergence

from flowvi.distributions import PathPosterior, PathPrior
from flowvi.paths import (
    ChainPath,
    DiffusionPath,
    LayerTimes,
    Linear,
    LinearLogSNR,
    PredictedDrift,
    Prediction,
    VariancePreservingCosine,
    convert,
)

SCHEDULE = LinearLogSNR(-4.0, 5.0).double()


def encoder(y, t):
    return y + (1 - t) * (0.3 * y + 0.2 * torch.sin(3 * t))


def transition(schedule, encode, t, s, x, y):
    """Mean and variance of x_s given x_t and y: conditional of a joint normal, layer by layer.

    The joint is that of x_t = (alpha_t / alpha_s) (x_s - alpha_s F_s) + alpha_t F_t + noise.
    """
    now, then = schedule(t), schedule(s)
    slope = now.alpha / then.alpha
    variance = then.sigma**2
    total = slope**2 * variance + (now.sigma**2 - slope**2 * variance)
    gain = slope * variance / total
    mean = then.alpha * encode(y, s) + gain * (x - now.alpha * encode(y, t))
    return mean, variance - gain * slope * variance


@pytest.mark.parametrize("schedule", [SCHEDULE, VariancePreservingCosine(-5.0, 5.0)], ids=str)
@pytest.mark.parametrize("encode", [None, encoder], ids=["plain", "encoder"])
def test_step_is_the_transition(schedule, encode):
    path = ChainPath(2, schedule, 5, encode)
    y, t = torch.randn(4, 2), torch.tensor([[0.0], [0.2], [0.6], [0.8]])
    point = path.point(torch.randn(4, 2), t, y)
    mean, variance = transition(schedule, encode or (lambda y, t: y), t, t + 0.2, point.state, y)
    torch.testing.assert_close(point.state + 0.2 * point.drift, mean)
    torch.testing.assert_close(0.2 * point.diffusion**2, variance.expand_as(point.state))
    values = schedule(t)
    torch.testing.assert_close(values.alpha * point.data + values.sigma * point.noise, point.state)
    data, noise = path.target_of_drift(point.state, point.drift, t)
    torch.testing.assert_close(data, point.data)
    torch.testing.assert_close(noise, point.noise)


@pytest.mark.parametrize("prediction", list(Prediction), ids=lambda p: p.name)
def test_integrand_is_the_divergence_of_two_transitions(prediction):
    path = ChainPath(2, SCHEDULE, 5, encoder)
    y, t = torch.randn(4, 2), torch.tensor([[0.0], [0.2], [0.6], [0.8]])
    point = path.point(torch.randn(4, 2), t, y)
    guess = torch.randn(4, 2)
    output = convert(guess, Prediction.DATA, prediction, point.state, SCHEDULE(t))
    drift = PredictedDrift(path, lambda x, t: output, prediction)
    gap = drift.difference(point.state, t, point.data, point.noise, point.diffusion)
    got = (gap / point.diffusion).square().sum(-1) / 2
    mean, variance = transition(SCHEDULE, encoder, t, t + 0.2, point.state, y)
    # The model's transition: the prediction in place of the encoded data at both layers.
    model_mean, _ = transition(SCHEDULE, lambda y, t: guess, t, t + 0.2, point.state, y)
    sd = variance.sqrt()
    want = 5 * kl_divergence(Normal(mean, sd), Normal(model_mean, sd)).sum(-1)
    torch.testing.assert_close(got, want)
    snr = (SCHEDULE.log_snr(t + 0.2).exp() - SCHEDULE.log_snr(t).exp()).squeeze(-1)
    torch.testing.assert_close(got, 2.5 * snr * (guess - point.data).square().sum(-1))
    torch.testing.assert_close(gap, drift(point.state, t) - point.drift)


def test_every_layer_comes_once():
    law = LayerTimes(6)
    times, weights = law.draw((6, 5), torch.empty(0))
    want = torch.arange(6).unsqueeze(-1).expand(6, 5) / 6
    torch.testing.assert_close(times.sort(0).values, want)
    assert (weights == 1).all()
    single, _ = LayerTimes(3, stratified=False).draw((30_000,), torch.empty(0))
    share = (single == 1 / 3).double().mean()
    # 4.5 standard errors of 30,000 draws.
    assert abs(share - 1 / 3) < 4.5 * math.sqrt(2 / 9 / 30_000)


def exact_integral(path, factor, times):
    """Mean of the integrand over data N(0, 1.5^2) and noise, at each time; linear throughout.

    Gauss-Hermite nodes are exact for squares; the prediction is ``factor`` times the state.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(6)
    nodes = torch.as_tensor(nodes)
    weights = torch.as_tensor(weights / weights.sum())
    y = 1.5 * nodes.repeat_interleave(6).unsqueeze(-1)
    eps = nodes.repeat(6).unsqueeze(-1)
    weight = weights.repeat_interleave(6) * weights.repeat(6)
    t = times.reshape(-1, 1, 1).expand(-1, 36, 1)
    drift = PredictedDrift(path, lambda x, t: factor(t) * x, Prediction.DATA)
    point = path.point(eps.expand(len(times), 36, 1), t, y)
    gap = drift.difference(point.state, t, point.data, point.noise, point.diffusion)
    return ((gap / point.diffusion).square().squeeze(-1) / 2 * weight).sum(-1)


def best_factor(t):
    values = SCHEDULE(t)
    return 2.25 * values.alpha / (2.25 * values.alpha**2 + values.sigma**2)


@pytest.mark.parametrize("encode", [None, encoder], ids=["plain", "encoder"])
def test_gap_of_finitely_many_layers_falls_like_one_over_their_number(encode):
    times = (torch.arange(20_000) + 0.5) / 20_000
    limit = exact_integral(DiffusionPath(1, SCHEDULE, encode), best_factor, times).mean()
    if encode is None:
        # 1/2 int SNR' v dt with the posterior variance v = s^2 / (1 + s^2 SNR).
        ends = SCHEDULE.log_snr(torch.tensor([0.0, 1.0])).exp()
        closed = (1 + 2.25 * ends).log().diff()[0] / 2
        torch.testing.assert_close(limit, closed, rtol=1e-6, atol=1e-6)
    gaps = []
    for layers in (25, 50, 100, 200):
        layer = torch.arange(layers) / layers
        total = exact_integral(ChainPath(1, SCHEDULE, layers, encode), best_factor, layer).mean()
        gaps.append(float(total - limit))
    slopes = -np.diff(np.log2(np.abs(gaps)))
    np.testing.assert_allclose(slopes, 1.0, atol=0.15)
    # An encoder's loss may be approached from either side; the plain one from above.
    assert encode is not None or min(gaps) > 0


def test_simulated_prior_is_ancestral_sampling():
    """Means and variances of a chain of affine transitions, multiplied out."""
    layers = 4
    path = ChainPath(1, SCHEDULE, layers)
    drift = PredictedDrift(path, lambda x, t: best_factor(t) * x, Prediction.DATA)
    start = Normal(torch.zeros(1), 1.0).to_event(1)
    prior = PathPrior(path, drift, start, times=path.times, num_steps=layers)
    draw = prior.unpack(prior.sample((20_000,)))
    variance = torch.ones(1)
    for k in range(layers):
        t, s = torch.tensor([k / layers]), torch.tensor([(k + 1) / layers])
        mean, fresh = transition(SCHEDULE, lambda y, t: y, t, s, torch.ones(1), best_factor(t))
        variance = mean**2 * variance + fresh
    # 4.5 standard errors of 20,000 draws.
    assert abs(draw.end.var() / variance - 1) < 4.5 * math.sqrt(2 / 20_000)
    q = PathPosterior(path, torch.zeros(3, 1), times=path.times)
    assert prior.log_prob(q.sample()).isfinite().all()


def test_bad_input():
    for layers in (0, -1, 2.5):
        with pytest.raises(ValueError, match="`num_layers` must be an integer of at least 1"):
            ChainPath(1, SCHEDULE, layers)
    with pytest.raises(TypeError, match="`schedule` must be a Schedule; got str"):
        ChainPath(1, "linear", 3)
    assert ChainPath(1, Linear(), 3).num_layers == 3
