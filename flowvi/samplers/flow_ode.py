"""The probability-flow ODE: fixed or adaptive steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowvi.nn import VectorField
from flowvi.samplers.base import Sampler, Span
from flowvi.samplers.process import Ability, GenerativeProcess
from flowvi.transforms import RK4, Adaptive, ExactDivergence
from flowvi.transforms._dynamics import FlowDynamics, Instant, Problem, State
from flowvi.transforms.ode_solvers import FixedStep

__all__ = ["FlowField", "ProbabilityFlow"]


class FlowField(VectorField):
    """Probability flow of a process as the field of a continuous flow on times 0 to 1.

    The times of the process are stretched to [0, 1], so :class:`~flowvi.transforms.Continuous`
    scores states at its last time by their law at its first.

    Args:
        process: with a velocity.

    Raises:
        NotImplementedError: if the process has no flow.
    """

    def __init__(self, process: GenerativeProcess) -> None:
        process.require([Ability.FLOW], "FlowField", "Use the bound in its place.")
        super().__init__(process.dim)
        self.process = process

    def velocity(self, time: Tensor, x: Tensor, prepared: None) -> Tensor:
        length = self.process.high - self.process.low
        # A time for all states, or one for each.
        t = (self.process.low + length * time).unsqueeze(-1)
        return length * self.process.velocity(x, t.expand(*x.shape[:-1], 1))


class _Moving(FlowDynamics):
    """States alone; nothing is integrated along."""

    def rates_and_integrands(self, instant: Instant, state: State) -> tuple[State, tuple]:
        return self.rates(instant, state), ()


class ProbabilityFlow(Sampler):
    r"""Follows the velocity of the marginals, without noise.

    .. math:: \frac{dx}{dt} = v(x, t)

    Args:
        method: an explicit Runge-Kutta method, one step for each interval of the grid; or an
            :class:`~flowvi.transforms.Adaptive` solver, which takes as many as it needs in each.

    Raises:
        TypeError: if ``method`` is neither.

    References:
        Song et al. (2021), Score-based generative modeling through stochastic differential
        equations, arXiv:2011.13456, equation 13.

    Example:
        >>> ProbabilityFlow(RK4).order
        4
    """

    def __init__(self, method: type[FixedStep] | Adaptive = RK4) -> None:
        fixed = isinstance(method, type) and issubclass(method, FixedStep)
        if not fixed and not isinstance(method, Adaptive):
            raise TypeError(
                "`method` must be a class of fixed steps (Euler, Midpoint, RK4, DormandPrince) "
                f"or an Adaptive solver; got {method!r}."
            )
        self.method = method
        self.order = method.order if fixed else None

    @property
    def needs(self) -> frozenset[Ability]:
        return frozenset({Ability.FLOW})

    @property
    def is_adaptive(self) -> bool:
        """Whether the step sizes depend on the states."""
        return isinstance(self.method, Adaptive)

    def step(
        self, process: GenerativeProcess, x: Tensor, span: Span, state: Any
    ) -> tuple[Tensor, Any]:
        if self.is_adaptive:
            return self._solve(process, x, span), state
        method, h = self.method, span.end - span.start
        rates: list[Tensor] = []
        for node, row in zip(method.nodes, method.rows, strict=True):
            rates.append(process.velocity(_moved(x, h, row, rates), span.start + node * h))
        return _moved(x, h, method.weights, rates), state

    def _solve(self, process: GenerativeProcess, x: Tensor, span: Span) -> Tensor:
        field = FlowField(process)
        problem = Problem(field, ExactDivergence(), None, None, process.name)
        length = process.high - process.low
        ends = [float((u.flatten()[0] - process.low) / length) for u in span[:2]]
        return self.method.solve(_Moving(problem), (x,), *ends).state[0]


def _moved(x: Tensor, h: Tensor, weights: tuple[float, ...], rates: list[Tensor]) -> Tensor:
    terms = [
        torch.mul(rate, weight) for weight, rate in zip(weights, rates, strict=True) if weight
    ]
    return x + h * sum(terms) if terms else x
