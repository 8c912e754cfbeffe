"""Posterior families: log-densities, start, amortisation."""

from __future__ import annotations

import pytest
import torch
from pyro.distributions import Normal
from registry import POSTERIORS
from torch import Tensor, nn

from flowvi.models import DiagonalPosterior, FlowPosterior
from flowvi.transforms import Permutation, Planar


def drawn(name: str) -> FlowPosterior:
    case = POSTERIORS[name]
    made = case.make()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5 * case.scale)
    return made


@pytest.mark.parametrize("name", POSTERIORS)
def test_log_density_against_the_jacobian_of_the_draw(name: str):
    """log q(z) = log N(eps) - log|dz/deps|, with the Jacobian by autograd from values alone."""
    posterior, h = drawn(name), torch.randn(4, 5)
    eps = torch.randn(4, 3)

    def draw(noise: Tensor, features: Tensor) -> Tensor:
        return posterior.flow.transform.call_and_ladj(noise, features)[0]

    z = draw(eps, h)
    jacobian = torch.stack(
        [
            torch.autograd.functional.jacobian(lambda e, f=f: draw(e, f), e)
            for e, f in zip(eps, h, strict=True)
        ]
    )
    exact = Normal(0.0, 1.0).log_prob(eps).sum(-1) - torch.linalg.slogdet(jacobian).logabsdet
    # Scored as a foreign value, so through the inverse.
    made = posterior(h).log_prob(z.detach().clone())
    assert torch.allclose(made, exact, atol=2e-6 if name == "continuous" else 1e-9)
    value, log_q = posterior(h).rsample_and_log_prob()
    again = posterior(h).log_prob(value.detach().clone())
    assert torch.allclose(log_q, again, atol=2e-6 if name == "continuous" else 1e-9)


@pytest.mark.parametrize("name", POSTERIORS)
def test_starts_near_the_standard_normal(name: str):
    case = POSTERIORS[name]
    posterior, h = case.make(), torch.randn(50, 5)
    with torch.no_grad():
        value, log_q = posterior(h).rsample_and_log_prob((20,))
    prior = Normal(0.0, 1.0).log_prob(value).sum(-1)
    assert posterior.latent_dim == case.input_dim
    assert posterior.feature_dim == case.context_dim
    # Divergence in nats of a law that starts as the identity, or near it.
    assert float((log_q - prior).mean().abs()) < 0.5


@pytest.mark.parametrize("name", POSTERIORS)
def test_every_law_depends_on_the_features(name: str):
    posterior, h = drawn(name), torch.randn(2, 5)
    torch.manual_seed(1)
    first = posterior(h).rsample()
    torch.manual_seed(1)
    second = posterior(h.flip(0)).rsample()
    assert float((first - second).detach().abs().min()) > 1e-4


def test_diagonal_against_the_formula():
    posterior, h = DiagonalPosterior(5, 3), torch.randn(4, 5)
    nn.init.normal_(posterior.head.layers[0].weight)
    nn.init.normal_(posterior.head.layers[0].bias)
    law = posterior(h)
    z = torch.randn(4, 3)
    gap = (z - law.mean) / law.stddev
    exact = -0.5 * gap.square() - law.stddev.log() - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    assert torch.allclose(law.log_prob(z), exact.sum(-1))
    assert float(law.stddev.detach().min()) > 0


def test_layers_without_a_context_are_shared():
    posterior = FlowPosterior(5, [Planar(3, 5), Permutation.reverse(3)])
    assert posterior(torch.zeros(2, 5)).sample().shape == (2, 3)


def test_errors():
    with pytest.raises(ValueError, match="`layers` must hold at least one transform"):
        FlowPosterior(5, [])
    with pytest.raises(ValueError, match="`parts` must agree in context_dim"):
        FlowPosterior(5, [Planar(3, 4)])
