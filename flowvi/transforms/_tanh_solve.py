r"""Fixed steps along a field of tanh units, compiled, with a backward pass by hand.

A Runge-Kutta step :math:`x' = x + h \sum_i b_i k_i` with stages
:math:`p_i = x + h \sum_{j<i} a_{ij} k_j` pulls a gradient :math:`g` for its end back, from the
last stage to the first, by

.. math:: g_{k_i} = h \Big( b_i\, g + \sum_{j>i} a_{ji}\, g_{p_j} \Big), \qquad
    g_x = g + \sum_i g_{p_i}

with :math:`g_{p_i}` from :math:`g_{k_i}` through the network. Steps are compiled one by one, so
that what belongs together is done while it is in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from types import FunctionType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from flowvi.nn._compiled import Compiled, compiled
from flowvi.nn._tanh_layers import Kept, TanhLayers, evaluate, pull_back, tanh_layers
from flowvi.transforms._by_hand import by_hand, plain_gradients
from flowvi.transforms._dynamics import Dynamics, State
from flowvi.transforms.divergence import ClosedFormDivergence

__all__ = ["Tableau", "tanh_run"]


class Tableau(NamedTuple):
    """Coefficients of a Runge-Kutta method, apart from its nodes.

    Args:
        rows: a, one row for each stage.
        weights: b, one for each stage.
    """

    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


def tanh_run(tableau: Tableau, dynamics: Dynamics) -> Callable | None:
    """What runs steps by hand along a field of tanh units; None for all other dynamics.

    It is called and returns as any run of a :class:`FixedStep` whose step length is a tensor.
    """
    problem = dynamics.problem
    layers = tanh_layers(problem.field, dynamics.prepared)
    if layers is None or type(problem.divergence) is not ClosedFormDivergence:
        return None
    if torch.is_autocast_enabled(layers.core.device.type):
        return None
    return partial(_run, tableau)


def _run(
    tableau: Tableau, dynamics: Dynamics, times: Tensor, embedded: Tensor, state: State, h: Tensor
) -> tuple[State, tuple[Tensor, ...]]:
    field, context = dynamics.field, dynamics.prepared.shift
    layers = tanh_layers(field, dynamics.prepared)
    (start,) = state
    x = start.reshape(-1, start.shape[-1]).contiguous()
    # What the first layer adds: the same for all rows at each stage, and what the context gives.
    common, own = embedded + field.layers[0].bias, None
    if context is not None:
        own = context.expand(*start.shape[:-1], -1).reshape(len(x), -1).contiguous()
    plan = Plan(tableau, dynamics.problem.name, layers, h)
    end, ladj = TanhSteps.apply(plan, x, common, own, *layers.flat())
    return (end.view_as(start),), (ladj.view(start.shape[:-1]),)


def _forward_step(
    tableau: Tableau, h: Tensor, x: Tensor, shifts: Tensor, own: Tensor | None, layers: TanhLayers
) -> tuple[Tensor, Tensor, list[Kept]]:
    """End of a step, what it adds to the log-determinant, and what every stage keeps."""
    rates, ladjs, stages = [], [], []
    for shift, row, weight in zip(shifts.unbind(), *tableau, strict=True):
        shift = shift if own is None else shift + own
        point = _moved(x, rates, row, h)
        rate, divergence, kept = evaluate(layers, shift, point, divergence=weight != 0)
        rates.append(rate)
        stages.append(kept)
        if weight:
            ladjs.append(weight * h * divergence)
    return _moved(x, rates, tableau.weights, h), sum(ladjs[1:], ladjs[0]), stages


def _forward_only(
    tableau: Tableau, h: Tensor, x: Tensor, shifts: Tensor, own: Tensor | None, layers: TanhLayers
) -> tuple[Tensor, Tensor]:
    """The same without what is kept."""
    return _forward_step(tableau, h, x, shifts, own, layers)[:2]


def _moved(x: Tensor, rates: Sequence[Tensor], weights: Sequence[float], h: Tensor) -> Tensor:
    for weight, rate in zip(weights, rates, strict=False):
        x = x + weight * h * rate if weight else x
    return x


def _backward_step(
    tableau: Tableau,
    h: Tensor,
    layers: TanhLayers,
    stages: Sequence[Kept],
    grad: Tensor,
    grad_ladj: Tensor,
    of_layers: bool,
    of_own: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients for the start, the common shifts, and in a row those of each row and the layers.

    The last two only if asked for.
    """
    of_points: list[Tensor] = []
    of_shifts, sums = [], None
    for i in reversed(range(len(stages))):
        weight = tableau.weights[i]
        later = [row[i] for row in reversed(tableau.rows[i + 1 :])]
        of_rate = _moved(weight * h * grad, of_points, later, h)
        of_divergence = weight * h * grad_ladj if weight else None
        of_point, of_shift, made = pull_back(
            layers, stages[i], of_rate, of_divergence, with_layers=of_layers
        )
        of_points.append(of_point)
        of_shifts.append(of_shift.sum(0))
        made = [of_shift, *made] if of_own else list(made)
        sums = made if sums is None else [a + b for a, b in zip(sums, made, strict=True)]
    return sum(of_points, grad), torch.stack(of_shifts[::-1]), sums


class Plan:
    """What the steps of one solve have in common.

    Args:
        tableau: the method.
        name: what a warning calls the solve.
        layers: the network.
        h: length of a step.
    """

    def __init__(self, tableau: Tableau, name: str, layers: TanhLayers, h: Tensor) -> None:
        self.tableau = tableau
        self.h = h
        self.graded = torch.is_grad_enabled()
        # Compiled functions see tensors that need no gradients, whatever those of the user need.
        self.layers = TanhLayers.of([t.detach() for t in layers.flat()])
        self._name = f"The solve of {name}"
        kinds = ((t.dtype, t.device, t.shape, t.stride()) for t in layers.flat())
        self._key = (tableau, h.dtype, *kinds)

    def plainly(
        self, x: Tensor, shifts: Tensor, own: Tensor | None, *flat: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The steps by plain operations."""
        ladjs, layers = [], TanhLayers.of(flat)
        for part in shifts.split(len(self.tableau.weights)):
            x, ladj = _forward_only(self.tableau, self.h, x, part, own, layers)
            ladjs.append(ladj)
        return x, torch.stack(ladjs).sum(0)

    def stages(self, kept: Sequence[Tensor | None]) -> list[list[Kept]]:
        """What was kept, by steps and stages, from its tensors in a row."""
        size, number = len(self.layers.weights) + 1, len(self.tableau.weights)
        stages = [
            Kept(tuple(kept[i : i + size - 1]), kept[i + size - 1])
            for i in range(0, len(kept), size)
        ]
        return [stages[i : i + number] for i in range(0, len(stages), number)]

    def compiled(self, function: FunctionType, deciding: str, *key: Hashable) -> Compiled:
        """A function of this module, for this method and network, compiled."""
        own = (*self._key, *key)
        return compiled(function, self._name, *own, lean=True, deciding=(deciding,))


class TanhSteps(torch.autograd.Function):
    """``(plan, x, shifts, own, *layers) -> (end, ladj)`` of steps one after the other.

    Where second derivatives are asked for, or many gradients at once, autograd goes through the
    plain operations.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        plan: Plan,
        x: Tensor,
        shifts: Tensor,
        own: Tensor | None,
        *flat: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.plan, keep = plan, plan.graded and any(ctx.needs_input_grad)
        point, common, rows = (None if t is None else t.detach() for t in (x, shifts, own))
        kinds = (common.dtype, None if own is None else own.dtype)
        step = plan.compiled(_forward_step if keep else _forward_only, "x", *kinds)
        ladjs, kept = [], []
        for part in common.split(len(plan.tableau.weights)):
            point, ladj, *stages = step(plan.tableau, plan.h, point, part, rows, plan.layers)
            ladjs.append(ladj)
            kept += stages
        if keep:
            tensors = (t for step in kept for stage in step for t in (*stage.inputs, stage.pushed))
            ctx.save_for_backward(x, shifts, own, *flat, *tensors)
        return point, torch.stack(ladjs).sum(0)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor, grad_ladj: Tensor) -> tuple:
        plan, needs, saved = ctx.plan, ctx.needs_input_grad[1:], ctx.saved_tensors
        sources, kept = saved[: len(needs)], saved[len(needs) :]
        if not by_hand(grad, grad_ladj):
            return None, *plain_gradients(plan.plainly, sources, needs, (grad, grad_ladj))
        of_own, of_layers = needs[2], any(needs[3:])
        step = plan.compiled(_backward_step, "grad", of_layers, of_own)
        # Expanded gradients, as those of sums, would be another kind to compile for.
        grad, grad_ladj = grad.contiguous(), grad_ladj.contiguous()
        of_shifts, sums = [], []
        for stages in reversed(plan.stages(kept)):
            grad, of_common, made = step(
                plan.tableau, plan.h, plan.layers, stages, grad, grad_ladj, of_layers, of_own
            )
            of_shifts.append(of_common)
            if sums and made:
                torch._foreach_add_(sums, made)
            sums = sums or made
        rows = sums.pop(0) if of_own else None
        return None, grad, torch.cat(of_shifts[::-1]), rows, *(sums or [None] * len(needs[3:]))
