"""Fixed-step solvers of differential equations, differentiable exactly as they compute."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowvi.nn._compiled import can_compile, compiled, structure
from flowvi.transforms._dynamics import Dynamics, FlowDynamics, State
from flowvi.transforms._tanh_solve import Tableau, tanh_run
from flowvi.transforms.divergence import ExactDivergence

__all__ = [
    "RK4",
    "DormandPrince",
    "Euler",
    "FixedStep",
    "Midpoint",
    "Solution",
    "Solver",
]

# Steps in one compiled piece at most. In longer ones the compiler brings together what belongs to
# different steps, whose numbers have left the cache by then; they also take longer to compile.
COMPILED_STEPS = 2


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

    With ``compiled`` up to two steps run as one graph of ``torch.compile``, forwards and
    backwards. The first solve of a kind (with and without gradients, another structure of the
    field) then takes tens of seconds, and one more for other batch sizes than the first (every
    one, with :class:`ExactDivergence`); without a C++ compiler a warning says so and the solve
    runs as without. Solves with penalties or scores, and those inside ``torch.func`` transforms,
    run as without, too. For an :class:`flowvi.nn.MLPField` with up to two hidden layers of tanh
    and its divergence in closed form the backward pass is by hand, which is faster again; for
    others second derivatives are refused.

    Subclasses give ``nodes`` (c), ``rows`` (a), ``weights`` (b) and ``order``.

    Args:
        num_steps: number of steps from time 0 to time 1, at least 1.
        checkpointed: keep only the ends of about ``sqrt(num_steps)`` segments.
        compiled: run through ``torch.compile``.

    Raises:
        ValueError: if ``num_steps`` is not a positive integer.
    """

    num_steps: int = 10
    checkpointed: bool = False
    compiled: bool = field(default=False, kw_only=True)

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
        times = torch.stack([start + h * (steps + c) for c in self.nodes], 1).flatten()
        embedded = dynamics.field.embed(times)
        piece = math.isqrt(num_steps - 1) + 1 if self.checkpointed else num_steps
        run: Callable = self._run
        plain = type(dynamics) is FlowDynamics and not dynamics.terms
        if self.compiled and plain and can_compile(x):
            h, by_hand = x.new_full((), h), tanh_run(Tableau(self.rows, self.weights), dynamics)
            if by_hand is None:
                piece = _divisor(num_steps, min(COMPILED_STEPS, math.isqrt(num_steps - 1) + 1))
                run, state = self._compiled_run(dynamics, piece), _tracked(dynamics, state)
            else:
                run = by_hand
        run = self._checkpointed_run(dynamics, run)
        stages, parts = len(self.nodes), []
        for first in range(0, len(times), stages * piece):
            part = slice(first, first + stages * piece)
            state, integrals = run(dynamics, times[part], embedded[part], state, h)
            parts.append(integrals)
        totals = tuple(sum(pieces[1:], pieces[0]) for pieces in zip(*parts, strict=True))
        return Solution(state, totals, stages * num_steps)

    def _compiled_run(self, dynamics: Dynamics, piece: int) -> Callable:
        divergence = type(dynamics.problem.divergence)
        key = (type(self), piece, structure(dynamics.field), divergence)
        name, static = f"The solve of {dynamics.problem.name}", divergence is ExactDivergence
        run = compiled(_run_steps, name, *key, lean=True, static=static)
        return lambda *args: run(type(self), *args)

    def _checkpointed_run(self, dynamics: Dynamics, run: Callable) -> Callable:
        if not (
            self.checkpointed
            and dynamics.can_recompute
            and torch.is_grad_enabled()
            and _hooks_allowed()
        ):
            return run
        if not torch.compiler.is_compiling():
            run = _replayable(run, dynamics)
        return lambda *args: checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)

    def _run(
        self, dynamics: Dynamics, times: Tensor, embedded: Tensor, state: State, h: float
    ) -> tuple[State, tuple[Tensor, ...]]:
        return _run_steps(type(self), dynamics, times, embedded, state, h)


def _run_steps(
    method: type[FixedStep],
    dynamics: Dynamics,
    times: Tensor,
    embedded: Tensor,
    state: State,
    h: float | Tensor,
) -> tuple[State, tuple[Tensor, ...]]:
    """Steps at the given times; the length is a tensor where they are compiled."""
    stages = len(method.nodes)
    instants = dynamics.instants(times, embedded)
    seen: dict[float, list[tuple[Tensor, ...]]] = {}
    for first in range(0, len(instants), stages):
        rates: list[State] = []
        for i, instant in enumerate(instants[first : first + stages]):
            point = _advance(state, rates, method.rows[i], h)
            if method.weights[i]:
                rate, integrands = dynamics.rates_and_integrands(instant, point)
                seen.setdefault(method.weights[i], []).append(integrands)
            else:
                rate = dynamics.rates(instant, point)
            rates.append(rate)
        state = _advance(state, rates, method.weights, h)
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
    """A part of a solve as a module, so that its parameters can be replaced."""

    def __init__(self, run: Callable, dynamics: Dynamics) -> None:
        super().__init__()
        self.run = run
        self.field = dynamics.field

    def forward(self, *args: object) -> tuple[State, tuple[Tensor, ...]]:
        return self.run(*args)


def _replayable(run: Callable, dynamics: Dynamics) -> Callable:
    """A part that is computed again with the parameters that it had the first time.

    They may have been replaced by others for a while, as when a density is scored with constant
    parameters; the second time is during the backward pass, when that is over.
    """
    module = _Run(run, dynamics)
    parameters = dict(module.named_parameters())
    return lambda *args: torch.func.functional_call(module, parameters, args)


def _advance(
    state: State, rates: list[State], weights: tuple[float, ...], h: float | Tensor
) -> State:
    """The state moved by a weighted sum of rates."""
    moved = list(state)
    for weight, rate in zip(weights, rates, strict=True):
        if not weight:
            continue
        if isinstance(h, Tensor):
            moved = [
                torch.addcmul(x, k, h, value=weight) for x, k in zip(moved, rate, strict=True)
            ]
        else:
            moved = [torch.add(x, k, alpha=h * weight) for x, k in zip(moved, rate, strict=True)]
    return tuple(moved)


def _divisor(number: int, limit: int) -> int:
    """The largest divisor that is at most ``limit``."""
    return next(d for d in range(limit, 0, -1) if number % d == 0)


def _tracked(dynamics: Dynamics, state: State) -> State:
    """A state that needs gradients if anything else does.

    The first piece of the solve is then of the same kind as those that follow, and all run what
    was compiled once.
    """
    others = (dynamics.problem.context, *dynamics.field.parameters())
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in others):
        return tuple(x if x.requires_grad else x.detach().requires_grad_() for x in state)
    return state


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
