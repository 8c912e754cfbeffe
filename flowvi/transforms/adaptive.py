"""Solvers that choose their steps."""

from __future__ import annotations

import enum
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowvi.transforms._dynamics import Dynamics, FlowDynamics, State
from flowvi.transforms._ode_adjoint import solve_with_adjoint
from flowvi.transforms._torchdiffeq import (
    Block,
    NotSolvedError,
    Tolerance,
    TooManyEvaluationsError,
    natural_size,
    solve_adaptively,
)
from flowvi.transforms.ode_solvers import DormandPrince, Solution, Solver

__all__ = ["Adaptive", "AdaptiveMethod"]


class AdaptiveMethod(enum.Enum):
    """Embedded Runge-Kutta methods; the value is torchdiffeq's name."""

    HEUN2 = "adaptive_heun"
    BOSH3 = "bosh3"
    DOPRI5 = "dopri5"
    DOPRI8 = "dopri8"


@dataclass(frozen=True)
class Adaptive(Solver):
    r"""Steps as long as a tolerance allows, by torchdiffeq.

    A step is accepted when every row of the batch is right, relative to its own size: its error
    is at most ``rtol`` times its root mean square plus ``atol`` times its natural size, which is
    that of its start and of its first velocity. So one row does not hurt another, and rows of
    1e-8 or 1e8 are as good as rows of 1. Log-determinants are right to ``atol + rtol * size``
    nats.

    Every step looks at the error, so it waits for the device; the number of evaluations varies,
    and gradients are those of the steps taken. For training prefer a fixed-step solver. On the
    meta device, without numbers, it takes fixed steps.

    Args:
        method: the embedded pair of methods.
        rtol: relative tolerance, positive.
        atol: absolute tolerance, positive.
        max_nfe: evaluations of the field allowed in one solve; where they do not suffice, the
            solve is done again with as many fixed steps and a warning says so.
        adjoint: gradients by a second solve backwards in time, with memory that does not grow
            with the number of steps; right up to the tolerance only, and without second
            derivatives.

    Raises:
        ValueError: if a tolerance is not positive or ``max_nfe`` is below 20.
        RuntimeError: by a solve, if the field is not finite or no step is short enough.

    References:
        Chen, Rubanova, Bettencourt and Duvenaud (2018), Neural ordinary differential equations,
        arXiv:1806.07366, appendix B, for the adjoint; Kidger, Chen and Lyons (2021), "Hey,
        that's not an ODE", arXiv:2009.09457, for leaving integrals out of its error norm.
    """

    method: AdaptiveMethod = AdaptiveMethod.DOPRI5
    rtol: float = 1e-5
    atol: float = 1e-5
    max_nfe: int = 3000
    adjoint: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.method, AdaptiveMethod):
            raise TypeError(f"`method` must be an AdaptiveMethod; got {self.method!r}.")
        for name in ("rtol", "atol"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive; got {getattr(self, name)}.")
        if self.max_nfe < 20:
            raise ValueError(f"`max_nfe` must be at least 20; got {self.max_nfe}.")

    def refined(self) -> Adaptive:
        return replace(self, rtol=self.rtol / 30, atol=self.atol / 30, max_nfe=5 * self.max_nfe)

    @property
    def recomputes(self) -> bool:
        return self.adjoint

    @property
    def tolerance(self) -> Tolerance:
        return Tolerance(self.method.value, self.rtol, self.atol, self.max_nfe)

    @property
    def fallback(self) -> DormandPrince:
        """The fixed steps taken where the tolerance is not reached."""
        return DormandPrince(max(1, self.max_nfe // 6))

    def solve(self, dynamics: Dynamics, state: State, start: float, end: float) -> Solution:
        if state[0].is_meta:
            return self.fallback.solve(dynamics, state, start, end)
        name = dynamics.problem.name
        try:
            if self.adjoint and torch.is_grad_enabled():
                _check_adjoint(dynamics)
                return solve_with_adjoint(self, dynamics.problem, state[0], start, end)
            return self.solve_directly(dynamics, state, start, end)
        except TooManyEvaluationsError:
            steps = self.fallback.num_steps
            note = (
                f"not solved to the tolerance within max_nfe={self.max_nfe} evaluations; took "
                f"{steps} fixed steps instead"
            )
            warnings.warn(
                f"{name} was {note}. Its field may be stiff: allow more evaluations, or "
                "regularise it.",
                stacklevel=2,
            )
            solution = self.fallback.solve(dynamics, state, start, end)
            return replace(solution, note=note)
        except NotSolvedError as error:
            raise RuntimeError(
                f"The field of {name} cannot be solved: {error}. It must be finite and without "
                "jumps along the path."
            ) from error

    def solve_directly(
        self, dynamics: Dynamics, state: State, start: float, end: float
    ) -> Solution:
        """The solve itself, without adjoint and without a way out."""
        batch = state[0].shape[:-1]
        widths = len(state)

        def function(t: Tensor, blocks: list[Tensor]) -> list[Tensor]:
            parts = tuple(b.view(x.shape) for b, x in zip(blocks, state, strict=False))
            rates, integrands = dynamics.rates_and_integrands(dynamics.instant(t), parts)
            return [*rates, *integrands]

        with torch.no_grad():
            t = torch.full((), start, dtype=state[0].dtype, device=state[0].device)
            rates, integrands = dynamics.rates_and_integrands(dynamics.instant(t), state)
        blocks = [
            Block(_rows(x), natural_size(_rows(x), _rows(rate) * (end - start)))
            for x, rate in zip(state, rates, strict=True)
        ]
        blocks += [Block(torch.zeros_like(g).reshape(-1, 1)) for g in integrands]
        ends, count = solve_adaptively(function, blocks, start, end, self.tolerance)
        return Solution(
            tuple(e.view(x.shape) for e, x in zip(ends, state, strict=False)),
            tuple(part.view(batch) for part in ends[widths:]),
            count + 1,
        )


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _check_adjoint(dynamics: Dynamics) -> None:
    if not isinstance(dynamics, FlowDynamics) or dynamics.terms:
        raise NotImplementedError(
            "The adjoint integrates the log-determinant only. Use a fixed-step solver, or "
            "Adaptive(adjoint=False), for further terms and scores."
        )
