"""Several layers of latents: merging, exact evidence by quadrature, free bits, warm-up."""

from __future__ import annotations

import copy
import math
import pickle
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from registry import IMAGE
from torch import Tensor, nn
from torch.distributions import Normal

from flowvi.models import (
    BernoulliLikelihood,
    HierarchicalVAE,
    LadderVAE,
    ResidualVAE,
    TopDownVAE,
    precision_weighted,
)
from flowvi.objectives import ELBO, BetaELBO, FreeBits, LinearSchedule

SMALL = (1, 2, 2)
MAKERS = {
    "hierarchical": lambda: HierarchicalVAE(BernoulliLikelihood(SMALL), (1, 1), (4, 4)),
    "ladder": lambda: LadderVAE(BernoulliLikelihood(SMALL), (1, 1), (4, 4), batch_norm=False),
    "ladder, batch norm": lambda: LadderVAE(BernoulliLikelihood(SMALL), (1, 1), (4, 4)),
}


def test_merged_law_is_the_normalised_product():
    first, second = (
        torch.distributions.Independent(Normal(torch.randn(4, 3), torch.rand(4, 3) + 0.1), 1)
        for _ in range(2)
    )
    merged = precision_weighted(first, second)
    z = torch.randn(50, 4, 3)
    constant = merged.log_prob(z) - first.log_prob(z) - second.log_prob(z)
    # Minus the log of the integral of the product, which is a normal density of the means.
    spread = (first.variance + second.variance).sqrt()
    exact = -Normal(first.mean, spread).log_prob(second.mean).sum(-1)
    assert torch.allclose(constant, exact.expand(50, 4))


def test_merging_with_a_very_sharp_or_very_wide_law():
    first = Normal(torch.tensor([1.0]), torch.tensor([1e-20])).expand((1,))
    wide = Normal(torch.tensor([5.0]), torch.tensor([1e20]))
    first, wide = (torch.distributions.Independent(law, 1) for law in (first, wide))
    for merged in (precision_weighted(first, wide), precision_weighted(wide, first)):
        assert float(merged.mean) == pytest.approx(1)
        assert float(merged.stddev) == pytest.approx(1e-20)


def quadrature(pair: nn.Module, x: Tensor) -> Tensor:
    """log p(x) by Gauss-Hermite in the upper latent and given it in the lower one."""
    points, weights = np.polynomial.hermite_e.hermegauss(60)
    eps, log_w = torch.tensor(points), torch.tensor(weights).log() - 0.5 * math.log(2 * math.pi)
    top = eps.unsqueeze(-1)
    law = pair.down[0](top) if isinstance(pair, HierarchicalVAE) else pair.stages[1].prior(top)
    z = law.mean + law.stddev * eps.reshape(-1, 1, 1)
    logits = pair.decoder(z).flatten(2)
    scores = (x.flatten(1)[:, None, None] * logits - nn.functional.softplus(logits)).sum(-1)
    return (scores + log_w[:, None] + log_w).flatten(1).logsumexp(1)


@pytest.mark.parametrize("name", MAKERS)
def test_evidence_against_quadrature(name: str):
    pair = MAKERS[name]()
    # A model with much to say and a guide that is near its prior, so that weights are tame.
    for key, parameter in pair.named_parameters():
        nn.init.normal_(parameter, std=0.8 if key.startswith("decoder") else 0.25)
    x = (torch.rand(6, *SMALL) < 0.5).double()
    pair.eval()
    with torch.no_grad():
        exact = quadrature(pair, x)
    estimate = pair.log_likelihood(x, 4000)
    # 4000 draws, five standard errors.
    assert bool(((estimate.value - exact).abs() < 5 * estimate.se + 1e-3).all())
    assert float(estimate.se.max()) < 0.2
    with torch.no_grad():
        elbo = pair.terms(x, num_particles=2000).elbo
    assert bool((elbo < exact + 0.02).all())


def test_every_layer_is_generated_from_the_one_above():
    pair = HierarchicalVAE(BernoulliLikelihood(IMAGE), (3, 2, 2), (6, 5, 4))
    sites = poutine.trace(pair.model).get_trace(None, num_items=5).nodes
    for k in (1, 2):
        law = pair.down[k - 1](sites[f"z{k + 1}"]["value"])
        assert torch.allclose(sites[f"z{k}"]["fn"].mean, law.mean)
        assert float(law.mean.detach().std(0).max()) > 1e-3
    x = (torch.rand(5, *IMAGE) < 0.5).double()
    sites = poutine.trace(pair.guide).get_trace(x).nodes
    for k in (2, 3):
        law = pair.up[k - 1](sites[f"z{k - 1}"]["value"])
        assert torch.allclose(sites[f"z{k}"]["fn"].mean, law.mean)


def test_top_of_a_ladder_sees_the_image_alone():
    pair = LadderVAE(BernoulliLikelihood(IMAGE), (3, 2), (6, 5), batch_norm=False)
    x = (torch.rand(2, *IMAGE) < 0.5).double()
    sites = pair.posterior_trace(x)
    evidence = pair.encoder(x)
    assert torch.allclose(sites["z2"]["fn"].mean[0], evidence[0][:, :2])
    above = sites["z2"]["value"]
    below = pair.stages[1].posterior(pair.stages[1].prior(above), above, evidence[1])
    assert torch.allclose(sites["z1"]["fn"].mean, below.mean)
    assert list(sites) == ["z2", "z1"]


def test_correction_of_a_residual_posterior_starts_at_none():
    pair = ResidualVAE(BernoulliLikelihood(IMAGE), (1, 1), width=4, latent_channels=2)
    for stage in pair.stages:
        nn.init.normal_(stage.prior_net[-1].weight)
    x = (torch.rand(3, *IMAGE) < 0.5).double()
    terms = pair.terms(x)
    assert all(float(d.detach().abs().max()) < 0.02 for d in terms.divergences.values())
    shapes = {n: tuple(s["value"].shape[2:]) for n, s in pair.posterior_trace(x).items()}
    assert shapes == {"z2": (2, 2, 2), "z1": (2, 4, 4)}


def test_warm_up_and_free_bits_see_every_layer():
    pair = LadderVAE(BernoulliLikelihood(IMAGE), (3, 2, 2), (6, 5, 4))
    x = (torch.rand(8, *IMAGE) < 0.5).double()
    beta = {"z1": LinearSchedule(10), "z2": LinearSchedule(20), "z3": 1.0}
    objective = BetaELBO(
        1, beta=beta, free_bits=FreeBits(0.5, per_dimension=True), max_plate_nesting=1
    )
    for _ in range(6):
        objective.differentiable_loss(pair.model, pair.guide, x).backward()
    report = objective.report
    assert float(report["beta/z1"]) == pytest.approx(0.5)
    assert float(report["beta/z2"]) == pytest.approx(0.25)
    assert {"kl/z1", "kl/z2", "kl/z3"} <= set(report)


def test_errors():
    likelihood = BernoulliLikelihood(IMAGE)
    for make in (HierarchicalVAE, LadderVAE):
        with pytest.raises(ValueError, match=r"same length, at least 1; got \(2, 2\) and \(3,\)"):
            make(likelihood, (2, 2), (3,))
        with pytest.raises(ValueError, match="`latent_dims` and `hidden_dims` must be at least 1"):
            make(likelihood, (2, 0), (3, 3))
    with pytest.raises(ValueError, match="`num_stages` must hold positive integers"):
        ResidualVAE(likelihood, ())
    with pytest.raises(ValueError, match=r"sides divisible by 8; got \(1, 4, 4\)"):
        ResidualVAE(likelihood, (1, 1, 1, 1))
    with pytest.raises(ValueError, match="`stages` must hold at least one stage"):
        TopDownVAE(nn.Identity(), [], nn.Identity(), likelihood)


TOP_DOWN = {
    "ladder": lambda: LadderVAE(BernoulliLikelihood(IMAGE), (3, 2, 2), (6, 5, 4)),
    "residual": lambda: ResidualVAE(
        BernoulliLikelihood(IMAGE), (1, 1), width=4, latent_channels=2
    ),
}


def runs_of(pair: TopDownVAE) -> Counter:
    """Counts, from now on, how often each prior network and each step of a state is evaluated."""
    counts: Counter = Counter()

    def counted(key: tuple[int, str], call: Callable) -> Callable:
        def counting(*args: object) -> object:
            counts[key] += 1
            return call(*args)

        return counting

    for k, stage in enumerate(pair.stages):
        for method in ("prior", "advance"):
            setattr(stage, method, counted((k, method), getattr(stage, method)))
    return counts


def forget(pair: TopDownVAE) -> Callable:
    """The pair's model without what the guide has made."""

    def model(*args: object) -> Tensor:
        pair._pass = None
        return pair.model(*args)

    return model


@pytest.mark.parametrize("name", TOP_DOWN)
@pytest.mark.parametrize("particles", [1, 3])
def test_networks_run_once_in_a_step_and_give_the_same_loss_and_gradients(
    name: str, particles: int
):
    pair = TOP_DOWN[name]()
    for parameter in pair.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = (torch.rand(8, *IMAGE) < 0.5).double()
    objective = ELBO(particles, max_plate_nesting=1)
    before, counts, results = copy.deepcopy(pair.state_dict()), runs_of(pair), []
    for model, runs in ((forget(pair), 2), (pair.model, 1)):
        pair.load_state_dict(before)
        pair.zero_grad()
        counts.clear()
        torch.manual_seed(1)
        loss = objective.differentiable_loss(model, pair.guide, x)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in pair.parameters())])
        assert set(counts.values()) == {runs}
        assert len(counts) == 2 * len(pair.stages)
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_batch_normalisation_updates_once_in_a_step():
    pair = TOP_DOWN["ladder"]()
    x = (torch.rand(8, *IMAGE) < 0.5).double()
    ELBO(max_plate_nesting=1).differentiable_loss(pair.model, pair.guide, x)
    norms = [m for m in pair.modules() if isinstance(m, nn.BatchNorm1d)]
    assert {int(norm.num_batches_tracked) for norm in norms} == {1}
    poutine.trace(pair.model).get_trace(x)
    priors = [m for m in pair.stages.modules() if isinstance(m, nn.BatchNorm1d)]
    assert {int(norm.num_batches_tracked) for norm in priors} == {2}


@torch.no_grad()
def _nudge(pair: TopDownVAE) -> None:
    for parameter in pair.parameters():
        parameter.add_(0.1)


CHANGES = {
    "parameters": _nudge,
    "running statistics": lambda pair: [
        m.running_var.mul_(2) for m in pair.modules() if isinstance(m, nn.BatchNorm1d)
    ],
    "mode": lambda pair: pair.train(),
    "copied": lambda pair: pair.load_state_dict(TOP_DOWN["ladder"]().state_dict()),
    "other parameters": lambda pair: [
        setattr(m, "weight", nn.Parameter(m.weight * 2))
        for m in pair.stages.modules()
        if isinstance(m, nn.Linear)
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_taken_over_after_a_change(change: str):
    pair = TOP_DOWN["ladder"]().eval()
    x = (torch.rand(8, *IMAGE) < 0.5).double()
    guide_trace = poutine.trace(pair.guide).get_trace(x)
    CHANGES[change](pair)
    replayed = poutine.trace(poutine.replay(pair.model, trace=guide_trace)).get_trace(x)
    other = copy.deepcopy(pair)
    fresh = poutine.trace(poutine.replay(other.model, trace=guide_trace)).get_trace(x)
    for key in ("z1", "z2", "z3"):
        first, second = replayed.nodes[key]["fn"], fresh.nodes[key]["fn"]
        assert torch.allclose(first.mean, second.mean)
        assert torch.allclose(first.stddev, second.stddev)


def test_only_the_guides_own_draws_are_taken_over():
    pair = TOP_DOWN["ladder"]().eval()
    x = (torch.rand(8, *IMAGE) < 0.5).double()
    guide_trace = poutine.trace(pair.guide).get_trace(x)
    other = torch.randn(8, 2)
    model = poutine.condition(poutine.replay(pair.model, trace=guide_trace), data={"z2": other})
    sites = poutine.trace(model).get_trace(x).nodes
    assert torch.allclose(sites["z1"]["fn"].mean, pair.stages[2].prior(other).mean)
    assert pair._pass is None


def test_a_graph_is_made_where_the_guide_made_none():
    pair = TOP_DOWN["residual"]()
    x = (torch.rand(4, *IMAGE) < 0.5).double()
    with torch.no_grad():
        guide_trace = poutine.trace(pair.guide).get_trace(x)
    model_trace = poutine.trace(poutine.replay(pair.model, trace=guide_trace)).get_trace(x)
    model_trace.log_prob_sum().backward()
    assert all(p.grad is not None for p in pair.stages[1].prior_net[-1].parameters())


def test_predictive_and_copies_after_a_step():
    pair = TOP_DOWN["ladder"]()
    x = (torch.rand(4, *IMAGE) < 0.5).double()
    pair.guide(x)
    copied = pickle.loads(pickle.dumps(pair))
    assert copied._pass is None
    pair.eval()
    draws = Predictive(pair.model, guide=pair.guide, num_samples=3)(x)
    assert draws["z1"].shape == (3, 4, 3)
