"""The linear autoencoder against its exact evidence, and priors."""

from __future__ import annotations

import math

import pytest
import torch
from pyro.distributions import MultivariateNormal
from registry import IMAGE
from torch import Tensor, nn
from torch.distributions import Normal

from flowvi.models import (
    VAE,
    DiagonalPosterior,
    MLPDecoder,
    MLPEncoder,
    NormalLikelihood,
    VampPrior,
    full_posterior,
)
from flowvi.objectives import IWAE

DATA, LATENT, NOISE = 5, 2, 0.6


class Same(nn.Module):
    """Encoder that hands the data on."""

    output_dim = DATA

    def forward(self, x: Tensor) -> Tensor:
        return x


def linear(posterior: nn.Module) -> tuple[VAE, Tensor, Tensor]:
    """Probabilistic PCA: its autoencoder, loadings and mean."""
    likelihood = NormalLikelihood((DATA,), NOISE)
    decoder = MLPDecoder(LATENT, (), likelihood.output_shape)
    nn.init.normal_(decoder.network.layers[0].weight)
    vae = VAE(Same(), decoder, likelihood, posterior)
    layer = decoder.network.layers[0]
    return vae, layer.weight.detach(), layer.bias.detach()


def exact_posterior(loadings: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior N(A x + b, L L^T): A, b and L (Tipping and Bishop 1999, equation 11)."""
    precision = loadings.T @ loadings + NOISE**2 * torch.eye(LATENT)
    slope = torch.linalg.solve(precision, loadings.T)
    factor = torch.linalg.cholesky(NOISE**2 * torch.linalg.inv(precision))
    return slope, -slope @ mean, factor


@torch.no_grad()
def set_right(posterior: nn.Module, loadings: Tensor, mean: Tensor) -> None:
    """Give a full-covariance posterior the parameters of the exact one."""
    slope, shift, factor = exact_posterior(loadings, mean)
    raw = posterior.flow.transform.parts[1].raw
    raw.network.layers[0].weight[:LATENT] = slope
    raw.loc.copy_(shift)
    raw.log_scale.copy_(factor.diagonal().log())
    raw.lower.copy_(factor / factor.diagonal().unsqueeze(-1))


def evidence(loadings: Tensor, mean: Tensor, x: Tensor) -> Tensor:
    covariance = loadings @ loadings.T + NOISE**2 * torch.eye(DATA)
    return MultivariateNormal(mean, covariance).log_prob(x)


def test_the_right_posterior_leaves_no_gap():
    posterior = full_posterior(DATA, LATENT)
    vae, loadings, mean = linear(posterior)
    set_right(posterior, loadings, mean)
    x = 3 * torch.randn(40, DATA)
    exact = evidence(loadings, mean, x)
    terms = vae.terms(x, num_particles=1)
    assert torch.allclose(terms.elbo, exact, atol=1e-10)
    estimate = vae.log_likelihood(x, 3)
    assert torch.allclose(estimate.value, exact, atol=1e-10)
    assert float(estimate.se.max()) < 1e-6


def test_in_float32_to_four_digits():
    posterior = full_posterior(DATA, LATENT)
    vae, loadings, mean = linear(posterior)
    set_right(posterior, loadings, mean)
    x = 2 * torch.randn(40, DATA)
    estimate = vae.float().log_likelihood(x.float(), 3)
    assert torch.allclose(estimate.value.double(), evidence(loadings, mean, x), atol=1e-4)


@torch.no_grad()
def wrong(loadings: Tensor, mean: Tensor) -> DiagonalPosterior:
    """The best diagonal posterior's means, and scales that are too wide."""
    posterior = DiagonalPosterior(DATA, LATENT)
    slope, shift, factor = exact_posterior(loadings, mean)
    layer = posterior.head.layers[0]
    layer.weight[:LATENT], layer.bias[:LATENT] = slope, shift
    scale = 1.2 * (factor @ factor.T).diagonal().sqrt()
    layer.bias[LATENT:] = (scale - 1e-4).expm1().log() - 0.5413
    return posterior


def test_importance_weighted_estimates_are_unbiased():
    vae, loadings, mean = linear(DiagonalPosterior(DATA, LATENT))
    vae.posterior = wrong(loadings, mean)
    x = mean + 2 * torch.randn(1, DATA)
    exact = evidence(loadings, mean, x)
    repeats = vae.log_likelihood(x.expand(20_000, DATA), 4)
    ratio = (repeats.value - exact).exp()
    se = float(ratio.std()) / math.sqrt(len(ratio))
    # 20,000 estimates of p(x), each of 4 draws; four standard errors.
    assert float(ratio.mean()) == pytest.approx(1, abs=4 * se)
    assert se < 0.02
    many = vae.log_likelihood(x, 40_000)
    assert float(many.value) == pytest.approx(float(exact), abs=4 * float(many.se))
    assert float(many.se) < 0.02
    # The bound in the mean, and its order in the number of draws.
    one = vae.log_likelihood(x.expand(20_000, DATA), 1).value.mean()
    assert float(one) < float(repeats.value.mean()) < float(exact)


def test_gap_of_a_wrong_posterior_is_its_divergence():
    vae, loadings, mean = linear(DiagonalPosterior(DATA, LATENT))
    vae.posterior = wrong(loadings, mean)
    x = torch.randn(1, DATA)
    slope, shift, factor = exact_posterior(loadings, mean)
    right = MultivariateNormal(slope @ x[0] + shift, scale_tril=factor)
    with torch.no_grad():
        law = vae.posterior(x)
        q = MultivariateNormal(law.mean[0], torch.diag(law.variance[0]))
        elbo = vae.terms(x.expand(20_000, DATA)).elbo
    gap = evidence(loadings, mean, x) - elbo.mean()
    exact = torch.distributions.kl_divergence(q, right)
    # 20,000 draws, four standard errors.
    assert float(gap) == pytest.approx(float(exact), abs=4 * float(elbo.std()) / 141)


@pytest.mark.slow
def test_training_closes_the_gap():
    """Two hundred steps of the multi-sample bound; the data come from another linear model."""
    vae, _, _ = linear(full_posterior(DATA, LATENT))
    x = torch.randn(200, LATENT) @ torch.randn(LATENT, DATA) + 0.6 * torch.randn(200, DATA)
    objective = IWAE(4, max_plate_nesting=1)
    optim = torch.optim.Adam(vae.parameters(), lr=0.03)
    for _ in range(200):
        optim.zero_grad()
        objective.differentiable_loss(vae.model, vae.guide, x).backward()
        optim.step()
    layer = vae.decoder.network.layers[0]
    exact = evidence(layer.weight.detach(), layer.bias.detach(), x)
    with torch.no_grad():
        gap = exact - vae.terms(x, num_particles=20).elbo
    assert 0 <= float(gap.mean()) < 0.05


# Priors.


def test_vamp_prior_against_a_sum():
    encoder, posterior = MLPEncoder(IMAGE, (8,)), DiagonalPosterior(8, 3)
    for parameter in posterior.parameters():
        nn.init.normal_(parameter)
    prior = VampPrior(encoder, posterior, torch.rand(6, *IMAGE))
    with torch.no_grad():
        law = posterior(encoder(prior.inputs))
        z = torch.randn(10, 3)
        parts = Normal(law.mean, law.stddev).log_prob(z.unsqueeze(1)).sum(-1).exp()
        assert torch.allclose(prior().log_prob(z), parts.mean(1).log())
        draws = prior().sample((20_000,))
    # 20,000 draws, five standard errors.
    se = draws.std(0) / 141
    assert bool(((draws.mean(0) - law.mean.mean(0)).abs() < 5 * se).all())


def test_vamp_prior_starts_at_its_inputs():
    inputs = torch.rand(6, *IMAGE)
    prior = VampPrior(MLPEncoder(IMAGE, (8,)), DiagonalPosterior(8, 3), inputs)
    assert torch.allclose(prior.inputs, inputs.clamp(0.01, 0.99))
    with pytest.raises(ValueError, match=r"`inputs` must be images \(K, \*event_shape\) of a"):
        VampPrior(MLPEncoder(IMAGE, (8,)), DiagonalPosterior(8, 3), torch.zeros(6, 2).int())
