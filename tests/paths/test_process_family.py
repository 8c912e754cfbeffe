"""All members of a process family have the same marginals."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from flowvi.paths import (
    GaussianPath,
    LinearLogSNR,
    MixturePath,
    ProcessFamily,
    StateDiffusion,
    VariancePreserving,
)

NUM = 20_000
WEIGHTS, MEANS, SCALES = (0.3, 0.7), (-2.0, 1.5), (0.4, 0.6)
SCHEDULES = {"linear log-snr": lambda: LinearLogSNR(-3.0, 3.0), "vp": VariancePreserving}


def target_path(schedule, diffusion) -> MixturePath:
    """Exact marginals of noised draws of a two-component Gaussian mixture.

    Both schedules preserve variance, so the squares of signal and noise are sigmoids.
    """

    def mean(y, t, m):
        return m * torch.sigmoid(schedule.log_snr(t)).sqrt()

    def scale(y, t, s):
        signal = torch.sigmoid(schedule.log_snr(t))
        return (1 + (s**2 - 1) * signal).sqrt()

    parts = [
        GaussianPath(1, partial(mean, m=m), partial(scale, s=s), diffusion)
        for m, s in zip(MEANS, SCALES, strict=True)
    ]
    return MixturePath(parts, WEIGHTS)


def noised_data(schedule, t: float, num: int) -> torch.Tensor:
    """Draws of the marginal without the path: data first, then noise."""
    index = torch.multinomial(torch.tensor(WEIGHTS), num, replacement=True)
    data = torch.tensor(MEANS)[index] + torch.tensor(SCALES)[index] * torch.randn(num)
    values = schedule(torch.tensor(t))
    return (values.alpha * data + values.sigma * torch.randn(num)).unsqueeze(-1)


def cdf(schedule, t: float, x: torch.Tensor) -> torch.Tensor:
    values = schedule(torch.tensor(t))
    out = 0.0
    for w, m, s in zip(WEIGHTS, MEANS, SCALES, strict=True):
        scale = (values.alpha**2 * s**2 + values.sigma**2).sqrt()
        out = out + w * torch.special.ndtr((x - values.alpha * m) / scale)
    return out


def kolmogorov_smirnov(draws: torch.Tensor, cdf) -> float:
    x = draws.flatten().sort().values
    f, n = cdf(x), len(x)
    up = torch.arange(1, n + 1) / n - f
    return float(torch.maximum(up, f - torch.arange(n) / n).max())


def run(family: ProcessFamily, level: float, x: torch.Tensor, start: float, end: float, steps=60):
    """Euler-Maruyama, written here: the laws' own loop is not what is tested."""
    times = torch.linspace(start, end, steps + 1)
    with torch.no_grad():
        for t, dt in zip(times, times.diff(), strict=False):
            at = t.reshape(1, 1)
            noise = torch.randn_like(x) * dt.abs().sqrt()
            x = x + family.drift(x, at, level) * dt + family.scale(x, at, level) * noise
    return x


@pytest.mark.parametrize("level", [1.0, 0.5, 0.0, -1.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_marginals_agree(name, level):
    schedule = SCHEDULES[name]()
    family = target_path(schedule, 0.8).family()
    early, late = 0.3, 0.9
    start, end = (early, late) if level >= 0 else (late, early)
    x = run(family, level, noised_data(schedule, start, NUM), start, end)
    # 1.95 / sqrt(n) is passed by one true null in a thousand.
    assert kolmogorov_smirnov(x, lambda x: cdf(schedule, end, x)) < 1.95 / NUM**0.5


@pytest.mark.slow
def test_the_test_sees_a_wrong_level():
    schedule = SCHEDULES["vp"]()
    family = target_path(schedule, 0.8).family()

    def without_score(x, t):
        velocity, score = family.field(x, t)
        return velocity, 0 * score

    x = run(ProcessFamily(without_score, 0.8), 1.0, noised_data(schedule, 0.3, NUM), 0.3, 0.9)
    assert kolmogorov_smirnov(x, lambda x: cdf(schedule, 0.9, x)) > 1.5 * 1.95 / NUM**0.5


@pytest.mark.slow
def test_marginals_agree_with_a_diffusion_of_the_state():
    schedule = SCHEDULES["linear log-snr"]()
    b = StateDiffusion(lambda x, t: 0.6 + 0.3 * (2 * x).sin(), elementwise=True)
    family = target_path(schedule, b).family()
    x = run(family, 1.0, noised_data(schedule, 0.3, NUM), 0.3, 0.9)
    assert kolmogorov_smirnov(x, lambda x: cdf(schedule, 0.9, x)) < 1.95 / NUM**0.5


def test_a_conditional_path_is_the_family_of_its_data():
    path = GaussianPath(2, lambda y, t: t * y, lambda y, t: 1.2 - t, 0.5)
    y, t = torch.randn(3, 2), torch.full((3, 1), 0.4)
    point = path.point(path.draw_noise((3,)), t, y)
    torch.testing.assert_close(path.family(y).drift(point.state, t), point.drift)
