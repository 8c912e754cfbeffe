"""Four posteriors that need no file: typed numbers, scikit-learn's tables, a funnel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes

__all__ = ["PROBLEMS", "Problem"]

# Rubin (1981), Estimation in parallel randomized experiments, table 1.
SCHOOLS_Y = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
SCHOOLS_SIGMA = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]


@dataclass(frozen=True)
class Problem:
    """A Pyro model, the data it is called with and the two coordinates worth drawing."""

    title: str
    model: Callable
    args: tuple
    joint: tuple[str, str]


def eight_schools_model(y: torch.Tensor, sigma: torch.Tensor) -> None:
    """Non-centred: theta = mu + tau * eta."""
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    with pyro.plate("school", y.shape[-1]):
        eta = pyro.sample("eta", dist.Normal(y.new_zeros(()), 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def eight_schools(dtype: torch.dtype) -> Problem:
    """Coaching effects in eight schools (Rubin 1981), d = 10."""
    args = (torch.tensor(SCHOOLS_Y, dtype=dtype), torch.tensor(SCHOOLS_SIGMA, dtype=dtype))
    return Problem("eight schools", eight_schools_model, args, ("mu", "tau"))


def logistic_model(x: torch.Tensor, label: torch.Tensor) -> None:
    """Logistic regression; the weights form one vector site."""
    scale = x.new_full((x.shape[-1],), 2.5)
    w = pyro.sample("w", dist.Normal(torch.zeros_like(scale), scale).to_event(1))
    logits = (x * w).sum(-1)
    with pyro.plate("patient", x.shape[0]):
        pyro.sample("label", dist.Bernoulli(logits=logits), obs=label)


def logistic(dtype: torch.dtype) -> Problem:
    """Breast cancer table, ten mean features: nearly collinear, so strongly correlated weights."""
    table = load_breast_cancer()
    x = table.data[:, :10]
    x = (x - x.mean(0)) / x.std(0)
    x = np.concatenate([np.ones((len(x), 1)), x], axis=1)
    args = (torch.tensor(x, dtype=dtype), torch.tensor(table.target, dtype=dtype))
    return Problem("logistic regression", logistic_model, args, ("w[1]", "w[3]"))


def hierarchical_model(x: torch.Tensor, group: torch.Tensor, y: torch.Tensor) -> None:
    """Varying intercepts and slopes over age bands, centred: a mild funnel in each group."""
    num_groups = int(group.max()) + 1
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(2), 2.0).to_event(1))
    spread = pyro.sample("spread", dist.HalfNormal(y.new_ones(2)).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(y.new_ones(())))
    with pyro.plate("band", num_groups):
        coef = pyro.sample("coef", dist.Normal(mean, spread).to_event(1))
    picked = coef[..., group, :]
    with pyro.plate("patient", len(y)):
        pyro.sample("y", dist.Normal(picked[..., 0] + picked[..., 1] * x, noise), obs=y)


def hierarchical(dtype: torch.dtype) -> Problem:
    """Diabetes table: progression on body-mass index, eight bands of age, d = 21."""
    table = load_diabetes(scaled=False)
    age, bmi, y = table.data[:, 0], table.data[:, 2], table.target
    edges = np.quantile(age, np.linspace(0, 1, 9)[1:-1])
    args = (
        torch.tensor((bmi - bmi.mean()) / bmi.std(), dtype=dtype),
        torch.tensor(np.digitize(age, edges)),
        torch.tensor((y - y.mean()) / y.std(), dtype=dtype),
    )
    return Problem("hierarchical regression", hierarchical_model, args, ("spread[0]", "coef[0,0]"))


def funnel_model(like: torch.Tensor) -> None:
    """Neal's funnel in ten dimensions: log evidence exactly 0."""
    z0 = pyro.sample("z0", dist.Normal(like.new_zeros(()), 3.0))
    with pyro.plate("rest", 9):
        pyro.sample("z", dist.Normal(torch.zeros_like(z0), (0.5 * z0).exp()))


def funnel(dtype: torch.dtype) -> Problem:
    """Neal (2003), Slice sampling, section 8: no data at all."""
    return Problem("10-D funnel", funnel_model, (torch.zeros((), dtype=dtype),), ("z[0]", "z0"))


PROBLEMS = {
    "eight_schools": eight_schools,
    "logistic": logistic,
    "hierarchical": hierarchical,
    "funnel": funnel,
}
