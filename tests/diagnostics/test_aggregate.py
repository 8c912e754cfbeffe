"""Active units and aggregated posteriors against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from registry import PAIRS
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from flowvi.diagnostics import active_units, aggregate_posterior
from flowvi.models import (
    VAE,
    DiagonalPosterior,
    MLPDecoder,
    NormalLikelihood,
    full_posterior,
)


class Same(nn.Module):
    output_dim = 3

    def forward(self, x: Tensor) -> Tensor:
        return x


@torch.no_grad()
def linear(slope: Tensor, scale: float, *, full: bool = False) -> VAE:
    """Posterior N(slope x, scale^2 I) of a two-dimensional latent."""
    likelihood = NormalLikelihood((3,))
    posterior = (full_posterior if full else DiagonalPosterior)(3, 2)
    if full:
        raw = posterior.flow.transform.parts[1].raw
        raw.network.layers[0].weight[:2] = slope
        raw.log_scale.fill_(math.log(scale))
    else:
        layer = posterior.head.layers[0]
        layer.weight[:2] = slope
        layer.bias[2:] = math.log(math.expm1(scale - 1e-4)) - 0.5413
    return VAE(Same(), MLPDecoder(2, (), likelihood.output_shape), likelihood, posterior)


@pytest.mark.parametrize("full", [False, True])
def test_active_units_of_a_linear_posterior(full: bool):
    slope = torch.tensor([[0.5, 0.2, 0.0], [0.0, 0.0, 0.02]])
    x = torch.randn(800, 3)
    exact = (x @ slope.T).var(0)
    units = active_units(linear(slope, 0.8, full=full), x)
    # Without a closed form, means of 32 draws: 800 items, four standard errors of a variance.
    tolerance = 4 * (exact + 0.02) * math.sqrt(2 / 800) if full else 1e-12
    assert bool(((units.variances["z"] - exact).abs() < tolerance).all())
    assert units.counts == {"z": 1}
    assert units.sizes == {"z": 2}


def test_active_units_of_every_layer():
    x = (torch.rand(20, 1, 4, 4) < 0.5).double()
    for name, sizes in {
        "ladder": {"z3": 2, "z2": 2, "z1": 3},
        "hierarchical": {"z1": 3, "z2": 2, "z3": 2},
        "residual": {"z3": 8, "z2": 32, "z1": 32},
    }.items():
        pair = PAIRS[name].make()
        units = active_units(pair, x, num_particles=2)
        assert units.sizes == sizes
        assert pair.training


@pytest.mark.parametrize("full", [False, True])
def test_posteriors_that_say_nothing(full: bool):
    pair = linear(torch.zeros(2, 3), 0.7, full=full)
    result = aggregate_posterior(pair, torch.randn(500, 3))
    exact = 2 * float(kl_divergence(Normal(0.0, 0.7), Normal(0.0, 1.0)))
    assert result.mutual_information.value == pytest.approx(0, abs=1e-9)
    bound = result.marginal_divergence
    # 500 draws, four standard errors.
    assert bound.value == pytest.approx(exact, abs=4 * bound.se)
    assert result.divergence == pytest.approx(bound.value, abs=1e-9)


def test_posteriors_that_tell_all():
    pair = linear(1000 * torch.randn(2, 3), 0.1)
    result = aggregate_posterior(pair, torch.randn(50, 3), max_rows=120)
    assert result.mutual_information.value == pytest.approx(math.log(50), abs=1e-6)


def test_sum_of_both_is_the_mean_divergence():
    pair = linear(torch.tensor([[1.0, 0.3, 0.0], [0.0, -0.5, 0.5]]), 0.5)
    x = torch.randn(400, 3)
    result = aggregate_posterior(pair, x)
    with torch.no_grad():
        law = pair.posterior(x)
    exact = float(kl_divergence(law.base_dist, Normal(0.0, 1.0)).sum(-1).mean())
    se = result.mutual_information.se + result.marginal_divergence.se
    assert result.divergence == pytest.approx(exact, abs=4 * se)
    # Linear and normal: with many items, half the log-determinant of 1 + signal over noise.
    slope = pair.posterior.head.layers[0].weight[:2].detach()
    signal = slope @ torch.cov(x.T) @ slope.T / 0.25
    most = 0.5 * float(torch.linalg.slogdet(torch.eye(2) + signal).logabsdet)
    assert result.mutual_information.value == pytest.approx(most, abs=0.15)


def test_layers_are_taken_together():
    x = (torch.rand(12, 1, 4, 4) < 0.5).double()
    for name in ("ladder", "hierarchical", "residual", "vae, flow prior"):
        result = aggregate_posterior(PAIRS[name].make(), x, max_rows=50)
        assert result.mutual_information.value < math.log(12) + 1e-9
        assert math.isfinite(result.marginal_divergence.value)


def test_errors():
    pair = PAIRS["vae"].make()
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="`x` must hold at least 2 items and .* got 1 and 32"):
        active_units(pair, x)
    with pytest.raises(ValueError, match="`x` must hold at least 2 items; got 1"):
        aggregate_posterior(pair, x)
