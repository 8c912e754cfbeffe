"""Continuous flows: maps that follow a vector field from time 0 to time 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowvi.nn import VectorField
from flowvi.transforms._dynamics import (
    Dynamics,
    FlowDynamics,
    Problem,
    ScoreDynamics,
    State,
    Term,
)
from flowvi.transforms._solvers import all_true
from flowvi.transforms.base import FlowTransform, common_shape
from flowvi.transforms.divergence import Divergence, cheapest_divergence
from flowvi.transforms.ode_solvers import DormandPrince, Solution, Solver
from flowvi.transforms.regularizers import penalised_solve

__all__ = ["Continuous", "SolveReport", "Trajectory"]


@dataclass(frozen=True)
class SolveReport:
    """What a solve cost and how far off it may be.

    Args:
        solver: the solver's description.
        num_evaluations: how many times the field was evaluated (NFE).
        note: what went differently from what was asked, or "".
        error: largest distance of an end point to that of a refined solver; None if not asked
            for.
        ladj_error: the same for the log-determinant, in nats.
    """

    solver: str
    num_evaluations: int
    note: str = ""
    error: float | None = None
    ladj_error: float | None = None


@dataclass(frozen=True)
class Trajectory:
    """States along a path.

    Args:
        ts: times ``(T,)``.
        x: states ``(T, *batch, input_dim)``.
        ladj: log-determinant from the first time on ``(T, *batch)``, nats.
        score: gradients of the log-density at the states, like ``x``; None if not asked for.
    """

    ts: Tensor
    x: Tensor
    ladj: Tensor
    score: Tensor | None = None

    @property
    def entropy_change(self) -> Tensor:
        """Entropy of the law at each time minus that at the first, nats, shape ``(T,)``.

        A Monte Carlo mean over the batch, for states drawn from the law at the first time.
        """
        return self.ladj.flatten(1).mean(1) if self.ladj.dim() > 1 else self.ladj


class Continuous(FlowTransform):
    r"""Flow along a vector field, from time 0 (base) to time 1 (target).

    .. math:: \frac{dx}{dt} = v(t, x), \qquad
        \log\left|\det\frac{\partial x_1}{\partial x_0}\right|
        = \int_0^1 \operatorname{div} v(t, x_t)\,dt

    Both directions cost one solve; the inverse runs backwards in time. Both, and the
    log-determinant, are as exact as the solver: see :meth:`report`. With a fixed-step solver no
    step looks at the numbers.

    Args:
        field: the vector field; it fixes ``input_dim`` and ``context_dim``.
        divergence: how to get the divergence. If left out: the field's closed form if it has
            one, else exact by forward mode up to 64 dimensions, else Hutchinson's estimate (with
            a warning).
        solver: how to solve, by default Dormand-Prince steps of fixed length.
        eval_solver: solver in evaluation mode (``.eval()``), for instance an adaptive one;
            ``solver`` if left out.
        name: what errors and warnings call this flow.

    Shape:
        x: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; ladj: ``(*batch,)``, nats.

    Raises:
        TypeError: if an argument has the wrong type.
        NotImplementedError: if the field lacks the closed form asked for.
        RuntimeError: in evaluation mode, if a result is not finite.

    References:
        Chen, Rubanova, Bettencourt and Duvenaud (2018), Neural ordinary differential equations,
        arXiv:1806.07366, theorem 1; Song et al. (2021), Score-based generative modeling through
        stochastic differential equations, arXiv:2011.13456, appendix D.2, for the inverse.

    Example:
        >>> from flowvi.nn import FunctionField
        >>> grow = Continuous(FunctionField(2, lambda t, x: x))
        >>> y, ladj = grow.call_and_ladj(torch.ones(2))
        >>> y, ladj
        (tensor([2.7183, 2.7183]), tensor(2.))
    """

    exact_inverse = False

    def __init__(
        self,
        field: VectorField,
        divergence: Divergence | None = None,
        solver: Solver | None = None,
        *,
        eval_solver: Solver | None = None,
        name: str | None = None,
    ) -> None:
        for label, value, kind in (
            ("field", field, VectorField),
            ("divergence", divergence, Divergence),
            ("solver", solver, Solver),
            ("eval_solver", eval_solver, Solver),
        ):
            if not isinstance(value, kind) and (value is not None or label == "field"):
                raise TypeError(
                    f"`{label}` must be a {kind.__name__}; got {type(value).__name__}."
                )
        super().__init__(field.input_dim, field.context_dim)
        self.field = field
        self.divergence = cheapest_divergence(field) if divergence is None else divergence
        self.divergence.check(field)
        self.solver = DormandPrince() if solver is None else solver
        self.eval_solver = eval_solver
        self.name = f"Continuous({self.input_dim})" if name is None else name
        self.last_solve: SolveReport | None = None

    @property
    def active_solver(self) -> Solver:
        """The solver that the next call takes."""
        if self.training or self.eval_solver is None:
            return self.solver
        return self.eval_solver

    @property
    def has_score_recursion(self) -> bool:
        return not self.active_solver.recomputes

    def call_with_integrals(
        self, x: Tensor, terms: Sequence[Term], context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Map ``x`` to ``(y, ladj, integrals)``, each integral that of a term over time 0 to 1.

        Args:
            x: base side.
            terms: functions of a :class:`Stage`, each giving ``(*batch,)``.
            context: as in :meth:`call_and_ladj`.
        """
        self._check("x", x, context)
        return self._with_integrals(x, context, terms, 0.0, 1.0)

    def inverse_with_integrals(
        self, y: Tensor, terms: Sequence[Term], context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Map ``y`` to ``(x, ladj of the inverse map, integrals)``.

        The integrals are over the same path as in :meth:`call_with_integrals`, with the same
        sign.
        """
        self._check("y", y, context)
        return self._with_integrals(y, context, terms, 1.0, 0.0)

    def trajectory(
        self,
        x: Tensor,
        ts: Tensor,
        context: Tensor | None = None,
        *,
        score: Tensor | None = None,
    ) -> Trajectory:
        r"""States at the times ``ts``, starting from ``x`` at the first of them.

        Args:
            x: state at time ``ts[0]``.
            ts: at least two different times in [0, 1], rising or falling.
            context: as in :meth:`call_and_ladj`.
            score: gradient of the log-density of the law of ``x`` at ``x``; carried along if
                given, by :math:`ds/dt = -J^T s - \nabla \operatorname{div} v`.

        Raises:
            ValueError: if a time is outside [0, 1].
        """
        self._check("x", x, context)
        times = ts.detach().tolist()
        if len(times) < 2 or min(times) < 0 or max(times) > 1:
            raise ValueError(f"`ts` must hold at least two times in [0, 1]; got {times}.")
        x, context = self._batched(x, context), context
        state: State = (x,) if score is None else (x, score.detach().expand_as(x))
        dynamics = self._dynamics(x, context, score is not None)
        states, ladjs = [state], [x.new_zeros(x.shape[:-1])]
        for start, end in zip(times, times[1:], strict=False):
            solution = self._solve(dynamics, states[-1], start, end)
            states.append(solution.state)
            ladjs.append(ladjs[-1] + solution.integrals[0])
        parts = [torch.stack(values) for values in zip(*states, strict=True)]
        return Trajectory(ts, parts[0], torch.stack(ladjs), *parts[1:])

    @torch.no_grad()
    def report(self, x: Tensor, context: Tensor | None = None) -> SolveReport:
        """Cost and estimated error of mapping ``x``, by comparison with a refined solver."""
        self._check("x", x, context)
        x = self._batched(x, context)
        dynamics = self._dynamics(x, context)
        solver = self.active_solver
        rough, fine = (s.solve(dynamics, (x,), 0.0, 1.0) for s in (solver, solver.refined()))
        error = (rough.state[0] - fine.state[0]).norm(dim=-1).max()
        ladj_error = (rough.integrals[0] - fine.integrals[0]).abs().max()
        return SolveReport(
            repr(solver), rough.num_evaluations, rough.note, float(error), float(ladj_error)
        )

    def _call_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._with_integrals(x, context, (), 0.0, 1.0)[:2]

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._with_integrals(y, context, (), 1.0, 0.0)[:2]

    def _call_ladj_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = self._batched(x, context)
        dynamics = self._dynamics(x, context, True)
        solution = self._solve(dynamics, (x, score.detach().expand_as(x)), 0.0, 1.0)
        return solution.state[0], solution.integrals[0], solution.state[1]

    def _with_integrals(
        self, x: Tensor, context: Tensor | None, terms: Sequence[Term], start: float, end: float
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        x = self._batched(x, context)
        solution = self._solve(self._dynamics(x, context, terms=terms), (x,), start, end)
        ladj, *integrals = solution.integrals
        sign = 1 if end > start else -1
        return solution.state[0], ladj, tuple(sign * integral for integral in integrals)

    def _batched(self, x: Tensor, context: Tensor | None) -> Tensor:
        """The state with the batch that it shares with the context, in memory of its own.

        Forward mode refuses expanded tensors.
        """
        if self.context_dim:
            x = x.expand(*common_shape(x.shape[:-1], context.shape[:-1]), -1)
        return x.contiguous()

    def _dynamics(
        self,
        x: Tensor,
        context: Tensor | None,
        scored: bool = False,
        terms: Sequence[Term] = (),
    ) -> Dynamics:
        context = context if self.context_dim else None
        problem = Problem(self.field, self.divergence, context, self.divergence.draw(x), self.name)
        return ScoreDynamics(problem) if scored else FlowDynamics(problem, terms)

    def _solve(self, dynamics: Dynamics, state: State, start: float, end: float) -> Solution:
        solver = self.active_solver
        solution = penalised_solve(self, solver, dynamics, state, start, end)
        if not torch.compiler.is_compiling():
            self.last_solve = SolveReport(repr(solver), solution.num_evaluations, solution.note)
        if not self.training:
            finite = solution.state[0].isfinite().all(-1) & solution.integrals[0].isfinite()
            if all_true(finite) is False:
                raise RuntimeError(
                    f"{self.name} gave {int((~finite).sum())} of {finite.numel()} results that "
                    f"are not finite with {solver!r}. The field gives such values or is too "
                    "stiff for these steps: take more, or an Adaptive solver."
                )
        return solution
