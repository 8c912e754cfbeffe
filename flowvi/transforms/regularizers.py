"""Penalties on how a continuous flow moves, integrated in the same solve as its log-density."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from flowvi.nn import VectorField
from flowvi.nn._tanh_layers import TanhLayers, divergence_rate, tanh_layers
from flowvi.transforms._dynamics import Dynamics, Instant, Stage, State, Term
from flowvi.transforms.divergence import ClosedFormDivergence, Probe
from flowvi.transforms.ode_solvers import Solution, Solver

__all__ = [
    "HJB",
    "JKO",
    "DivergenceRate",
    "JacobianNorm",
    "KineticEnergy",
    "PathPenalty",
    "Regularizer",
    "collect_penalties",
    "penalised_solve",
]


class Regularizer:
    r"""A penalty on the path of every row: an integral over time, or a function of its ends.

    Give it to :class:`flowvi.objectives.Regularized`. A new one writes :meth:`term` or
    :meth:`of_ends`, and :meth:`check` if it cannot be used with every field.

    Args:
        weight: factor in the objective, non-negative.

    Raises:
        ValueError: if ``weight`` is negative or no number.
    """

    def __init__(self, weight: float = 1.0) -> None:
        if not isinstance(weight, (int, float)) or not weight >= 0:
            raise ValueError(f"`weight` must be a non-negative number; got {weight!r}.")
        self.weight = weight

    @property
    def label(self) -> str:
        """Name in reports."""
        return type(self).__name__

    def check(self, field: VectorField) -> None:
        """Refuse a field that this cannot be used with."""

    def term(self, dynamics: Dynamics, x: Tensor) -> Term | None:
        """What to integrate along the paths of one solve that starts at ``x``, if anything."""
        return None

    def of_ends(self, start: Tensor, end: Tensor) -> Tensor | None:
        """Penalty ``(*batch,)`` from both ends of the paths, if any."""
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.weight})"


class KineticEnergy(Regularizer):
    r"""Kinetic energy along the path, which makes paths short and speeds even.

    .. math:: \int_0^1 \tfrac12 \lVert v(t, x_t) \rVert^2\, dt

    Costs nothing beyond the solve. Without other forces its minimum is the optimal transport,
    whose paths are straight lines.

    Args:
        weight: factor in the objective, non-negative.

    References:
        Finlay, Jacobsen, Nurbekyan and Oberman (2020), How to train your neural ODE,
        arXiv:2002.02798, equation 7 (twice this); Onken, Wu Fung, Li and Ruthotto (2021),
        OT-Flow, arXiv:2006.00104, equation 7.

    Example:
        >>> from flowvi.objectives import ELBO, Regularized
        >>> objective = Regularized(ELBO(8), KineticEnergy(0.1))
    """

    def term(self, dynamics: Dynamics, x: Tensor) -> Term:
        return _half_square


class JacobianNorm(Regularizer):
    r"""Squared Frobenius norm of the velocity's Jacobian along the path.

    .. math:: \int_0^1 \lVert \nabla_x v(t, x_t) \rVert_F^2\, dt
        = E_\epsilon \int_0^1 \lVert \epsilon^T\, \nabla_x v(t, x_t) \rVert^2\, dt

    Small where neighbouring rows move alike, so that an adaptive solver can take long steps.
    Estimated without bias by one probe per row and solve, the divergence's own if it has one, at
    about the cost of two more evaluations of the field.

    Args:
        weight: factor in the objective, non-negative.
        probe: law of the noise; None takes the exact norm, at ``input_dim`` times the cost.

    References:
        Finlay, Jacobsen, Nurbekyan and Oberman (2020), How to train your neural ODE,
        arXiv:2002.02798, equation 10.
    """

    def __init__(self, weight: float = 1.0, probe: Probe | None = Probe.RADEMACHER) -> None:
        super().__init__(weight)
        if probe is not None and not isinstance(probe, Probe):
            raise TypeError(f"`probe` must be a Probe or None; got {probe!r}.")
        self.probe = probe

    def term(self, dynamics: Dynamics, x: Tensor) -> Term:
        if self.probe is None:
            return _exact_norm
        noise = dynamics.problem.probe
        noise = self.probe.draw(x.detach()) if noise is None else noise

        def estimate(stage: Stage) -> Tensor:
            # Reverse mode: half the time of forward mode here.
            pull = torch.func.vjp(stage.function, stage.x)[1]
            return pull(noise)[0].square().sum(-1)

        return estimate


class DivergenceRate(Regularizer):
    r"""Squared rate at which the divergence changes along the path.

    .. math:: \int_0^1 \Big( \frac{d}{dt} \operatorname{div} v(t, x_t) \Big)^2 dt, \qquad
        \frac{d}{dt} \operatorname{div} v = \partial_t \operatorname{div} v
        + v \cdot \nabla_x \operatorname{div} v

    The log-density of a point is one more coordinate of the solve, whose speed is the divergence;
    this is its squared acceleration. Where log-densities are computed by an adaptive solver that
    coordinate is the one that limits the steps: paths that are straight and slow still change
    volume unevenly. Best beside :class:`KineticEnergy` and :class:`JacobianNorm`, with a weight a
    hundred times smaller, as the rate is in squared units of log-density per time squared. With
    :class:`Hutchinson` it is that of the estimate, for the solve's own probe.

    Costs about two more evaluations of velocity and divergence.

    Args:
        weight: factor in the objective, non-negative.

    References:
        Kelly, Bettencourt, Johnson and Duvenaud (2020), Learning differential equations that are
        easy to solve, arXiv:2007.04504, equation 1 with K = 2, there of the state; of the
        log-density it is this project's.
    """

    def term(self, dynamics: Dynamics, x: Tensor) -> Term:
        problem, field, prepared = dynamics.problem, dynamics.field, dynamics.prepared
        layers = tanh_layers(field, prepared)
        if layers is not None and type(problem.divergence) is ClosedFormDivergence:
            return partial(_squared_rate_of_tanh, field, layers, prepared.shift)

        def divergence(t: Tensor, x: Tensor) -> Tensor:
            time = field.embed(t)
            return problem.divergence.velocity_and_divergence(
                field, time, x, prepared, problem.probe
            )[1]

        def squared_rate(stage: Stage) -> Tensor:
            ahead = (torch.ones_like(stage.t), stage.velocity)
            return torch.func.jvp(divergence, (stage.t, stage.x), ahead)[1].square()

        return squared_rate


class HJB(Regularizer):
    r"""Residual of the Hamilton-Jacobi-Bellman equation of a potential, along the path.

    .. math:: \int_0^1 \big| \partial_t \Phi(t, x_t)
        - \tfrac12 \lVert \nabla_x \Phi(t, x_t) \rVert^2 \big|\, dt, \qquad v = -\nabla_x \Phi

    Zero for optimal transport, whose potential solves that equation; it helps
    :class:`KineticEnergy` to find straight paths. Costs one more evaluation of the potential.

    Args:
        weight: factor in the objective, non-negative.

    References:
        Onken, Wu Fung, Li and Ruthotto (2021), OT-Flow, arXiv:2006.00104, equation 9 (there time
        runs from the data).
    """

    def check(self, field: VectorField) -> None:
        if not callable(getattr(field, "potential", None)):
            raise NotImplementedError(
                f"{type(field).__name__} has no potential, so the HJB residual is not defined. "
                "Use a PotentialField, or KineticEnergy alone."
            )

    def term(self, dynamics: Dynamics, x: Tensor) -> Term:
        field = dynamics.field

        def residual(stage: Stage) -> Tensor:
            def at(t: Tensor) -> Tensor:
                return field.potential(t, stage.x, stage.context)

            change = torch.func.jvp(at, (stage.t,), (torch.ones_like(stage.t),))[1]
            return (change - _half_square(stage)).abs()

        return residual


class JKO(Regularizer):
    r"""Squared distance moved, which makes the flow one proximal step of steepest descent.

    .. math:: \frac{1}{2h} \lVert x_1 - x_0 \rVert^2

    With weight 1 the regularised bound is the scheme of Jordan, Kinderlehrer and Otto for the
    steepest descent of the KL divergence in the Wasserstein metric: from the base, a step of
    length ``h`` towards the target. Chain flows trained one after the other to go all the way.

    Args:
        step_size: length ``h`` of the step in the time of the gradient flow, positive.
        weight: factor in the objective, non-negative.

    References:
        Jordan, Kinderlehrer and Otto (1998), The variational formulation of the Fokker-Planck
        equation, equation 11; Xu, Cheng and Xie (2023), Normalizing flow neural networks by JKO
        scheme, arXiv:2212.14424, equation 7; Vidal et al. (2023), Taming hyperparameter tuning
        in continuous normalizing flows using the JKO scheme, arXiv:2211.16757.
    """

    def __init__(self, step_size: float, weight: float = 1.0) -> None:
        super().__init__(weight)
        if not isinstance(step_size, (int, float)) or not step_size > 0:
            raise ValueError(f"`step_size` must be a positive number; got {step_size!r}.")
        self.step_size = step_size

    def of_ends(self, start: Tensor, end: Tensor) -> Tensor:
        return (end - start).square().sum(-1) / (2 * self.step_size)

    def __repr__(self) -> str:
        return f"JKO({self.step_size}, {self.weight})"


def _half_square(stage: Stage) -> Tensor:
    return 0.5 * stage.velocity.square().sum(-1)


def _squared_rate_of_tanh(
    field: VectorField, layers: TanhLayers, own: Tensor | None, stage: Stage
) -> Tensor:
    shift, shift_rate = torch.func.jvp(field.embed, (stage.t,), (torch.ones_like(stage.t),))
    shift = shift + field.layers[0].bias
    shift = shift if own is None else shift + own
    return divergence_rate(layers, shift, shift_rate, stage.x, stage.velocity).square()


def _exact_norm(stage: Stage) -> Tensor:
    x = stage.x

    def along(axis: Tensor) -> Tensor:
        change = torch.func.jvp(stage.function, (x,), (axis.expand_as(x),))[1]
        return change.square().sum(-1)

    return torch.func.vmap(along)(torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)).sum(0)


@dataclass(frozen=True)
class PathPenalty:
    """Penalties of one solve.

    Args:
        flow: the transform that made it.
        values: one tensor ``(*batch,)`` per regulariser, without its weight.
    """

    flow: nn.Module
    values: tuple[Tensor, ...]


# Innermost last. A stack, because an objective may be evaluated inside another one.
_COLLECTORS: list[tuple[tuple[Regularizer, ...], list[PathPenalty]]] = []


@contextmanager
def collect_penalties(regularizers: Sequence[Regularizer]) -> Iterator[list[PathPenalty]]:
    """Let every continuous flow that is solved in here, from end to end, add its penalties.

    Args:
        regularizers: what to compute.

    Returns:
        A list that grows by one entry per solve, with its graph.

    Example:
        >>> from flowvi.nn import FunctionField
        >>> from flowvi.transforms import Continuous, KineticEnergy, collect_penalties
        >>> flow = Continuous(FunctionField(2, lambda t, x: torch.ones_like(x)))
        >>> with collect_penalties([KineticEnergy()]) as found:
        ...     y = flow(torch.zeros(3, 2))
        >>> found[0].values[0]
        tensor([1., 1., 1.])
    """
    found: list[PathPenalty] = []
    entry = (tuple(regularizers), found)
    _COLLECTORS.append(entry)
    try:
        yield found
    finally:
        _COLLECTORS.remove(entry)


def penalised_solve(
    flow: nn.Module, solver: Solver, dynamics: Dynamics, state: State, start: float, end: float
) -> Solution:
    """``solver.solve``, with the penalties that are being collected integrated along."""
    if not _COLLECTORS or abs(end - start) != 1 or _is_frozen(flow):
        return solver.solve(dynamics, state, start, end)
    regularizers, found = _COLLECTORS[-1]
    for regularizer in regularizers:
        regularizer.check(dynamics.field)
    terms = [regularizer.term(dynamics, state[0]) for regularizer in regularizers]
    kept = [term for term in terms if term is not None]
    solution = solver.solve(_Penalised(dynamics, kept), state, start, end)
    own = len(solution.integrals) - len(kept)
    sign = 1 if end > start else -1
    integrals = iter(solution.integrals[own:])
    values = []
    for regularizer, term in zip(regularizers, terms, strict=True):
        value = regularizer.of_ends(state[0], solution.state[0])
        if term is not None:
            integral = sign * next(integrals)
            value = integral if value is None else value + integral
        values.append(state[0].new_zeros(state[0].shape[:-1]) if value is None else value)
    found.append(PathPenalty(flow, tuple(values)))
    return replace(solution, integrals=solution.integrals[:own])


def _is_frozen(flow: nn.Module) -> bool:
    """Whether nothing in a flow can be trained, as when a draw is scored with constants."""
    parameters = list(flow.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


class _Penalised(Dynamics):
    """Dynamics with more terms integrated along."""

    def __init__(self, dynamics: Dynamics, terms: Sequence[Term]) -> None:
        # Everything is that of the dynamics given, which has prepared its field already.
        self.inner = dynamics
        self.can_recompute = dynamics.can_recompute
        self.problem, self.field, self.prepared = (
            dynamics.problem,
            dynamics.field,
            dynamics.prepared,
        )
        self.terms = tuple(terms)

    def rates(self, instant: Instant, state: State) -> State:
        return self.inner.rates(instant, state)

    def rates_and_integrands(
        self, instant: Instant, state: State
    ) -> tuple[State, tuple[Tensor, ...]]:
        rates, integrands = self.inner.rates_and_integrands(instant, state)
        stage = Stage(
            instant.t,
            state[0],
            rates[0],
            integrands[0],
            self.problem.probe,
            self.problem.context,
            lambda x: self.field.velocity(instant.embedded, x, self.prepared),
        )
        return rates, (*integrands, *(term(stage) for term in self.terms))
