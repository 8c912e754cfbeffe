"""Posterior paths of two stochastic processes seen at a few times, beside exact references.

A particle in a double well, which must have crossed over between two observations, and a geometric
Brownian motion. The guide simulates the process with its diffusion and a drift of its own: the
process's, a pull to the next observation and a network, trained by stock SVI. The reference is the
forward-backward recursion on a fine grid of states. Printed are the errors of the guide's means
and standard deviations, as drawn and after weighting by the pathwise likelihood ratio, in units of
the reference's standard deviation.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pyro
import torch
from matplotlib import pyplot as plt
from pyro.distributions import Distribution, LogNormal, Normal
from pyro.infer import SVI
from torch import Tensor, nn
from tqdm import tqdm

from flowvi.distributions import LogRatio, SimulatedPosterior, SimulatedPrior
from flowvi.models import DriftMLP
from flowvi.objectives import ELBO
from flowvi.paths import SDE, StateDiffusion
from flowvi.samplers import simulate

LEVELS = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class Problem:
    """A process in one dimension and what has been seen of it.

    Args:
        title: name in the picture.
        process: the process.
        start: law of its first state, scalar.
        times: grid of the simulation.
        seen: places of the observations in the grid.
        values: observations there.
        residual: their standard deviation.
        support: states of the reference's grid.
    """

    title: str
    process: SDE
    start: Distribution
    times: Tensor
    seen: tuple[int, ...]
    values: Tensor
    residual: float
    support: Tensor


def double_well() -> Problem:
    """Drift 4 (x - x^3): wells at -1 and 1, and observations in both."""
    return Problem(
        "double well",
        SDE(lambda x, t: 4 * (x - x**3), 0.8),
        Normal(-1.0, 0.3),
        torch.linspace(0, 4, 81),
        (10, 30, 60, 70),
        torch.tensor([-1.1, -0.7, 0.9, 1.2]),
        0.2,
        torch.linspace(-2.5, 2.5, 501),
    )


def geometric() -> Problem:
    """Growth at rate 0.3 with noise in proportion to the state."""
    diffusion = StateDiffusion(lambda x, t: 0.6 * x, elementwise=True)
    return Problem(
        "geometric Brownian motion",
        SDE(lambda x, t: 0.3 * x, diffusion),
        LogNormal(0.0, 0.2),
        torch.linspace(0, 2, 51),
        (12, 25, 42),
        torch.tensor([1.6, 0.8, 2.0]),
        0.15,
        torch.linspace(0.02, 6, 900),
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {"double_well": double_well, "geometric": geometric}


@torch.no_grad()
def reference(problem: Problem) -> Tensor:
    """Posterior probabilities of every state of the support at every time, ``(T, states)``."""
    x, times = problem.support, problem.times
    step = float(times[1] - times[0])
    column, zero = x.unsqueeze(-1), torch.zeros(1)
    mean = column + problem.process.drift(column, zero) * step
    noise = problem.process.diffusion(column, zero).expand_as(column)
    moves = Normal(mean, noise * step**0.5).log_prob(x).exp()
    moves = moves / moves.sum(-1, keepdim=True)
    likelihood = torch.ones(len(times), len(x))
    for place, value in zip(problem.seen, problem.values, strict=True):
        likelihood[place] = Normal(x, problem.residual).log_prob(value).exp()
    forward, backward = [_normal(problem.start.log_prob(x).exp())], [torch.ones_like(x)]
    for k in range(1, len(times)):
        forward.append(_normal((forward[-1] * likelihood[k - 1]) @ moves))
        backward.append(_normal(moves @ (backward[-1] * likelihood[-k])))
    return torch.stack(
        [_normal(f * w * b) for f, w, b in zip(forward, likelihood, backward[::-1], strict=True)]
    )


def _normal(weights: Tensor) -> Tensor:
    return weights / weights.sum()


class Pair(nn.Module):
    """Model and guide of one problem; the guide has a learnt context for every observation.

    Args:
        problem: what to infer.
        log_ratio: which log-ratio is scored.
    """

    def __init__(self, problem: Problem, log_ratio: LogRatio = LogRatio.KL) -> None:
        super().__init__()
        self.problem = problem
        self.log_ratio = log_ratio
        self.drift = DriftMLP(1, (32, 32), 4)
        self.context = nn.Parameter(torch.randn(len(problem.seen) + 2, 4))
        self.loc = nn.Parameter(problem.start.loc.clone())
        self.log_scale = nn.Parameter(torch.tensor(-1.5))

    def prior(self) -> SimulatedPrior:
        """Law of the model's site."""
        start, options = self.problem.start.expand((1,)).to_event(1), self._options
        return SimulatedPrior(self.problem.process, start, self.problem.times, **options)

    def posterior(self) -> SimulatedPosterior:
        """Law of the guide's site: g = f + b u, so that g - f vanishes with b."""
        problem, sde = self.problem, self.problem.process
        at = problem.times[[0, *problem.seen, -1]]
        control = self.drift.bind(self.context, at)

        def drift(x: Tensor, t: Tensor) -> Tensor:
            noise = sde.diffusion(x, t)
            return sde.drift(x, t) + noise * (pull(problem, x, t, noise) + control(x, t))

        start = type(problem.start)(self.loc, self.log_scale.exp()).expand((1,)).to_event(1)
        return SimulatedPosterior(sde, drift, start, problem.times, **self._options)

    @property
    def _options(self) -> dict:
        return {"simulator": simulate, "log_ratio": self.log_ratio}

    def model(self) -> None:
        """The process and what has been seen of it."""
        law = self.prior()
        states = law.unpack(pyro.sample("path", law)).states[..., list(self.problem.seen), 0]
        observed = Normal(states, self.problem.residual).to_event(1)
        pyro.sample("seen", observed, obs=self.problem.values)

    def guide(self) -> None:
        """The posterior."""
        pyro.module("pair", self)
        pyro.sample("path", self.posterior())


def pull(problem: Problem, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Control that takes the process to the next observation if it is a Brownian motion from here.

    What is left for a network is the difference that the drift, a noise that changes and the later
    observations make.
    """
    at = problem.times[list(problem.seen)]
    index = torch.searchsorted(at, t.contiguous(), right=True).clamp(max=len(at) - 1)
    left = at[index] - t
    variance = noise.square() * left.clamp(min=0) + problem.residual**2
    return (left > 0) * noise * (problem.values[index] - x) / variance


def train(pair: Pair, num_steps: int) -> Pair:
    """Stock SVI with 32 paths for each step."""
    pyro.clear_param_store()
    optim = pyro.optim.ClippedAdam(
        {"lr": 2e-2, "lrd": 0.05 ** (1 / num_steps), "clip_norm": 100.0}
    )
    svi = SVI(pair.model, pair.guide, optim, ELBO(32, max_plate_nesting=1))
    for _ in tqdm(range(num_steps), leave=False):
        svi.step()
    return pair


@torch.no_grad()
def draw(pair: Pair, num_paths: int) -> tuple[Tensor, Tensor]:
    """Paths of the guide ``(num_paths, T)`` and normalised pathwise importance weights."""
    pair.log_ratio = LogRatio.PATHWISE
    prior, posterior, problem = pair.prior(), pair.posterior(), pair.problem
    value = posterior.sample((num_paths,))
    states = posterior.unpack(value).states[..., 0]
    fit = Normal(states[:, list(problem.seen)], problem.residual).log_prob(problem.values)
    log_w = prior.log_prob(value) - posterior.log_prob(value) + fit.sum(-1)
    return states, log_w.softmax(0)


def errors(
    problem: Problem, exact: Tensor, states: Tensor, weights: Tensor
) -> tuple[float, float]:
    """Largest error over time of mean and log standard deviation, in the reference's units."""
    x = problem.support
    mean = exact @ x
    sd = (exact @ x.square() - mean.square()).sqrt()
    drawn = weights @ states
    spread = (weights @ (states - drawn).square()).sqrt()
    return float(((drawn - mean) / sd).abs().max()), float((spread / sd).log().abs().max())


def bands(problem: Problem, exact: Tensor) -> Tensor:
    """Quantiles of the reference at every time, ``(levels, T)``."""
    cumulated = exact.cumsum(-1)
    places = [(cumulated < level).sum(-1).clamp(max=exact.shape[-1] - 1) for level in LEVELS]
    return torch.stack([problem.support[place] for place in places])


def panel(ax: plt.Axes, problem: Problem, exact: Tensor, states: Tensor) -> None:
    """Bands of the guide as an area, of the reference as lines."""
    levels = torch.tensor(LEVELS, dtype=states.dtype)
    low, middle, high = torch.quantile(states, levels, 0)
    ax.fill_between(problem.times, low, high, alpha=0.3, label="guide, 5 % to 95 %")
    ax.plot(problem.times, middle, label="guide, median")
    for line, level in zip(bands(problem, exact), LEVELS, strict=True):
        style = "-" if level == 0.5 else "--"
        ax.plot(problem.times, line, "k" + style, linewidth=1.0)
    ax.plot([], [], "k--", linewidth=1.0, label="reference")
    ax.plot(problem.times, states[:3].T, color="C0", linewidth=0.4)
    seen = problem.times[list(problem.seen)]
    ax.errorbar(seen, problem.values, 2 * problem.residual, fmt="o", color="C3", label="seen")
    ax.set(title=problem.title, xlabel="time")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=600, help="optimiser steps")
    parser.add_argument("--smoke-test", action="store_true", help="a few steps only, for tests")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for results")
    return parser.parse_args()


def main() -> None:
    """Infer both, print the errors, save the picture."""
    matplotlib.use("Agg")
    args = parse()
    args.output.mkdir(parents=True, exist_ok=True)
    pyro.enable_validation(False)
    pyro.set_rng_seed(0)
    num_steps, num_paths = (3, 50) if args.smoke_test else (args.num_steps, 4000)
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    print(f"{'':<28}{'mean':>8}{'log sd':>8}{'mean, weighted':>16}{'log sd, weighted':>18}")
    for ax, make in zip(axes, PROBLEMS.values(), strict=True):
        problem = make()
        exact = reference(problem)
        states, weights = draw(train(Pair(problem), num_steps), num_paths)
        plain = errors(problem, exact, states, torch.full_like(weights, 1 / num_paths))
        weighted = errors(problem, exact, states, weights)
        ess = float(1 / weights.square().sum())
        print(
            f"{problem.title:<28}{plain[0]:8.3f}{plain[1]:8.3f}{weighted[0]:16.3f}"
            f"{weighted[1]:18.3f}   ({ess:.0f} effective of {num_paths})"
        )
        panel(ax, problem, exact, states)
    axes[0].legend(loc="upper left")
    figure.savefig(args.output / "sde_posteriors.png", dpi=110)
    plt.close(figure)
    print(f"The picture is in {args.output}/sde_posteriors.png.")


if __name__ == "__main__":
    main()
