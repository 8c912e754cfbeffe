"""Fixed-step solvers of differential equations, differentiable exactly as they compute."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowvi.transforms._dynamics import Dynamics, Instant, State

__all__ = [
    "RK4",
    "DormandPrince",
    "Euler",
    "FixedStep",
    "Midpoint",
    "Solution",
    "Solver",
]


@dataclass(frozen=True)
class Solution:
    """Where a solve ended.

    Args:
        state: the state at the end.
        integrals: the integrals of the integrands, each ``(*batch,)``.
        num_evaluations: how many times the field was evaluated.
        note: what went differently from what was asked, or "".
    """

    state: State
    integrals: tuple[Tensor, ...]
    num_evaluations: int
    note: str = ""


class Solver(abc.ABC):
    """Takes a state from one time to another and integrates along."""

    @property
    def recomputes(self) -> bool:
        """Whether gradients need a second solve, through which no score can be carried."""
        return False

    @abc.abstractmethod
    def solve(self, dynamics: Dynamics, state: State, start: float, end: float) -> Solution:
        """Solve from time ``start`` to time ``end``, either of which may be the later one."""

    @abc.abstractmethod
    def refined(self) -> Solver:
        """A clearly more accurate solver of the same kind, to estimate this one's error."""


@dataclass(frozen=True)
class FixedStep(Solver):
    r"""Explicit Runge-Kutta steps of equal length.

    .. math:: k_i = f(t + c_i h,\; x + h \sum_{j<i} a_{ij} k_j), \qquad
        x' = x + h \sum_i b_i k_i

    No step looks at the numbers, so nothing waits for a device, every solve costs the same, and
    gradients are exactly those of the discrete map. With ``checkpointed`` memory grows like the
    square root of the number of steps, for one more forward solve during the backward pass; it
    has no effect inside ``torch.func`` transforms and on solves that carry a score.

    Subclasses give ``nodes`` (c), ``rows`` (a), ``weights`` (b) and ``order``.

    Args:
        num_steps: number of steps from time 0 to time 1, at least 1.
        checkpointed: keep only the ends of about ``sqrt(num_steps)`` segments.

    Raises:
        ValueError: if ``num_steps`` is not a positive integer.
    """

    num_steps: int = 10
    checkpointed: bool = False

    order: ClassVar[int]
    nodes: ClassVar[tuple[float, ...]]
    rows: ClassVar[tuple[tuple[float, ...], ...]]
    weights: ClassVar[tuple[float, ...]]

    def __post_init__(self) -> None:
        if not isinstance(self.num_steps, int) or self.num_steps < 1:
            raise ValueError(f"`num_steps` must be a positive integer; got {self.num_steps!r}.")

    @property
    def recomputes(self) -> bool:
        return self.checkpointed

    def refined(self) -> FixedStep:
        return type(self)(2 * self.num_steps, self.checkpointed)

    def solve(self, dynamics: Dynamics, state: State, start: float, end: float) -> Solution:
        x = state[0]
        num_steps = max(1, math.ceil(self.num_steps * abs(end - start) - 1e-9))
        # On the meta device only shapes count, and every step has the same.
        num_steps = 1 if x.is_meta else num_steps
        h = (end - start) / num_steps
        steps = torch.arange(num_steps, dtype=x.dtype, device=x.device)
        times = torch.stack([start + h * (steps + c) for c in self.nodes], 1)
        instants = dynamics.instants(times.flatten())
        stages = len(self.nodes)
        length = stages * (math.isqrt(num_steps - 1) + 1 if self.checkpointed else num_steps)
        parts = []
        for first in range(0, len(instants), length):
            state, integrals = self._segment(dynamics, instants[first : first + length], state, h)
            parts.append(integrals)
        totals = tuple(sum(pieces[1:], pieces[0]) for pieces in zip(*parts, strict=True))
        return Solution(state, totals, stages * num_steps)

    def _segment(
        self, dynamics: Dynamics, instants: list[Instant], state: State, h: float
    ) -> tuple[State, tuple[Tensor, ...]]:
        if (
            self.checkpointed
            and dynamics.can_recompute
            and torch.is_grad_enabled()
            and _hooks_allowed()
        ):
            compiling = torch.compiler.is_compiling()
            run = self._run if compiling else _replayable(self, dynamics)
            return checkpoint(
                run, dynamics, instants, state, h, use_reentrant=False, preserve_rng_state=False
            )
        return self._run(dynamics, instants, state, h)

    def _run(
        self, dynamics: Dynamics, instants: list[Instant], state: State, h: float
    ) -> tuple[State, tuple[Tensor, ...]]:
        stages = len(self.nodes)
        seen: dict[float, list[tuple[Tensor, ...]]] = {}
        for first in range(0, len(instants), stages):
            rates: list[State] = []
            for i, instant in enumerate(instants[first : first + stages]):
                point = _advance(state, rates, self.rows[i], h)
                if self.weights[i]:
                    rate, integrands = dynamics.rates_and_integrands(instant, point)
                    seen.setdefault(self.weights[i], []).append(integrands)
                else:
                    rate = dynamics.rates(instant, point)
                rates.append(rate)
            state = _advance(state, rates, self.weights, h)
        # Integrands feed back into nothing, so they are summed once, by equal weights.
        sums = [
            tuple(h * weight * torch.stack(values).sum(0) for values in zip(*rows, strict=True))
            for weight, rows in seen.items()
        ]
        return state, tuple(sum(pieces[1:], pieces[0]) for pieces in zip(*sums, strict=True))


class Euler(FixedStep):
    """Euler's method: order 1, one evaluation a step."""

    order = 1
    nodes = (0.0,)
    rows = ((),)
    weights = (1.0,)


class Midpoint(FixedStep):
    """Explicit midpoint method: order 2, two evaluations a step."""

    order = 2
    nodes = (0.0, 0.5)
    rows = ((), (0.5,))
    weights = (0.0, 1.0)


class RK4(FixedStep):
    """The classical Runge-Kutta method: order 4, four evaluations a step."""

    order = 4
    nodes = (0.0, 0.5, 0.5, 1.0)
    rows = ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0))
    weights = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


class DormandPrince(FixedStep):
    """Dormand and Prince's method without step control: order 5, six evaluations a step.

    References:
        Dormand and Prince (1980), A family of embedded Runge-Kutta formulae, table 2.
    """

    order = 5
    nodes = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0)
    rows = (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    )
    weights = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)


class _Run(nn.Module):
    """A segment of a solve as a module, so that its parameters can be replaced."""

    def __init__(self, solver: FixedStep, dynamics: Dynamics) -> None:
        super().__init__()
        self.solver = solver
        self.field = dynamics.field

    def forward(self, *args: object) -> tuple[State, tuple[Tensor, ...]]:
        return self.solver._run(*args)


def _replayable(solver: FixedStep, dynamics: Dynamics) -> Callable:
    """A segment that is computed again with the parameters that it had the first time.

    They may have been replaced by others for a while, as when a density is scored with constant
    parameters; the second time is during the backward pass, when that is over.
    """
    module = _Run(solver, dynamics)
    parameters = dict(module.named_parameters())
    return lambda *args: torch.func.functional_call(module, parameters, args)


def _advance(state: State, rates: list[State], weights: tuple[float, ...], h: float) -> State:
    """The state moved by a weighted sum of rates."""
    moved = list(state)
    for weight, rate in zip(weights, rates, strict=True):
        if weight:
            moved = [torch.add(x, k, alpha=h * weight) for x, k in zip(moved, rate, strict=True)]
    return tuple(moved)


def _hooks_allowed() -> bool:
    """Whether saved tensors may be treated, which ``torch.func`` transforms forbid."""
    if torch.compiler.is_compiling():
        return True
    try:
        with torch.autograd.graph.saved_tensors_hooks(_same, _same):
            return True
    except RuntimeError:
        return False


def _same(x: object) -> object:
    return x
