"""Conversions among predictions, and prior drifts made of them."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from registry import PATHS, SCHEDULES

from flowvi.paths import (
    DiffusionPath,
    LinearLogSNR,
    PredictedDrift,
    Prediction,
    ScheduleDiffusion,
    VarianceExploding,
    convert,
    prediction_family,
    split,
)

PAIRS = list(permutations(Prediction, 2))


def truth(schedule, t: torch.Tensor, data: torch.Tensor, noise: torch.Tensor):
    """State and all five predictions, written out."""
    h = 1e-6
    values = schedule(t)
    ahead, behind = schedule(t + h), schedule(t - h)
    velocity = ((ahead.alpha - behind.alpha) * data + (ahead.sigma - behind.sigma) * noise) / (
        2 * h
    )
    state = values.alpha * data + values.sigma * noise
    score = (values.alpha * data - state) / values.sigma**2
    return state, {
        Prediction.ANGULAR: values.alpha * noise - values.sigma * data,
        Prediction.DATA: data,
        Prediction.NOISE: noise,
        Prediction.SCORE: score,
        Prediction.VELOCITY: velocity,
    }


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda p: p.name)
def test_every_conversion_gives_the_truth_and_round_trips(name, source, target):
    schedule = SCHEDULES[name].make()
    t = torch.tensor([[0.2], [0.5], [0.8]])
    data, noise = torch.randn(3, 2), torch.randn(3, 2)
    state, known = truth(schedule, t, data, noise)
    values = schedule(t)
    got = convert(known[source], source, target, state, values)
    torch.testing.assert_close(got, known[target], rtol=1e-4, atol=1e-4)
    output = torch.randn(3, 2)
    there = convert(output, source, target, state, values)
    back = convert(there, target, source, state, values)
    torch.testing.assert_close(back, output, rtol=1e-8, atol=1e-8)


def test_twenty_conversions():
    assert len(PAIRS) == 20


@pytest.mark.parametrize("prediction", list(Prediction), ids=lambda p: p.name)
@pytest.mark.parametrize("name", [n for n in sorted(PATHS) if PATHS[n].make().has_target])
def test_difference_is_that_of_the_two_drifts(name, prediction):
    path = PATHS[name].make()
    y, t = torch.randn(3, 2), torch.tensor([[0.2], [0.5], [0.8]])
    point = path.point(path.draw_noise((3,)), t, y)
    output = torch.randn(3, 2)
    drift = PredictedDrift(path, lambda x, t: output, prediction)
    gap = drift.difference(point.state, t, point.data, point.noise, point.diffusion)
    torch.testing.assert_close(gap, drift(point.state, t) - point.drift, rtol=1e-8, atol=1e-8)
    # The truth as prediction gives the posterior's drift.
    exact = convert(point.data, Prediction.DATA, prediction, point.state, path.schedule(t))
    drift = PredictedDrift(path, lambda x, t: exact, prediction)
    torch.testing.assert_close(drift(point.state, t), point.drift, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0])
def test_weight_of_the_integrand(ratio):
    """|f - g|^2 / (2 b^2) is SNR' |x_hat - y|^2 / 2 times (1 + ratio)^2 / (4 ratio)."""
    schedule = LinearLogSNR(-4.0, 6.0)
    path = DiffusionPath(1, schedule, diffusion=ScheduleDiffusion(schedule, ratio))
    y, t = torch.randn(5, 1), torch.rand(5, 1) * 0.8 + 0.1
    point = path.point(path.draw_noise((5,)), t, y)
    guess = torch.randn(5, 1)
    drift = PredictedDrift(path, lambda x, t: guess)
    gap = drift(point.state, t) - point.drift
    got = gap**2 / (2 * path.diffusion(point.state, t) ** 2)
    h = 1e-6
    slope = (schedule.log_snr(t + h).exp() - schedule.log_snr(t - h).exp()) / (2 * h)
    want = slope / 2 * (guess - y) ** 2 * (1 + ratio) ** 2 / (4 * ratio)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_float32_resolves_a_small_difference_of_large_drifts():
    """At the noise end of a variance-exploding schedule the state is large, and so are drifts."""
    schedule = VarianceExploding(0.01, 5000.0).float()
    path = DiffusionPath(1, schedule)
    t = torch.full((1000, 1), 0.01, dtype=torch.float32)
    y = torch.randint(0, 9, (1000, 1)).float() / 8
    point = path.point(path.draw_noise((1000,)), t, y)
    # Exact in binary, so that the prediction itself is not rounded.
    gap = torch.full_like(y, 2.0**-12)
    want = schedule(t).d_log_snr * gap
    drift = PredictedDrift(path, lambda x, t: y + gap)
    stable = drift.difference(point.state, t, point.data, point.noise, point.diffusion)
    naive = drift(point.state, t) - point.drift
    assert ((stable - want).abs() / want).max() < 1e-4
    assert ((naive - want).abs() / want).median() > 0.1


def test_split_solves_the_system():
    schedule, t = LinearLogSNR(-4.0, 4.0), torch.rand(6, 1)
    x, output = torch.randn(6, 2), torch.randn(6, 2)
    values = schedule(t)
    data, noise = split(output, Prediction.VELOCITY, x, values)
    matrix = torch.stack([values.alpha, values.sigma, values.d_alpha, values.d_sigma], -1)
    want = torch.linalg.solve(matrix.reshape(6, 2, 2), torch.stack([x, output], -2))
    torch.testing.assert_close(torch.stack([data, noise], -2), want)


def test_family_of_a_prediction():
    schedule, t = LinearLogSNR(-4.0, 4.0), torch.rand(6, 1)
    x, output = torch.randn(6, 2), torch.randn(6, 2)
    values = schedule(t)
    family = prediction_family(schedule, lambda x, t: output, Prediction.SCORE, 0.7)
    velocity, score = family.field(x, t)
    torch.testing.assert_close(score, output)
    # v = (log alpha)' x - (sigma sigma' - sigma^2 (log alpha)') s for a Gaussian path.
    rate = values.d_alpha / values.alpha
    want = rate * x - (values.sigma * values.d_sigma - values.sigma**2 * rate) * output
    torch.testing.assert_close(velocity, want)
    torch.testing.assert_close(family.drift(x, t, -1.0), want - 0.7**2 / 2 * output)
    torch.testing.assert_close(family.drift(x, t, 0.0), want)
    torch.testing.assert_close(family.scale(x, t, -0.25), torch.full((6, 1), 0.35))


def test_bad_arguments_are_named():
    path = DiffusionPath(1, LinearLogSNR())
    with pytest.raises(TypeError, match="`path` must be a DiffusionPath; got BrownianBridge"):
        PredictedDrift(PATHS["bridge"].make(), lambda x, t: x)
    with pytest.raises(TypeError, match="`prediction` must be a Prediction; got 'data'"):
        PredictedDrift(path, lambda x, t: x, "data")
