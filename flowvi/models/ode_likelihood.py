"""Log-densities by the probability-flow ODE, with what is known of their errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowvi.distributions import Flow
from flowvi.models.pair import LogLikelihood
from flowvi.nn import VectorField
from flowvi.transforms import Divergence, Solver

__all__ = ["ODELikelihood", "flow_likelihood", "standard_error"]

Density = Callable[[Divergence | None, Solver | None], Flow]


@dataclass(frozen=True)
class ODELikelihood(LogLikelihood):
    """Log-densities by the probability-flow ODE, in nats.

    Args:
        value: log-density of each item, ``(B,)``.
        se: standard error from the probes of the divergence, ``(B,)``; 0 for an exact one, NaN
            for a single probe.
        solver_error: distance of each to what a refined solver gives, ``(B,)``.
    """

    solver_error: Tensor


class _Fixed(Divergence):
    """A divergence whose noise has been drawn."""

    def __init__(self, divergence: Divergence, probe: Tensor | None) -> None:
        self.divergence = divergence
        self.probe = probe

    def draw(self, x: Tensor) -> Tensor | None:
        return self.probe

    def velocity_and_divergence(
        self, field: VectorField, time: Tensor, x: Tensor, prepared: Any, probe: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self.divergence.velocity_and_divergence(field, time, x, prepared, probe)


@torch.no_grad()
def flow_likelihood(
    make: Density,
    x: Tensor,
    context: Tensor | None,
    num_probes: int,
    divergence: Divergence | None,
    solver: Solver | None,
) -> ODELikelihood:
    """Mean over probes, its standard error, and its change with a refined solver.

    Args:
        make: makes the density from a divergence and a solver.
        x: items ``(B, dim)``.
        context: what they are conditioned on.
        num_probes: noises of an estimated divergence to average over, all in one solve.
        divergence: as of :class:`~flowvi.transforms.Continuous`.
        solver: likewise.
    """
    given = make(divergence, solver).transform
    exact = given.divergence.draw(x) is None
    rows = x.expand(1 if exact else num_probes, *x.shape).contiguous()
    fixed = _Fixed(given.divergence, given.divergence.draw(rows))

    def solve(solver: Solver) -> Tensor:
        return make(fixed, solver)(context).log_prob(rows)

    values = solve(given.solver)
    error = (solve(given.solver.refined()) - values).mean(0).abs()
    se = torch.zeros_like(error)
    if not exact:
        se = standard_error(values)
    return ODELikelihood(values.mean(0), se, error)


def standard_error(values: Tensor) -> Tensor:
    """Standard error of the mean over the first dim; NaN for a single value."""
    return values.var(0, correction=0).div(len(values) - 1 or torch.nan).sqrt()
