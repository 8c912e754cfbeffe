"""Problems in the plane for rectified flows, and how the couplings are trained and judged."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import torch
from pyro.distributions import Categorical, Distribution, MixtureSameFamily, Normal
from pyro.infer import SVI
from pyro.optim import PyroLRScheduler
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.quasirandom import SobolEngine
from tqdm import tqdm

from flowvi.distributions import StandardNormal
from flowvi.flows import nsf
from flowvi.infer import Average, CompiledSVI, GlobalOptim
from flowvi.infer.optim import Schedule
from flowvi.models import (
    LearnedCoupling,
    ModelGuidePair,
    OptimalTransportCoupling,
    RectifiedFlow,
    StartCoupling,
    normalised_path_energy,
    wasserstein_distance,
)
from flowvi.nn import MLPField
from flowvi.objectives import ELBO
from flowvi.paths import BrownianBridge, DensityTimes, StochasticInterpolant
from flowvi.samplers import ProbabilityFlow, sample
from flowvi.transforms import RK4, Euler

__all__ = [
    "COUPLINGS",
    "PROBLEMS",
    "Problem",
    "Quality",
    "fit",
    "judge",
    "planar_bridge",
    "train",
]

HIDDEN, FEATURES, BATCH = (128, 128, 128), 32, 256


def spread(number: int, dim: int) -> Tensor:
    """A scrambled Sobol sequence in the open unit cube."""
    return SobolEngine(dim, scramble=True).draw(number).clamp(1e-6, 1 - 1e-6)


def in_polar(u: Tensor) -> Tensor:
    """Standard normal points from the unit square: angle, then radius.

    Every sector of the plane gets its share of an evenly spread sample, which decides how many
    points a flow takes to each cluster.
    """
    angle, radius = 2 * math.pi * u[..., 0], (-2 * u[..., 1].log()).sqrt()
    return radius.unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], -1)


def eight_gaussians(number: int, *, even: bool = False) -> Tensor:
    """Eight Gaussians of variance 0.1 on a circle of radius 5; ``even``: evenly spread draws."""
    # Neighbours of a Sobol sequence are spread evenly, every eighth of it is not.
    index = torch.arange(number) * 8 // number if even else torch.randint(8, (number,))
    angle = index * (math.pi / 4)
    centre = 5 * torch.stack([angle.cos(), angle.sin()], -1)
    noise = in_polar(spread(number, 2)) if even else torch.randn(number, 2)
    return centre + math.sqrt(0.1) * noise


class Moons(nn.Module):
    """Law of two interleaved half circles with noise 0.6, as a mixture with a density."""

    def __init__(self) -> None:
        super().__init__()
        angle = torch.linspace(0, math.pi, 60)
        upper = torch.stack([angle.cos(), angle.sin()], -1)
        lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], -1)
        self.register_buffer("centres", 3 * torch.cat([upper, lower]) - 1)

    def even(self, number: int) -> Tensor:
        """Evenly spread draws."""
        u = spread(number, 3)
        index = (u[:, 0] * len(self.centres)).long()
        return self.centres[index] + 0.6 * in_polar(u[:, 1:])

    def forward(self) -> Distribution:
        weights = Categorical(logits=self.centres.new_zeros(len(self.centres)))
        return MixtureSameFamily(weights, Normal(self.centres, 0.6).to_event(1))


class Normal2(StandardNormal):
    """Standard normal law in the plane, with draws that are spread evenly."""

    def __init__(self) -> None:
        super().__init__(2)

    def even(self, number: int) -> Tensor:
        """Evenly spread draws."""
        return in_polar(spread(number, 2))


@dataclass(frozen=True)
class Problem:
    """Two laws in the plane.

    Args:
        start: makes the module of the starts.
        sigma: noise of the Brownian bridge that the coupling is learnt with.
    """

    start: Callable[[], nn.Module]
    sigma: float


PROBLEMS = {
    "N to 8 Gaussians": Problem(Normal2, 0.5),
    "moons to 8 Gaussians": Problem(Moons, 0.5),
}


def field() -> MLPField:
    """Velocity of every flow here."""
    return MLPField(2, HIDDEN, activation=nn.SiLU)


def crowding(t: Tensor) -> Tensor:
    """Density of the times at which a flow under a learned coupling is trained.

    Half of them crowd at the start, where such a coupling makes the velocity jump.
    """
    return 0.5 + 15 * torch.exp(-30 * t)


def muon_or_adam(params: list[nn.Parameter], lr: float) -> Optimizer:
    """Optimiser of one parameter: Muon between hidden layers, Adam elsewhere.

    Orthogonal updates let a network learn jumps in a few thousand steps. Needs torch 2.9.
    """
    if params[0].dim() == 2 and min(params[0].shape) == HIDDEN[0]:
        return torch.optim.Muon(params, lr=50 * lr, weight_decay=0.0)
    return Adam(params, lr=lr)


def fit(
    flow: ModelGuidePair,
    draw: Callable[[], Tensor],
    num_steps: int,
    name: str,
    *,
    lr: float = 4e-3,
    clip_norm: float = 10.0,
    compiled: bool = False,
    muon: bool = False,
) -> ModelGuidePair:
    """Train by stock SVI on the mean loss of a batch, drawn anew at every step.

    The flow is left with the moving average of its weights. ``compiled`` takes the same steps as
    one graph, which pays from some thousand steps on; ``muon`` takes :func:`muon_or_adam`.
    """
    pyro.clear_param_store()
    model, guide = (pyro.poutine.scale(p, 1 / len(draw())) for p in (flow.model, flow.guide))
    schedule = Schedule(num_steps, warmup_steps=100)
    if muon:
        args = {"optimizer": muon_or_adam, "optim_args": {"lr": lr}, "lr_lambda": schedule}
        optim = PyroLRScheduler(LambdaLR, args, {"clip_norm": clip_norm})
    else:
        optim = GlobalOptim(lr, betas=(0.9, 0.999), clip_norm=clip_norm, schedule=schedule)
    svi = (CompiledSVI if compiled else SVI)(model, guide, optim, ELBO(max_plate_nesting=1))
    bar, mean = tqdm(range(num_steps), desc=name), None
    average = Average.over(len(range(0, num_steps, 4)))
    for step in bar:
        # Validation looks at every number, which costs a third of a step.
        with pyro.validation_enabled(False):
            loss = svi.step(draw())
        if muon:
            optim.step()
        mean = loss if mean is None else 0.99 * mean + 0.01 * loss
        if step % 4 == 0:
            average.update(flow.named_parameters())
        if step % 50 == 0:
            bar.set_postfix(loss=f"{mean:.3f}")
    with torch.no_grad():
        for key, parameter in flow.named_parameters():
            parameter.copy_(average.values[key])
    return flow.eval()


def batch() -> Tensor:
    """Items of one step."""
    return eight_gaussians(BATCH)


def planar_bridge(coupling: str, sigma: float, start: nn.Module | None = None) -> RectifiedFlow:
    """Field and coupling for the bound of a Brownian bridge, not trained yet."""
    return RectifiedFlow(field(), BrownianBridge(2, sigma), JOINTS[coupling](), start=start)


def learned_coupling() -> LearnedCoupling:
    """Spline flow of an encoded item."""
    encoder = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, FEATURES), nn.SiLU())
    return LearnedCoupling(nsf(2, FEATURES, num_layers=4, hidden_dims=(64,)), encoder)


JOINTS: dict[str, Callable[[], StartCoupling | None]] = {
    "independent": lambda: None,
    "minibatch OT": OptimalTransportCoupling,
    "learned": learned_coupling,
}


def straight(problem: Problem, coupling: nn.Module | None = None) -> RectifiedFlow:
    """A flow along straight lines."""
    path = StochasticInterpolant(2, None, 1.0)
    return RectifiedFlow(field(), path, coupling, start=problem.start())


def independent(problem: Problem, num_steps: int) -> RectifiedFlow:
    """Starts that know nothing of the items; the velocity is smooth, and Adam suits it better."""
    return fit(straight(problem), batch, num_steps, "independent", compiled=num_steps >= 1000)


def optimal(problem: Problem, num_steps: int) -> RectifiedFlow:
    """Starts that are dealt out within a batch."""
    flow = straight(problem, OptimalTransportCoupling())
    return fit(flow, batch, num_steps, "minibatch OT")


def learned(problem: Problem, num_steps: int) -> RectifiedFlow:
    """Drift and coupling by the bound, a Schroedinger bridge; then a straight flow under it."""
    bridge = planar_bridge("learned", problem.sigma, problem.start())
    steps = 8 * num_steps
    fit(bridge, batch, steps, "bridge", lr=2e-3, compiled=steps >= 1000)
    flow = bridge.straighten(
        field(), diffusion=lambda t: crowding(t).rsqrt(), times=DensityTimes(crowding)
    )
    flow.num_times = 2
    return fit(flow, batch, num_steps, "learned", muon=True)


COUPLINGS: dict[str, Callable[..., RectifiedFlow]] = {
    "independent": independent,
    "minibatch OT": optimal,
    "learned": learned,
}


def train(problem: str, coupling: str, num_steps: int, seed: int) -> RectifiedFlow:
    """A flow under one of the couplings."""
    pyro.set_rng_seed(seed)
    return COUPLINGS[coupling](PROBLEMS[problem], num_steps)


@dataclass(frozen=True)
class Quality:
    """What a trained flow is worth.

    Args:
        path_energy: normalised path energy.
        straightness: mean straightness.
        few: 2-Wasserstein distance to the data with five Euler steps.
        many: the same with twenty Runge-Kutta steps.
        floor: the same between two samples of the data.
    """

    path_energy: float
    straightness: float
    few: float
    many: float
    floor: float


@torch.no_grad()
def judge(flow: RectifiedFlow, number: int = 2048, repeats: int = 2) -> Quality:
    """Measure a flow on new samples; distances are means over ``repeats`` pairs of samples.

    Starts and data are spread evenly: otherwise chance numbers of points in the eight clusters
    make two samples of the data 0.65 apart at this size, more than the flows differ.
    """
    cost = flow.transport(number, solver=RK4(20))
    distances: dict[str, list[Tensor]] = {"ends": [], "few": [], "many": [], "floor": []}
    for _ in range(repeats):
        start, data = flow.start.even(number), eight_gaussians(number, even=True)
        from_samples = {
            "ends": start,
            "few": sample(flow, ProbabilityFlow(Euler), (number,), 5, start=start),
            "many": sample(flow, ProbabilityFlow(RK4), (number,), 20, start=start),
            "floor": eight_gaussians(number, even=True),
        }
        for name, x in from_samples.items():
            distances[name].append(wasserstein_distance(x, data))
    mean = {name: torch.stack(values).mean() for name, values in distances.items()}
    energy = normalised_path_energy(cost.energy, torch.stack(distances["ends"]).square().mean())
    distances_of = (float(mean[name]) for name in ("few", "many", "floor"))
    return Quality(float(energy), float(cost.straightness.mean()), *distances_of)
