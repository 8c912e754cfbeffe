"""Laws of pixels against enumeration, quadrature and torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.distributions import ContinuousBernoulli as TorchContinuousBernoulli

from flowvi.distributions import CategoricalLevels, ContinuousBernoulli, DiscretisedLogistic

LOGITS = (-60.0, -8.0, -0.7, -0.19, -1e-3, -1e-9, 0.0, 1e-6, 0.21, 0.59, 0.61, 3.0, 40.0)


def nodes(count: int = 200) -> tuple[Tensor, Tensor]:
    """Points and weights of a quadrature on [0, 1], dense at the ends."""
    x, w = (torch.tensor(a) for a in np.polynomial.legendre.leggauss(count))
    t = (x + 1) / 2
    return t * t * (3 - 2 * t), w / 2 * 6 * t * (1 - t)


@pytest.mark.parametrize("logit", LOGITS)
def test_continuous_bernoulli_against_quadrature(logit: float):
    law = ContinuousBernoulli(torch.tensor(logit))
    x, w = nodes()
    density = law.log_prob(x).exp()
    assert float((w * density).sum()) == pytest.approx(1, abs=1e-11)
    assert float((w * density * x).sum()) == pytest.approx(float(law.mean), abs=1e-11)


@pytest.mark.parametrize("logit", [0.0, 1e-4, 0.59, 0.61, 5.0, -200.0, 200.0])
def test_continuous_bernoulli_in_float32(logit: float):
    narrow = ContinuousBernoulli(torch.tensor(logit, dtype=torch.float32, requires_grad=True))
    wide = ContinuousBernoulli(torch.tensor(logit))
    x = torch.tensor([0.0, 0.3, 1.0])
    made = narrow.log_prob(x.float())
    assert torch.allclose(made.double(), wide.log_prob(x), rtol=1e-6, atol=1e-6)
    slope = torch.autograd.grad(made.sum(), narrow.logits)[0]
    assert float(slope) == pytest.approx(float((x - wide.mean).sum()), rel=1e-5, abs=1e-5)


def test_continuous_bernoulli_against_torch_away_from_one_half():
    logits = torch.tensor([-6.0, -1.0, 0.5, 4.0])
    x = torch.rand(9, 1)
    theirs = TorchContinuousBernoulli(logits=logits)
    ours = ContinuousBernoulli(logits)
    assert torch.allclose(ours.log_prob(x), theirs.log_prob(x), atol=1e-10)
    assert torch.allclose(ours.mean, theirs.mean, atol=1e-10)


def test_torch_is_less_exact_around_one_half_in_float32():
    # Just outside the interval where torch expands: half a per mille from 1/2.
    logits = torch.linspace(0.0041, 0.02, 50, dtype=torch.float32)
    exact = ContinuousBernoulli(logits.double()).mean
    ours = (ContinuousBernoulli(logits).mean - exact).abs().max()
    theirs = (TorchContinuousBernoulli(logits=logits).mean - exact).abs().max()
    assert float(ours) < 2e-7
    assert float(theirs) > 10 * float(ours)


def test_continuous_bernoulli_draws():
    logits = torch.tensor([-30.0, -1.0, 0.0, 0.02, 2.0]).requires_grad_()
    law = ContinuousBernoulli(logits)
    x = law.rsample((40_000,))
    assert bool(((x >= 0) & (x <= 1)).all())
    se = x.std(0) / 200
    # 40,000 draws, four standard errors.
    assert bool(((x.mean(0) - law.mean).abs() < 4 * se).all())
    slope = torch.autograd.grad(x.mean(0).sum(), logits)[0]
    exact = torch.autograd.grad(law.mean.sum(), logits)[0]
    assert torch.allclose(slope, exact, atol=5e-3)


def test_continuous_bernoulli_draws_invert_the_distribution_function():
    logits = torch.tensor([-4.0, -0.029, 0.01, 0.029, 0.031, 4.0])
    torch.manual_seed(1)
    x = ContinuousBernoulli(logits).rsample((100,))
    torch.manual_seed(1)
    u = torch.rand(100, 6)
    assert torch.allclose((logits * x).expm1() / logits.expm1(), u, atol=1e-11)


@pytest.mark.parametrize("num_levels", [2, 7, 256])
def test_discretised_logistic_against_differences(num_levels: int):
    loc, log_scale = torch.tensor([-0.9, 0.1, 2.0]), torch.tensor([-1.0, -2.0, 0.5])
    law = DiscretisedLogistic(loc, log_scale, num_levels)
    levels = torch.arange(num_levels, dtype=torch.float64).unsqueeze(-1)
    edges = ((levels[:-1] + 0.5) / (num_levels - 1) * 2 - 1).sub(loc) / log_scale.exp()
    below = torch.cat([torch.zeros(1, 3), 1 / (1 + (-edges).exp()), torch.ones(1, 3)])
    p = law.log_prob(levels).exp()
    assert torch.allclose(p, below.diff(dim=0), atol=1e-14)
    assert torch.allclose((p * levels).sum(0), law.mean, atol=1e-10)


@pytest.mark.parametrize("log_scale", [-9.0, -5.0, 5.0])
def test_discretised_logistic_far_out_in_float32(log_scale: float):
    x = torch.arange(256, dtype=torch.float32)
    args = [torch.tensor(v, dtype=torch.float32, requires_grad=True) for v in (3.0, log_scale)]
    made = DiscretisedLogistic(*args).log_prob(x)
    grads = torch.autograd.grad(made.sum(), args)
    wide = DiscretisedLogistic(*(a.detach().double() for a in args)).log_prob(x.double())
    assert torch.allclose(made.double(), wide, rtol=1e-5)
    assert all(bool(g.isfinite()) for g in (made.sum(), *grads))


def test_categorical_levels_against_torch():
    logits = torch.randn(4, 6)
    ours, theirs = CategoricalLevels(logits), Categorical(logits=logits)
    x = torch.randint(0, 6, (9, 4))
    assert torch.allclose(ours.log_prob(x.double()), theirs.log_prob(x), atol=1e-14)
    mean = (theirs.probs * torch.arange(6)).sum(-1)
    assert torch.allclose(ours.mean, mean, atol=1e-14)


@pytest.mark.parametrize(
    "law",
    [
        DiscretisedLogistic(torch.tensor([-0.5, 0.9]), torch.tensor([-1.0, -0.3]), 5),
        CategoricalLevels(torch.tensor([[0.0, 1.0, -1.0, 0.5, 0.0], [2.0, 0.0, 0.0, 0.0, -9.0]])),
    ],
    ids=["logistic", "categorical"],
)
def test_frequencies_of_levels(law: object):
    x = law.sample((40_000,))
    for level in range(5):
        p = law.log_prob(torch.full((2,), float(level))).exp()
        se = (p * (1 - p) / 40_000).sqrt()
        # 40,000 draws, four standard errors of a frequency.
        assert bool(((x == level).double().mean(0) - p).abs().le(4 * se + 1e-4).all())


def test_expand_keeps_the_law():
    for law in (
        ContinuousBernoulli(torch.randn(3)),
        DiscretisedLogistic(torch.randn(3), torch.randn(1), 9),
        CategoricalLevels(torch.randn(3, 9)),
    ):
        more = law.expand((2, 3))
        assert more.batch_shape == (2, 3)
        assert more.sample((4,)).shape == (4, 2, 3)
        assert torch.equal(
            more.log_prob(torch.ones(2, 3)), law.log_prob(torch.ones(3)).expand(2, 3)
        )


def test_errors():
    with pytest.raises(ValueError, match="`num_levels` must be an integer of at least 2; got 1"):
        DiscretisedLogistic(torch.zeros(()), torch.zeros(()), 1)
    with pytest.raises(ValueError, match="support"):
        ContinuousBernoulli(torch.zeros(()), validate_args=True).log_prob(torch.tensor(1.5))
    with pytest.raises(ValueError, match="support"):
        DiscretisedLogistic(torch.zeros(()), torch.zeros(()), 4).log_prob(torch.tensor(4.0))
    assert math.isinf(CategoricalLevels(torch.tensor([0.0, -torch.inf])).log_prob(torch.ones(())))
