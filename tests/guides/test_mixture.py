from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_models import DATA, affine, hierarchy, shake
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor

from flowvi.flows import realnvp
from flowvi.guides import AutoMixtureFlow
from flowvi.objectives import ELBO, STL

small = partial(realnvp, num_layers=2, hidden_dims=(8,))
stock = partial(Trace_ELBO, vectorize_particles=True)


@dataclass
class Mode:
    loc: Tensor
    scale_tril: Tensor
    weight: float


def mode(x: float, weight: float, scale: float = 1.0) -> Mode:
    return Mode(torch.tensor([x, 0.0]), scale * torch.eye(2), weight)


def two_modes() -> None:
    """Two Gaussians 8 sd apart, of weights 0.7 and 0.3."""
    wide = dist.Normal(torch.zeros(2), 10.0).to_event(1)
    z = pyro.sample("z", wide)
    centres = torch.tensor([[-4.0, 0.0], [4.0, 0.0]])
    parts = dist.Normal(centres, 1.0).to_event(1).log_prob(z.unsqueeze(-2))
    log_density = (parts + torch.tensor([0.7, 0.3]).log()).logsumexp(-1)
    pyro.factor("two_modes", log_density - wide.log_prob(z))


@pytest.mark.parametrize("objective", [stock, ELBO, STL])
def test_gradient_of_the_weights_against_the_closed_form(objective: object) -> None:
    p, w, sd = torch.tensor([0.7, 0.3]), torch.tensor([0.5, 0.5]), torch.tensor([0.7, 1.2])
    modes = [mode(-4.0, 0.5, 0.7), mode(4.0, 0.5, 1.2)]
    guide = AutoMixtureFlow(two_modes, 2, small, modes=modes).initialize()
    # With modes this far apart, KL(q || p) = sum_k w_k (log w_k / p_k + KL_k), two dimensions.
    divergence = (w / p).log() + 2 * ((sd**2 - 1) / 2 - sd.log())
    exact = w * (divergence - (w * divergence).sum())
    gradients = []
    for _ in range(12):
        guide.zero_grad()
        objective(2000, max_plate_nesting=0).differentiable_loss(two_modes, guide).backward()
        gradients.append(guide.flow.logits.grad.clone())
    gradients = torch.stack(gradients)
    # Five standard errors; the overlap of the modes is of the order of 0.001.
    bound = 5 * gradients.std(0) / 12**0.5 + 0.002
    assert ((gradients.mean(0) - exact).abs() < bound).all()


def test_weights_of_two_modes_are_recovered() -> None:
    modes = [mode(-4.2, 0.5, 0.7), mode(4.3, 0.5, 1.2)]
    guide = AutoMixtureFlow(two_modes, 2, affine, modes=modes).initialize()
    torch.testing.assert_close(guide.weights, torch.tensor([0.5, 0.5]))
    optimizer = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.985})
    svi = SVI(two_modes, guide, optimizer, stock(16, max_plate_nesting=0))
    for _ in range(300):
        svi.step()
    assert (guide.weights - torch.tensor([0.7, 0.3])).abs().max() < 0.05
    draws = guide.get_posterior().sample((20_000,))
    right = draws[:, 0] > 0
    assert abs(float(right.double().mean()) - 0.3) < 0.05
    for side, centre in ((right, 4.0), (~right, -4.0)):
        assert abs(float(draws[side, 0].mean()) - centre) < 0.1
        assert (draws[side].std(0) - 1).abs().max() < 0.1


def test_modes_become_components() -> None:
    guide = AutoMixtureFlow(two_modes, 3, small).initialize()
    guide.whiten_modes([mode(4.0, 0.2), mode(-4.0, 0.6)])
    # The third component shares the heavier mode, whose weight is split.
    torch.testing.assert_close(guide.weights, torch.tensor([0.375, 0.25, 0.375]))
    assert [float(w.loc[0]) for w in guide.whitenings] == [-4.0, 4.0, -4.0]
    with pytest.warns(UserWarning, match="3 components for 4 modes; the lightest are left out"):
        guide.whiten_modes([mode(float(i), 0.1 * (i + 1)) for i in range(4)])
    assert [float(w.loc[0]) for w in guide.whitenings] == [3.0, 2.0, 1.0]


def test_density_is_the_weighted_sum_of_the_components() -> None:
    guide = AutoMixtureFlow(two_modes, 2, small, modes=[mode(-4.0, 0.7), mode(4.0, 0.3)])
    guide.initialize()
    z = 5 * torch.randn(6, 2)
    parts = [dist.Normal(m.loc, 1.0).to_event(1).log_prob(z) for m in guide.whitenings]
    exact = torch.log(0.7 * parts[0].exp() + 0.3 * parts[1].exp())
    torch.testing.assert_close(guide.log_q({"z": z}), exact)


def test_whiten_without_modes_spreads_the_components() -> None:
    guide = AutoMixtureFlow(hierarchy, 3, small).initialize(DATA)
    guide.whiten(torch.ones(7), torch.eye(7))
    first, *others = (w.loc for w in guide.whitenings)
    torch.testing.assert_close(first, torch.ones(7))
    assert all((other - first).norm() > 0.5 for other in others)
    shake(guide)
    assert guide.log_q({"mu": torch.zeros(()), "z": torch.zeros(6)}, DATA).isfinite()


def test_refusals() -> None:
    guide = AutoMixtureFlow(two_modes, 2, small).initialize()
    with pytest.raises(ValueError, match="`modes` must hold at least one mode; got none"):
        guide.whiten_modes([])
    with pytest.raises(ValueError, match=r"`loc` must have shape \(2,\); got \(3,\)"):
        guide.whiten_modes([Mode(torch.zeros(3), torch.eye(2), 1.0)])
    with pytest.raises(ValueError, match="`weight` of a mode must be positive; got 0.0"):
        guide.whiten_modes([mode(0.0, 0.0)])
    with pytest.raises(
        ValueError, match="`num_components` must be an integer of at least 1; got 0"
    ):
        AutoMixtureFlow(two_modes, 0)
    with pytest.raises(
        ValueError, match="`num_components` must be an integer of at least 1; got 0"
    ):
        AutoMixtureFlow(two_modes, modes=[])
    with pytest.raises(TypeError, match="got one Flow for all"):
        AutoMixtureFlow(two_modes, 2, small(2))
    with pytest.raises(RuntimeError, match="no parameters yet"):
        AutoMixtureFlow(two_modes).whiten_modes([mode(0.0, 1.0)])
    neutra = NeuTraReparam(guide)
    with pytest.raises(ValueError, match="NeuTraReparam only supports guides"):
        neutra.reparam(two_modes)()
    with pytest.raises(NotImplementedError, match="no single base and transform"):
        guide.get_transform()
