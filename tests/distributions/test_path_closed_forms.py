"""Bounds of path laws against closed forms: diffusion, bridge, Kalman filter."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch

from flowvi.distributions import PathPosterior, PathPrior
from flowvi.paths import (
    BrownianBridge,
    DiffusionPath,
    GaussianPath,
    LinearLogSNR,
    PredictedDrift,
    Prediction,
    ScheduleDiffusion,
    StochasticInterpolant,
    UniformTimes,
    convert,
)

DOUBLE = {"dtype": torch.float64}
WEIGHTS = torch.tensor([0.35, 0.65], **DOUBLE)
MEANS, SCALES = torch.tensor([-1.5, 1.0], **DOUBLE), torch.tensor([0.3, 0.5], **DOUBLE)
NUM = 100_000


def mixture() -> dist.Distribution:
    return dist.MixtureSameFamily(dist.Categorical(WEIGHTS), dist.Normal(MEANS, SCALES))


class ExactDenoiser:
    """Posterior law of data given a noised state, for the mixture: responsibilities by Bayes."""

    def __init__(self, schedule):
        self.schedule = schedule

    def posterior(self, x, t):
        values = self.schedule(t)
        signal, noise = values.alpha, values.sigma
        total = signal**2 * SCALES**2 + noise**2
        log_r = WEIGHTS.log() - total.log() / 2 - (x - signal * MEANS) ** 2 / (2 * total)
        gain = signal * SCALES**2 / total
        return dist.MixtureSameFamily(
            dist.Categorical(logits=log_r),
            dist.Normal(MEANS + gain * (x - signal * MEANS), SCALES * noise / total.sqrt()),
        )

    def __call__(self, x, t):
        return self.posterior(x, t).mean.unsqueeze(-1)

    def marginal(self, t):
        values = self.schedule(torch.as_tensor(t))
        scale = (values.alpha**2 * SCALES**2 + values.sigma**2).sqrt()
        parts = dist.Normal(values.alpha * MEANS, scale)
        return dist.MixtureSameFamily(
            dist.Categorical(WEIGHTS), dist.Independent(_column(parts), 1)
        )


def _column(law):
    return dist.Normal(law.loc.unsqueeze(-1), law.scale.unsqueeze(-1))


def diffusion_bound(y, ratio=1.0, prediction=Prediction.DATA, log_snr_max=5.0):
    """Data term, start and path of (A) for each item, with everything exact."""
    schedule = LinearLogSNR(-4.0, log_snr_max)
    path = DiffusionPath(1, schedule, diffusion=ScheduleDiffusion(schedule, ratio))
    denoiser = ExactDenoiser(schedule)

    def network(x, t):
        return convert(denoiser(x, t), Prediction.DATA, prediction, x, schedule(t))

    q = PathPosterior(path, y, num_times=4)
    drift = PredictedDrift(path, network, prediction)
    p = PathPrior(path, drift, denoiser.marginal(0.0), num_times=4)
    z = q.sample()
    end = q.unpack(z).end
    data = denoiser.posterior(end, torch.ones_like(end)).log_prob(y[..., 0])
    terms = p.log_prob_terms(z)
    return data, terms.start - q.log_prob(z), terms.path


@pytest.mark.parametrize("prediction", list(Prediction), ids=lambda p: p.name)
def test_exact_diffusion_is_tight(prediction):
    y = mixture().sample((NUM,)).unsqueeze(-1)
    data, start, path = diffusion_bound(y, prediction=prediction)
    gap = data + start + path - mixture().log_prob(y[:, 0])
    # 3 standard errors of 100,000 data points.
    assert abs(gap.mean()) < 3 * gap.std() / NUM**0.5
    assert gap.std() / NUM**0.5 < 0.01


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_other_noise_costs_what_it_should(ratio):
    """(1 + r)^2 / (4 r) - 1 = 1/8 of the path term for half and for twice the best b^2."""
    y = mixture().sample((NUM,)).unsqueeze(-1)
    best = diffusion_bound(y, log_snr_max=13.0)
    other = diffusion_bound(y, ratio, log_snr_max=13.0)
    cost = sum(best) - sum(other)
    error = cost.std() / NUM**0.5
    assert abs(cost.mean() + best[2].mean() / 8) < 3 * error
    assert 0.6 < cost.mean() < 0.9


def test_integrand_is_the_weighted_error_of_the_denoiser():
    """Path term against 1/2 int SNR' E|y - x_hat|^2 dt by quadrature over time and noise."""
    schedule = LinearLogSNR(-4.0, 5.0)
    denoiser = ExactDenoiser(schedule)
    y = torch.linspace(-2, 2, 9).unsqueeze(-1)
    path = diffusion_bound(y.expand(1500, 9, 1))[2]
    snr = torch.linspace(-4, 5, 801).exp()
    t = (torch.linspace(-4, 5, 801) + 4) / 9
    eps = torch.linspace(-7, 7, 201)
    p_eps = dist.Normal(0.0, 1.0).log_prob(eps).exp() * (eps[1] - eps[0])
    values = schedule(t)
    x = values.alpha[:, None, None] * y[:, 0, None] + values.sigma[:, None, None] * eps
    guess = denoiser(x.unsqueeze(-1), t.reshape(-1, 1, 1, 1)).squeeze(-1)
    error = ((guess - y[:, 0, None]) ** 2 * p_eps).sum(-1)
    want = torch.trapezoid(error, snr.unsqueeze(-1), dim=0) / 2
    got, se = -path.mean(0), path.std(0) / 1500**0.5
    assert ((got - want).abs() < 4 * se + 1e-4).all()


def schroedinger(s: float, sigma: float, coupling: float, num: int):
    """Value of bound (B) with the best drift for a Gaussian coupling, N(0, 1) to N(0, s^2)."""

    def drift(x, t):
        var = (1 - t) ** 2 + t**2 * s**2 + 2 * t * (1 - t) * coupling + sigma**2 * t * (1 - t)
        cov = -(1 - t) + t * s**2 + (1 - 2 * t) * coupling - sigma**2 * t
        return cov / var * x

    end = s * torch.randn(num, 1)
    start = dist.Normal(coupling / s**2 * end, (1 - coupling**2 / s**2) ** 0.5).to_event(1)
    path = BrownianBridge(1, sigma)
    q = PathPosterior(path, end, start=start, num_times=2)
    p = PathPrior(path, drift, dist.Normal(torch.zeros(1), 1.0).to_event(1), num_times=2)
    z = q.sample()
    return p.log_prob(z) - q.log_prob(z)


@pytest.mark.parametrize(("s", "sigma"), [(2.0, 0.7), (0.5, 1.0)])
def test_bridge_bound_is_tight_at_the_schroedinger_bridge(s, sigma):
    coupling = (math.sqrt(4 * s**2 + sigma**4) - sigma**2) / 2
    bound = schroedinger(s, sigma, coupling, 200_000)
    entropy = 0.5 * math.log(2 * math.pi * math.e * s**2)
    # 3 standard errors of 200,000 data points.
    assert abs(bound.mean() + entropy) < 3 * bound.std() / 200_000**0.5
    assert bound.std() / 200_000**0.5 < 0.01


def test_bridge_bound_of_the_independent_coupling():
    bound = schroedinger(2.0, 0.7, 0.0, 200_000)
    assert abs(bound.mean() + 4.2970) < 3 * bound.std() / 200_000**0.5


def test_rectified_flow_loss_is_a_path_law_too():
    """No path noise: |z_1 - z_0 - f|^2 / (2 sigma^2); its least value is pi s / 2 as published."""
    s, sigma = 2.0, 0.7
    end = s * torch.randn(200_000, 1)
    start = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    path = StochasticInterpolant(1, None, sigma)

    def drift(x, t):
        return (t * s**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * s**2) * x

    q = PathPosterior(path, end, start=start)
    z = q.sample()
    terms = PathPrior(path, drift, start).log_prob_terms(z)
    residual = -2 * sigma**2 * terms.path
    assert abs(residual.mean() - math.pi * s / 2) < 3 * residual.std() / 200_000**0.5
    torch.testing.assert_close(terms.start, q.log_prob(z))


RATE, NOISE, START_SD, ERROR = 1.3, 0.9, 0.8, 0.4


def kernel(s, t):
    """Covariance of the Ornstein-Uhlenbeck process started from N(0, START_SD^2)."""
    level = NOISE**2 / (2 * RATE)
    fade = torch.exp(-RATE * (s + t))
    return fade * START_SD**2 + level * (torch.exp(-RATE * (s - t).abs()) - fade)


def kalman(times, y) -> float:
    """Exact log-likelihood by prediction and update, one observation after the other."""
    mean, var, last, total = 0.0, START_SD**2, 0.0, 0.0
    for t, value in zip(times.tolist(), y.tolist(), strict=True):
        fade = math.exp(-RATE * (t - last))
        mean = fade * mean
        var = fade**2 * var + NOISE**2 / (2 * RATE) * (1 - fade**2)
        total += -0.5 * math.log(2 * math.pi * (var + ERROR**2))
        total += -((value - mean) ** 2) / (2 * (var + ERROR**2))
        gain = var / (var + ERROR**2)
        mean, var, last = mean + gain * (value - mean), (1 - gain) * var, t
    return total


def smoother_path(times) -> GaussianPath:
    """Marginals of the exact posterior process, by Gaussian conditioning on all data."""

    def weights(t):
        gram = kernel(times.unsqueeze(-1), times.unsqueeze(-2))
        gram = gram + ERROR**2 * torch.eye(times.shape[-1])
        cross = kernel(t, times)
        return cross, torch.linalg.solve(gram, cross.unsqueeze(-1)).squeeze(-1)

    def mean(y, t):
        return (weights(t)[1] * y).sum(-1, keepdim=True)

    def sd(y, t):
        cross, solved = weights(t)
        return (kernel(t, t) - (cross * solved).sum(-1, keepdim=True)).sqrt()

    return GaussianPath(1, mean, sd, diffusion=NOISE)


def test_exact_smoother_reaches_the_kalman_likelihood():
    """Irregular times of each item; ELBO within 0.01 nats of the filter (3 standard errors)."""
    times = torch.tensor([[0.05, 0.3, 0.37, 0.8], [0.2, 0.21, 0.6, 1.0]])
    y = torch.tensor([[0.9, -0.4, 0.2, 1.1], [-1.0, -0.2, 0.5, 0.4]])
    num = 60_000
    path = smoother_path(times)
    start = dist.Normal(torch.zeros(1), START_SD).to_event(1)
    law = UniformTimes()
    q = PathPosterior(path, y, at=times, times=law, num_times=2)
    p = PathPrior(path, lambda x, t: -RATE * x, start, at=times, times=law, num_times=2)
    means, errors = [], []
    for _ in range(4):
        z = q.sample((num,))
        observed = q.unpack(z).observed[..., 0]
        data = dist.Normal(observed, ERROR).log_prob(y).sum(-1)
        elbo = data + p.log_prob(z) - q.log_prob(z)
        means.append(elbo.mean(0))
        errors.append(elbo.std(0) / num**0.5)
    exact = torch.tensor([kalman(t, v) for t, v in zip(times, y, strict=True)])
    error = torch.stack(errors).mean(0) / 2
    got = torch.stack(means).mean(0)
    assert error.max() < 0.005
    assert ((got - exact).abs() < torch.maximum(3 * error, torch.tensor(0.01))).all()
    assert ((got - exact).abs() < 3.5 * error).all()
