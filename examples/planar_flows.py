"""Problems in the plane for rectified flows, and how the couplings are trained and judged."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import torch
from pyro.distributions import Categorical, Distribution, MixtureSameFamily, Normal
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.quasirandom import SobolEngine
from tqdm import tqdm

from flowvi.distributions import StandardNormal
from flowvi.flows import nsf
from flowvi.models import (
    LearnedCoupling,
    OptimalTransportCoupling,
    RectifiedFlow,
    normalised_path_energy,
    wasserstein_distance,
)
from flowvi.nn import MLPField
from flowvi.paths import BrownianBridge, StochasticInterpolant
from flowvi.samplers import ProbabilityFlow, sample
from flowvi.transforms import RK4, Euler

__all__ = ["COUPLINGS", "PROBLEMS", "Problem", "Quality", "fit", "judge", "train"]

HIDDEN, FEATURES, BATCH = (64, 64, 64), 32, 256


def eight_gaussians(number: int, *, even: bool = False) -> Tensor:
    """Eight Gaussians of variance 0.1 on a circle of radius 5; ``even``: equally many of each."""
    index = torch.arange(number) % 8 if even else torch.randint(8, (number,))
    angle = index * (math.pi / 4)
    centre = 5 * torch.stack([angle.cos(), angle.sin()], -1)
    return centre + math.sqrt(0.1) * torch.randn(number, 2)


class Moons(nn.Module):
    """Law of two interleaved half circles with noise 0.6, as a mixture with a density."""

    def __init__(self) -> None:
        super().__init__()
        angle = torch.linspace(0, math.pi, 60)
        upper = torch.stack([angle.cos(), angle.sin()], -1)
        lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], -1)
        self.register_buffer("centres", 3 * torch.cat([upper, lower]) - 1)

    def even(self, number: int) -> Tensor:
        """Draws with equally many of each component."""
        centres = self.centres[torch.arange(number) % len(self.centres)]
        return centres + 0.6 * torch.randn_like(centres)

    def forward(self) -> Distribution:
        weights = Categorical(logits=self.centres.new_zeros(len(self.centres)))
        return MixtureSameFamily(weights, Normal(self.centres, 0.6).to_event(1))


class Normal2(StandardNormal):
    """Standard normal law in the plane, with draws that are spread evenly."""

    def __init__(self) -> None:
        super().__init__(2)

    def even(self, number: int) -> Tensor:
        """A scrambled Sobol sequence."""
        engine = SobolEngine(2, scramble=True)
        return torch.special.ndtri(engine.draw(number).clamp(1e-6, 1 - 1e-6))


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
    "N to 8 Gaussians": Problem(Normal2, 0.7),
    "moons to 8 Gaussians": Problem(Moons, 0.7),
}


def field() -> MLPField:
    """Velocity of every flow here."""
    return MLPField(2, HIDDEN, activation=nn.SiLU)


def fit(
    flow: RectifiedFlow,
    draw: Callable[[], Tensor],
    num_steps: int,
    name: str,
    clip_norm: float = 10.0,
) -> RectifiedFlow:
    """Train by stock SVI on the mean loss of a batch, drawn anew at every step."""
    pyro.clear_param_store()
    settings = {"lr": 2e-3, "lrd": 0.02 ** (1 / num_steps), "clip_norm": clip_norm}
    model, guide = (pyro.poutine.scale(p, 1 / len(draw())) for p in (flow.model, flow.guide))
    svi = SVI(model, guide, pyro.optim.ClippedAdam(settings), Trace_ELBO())
    bar, mean = tqdm(range(num_steps), desc=name), None
    for step in bar:
        # Validation looks at every number, which costs a third of a step.
        with pyro.validation_enabled(False):
            loss = svi.step(draw())
        mean = loss if mean is None else 0.99 * mean + 0.01 * loss
        if step % 50 == 0:
            bar.set_postfix(loss=f"{mean:.3f}")
    return flow.eval()


def batch() -> Tensor:
    """Items of one step."""
    return eight_gaussians(BATCH)


def straight(problem: Problem, coupling: nn.Module | None = None) -> RectifiedFlow:
    """A flow along straight lines."""
    path = StochasticInterpolant(2, None, 1.0)
    return RectifiedFlow(field(), path, coupling, start=problem.start())


def learn_coupling(problem: Problem, num_steps: int) -> RectifiedFlow:
    """Drift and coupling by the bound: a Schroedinger bridge."""
    encoder = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, FEATURES), nn.SiLU())
    posterior = nsf(2, FEATURES, num_layers=4, hidden_dims=(64,))
    coupling = LearnedCoupling(posterior, encoder)
    bridge = BrownianBridge(2, problem.sigma)
    flow = RectifiedFlow(field(), bridge, coupling, start=problem.start())
    return fit(flow, batch, num_steps, "bridge")


COUPLINGS: dict[str, Callable[[Problem, int], RectifiedFlow]] = {
    "independent": lambda problem, n: fit(straight(problem), batch, n, "independent"),
    "minibatch OT": lambda problem, n: fit(
        straight(problem, OptimalTransportCoupling()), batch, n, "minibatch OT"
    ),
    "learned": lambda problem, n: fit(
        learn_coupling(problem, n).straighten(field()), batch, n, "learned"
    ),
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
def judge(flow: RectifiedFlow, number: int = 2000, repeats: int = 2) -> Quality:
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
