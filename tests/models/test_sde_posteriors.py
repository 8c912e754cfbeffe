"""Posteriors of a double well and of geometric Brownian motion against a grid of states."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pyro
import pyro.distributions as dist
import pytest
import torch

from flowvi.distributions import LogRatio, SimulatedPosterior, SimulatedPrior
from flowvi.samplers import simulate

PATH = Path(__file__).parents[2] / "examples" / "sde_posteriors.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sde_posteriors", PATH)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["sde_posteriors"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["sde_posteriors"]


def moments(problem: object, exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean = exact @ problem.support
    return mean, (exact @ problem.support.square() - mean.square()).sqrt()


@pytest.mark.parametrize("name", ["double_well", "geometric"])
def test_weighted_paths_of_any_drift_have_the_posterior(example: ModuleType, name: str):
    """A control made by hand, pathwise weights: moments over time against forward-backward."""
    problem = example.PROBLEMS[name]()
    sde, start = problem.process, problem.start.expand((1,)).to_event(1)
    if name == "double_well":
        control = lambda x, t: 3.0 * ((t > 1.4) & (t < 2.4)) * (x < 0.3)  # noqa: E731
    else:
        control = lambda x, t: 1.0 - 2.0 * ((t > 0.4) & (t < 0.9))  # noqa: E731
    given = {"simulator": simulate, "log_ratio": LogRatio.PATHWISE}
    q = SimulatedPosterior(
        sde,
        lambda x, t: sde.drift(x, t) + sde.diffusion(x, t) * control(x, t),
        start,
        problem.times,
        **given,
    )
    p = SimulatedPrior(sde, start, problem.times, **given)
    value = q.sample((120_000,))
    states = q.unpack(value).states[..., 0]
    fit = dist.Normal(states[:, list(problem.seen)], problem.residual).log_prob(problem.values)
    weights = (p.log_prob(value) - q.log_prob(value) + fit.sum(-1)).softmax(0)
    mean, sd = moments(problem, example.reference(problem))
    effective = float(1 / weights.square().sum())
    assert effective > 300
    gap = (weights @ states - mean) / sd
    # The largest of some 80 dependent errors of a mean over `effective` draws.
    assert float(gap.abs().max()) < 4 / effective**0.5
    spread = (weights @ (states - mean).square()).sqrt()
    assert float((spread / sd).log().abs().max()) < 5 / effective**0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["double_well", "geometric"])
def test_trained_guides_are_close(example: ModuleType, name: str):
    torch.set_default_dtype(torch.float32)
    problem = example.PROBLEMS[name]()
    with pyro.validation_enabled(False):
        pair = example.train(example.Pair(problem), 600)
        states, weights = example.draw(pair, 20_000)
    exact = example.reference(problem)
    even = torch.full_like(weights, 1 / len(weights))
    mean, log_sd = example.errors(problem, exact, states, even)
    # Measured: 0.14 and 0.27 for the double well, 0.11 and 0.52 for the geometric motion.
    assert mean < 0.3
    assert log_sd < 0.75
    effective = float(1 / weights.square().sum())
    assert effective > 2000
    mean, log_sd = example.errors(problem, exact, states, weights)
    # The largest of some 80 dependent errors of a mean over `effective` draws.
    assert mean < 4 / effective**0.5
    assert log_sd < 5 / effective**0.5
