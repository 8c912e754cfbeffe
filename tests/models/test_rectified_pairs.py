"""Rectified flows as Pyro pairs: every path and coupling, devices, names, saving, errors."""

from __future__ import annotations

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor

from flowvi.flows import nsf
from flowvi.infer import fit
from flowvi.models import (
    DiagonalPosterior,
    IndependentCoupling,
    LatentRectifiedFlow,
    LearnedCoupling,
    MLPDecoder,
    MLPEncoder,
    NormalLikelihood,
    OptimalTransportCoupling,
    PairedCoupling,
    RectifiedFlow,
    SinkhornCoupling,
)
from flowvi.nn import MLPField
from flowvi.objectives import ELBO, IWAE, STL
from flowvi.paths import (
    BrownianBridge,
    DensityTimes,
    DiffusionPath,
    GaussianPath,
    LinearLogSNR,
    StochasticInterpolant,
    matched,
)

B = 6


def learned(context_dim: int = 0) -> LearnedCoupling:
    return LearnedCoupling(nsf(2, 2 + context_dim, num_layers=2, hidden_dims=(4,)))


def straight() -> StochasticInterpolant:
    return StochasticInterpolant(2, None, 0.5)


def gaussian() -> GaussianPath:
    return GaussianPath(2, lambda y, t: t * y, lambda y, t: 1 - 0.9 * t, 0.5)


def latent() -> LatentRectifiedFlow:
    likelihood = NormalLikelihood((3,), 0.5)
    return LatentRectifiedFlow(
        MLPEncoder((3,), (4,)),
        MLPDecoder(2, (4,), likelihood.output_shape),
        likelihood,
        DiagonalPosterior(4, 2),
        flow(BrownianBridge(2, 0.5), learned()),
    )


def flow(path: object, coupling: object = None, context_dim: int = 0) -> RectifiedFlow:
    field = MLPField(2, (4,), context_dim, zero_last=False)
    return RectifiedFlow(field, path, coupling, num_steps=3, num_times=2)


PAIRS = {
    "bridge": lambda: flow(BrownianBridge(2, 0.5)),
    "bridge, context": lambda: flow(BrownianBridge(2, 0.5), learned(3), 3),
    "bridge, learned": lambda: flow(BrownianBridge(2, 0.5), learned()),
    "bridge, learned noise": lambda: flow(
        BrownianBridge(2, torch.nn.Parameter(torch.tensor(0.5))), learned()
    ),
    "bridge, optimal transport": lambda: flow(BrownianBridge(2, 0.5), OptimalTransportCoupling()),
    "latent": latent,
    "matched, gaussian": lambda: flow(matched(gaussian())),
    "straight, learned": lambda: flow(straight(), learned()),
    "straight, pairs": lambda: flow(straight(), PairedCoupling()),
    "straight, sinkhorn": lambda: flow(straight(), SinkhornCoupling(0.5)),
}
DIMS = {"latent": 3, "straight, pairs": 4}


def items(name: str) -> tuple[Tensor, ...]:
    x = torch.randn(B, DIMS.get(name, 2))
    return (x, torch.randn(B, 3)) if "context" in name else (x,)


def draws_of(pair: RectifiedFlow, context: Tensor | None = None) -> Tensor:
    return pair.sample(B, context)


@pytest.mark.parametrize("name", PAIRS)
def test_terms_add_up_to_the_loss_of_stock_pyro(name: str):
    pair, args = PAIRS[name](), items(name)
    with torch.no_grad():
        terms = pair.terms(*args, num_particles=100)
        loss = Trace_ELBO(100, max_plate_nesting=1, vectorize_particles=True)
        stock = loss.loss(pair.model, pair.guide, *args)
    # Two averages of 600 draws, whose spread is below the size of the loss.
    assert float(terms.loss.sum()) == pytest.approx(stock, rel=0.15, abs=2.0)
    assert terms.loss.shape == (B,)


@pytest.mark.parametrize("objective", [ELBO, STL])
@pytest.mark.parametrize("name", PAIRS)
def test_every_parameter_gets_a_gradient(name: str, objective: type):
    pair, args = PAIRS[name](), items(name)
    loss = objective(2).differentiable_loss(pair.model, pair.guide, *args)
    loss.backward()
    assert loss.isfinite()
    for key, parameter in pair.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", PAIRS)
def test_meta_device(name: str):
    pair = PAIRS[name]().to("meta")
    args = [a.to("meta") for a in items(name)]
    with pyro.validation_enabled(False):
        loss = ELBO(2).differentiable_loss(pair.model, pair.guide, *args)
    loss.backward()
    assert loss.is_meta
    assert all(p.grad is not None and p.grad.is_meta for p in pair.parameters())


@pytest.mark.parametrize("name", PAIRS)
def test_float32_follows_the_parameters(name: str):
    pair = PAIRS[name]().float()
    args = [a.float() for a in items(name)]
    assert pair.terms(*args).loss.dtype == torch.float32
    assert draws_of(pair, *args[1:]).dtype == torch.float32


@pytest.mark.parametrize("name", PAIRS)
def test_generates(name: str):
    pair = PAIRS[name]()
    context = items(name)[1:]
    drawn = Predictive(pair.model, num_samples=4)(None, *context, num_items=B)
    dim = 3 if name == "latent" else 2
    assert drawn["x"].shape[-2:] == (B, dim)
    assert draws_of(pair, *context).isfinite().all()


def test_saving_copies_and_two_of_a_kind():
    pair, x = PAIRS["bridge, learned"](), torch.randn(B, 2)
    other = PAIRS["bridge, learned"]()
    before = copy.deepcopy(other.state_dict())
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    svi_other = SVI(other.model, other.guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(3):
        svi.step(x)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    kept = copy.deepcopy(pair.state_dict())
    svi_other.step(x)
    assert all(torch.equal(v, kept[k]) for k, v in pair.state_dict().items())
    assert any(not torch.equal(v, before[k]) for k, v in other.state_dict().items())
    other.load_state_dict(kept)
    losses = []
    for one in (pair, other, copy.deepcopy(pair)):
        torch.manual_seed(3)
        losses.append(one.terms(x).loss)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


class _Mixture(torch.nn.Module):
    """Law of the start whose draws carry no gradient."""

    def forward(self) -> dist.Distribution:
        parts = dist.Normal(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 0.3).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts)


@pytest.mark.parametrize("coupling", [IndependentCoupling, OptimalTransportCoupling, learned])
def test_start_without_reparameterised_draws(coupling: object):
    field = MLPField(2, (4,), zero_last=False)
    path = BrownianBridge(2, 0.5)
    pair = RectifiedFlow(field, path, coupling(), start=_Mixture(), num_steps=3)
    x = torch.randn(B, 2)
    for objective in (ELBO(2), Trace_ELBO(2, max_plate_nesting=1, vectorize_particles=True)):
        pair.zero_grad()
        objective.differentiable_loss(pair.model, pair.guide, x).backward()
        assert all(p.grad.isfinite().all() for p in pair.parameters())
    assert pair.terms(x).elbo.shape == (B,)
    assert pair.sample(5).shape == (5, 2)


@pytest.mark.slow
def test_trains_with_fit_on_minibatches():
    pair = flow(straight(), learned())
    pair.num_total = 40
    x = 3 + 0.1 * torch.randn(10, 2)

    def loss() -> Tensor:
        return pair.terms(x, num_particles=50).loss.mean().detach()

    before = loss()
    fit(pair.model, pair.guide, x, num_steps=80, start=False, progress_bar=False)
    assert loss() < before


def test_straighten_keeps_the_coupling():
    first = flow(BrownianBridge(2, 0.5), learned())
    second = first.straighten()
    assert second.is_deterministic
    trained = {n for n, p in second.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in second.named_parameters() if n.startswith("field.")}
    x, z = torch.randn(B, 2), torch.randn(B, 2)
    laws = (f.coupling(x, f.start(), None).log_prob(z) for f in (first, second))
    assert torch.equal(*laws)
    with pytest.raises(NotImplementedError, match="takes no coupling"):
        flow(gaussian()).straighten()


def test_straighten_weighs_times():
    def density(t: Tensor) -> Tensor:
        return 0.5 + 15 * torch.exp(-30 * t)

    second = flow(BrownianBridge(2, 0.5), learned()).straighten(
        diffusion=lambda t: density(t).rsqrt(), times=DensityTimes(density)
    )
    x = torch.randn(4000, 2)
    draw = second.posterior(x).unpack(second.posterior(x).sample())
    # Every item counts alike, whatever its time; half of them are early.
    assert (draw.weight / draw.diffusion.square()).sub(1).abs().max() < 0.05
    late = draw.time > 0.15
    assert late.double().mean() == pytest.approx(0.5 * 0.85 + 0.5 * math.exp(-4.5), abs=0.01)


def test_bounds_that_exponentiate_are_refused():
    x = torch.randn(B, 2)
    pair = flow(BrownianBridge(2, 0.5))
    with pytest.raises(NotImplementedError, match="IWAE exponentiates log-weights"):
        IWAE(3).loss(pair.model, pair.guide, x)
    with pytest.raises(NotImplementedError, match="Importance weights exponentiate"):
        latent().log_likelihood(torch.randn(B, 3))
    with pytest.raises(NotImplementedError, match="The drift of a process with noise"):
        pair.log_likelihood(x)


def test_parts_that_do_not_fit_are_refused():
    field = MLPField(2, (4,))
    with pytest.raises(TypeError, match="`field` must be a VectorField; got Linear"):
        RectifiedFlow(torch.nn.Linear(2, 2), straight())
    with pytest.raises(TypeError, match="`path` must be a Path; got int"):
        RectifiedFlow(field, 3)
    with pytest.raises(TypeError, match="`coupling` must be a StartCoupling; got str"):
        RectifiedFlow(field, straight(), "independent")
    with pytest.raises(ValueError, match="`field` must have input_dim 3"):
        RectifiedFlow(field, BrownianBridge(3, 0.5))
    with pytest.raises(ValueError, match="`coupling` must be None for GaussianPath"):
        RectifiedFlow(field, gaussian(), IndependentCoupling())
    with pytest.raises(ValueError, match="`path` must not be a DiffusionPath"):
        RectifiedFlow(field, DiffusionPath(2, LinearLogSNR()))


def test_items_that_do_not_fit_are_refused():
    pair = flow(straight())
    with pytest.raises(ValueError, match=r"`x` must have shape \(B, 2\) and a floating dtype"):
        pair.terms(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"`x` must have shape \(B, 2\) and a floating dtype"):
        pair.terms(torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="`x` must be finite; got 1 not finite"):
        pair.terms(torch.tensor([[0.0, torch.nan]]))
    with pytest.raises(ValueError, match="`context` must be None"):
        pair.terms(torch.zeros(3, 2), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="`x` must be given to the guide"):
        pair.guide(None)


def test_latent_flows_that_do_not_fit_are_refused():
    likelihood = NormalLikelihood((3,))
    parts = (MLPEncoder((3,), (4,)), MLPDecoder(2, (4,), likelihood.output_shape), likelihood)
    with pytest.raises(TypeError, match="`flow` must be a RectifiedFlow; got Linear"):
        LatentRectifiedFlow(*parts, DiagonalPosterior(4, 2), torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="`flow` must have paths that end at the latent vector"):
        LatentRectifiedFlow(*parts, DiagonalPosterior(4, 2), flow(matched(gaussian())))
    with pytest.raises(ValueError, match="`flow` must have dim 3"):
        LatentRectifiedFlow(*parts, DiagonalPosterior(4, 3), flow(straight()))
