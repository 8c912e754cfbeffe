from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from flowvi.distributions import Flow, MixtureFlow
from flowvi.objectives import ELBO, STL
from flowvi.transforms import Whitening

CENTRES = (-20.0, 20.0)


def component(centre):
    whitening = Whitening(1)
    whitening.set_(torch.tensor([centre]), torch.eye(1))
    return Flow(whitening)


@pytest.mark.parametrize("make", [ELBO, STL], ids=["elbo", "stl"])
@pytest.mark.parametrize("particles", [1, 16])
def test_gradient_of_the_weights(make, particles):
    shares = torch.tensor([0.2, 0.8])
    guide_flow = MixtureFlow([component(c) for c in CENTRES], torch.tensor([0.3, -0.1]))
    (logits,) = (p for p in guide_flow.parameters() if p.requires_grad)

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1).mask(False))
        log_p = dist.Normal(torch.tensor(CENTRES), 1.0).log_prob(z) + shares.log()
        # A constant, as every unnormalised posterior has: it must not add noise or bias.
        pyro.factor("density", log_p.logsumexp(-1) - 300.0)

    def guide():
        pyro.sample("z", guide_flow())

    # Far apart, the mixture is its index: the ELBO is -KL of the weights, less the constant.
    w = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((w.exp() * (shares.log() - w)).sum(), logits)
    objective = make(particles, max_plate_nesting=0)
    grads = torch.stack(
        [
            torch.autograd.grad(-objective.differentiable_loss(model, guide), logits)[0]
            for _ in range(600)
        ]
    )
    error = grads.std(0) / math.sqrt(len(grads))
    # Stratified draws with their own mean as baseline leave a bias of order 1 / particles^2.
    bias = 0.0 if particles == 1 else 0.5 / particles**2
    assert ((grads.mean(0) - exact).abs() < 4 * error + bias).all()
    if particles > 1:
        assert grads.std(0).max() < 0.1, "the constant must not add noise"
