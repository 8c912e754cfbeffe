"""Two posteriors with known log evidence, whose data files are not bundled."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from problems import Problem

__all__ = ["DATA_PROBLEMS", "LOG_EVIDENCE"]

# By importance sampling from adapted Gaussians and Student-t laws, standard error 0.001; the
# funnel is exact.
LOG_EVIDENCE = {"german_credit": -531.282, "seeds": -73.408, "funnel": 0.0}


def german_credit_model(x: torch.Tensor, label: torch.Tensor) -> None:
    """Logistic regression with standard normal weights, d = 25."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[-1]), 1.0).to_event(1))
    logits = (x * w).sum(-1)
    with pyro.plate("applicant", len(x)):
        pyro.sample("label", dist.Bernoulli(logits=logits), obs=label)


def german_credit(folder: Path, dtype: torch.dtype) -> Problem:
    """German credit, numeric (UCI): features over their sd, a column of ones first."""
    table = np.loadtxt(folder / "german.data-numeric")
    x = table[:, :-1] / table[:, :-1].std(0)
    x = np.concatenate([np.ones((len(x), 1)), x], axis=1)
    args = (torch.tensor(x, dtype=dtype), torch.tensor(table[:, -1] - 1, dtype=dtype))
    return Problem("German credit", german_credit_model, args, ("w[0]", "w[1]"))


def seeds_model(n: torch.Tensor, total: torch.Tensor, x1: torch.Tensor, x2: torch.Tensor) -> None:
    """Random-effects logistic regression (Crowder 1978), d = 26."""
    tau = pyro.sample("tau", dist.Gamma(n.new_tensor(0.01), 0.01))
    a = pyro.sample("a", dist.Normal(n.new_zeros(4), 10.0).to_event(1))
    fixed = torch.stack([torch.ones_like(x1), x1, x2, x1 * x2], -1)
    with pyro.plate("plate", len(n)):
        b = pyro.sample("b", dist.Normal(n.new_zeros(()), tau.rsqrt()))
        pyro.sample("n", dist.Binomial(total, logits=(fixed * a).sum(-1) + b), obs=n)


def seeds(folder: Path, dtype: torch.dtype) -> Problem:
    """Germination of seeds on 21 plates."""
    table = json.loads((folder / "seeds_data.json").read_text("utf-8"))
    args = tuple(torch.tensor(table[key], dtype=dtype) for key in ("n", "N", "x1", "x2"))
    return Problem("seeds", seeds_model, args, ("tau", "a[0]"))


DATA_PROBLEMS = {"german_credit": german_credit, "seeds": seeds}
