r"""A spline in one step of autograd: the forward numbers are kept, the backward is by hand.

Autograd would write down every operation on every bin; by hand it is one pass over the bins in
each direction. The inverse needs no derivative of its own: at :math:`x = f^{-1}(y; \theta)` with
:math:`\ell = \log f'(x; \theta)`, gradients :math:`g_x` for x and :math:`g_\ell` for
:math:`-\ell` pull back to

.. math:: g_y = (g_x - g_\ell\, \partial_x \ell) / f', \qquad
    g_\theta = -g_y\, \partial_\theta f - g_\ell\, \partial_\theta \ell
"""

from __future__ import annotations

from types import FunctionType

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from flowvi.nn._compiled import Compiled, compiled
from flowvi.transforms import _rational_quadratic as rq
from flowvi.transforms._by_hand import by_hand, plain_gradients
from flowvi.transforms._spline_bins import Bins, OneByOne, SideBySide

__all__ = ["SplinePass", "fastest", "invert", "run"]


def fastest(num_bins: int, bound: float, *, compiled: bool) -> Bins:
    """Bins for a :class:`SplinePass`: one by one where they are compiled."""
    bins, functions = OneByOne(num_bins, bound), (_forward_loop, _backward_loop)
    if compiled and not any(_loop(f, bins, i).failed for f in functions for i in (False, True)):
        return bins
    return SideBySide(num_bins, bound)


def run(bins: Bins, value: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor, tuple]:
    """Result, its log-derivative, and what :func:`pull_back` needs.

    Shape:
        value, result: ``(*batch)``; params: ``(3 num_bins - 1, *batch)``.
    """
    inside = value.abs() < bins.bound
    clamped = value.clamp(-bins.bound, bins.bound)
    cell, kept = bins.find(clamped, params, int(inverse))
    slopes = rq.end_slopes(cell)
    if inverse:
        xi = rq.root(clamped - cell.y0, cell, slopes)
        result, ladj = cell.x0 + xi * cell.widths[1], -rq.segment(xi, cell, slopes)[1]
    else:
        xi = (clamped - cell.x0) / cell.widths[1]
        result, ladj = rq.segment(xi, cell, slopes)
    result, ladj = torch.where(inside, result, value), torch.where(inside, ladj, 0.0)
    return result, ladj, (inside, xi, cell, slopes, kept)


def invert(bins: Bins, value: Tensor, params: Tensor) -> Tensor:
    """The inverse without its log-derivative."""
    clamped = value.clamp(-bins.bound, bins.bound)
    cell, _ = bins.find(clamped, params, 1)
    xi = rq.root(clamped - cell.y0, cell, rq.end_slopes(cell))
    return torch.where(value.abs() < bins.bound, cell.x0 + xi * cell.widths[1], value)


def pull_back(
    bins: Bins, found: tuple, grad: Tensor, grad_ladj: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Gradients for value and parameters."""
    inside, xi, cell, slopes, kept = found
    of_y, of_ladj = (torch.where(inside, g, 0.0) for g in (grad, grad_ladj))
    if inverse:
        slope, change = rq.bend(xi, cell, slopes)
        of_value = (of_y - of_ladj * change) / slope
        of_cell = rq.pull_back(xi, cell, slopes, -of_value, -of_ladj)[1]
    else:
        of_value, of_cell = rq.pull_back(xi, cell, slopes, of_y, of_ladj)
    return torch.where(inside, of_value, grad), bins.pull_back(of_cell, kept)


def _forward_loop(
    bins: Bins, value: Tensor, params: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    return run(bins, value, params, inverse)[:2]


def _backward_loop(
    bins: Bins, value: Tensor, params: Tensor, grad: Tensor, grad_ladj: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Everything again from ``value``, which costs less than reading it from memory."""
    return pull_back(bins, run(bins, value, params, inverse)[2], grad, grad_ladj, inverse)


def _loop(function: FunctionType, bins: Bins, inverse: bool) -> Compiled:
    return compiled(function, "A spline", bins, inverse)


def _flat(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().reshape(-1) for tensor in tensors]


class SplinePass(torch.autograd.Function):
    """``(bins, inverse, value, params) -> (result, ladj)``, run and differentiated by hand.

    Where second derivatives are asked for, or ``torch.func`` looks on, autograd goes through
    :func:`run`.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, bins: Bins, inverse: bool, value: Tensor, params: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.bins, ctx.inverse = bins, inverse
        if isinstance(bins, OneByOne):
            loop = _loop(_forward_loop, bins, inverse)
            made = loop(bins, *_flat(value), params.detach().flatten(1), inverse)
            ctx.save_for_backward(value, params)
            return tuple(t.view_as(value) for t in made)
        result, ladj, (inside, xi, cell, slopes, kept) = run(bins, value, params, inverse)
        parts = (*cell[:2], *cell.widths, *cell.heights, *cell.raw, *cell.inner)
        ctx.save_for_backward(value, params, inside, xi, *slopes, *kept, *parts)
        return result, ladj

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor, grad_ladj: Tensor) -> tuple:
        bins, inverse = ctx.bins, ctx.inverse
        value, params, *kept = ctx.saved_tensors
        if not by_hand(grad, grad_ladj):
            plain, needs = SideBySide(bins.num_bins, bins.bound), ctx.needs_input_grad[2:]

            def plainly(value: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
                return run(plain, value, params, inverse)[:2]

            made = plain_gradients(plainly, (value, params), needs, (grad, grad_ladj))
            return None, None, *made
        if isinstance(bins, OneByOne):
            loop = _loop(_backward_loop, bins, inverse)
            flat, *grads = _flat(value, grad, grad_ladj)
            made = loop(bins, flat, params.detach().flatten(1), *grads, inverse)
            return None, None, made[0].view_as(value), made[1].view_as(params)
        inside, xi, d0, d1, soft, index, *parts = kept
        cell = rq.Cell(*parts[:2], *(tuple(parts[i:j]) for i, j in _PARTS))
        found = (inside, xi, cell, (d0, d1), (soft, index))
        return None, None, *pull_back(bins, found, grad, grad_ladj, inverse)


# Where widths, heights, raw slopes and inner flags of a cell lie among what is kept.
_PARTS = ((2, 5), (5, 8), (8, 10), (10, 12))
