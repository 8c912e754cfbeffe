"""Gaussian data, for which scores are linear: exact processes and exact moments of samplers."""

from __future__ import annotations

import torch
from pyro.distributions import MultivariateNormal
from torch import Tensor

from flowvi.paths import Prediction, Schedule, ScheduleDiffusion, convert
from flowvi.samplers import Ability, PredictionProcess, Sampler, Span
from flowvi.samplers.base import spread

__all__ = ["COVARIANCE", "MEAN", "denoiser", "marginal", "moments", "process"]

MEAN = torch.tensor([1.0, -0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.6, 0.3], [0.3, 0.4]], dtype=torch.float64)


def marginal(schedule: Schedule, t: float) -> tuple[Tensor, Tensor]:
    """Mean and covariance of ``alpha y + sigma eps``."""
    values = schedule(torch.tensor(t))
    eye = torch.eye(2)
    return values.alpha * MEAN, values.alpha**2 * COVARIANCE + values.sigma**2 * eye


def denoiser(schedule: Schedule):
    """Mean of the data given a noised state, by Gaussian conditioning."""

    def mean(x: Tensor, t: Tensor) -> Tensor:
        values = schedule(t)
        alpha, sigma = values.alpha.unsqueeze(-1), values.sigma.unsqueeze(-1)
        total = alpha**2 * COVARIANCE + sigma**2 * torch.eye(2)
        gap = (x - values.alpha * MEAN).unsqueeze(-1)
        return MEAN + values.alpha * (COVARIANCE @ torch.linalg.solve(total, gap)).squeeze(-1)

    return mean


def process(
    schedule: Schedule,
    prediction: Prediction = Prediction.DATA,
    *,
    ratio: float = 1.0,
    abilities: tuple[Ability, ...] = tuple(Ability),
    low: float = 0.0,
    high: float = 1.0,
) -> PredictionProcess:
    """The exact generative process, started from its own marginal."""
    mean = denoiser(schedule)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return convert(mean(x, t), Prediction.DATA, prediction, x, schedule(t))

    return PredictionProcess(
        schedule,
        network,
        prediction,
        MultivariateNormal(*marginal(schedule, low)),
        diffusion=ScheduleDiffusion(schedule, ratio),
        abilities=abilities,
        low=low,
        high=high,
    )


def moments(sampler: Sampler, source: PredictionProcess, times: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the last state, exact: steps are affine in state and noise.

    Basis vectors in place of a state give the matrix of a deterministic run, memory included;
    with noise each step has its own matrices, and covariances add up.
    """
    mean, covariance = source.start.mean, source.start.covariance_matrix
    corners = torch.cat([torch.zeros(1, 2), torch.eye(2)])

    def affine(run):
        origin, *columns = run(corners).unbind()
        return origin, torch.stack([c - origin for c in columns], -1)

    if not sampler.is_stochastic:
        shift, matrix = affine(lambda x: sampler.run(source, x, times, lambda _: None)[-1])
        return shift + matrix @ mean, matrix @ covariance @ matrix.T
    number = sampler.num_noises
    for t, s in zip(times, times[1:], strict=False):

        def step(x, noise, t=t, s=s):
            return sampler.step(source, x, Span(spread(t, x), spread(s, x), noise), None)[0]

        shift, matrix = affine(lambda x: step(x, x.new_zeros(number, *x.shape)))
        mean, covariance = shift + matrix @ mean, matrix @ covariance @ matrix.T
        for k in range(number):
            noise = torch.zeros(number, 3, 2)
            noise[k] = corners
            _, spreads = affine(lambda x, noise=noise: step(torch.zeros_like(x), noise))
            covariance = covariance + spreads @ spreads.T
    return mean, covariance
