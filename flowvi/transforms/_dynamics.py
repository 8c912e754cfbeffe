"""Right-hand sides of the differential equations that continuous flows solve."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flowvi.nn import VectorField
from flowvi.transforms.divergence import Divergence, checked_velocity

__all__ = [
    "Dynamics",
    "FlowDynamics",
    "Instant",
    "Problem",
    "ScoreDynamics",
    "Stage",
    "State",
    "Term",
]


class Instant(NamedTuple):
    """A time and what the field makes of it."""

    t: Tensor
    embedded: Tensor


@dataclass(frozen=True)
class Stage:
    """One evaluation of the field, as a term to be integrated along the path sees it.

    Args:
        t: time, a scalar tensor.
        x: state ``(*batch, input_dim)``.
        velocity: ``(*batch, input_dim)``.
        divergence: ``(*batch,)``.
        probe: noise of this solve ``(*batch, input_dim)``, None if the divergence uses none.
        context: context of this solve, or None.
        function: the velocity at this time as a function of the state alone.
    """

    t: Tensor
    x: Tensor
    velocity: Tensor
    divergence: Tensor
    probe: Tensor | None
    context: Tensor | None
    function: Callable[[Tensor], Tensor]


# What is integrated over time along the path, one number per row.
Term = Callable[[Stage], Tensor]

State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Problem:
    """What stays the same during one solve.

    Args:
        field: the vector field.
        divergence: how to get its divergence.
        context: context vectors, or None.
        probe: noise of the divergence, or None.
        name: what errors and warnings call the flow.
    """

    field: VectorField
    divergence: Divergence
    context: Tensor | None
    probe: Tensor | None
    name: str


class Dynamics(abc.ABC):
    """The right-hand side of one solve.

    A state is a tuple of tensors that the rates depend on; integrands are functions of the state
    that are integrated along. ``can_recompute`` is false where ``torch.func`` is used inside in a
    way that forbids checkpoints.
    """

    can_recompute = True

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.field = problem.field
        self.prepared = self.field.prepare(problem.context)

    def instant(self, t: Tensor) -> Instant:
        """One time, embedded."""
        return Instant(t, self.field.embed(t))

    def instants(self, times: Tensor, embedded: Tensor) -> list[Instant]:
        """Times one by one that were embedded all at once."""
        return [Instant(*pair) for pair in zip(times.unbind(0), embedded.unbind(0), strict=True)]

    @abc.abstractmethod
    def rates(self, instant: Instant, state: State) -> State:
        """Time derivative of the state."""

    @abc.abstractmethod
    def rates_and_integrands(
        self, instant: Instant, state: State
    ) -> tuple[State, tuple[Tensor, ...]]:
        """Time derivative of the state, and the integrands, each ``(*batch,)``."""


class FlowDynamics(Dynamics):
    """State ``(x,)``; integrands are the divergence and any further terms."""

    def __init__(self, problem: Problem, terms: Sequence[Term] = ()) -> None:
        super().__init__(problem)
        self.terms = tuple(terms)

    def rates(self, instant: Instant, state: State) -> State:
        return (checked_velocity(self.field, instant.embedded, state[0], self.prepared),)

    def rates_and_integrands(
        self, instant: Instant, state: State
    ) -> tuple[State, tuple[Tensor, ...]]:
        (x,) = state
        problem = self.problem
        velocity, divergence = problem.divergence.velocity_and_divergence(
            self.field, instant.embedded, x, self.prepared, problem.probe
        )
        if not self.terms:
            return (velocity,), (divergence,)
        stage = Stage(
            instant.t,
            x,
            velocity,
            divergence,
            problem.probe,
            problem.context,
            lambda x: self.field.velocity(instant.embedded, x, self.prepared),
        )
        return (velocity,), (divergence, *(term(stage) for term in self.terms))


class ScoreDynamics(Dynamics):
    r"""State ``(x, score)``; the integrand is the divergence.

    .. math:: \frac{ds}{dt} = -J^T s - \nabla_x \operatorname{div} v

    The score carries no graph.
    """

    can_recompute = False

    def rates(self, instant: Instant, state: State) -> State:
        return self.rates_and_integrands(instant, state)[0]

    def rates_and_integrands(
        self, instant: Instant, state: State
    ) -> tuple[State, tuple[Tensor, ...]]:
        x, score = state
        problem = self.problem

        def outputs(x: Tensor) -> tuple[Tensor, Tensor]:
            return problem.divergence.velocity_and_divergence(
                self.field, instant.embedded, x, self.prepared, problem.probe
            )

        (velocity, divergence), pull = torch.func.vjp(outputs, x)
        with torch.no_grad():
            (pulled,) = pull((score, torch.ones_like(divergence)))
        return (velocity, -pulled), (divergence,)
