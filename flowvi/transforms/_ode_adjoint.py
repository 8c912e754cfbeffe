r"""Gradients of a solve by the continuous adjoint.

With cotangents a of the state and b (constant) of the log-determinant, backwards in time

.. math:: \frac{da}{dt} = -J^T a - b \nabla_x \operatorname{div} v, \qquad
    \frac{dg}{dt} = -\Big(\frac{\partial v}{\partial \theta}\Big)^T a
    - b\,\frac{\partial \operatorname{div} v}{\partial \theta},

where g gathers the gradient of parameters and context.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flowvi.transforms._dynamics import FlowDynamics, Problem
from flowvi.transforms._torchdiffeq import (
    Block,
    NotSolvedError,
    TooManyEvaluationsError,
    natural_size,
    solve_adaptively,
)
from flowvi.transforms.ode_solvers import Solution

if TYPE_CHECKING:
    from flowvi.transforms.adaptive import Adaptive

__all__ = ["solve_with_adjoint"]


def solve_with_adjoint(
    solver: Adaptive, problem: Problem, x: Tensor, start: float, end: float
) -> Solution:
    """As ``solver.solve``, with gradients for the state, the context and all parameters."""
    names = [name for name, p in problem.field.named_parameters() if p.requires_grad]
    run = _Run(solver, problem, names, start, end)
    parameters = (problem.field.get_parameter(name) for name in names)
    y, ladj = _Adjoint.apply(run, x, problem.context, *parameters)
    return Solution((y,), (ladj,), run.num_evaluations)


class _Rates(nn.Module):
    """The right-hand side as a module, so that its parameters can be replaced."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem
        self.field = problem.field

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.problem.divergence.velocity_and_divergence(
            self.field, self.field.embed(t), x, self.field.prepare(context), self.problem.probe
        )


class _Solve(nn.Module):
    """A fixed-step solve as a module, so that its parameters can be replaced."""

    def __init__(self, run: _Run) -> None:
        super().__init__()
        self.run = run
        self.field = run.problem.field

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        run = self.run
        solver = replace(run.solver.fallback, checkpointed=True)
        dynamics = FlowDynamics(replace(run.problem, context=context))
        solution = solver.solve(dynamics, (x,), run.start, run.end)
        return solution.state[0], solution.integrals[0]


@dataclass
class _Run:
    """Settings of one solve, shared by its two directions."""

    solver: Adaptive
    problem: Problem
    names: list[str]
    start: float
    end: float
    num_evaluations: int = 0


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: _Run, x: Tensor, context: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        solution = run.solver.solve_directly(FlowDynamics(run.problem), (x,), run.start, run.end)
        run.num_evaluations = solution.num_evaluations
        ctx.run = run
        ctx.save_for_backward(x, solution.state[0], context, *parameters)
        return solution.state[0], solution.integrals[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_ladj: Tensor) -> tuple[Tensor | None, ...]:
        x, y, context, *parameters = ctx.saved_tensors
        leaves = [t if t is None else t.detach().requires_grad_() for t in (context, *parameters)]
        cotangents = (grad_y, grad_ladj)
        try:
            grads = _backwards(ctx.run, y, leaves, cotangents)
        except (TooManyEvaluationsError, NotSolvedError):
            grads = _backwards_in_fixed_steps(ctx.run, x, leaves, cotangents)
        return None, *grads


def _named(run: _Run, parameters: list[Tensor]) -> dict[str, Tensor]:
    return {f"field.{name}": p for name, p in zip(run.names, parameters, strict=True)}


def _backwards(
    run: _Run, y: Tensor, leaves: list[Tensor | None], cotangents: tuple[Tensor, Tensor]
) -> list[Tensor | None]:
    """Gradients for the start, the context and the parameters, by a solve backwards in time."""
    module, (context, *parameters) = _Rates(run.problem), leaves
    replaced = _named(run, parameters)
    grad_y, grad_ladj = cotangents

    @torch.enable_grad()
    def rates(t: Tensor, blocks: list[Tensor]) -> list[Tensor]:
        x = blocks[0].detach().view_as(y).requires_grad_()
        outputs = torch.func.functional_call(module, replaced, (t, x, context))
        inputs = [x, *(leaf for leaf in leaves if leaf is not None)]
        grads = torch.autograd.grad(
            outputs, inputs, (blocks[1].view_as(y), grad_ladj), materialize_grads=True
        )
        return [outputs[0].detach(), *(-grad for grad in grads)]

    rows = [part.reshape(-1, part.shape[-1]) for part in (y, grad_y)]
    t = torch.full((), run.end, dtype=y.dtype, device=y.device)
    first = [rate.view_as(rows[0]) * (run.start - run.end) for rate in rates(t, rows)[:2]]
    blocks = [
        Block(part, natural_size(part, change)) for part, change in zip(rows, first, strict=True)
    ]
    blocks += [
        Block(torch.zeros_like(leaf), controlled=False) for leaf in leaves if leaf is not None
    ]
    with torch.no_grad():
        ends, _ = solve_adaptively(rates, blocks, run.end, run.start, run.solver.tolerance)
    grads = iter(ends[2:])
    return [ends[1].view_as(y), *(None if leaf is None else next(grads) for leaf in leaves)]


def _backwards_in_fixed_steps(
    run: _Run, x: Tensor, leaves: list[Tensor | None], cotangents: tuple[Tensor, Tensor]
) -> list[Tensor | None]:
    """The same by fixed steps from the start, where the solve backwards does not succeed."""
    warnings.warn(
        f"The gradient of {run.problem.name} was not solved to the tolerance within "
        f"max_nfe={run.solver.max_nfe} evaluations; took fixed steps instead.",
        stacklevel=2,
    )
    context, *parameters = leaves
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        outputs = torch.func.functional_call(_Solve(run), _named(run, parameters), (x, context))
        inputs = [x, *(leaf for leaf in leaves if leaf is not None)]
        grads = iter(torch.autograd.grad(outputs, inputs, cotangents, materialize_grads=True))
    return [next(grads), *(None if leaf is None else next(grads) for leaf in leaves)]
