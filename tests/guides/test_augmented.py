"""A guide with extra dimensions: its bound, its weights, its fit."""

from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_models import DATA, affine, hierarchy, hierarchy_posterior, shake
from pyro import poutine
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor

from flowvi.distributions import Flow
from flowvi.flows import realnvp
from flowvi.guides import AutoAugmentedFlow
from flowvi.infer import fit
from flowvi.nn import MLPField
from flowvi.objectives import ELBO, STL
from flowvi.transforms import RK4, Continuous

small = partial(realnvp, num_layers=2, hidden_dims=(8,))


def log_evidence(x: Tensor) -> Tensor:
    covariance = 1.25 * torch.eye(len(x)) + 1.0
    return dist.MultivariateNormal(torch.zeros(len(x)), covariance).log_prob(x)


@pytest.mark.parametrize("objective", [ELBO, STL])
def test_importance_weights_are_unbiased_for_the_evidence(objective: type):
    guide = AutoAugmentedFlow(hierarchy, affine, num_extra=2, init_scale=1.0).initialize(DATA)
    mean, covariance = hierarchy_posterior(DATA)
    guide.whiten(mean, torch.linalg.cholesky(covariance))
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    log_w = objective(20_000, max_plate_nesting=1).log_weight_draws(hierarchy, guide, DATA)
    weights = (log_w - log_evidence(DATA)).exp()
    # 20000 draws; four standard errors.
    assert (weights.mean() - 1).abs() < 4 * weights.std() / 20_000**0.5
    assert log_w.mean() < log_evidence(DATA)


def test_the_bound_is_that_of_the_latent_minus_the_auxiliary_divergence():
    guide = AutoAugmentedFlow(hierarchy, small, num_extra=1).initialize(DATA)
    shake(guide)
    trace = poutine.trace(guide).get_trace(DATA)
    sites = [n for n in trace.nodes if n.startswith("_AutoAugmented")]
    assert sites == [guide.latent_name, f"{guide.latent_name}_auxiliary"]
    latent, extra = trace.nodes[guide.latent_name]["value"].split([7, 1], -1)
    law = guide.get_posterior(DATA)
    log_r = law.log_auxiliary(latent, extra)
    torch.testing.assert_close(
        trace.log_prob_sum(), law.joint.log_prob(torch.cat([latent, extra], -1)) - log_r
    )


def test_log_q_tends_to_the_density_of_the_latent():
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    guide = AutoAugmentedFlow(model, small, num_extra=1, init_scale=1.0).initialize()
    shake(guide)
    grid = torch.linspace(-8, 8, 121).unsqueeze(-1)
    guide.num_score_draws = 4000
    density = guide.log_q({"z": grid}).exp()
    # Unbiased at every point; 4000 draws that all points share leave an error of about 0.01.
    assert torch.trapezoid(density, grid.squeeze(-1)).item() == pytest.approx(1, abs=0.04)


def test_fit_with_a_continuous_flow():
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("w", dist.Normal(z**2, 0.5))

    def recipe(dim: int) -> Flow:
        return Flow(Continuous(MLPField(dim, (16, 16)), solver=RK4(4)))

    guide = AutoAugmentedFlow(model, recipe, num_extra=1)
    result = fit(model, guide, num_steps=150, num_particles=64, seed=0, progress_bar=False)
    # The evidence is 1.
    assert -0.25 < result.elbo < 0.02
    assert set(result.sample(5)) == {"z", "w"}


def test_what_it_has_not():
    guide = AutoAugmentedFlow(hierarchy, small).initialize(DATA)
    with pytest.raises(NotImplementedError, match="no base and transform of the latent alone"):
        guide.get_transform()
    with pytest.raises(ValueError, match="NeuTraReparam only supports guides that implement"):
        NeuTraReparam(guide).reparam(hierarchy)(DATA)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="`num_extra` must be an integer of at least 1; got 0"):
        AutoAugmentedFlow(hierarchy, num_extra=0)
    with pytest.raises(ValueError, match="must make a flow with input_dim 8; got 7"):
        AutoAugmentedFlow(hierarchy, realnvp(7)).initialize(DATA)
    with pytest.raises(ValueError, match="`auxiliary` must have context_dim 7; got 6"):
        AutoAugmentedFlow(hierarchy, auxiliary=realnvp(1, 6)).initialize(DATA)
    guide = AutoAugmentedFlow(hierarchy, small).initialize(DATA)
    with pytest.raises(ValueError, match=r"`loc` must have shape \(7,\)"):
        guide.whiten(torch.zeros(8), torch.eye(8))
