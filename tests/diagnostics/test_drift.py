from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from diagnostics_models import exact_draws, target

from flowvi.diagnostics import drift_test
from flowvi.diagnostics.drift import covariance_factor
from flowvi.diagnostics.importance import smoothed_log_weights
from flowvi.diagnostics.shifts import (
    Shifts,
    chain_shifts,
    combine_shifts,
    heavy_tails,
    importance_shifts,
    natural_labels,
    sample_shifts,
)
from flowvi.infer.draws import Draws, guide_draws
from flowvi.infer.target import Target


def _scores(num_runs, **law):
    return [
        drift_test(exact_draws(1000, **law), target(), num_chains=100) for _ in range(num_runs)
    ]


def test_scores_are_standard_normal_at_the_posterior():
    runs = _scores(40)
    for pick in (lambda r: r.natural, lambda r: r.whitened):
        for attr in ("mean_z", "log_sd_z"):
            z = torch.stack([getattr(pick(r), attr) for r in runs])
            # 160 nearly independent scores: the mean has error 0.08, the sd 0.06.
            assert abs(float(z.mean())) < 0.4
            assert 0.75 < float(z.std()) < 1.3
    assert all(0.65 < r.acceptance < 0.95 for r in runs)
    # In whitened coordinates of a normal target two leapfrog steps per transition are enough.
    assert all(r.step_size > 0.6 and r.num_gradients < 80 for r in runs)


def test_slow_chains_have_honest_errors():
    # Chains that keep 0.95 of their start: the start's noise must cancel, not add up.
    scores, errors = [], []
    for _ in range(200):
        guide = torch.randn(1000, 5)
        start = guide[:100]
        chains = 0.95 * start + (1 - 0.95**2) ** 0.5 * torch.randn(1, 100, 5)
        shifts = chain_shifts(list("abcde"), guide, start, chains)
        scores.append(torch.stack([shifts.mean_z, shifts.log_sd_z]))
        errors.append(torch.stack([shifts.mean_se, shifts.log_sd_se]))
    # 1000 scores each: their sd has an error of 0.02.
    spread = torch.stack(scores).std((0, 2))
    assert bool(((spread - 1).abs() < 0.15).all())
    # Without the control variate the error of a mean would be 0.1.
    assert float(torch.stack(errors)[:, 0].mean()) < 0.05


def test_narrow_guide_is_found():
    runs = _scores(5, scale=0.8)
    log_sd = torch.stack([r.natural.log_sd for r in runs])
    assert float(log_sd.mean()) == pytest.approx(math.log(0.8), abs=0.05)
    assert all(float(r.natural.log_sd_z.max()) < -3 for r in runs)
    assert all(r.max_z > 3 for r in runs)


def test_moved_guide_is_found():
    runs = _scores(5, shift=0.3)
    mean = torch.stack([r.natural.mean for r in runs])
    assert float(mean.mean()) == pytest.approx(0.3, abs=0.05)
    assert all(float(r.natural.mean_z.max()) > 3 for r in runs)


def test_importance_shifts_have_honest_errors():
    labels = natural_labels(target())
    scores, values = [], []
    for _ in range(40):
        draws = exact_draws(1000, scale=1.05, shift=0.03)
        log_w, _ = smoothed_log_weights(draws.log_weights)
        shifts = importance_shifts(labels, draws.z, log_w)
        values.append(torch.stack([shifts.mean, shifts.log_sd]))
        truth = torch.tensor([[0.03], [math.log(1.05)]])
        scores.append((values[-1] - truth) / torch.stack([shifts.mean_se, shifts.log_sd_se]))
    assert float(torch.stack(values)[:, 0].mean()) == pytest.approx(0.03, abs=0.003)
    assert float(torch.stack(values)[:, 1].mean()) == pytest.approx(math.log(1.05), abs=0.005)
    # 160 scores each, correlated within a run.
    spread = torch.stack(scores).std((0, 2))
    assert bool(((spread > 0.75) & (spread < 1.3)).all())


def test_heavy_tails_are_told_from_light_ones():
    number = 4000
    uniform = torch.rand(number, 20)
    light = torch.cat(
        [torch.randn(number, 20), uniform, -uniform.log(), (uniform < 0.1).to(uniform)], -1
    )
    heavy, low, high = heavy_tails(light)
    assert not heavy.any()
    assert torch.equal(light.clamp(low, high), light)
    cauchy = torch.randn(number, 20) / torch.randn(number, 20)
    funnel = torch.randn(number, 20) * (1.5 * torch.randn(number, 20)).exp()
    heavy, low, high = heavy_tails(torch.cat([cauchy, funnel], -1))
    assert heavy.all()
    inside = (cauchy >= low[:20]) & (cauchy <= high[:20])
    assert inside.double().mean(0) == pytest.approx(torch.full((20,), 0.98).numpy(), abs=1e-3)
    # Quantiles 0.01 and 0.99 of a Cauchy law are -31.8 and 31.8.
    assert float(high[:20].median()) == pytest.approx(31.8, rel=0.15)


def test_sample_shifts():
    a, b = torch.randn(5000, 3) * 1.5 + 1, torch.randn(5000, 3)
    shifts = sample_shifts(["a", "b", "c"], a, b)
    assert bool(((shifts.mean - 1).abs() < 5 * shifts.mean_se).all())
    assert bool(((shifts.log_sd - math.log(1.5)).abs() < 5 * shifts.log_sd_se).all())
    null = sample_shifts(["a", "b", "c"], torch.randn(5000, 3), b)
    assert float(null.mean_z.abs().max()) < 5
    assert float(null.log_sd_z.abs().max()) < 5


def test_combination():
    def one(value, se):
        return Shifts(["a"], *(torch.tensor([v]) for v in (value, se, value, se)))

    merged = combine_shifts(one(0.1, 0.1), one(0.2, 0.1))
    assert float(merged.mean) == pytest.approx(0.15, abs=1e-3)
    assert float(merged.mean_se) == pytest.approx(0.1 / math.sqrt(2), rel=1e-2)
    # A clash: the clear shift wins over the precise nothing, whichever of the two sees it.
    assert float(combine_shifts(one(0.5, 0.05), one(0.0, 0.01)).mean) == 0.5
    assert float(combine_shifts(one(0.0, 0.01), one(0.5, 0.05)).mean) == 0.5


def test_labels_and_constrained_coordinates():
    def model():
        pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        pyro.sample("share", dist.Dirichlet(torch.full((3,), 4.0)))
        with pyro.plate("J", 2):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    laplace = Target(model)
    result = drift_test(guide_draws(model, laplace, 500), laplace, num_chains=100)
    assert result.natural.labels == ["scale", "share[0]", "share[1]", "share[2]", "x[0]", "x[1]"]
    assert len(result.whitened.labels) == laplace.dim == 5
    assert result.max_z < 4.5
    assert result.chains.shape == (12, 100, 5)


def test_covariance_factor_of_badly_scaled_draws():
    scale = torch.tensor([1e-6, 1.0, 1e6])
    z = torch.randn(5000, 3) @ torch.tensor([[1.0, 0.9, 0], [0, 0.5, 0.9], [0, 0, 0.3]]) * scale
    factor = covariance_factor(z)
    expected = torch.cov(z.T, correction=0) / scale / scale[:, None]
    torch.testing.assert_close((factor @ factor.T) / scale / scale[:, None], expected)
    degenerate = torch.cat([z, z[:, :1], torch.zeros(5000, 1)], -1)
    assert bool(torch.isfinite(covariance_factor(degenerate)).all())


def test_chains_survive_a_model_that_fails():
    def fragile():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x > 0.5, torch.nan, 0.0))

    fragile_target = Target(fragile)
    draws = guide_draws(lambda: pyro.sample("x", dist.Normal(-1.0, 1.0)), fragile_target, 2000)
    kept = draws[torch.isfinite(draws.log_p)]
    result = drift_test(kept, fragile_target, num_chains=200)
    # The posterior is N(0, 1) cut off at 0.5, of mean -phi(0.5) / Phi(0.5).
    normal = dist.Normal(0.0, 1.0)
    exact = -normal.log_prob(torch.tensor(0.5)).exp() / normal.cdf(torch.tensor(0.5))
    assert float(result.chains.mean()) == pytest.approx(float(exact), abs=0.12)
    assert float(result.natural.mean[0]) < -0.2


def test_messages():
    draws = exact_draws(100)
    with pytest.raises(ValueError, match="`num_kept` must be from 1 to .*; got 24"):
        drift_test(draws, target(), num_kept=24)
    with pytest.raises(ValueError, match="`num_chains` must be at least 10; got 5"):
        drift_test(draws, target(), num_chains=5)
    with pytest.raises(ValueError, match="`draws` must hold at least 200 draws.*got 100 of 100"):
        drift_test(draws, target())
    dead = Draws(draws.z, draws.log_q, draws.log_p - math.inf, draws.values)
    with pytest.raises(ValueError, match="got 0 of 100"):
        drift_test(dead, target(), num_chains=20)
