r"""Triangular solves with the transposed Jacobian of an autoregressive map.

With :math:`y_i = f(x_i; \theta_i(x_{<i}))`, derivatives :math:`f_x, f_\theta` of ``f`` and
:math:`N_{ji} = \partial\theta_j / \partial x_i` of the network, the Jacobian is
:math:`J = f_x + f_\theta N`. Levels and ``starts`` are those of ``_incremental``, and so is the
layout: ``(rows, N)`` for a batch of ``N``.

:math:`J^T u = w` is solved from the last variable to the first, in blocks. The diagonal blocks of
J are formed and inverted for all blocks at once, by substitution; what a block takes from later
ones is one dense product per level of the network. So the number of steps is the number of blocks
and a block's length, not the number of variables.

The adjoint of the inverse map: cotangents g of x and h of theta give

.. math:: J^T u = g + N^T h, \qquad \gamma = h - f_\theta u,

with u the cotangent of y and :math:`\gamma` that of theta (implicit function theorem).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowvi.transforms.elementwise import ElementwiseMap

__all__ = ["block_rows", "partials", "pull_back", "slopes", "solve_adjoint", "solve_transposed"]

_BLOCK = 8

Layers = Sequence[tuple[Tensor, Tensor]]
Starts = Sequence[Sequence[int]]


def block_rows(starts: Starts) -> list[Tensor]:
    """Row numbers of every block of variables in the variables and each hidden level.

    Shape:
        each: ``(num_blocks, most rows of a block)``, filled up with ``-1``.
    """
    dim = len(starts[0]) - 1
    ends = [(i, min(i + _BLOCK, dim)) for i in range(0, dim, _BLOCK)]
    levels = []
    for start in starts[:-1]:
        rows = [list(range(start[begin], start[end])) for begin, end in ends]
        width = max(map(len, rows))
        levels.append(torch.tensor([r + [-1] * (width - len(r)) for r in rows]))
    return levels


def solve_adjoint(
    grad_x: Tensor,
    grad_theta: Tensor,
    layers: Layers,
    starts: Starts,
    blocks: Sequence[Tensor],
    activation_slopes: Sequence[Tensor],
    map_slopes: tuple[Tensor, Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """Pull cotangents back through the inverse map.

    Args:
        grad_x: ``g``, ``(D, N)``.
        grad_theta: ``h``, ``(D * P, N)``, variable by variable.
        layers: as for :func:`solve_transposed`.
        starts: as for :func:`solve_transposed`.
        blocks: as for :func:`solve_transposed`.
        activation_slopes: as for :func:`solve_transposed`.
        map_slopes: as for :func:`solve_transposed`.

    Returns:
        ``u``, ``(D, N)``, and the cotangents of what levels 1 and up take in; the last is
        ``gamma``.
    """
    source, sources = pull_back(grad_theta, layers, activation_slopes)
    u, taken = solve_transposed(
        grad_x + source, layers, starts, blocks, activation_slopes, map_slopes
    )
    return u, [s.sub(t) for s, t in zip(sources, taken, strict=True)]


def pull_back(
    grad: Tensor, layers: Layers, activation_slopes: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Gradient for x, and for what levels 1 and up take in, of one for the network's output."""
    grads = [grad]
    for (weight, _), slope in zip(layers[:0:-1], activation_slopes[::-1], strict=True):
        grads.append((weight.t() @ grads[-1]).mul_(slope))
    return layers[0][0].t() @ grads[-1], grads[::-1]


def solve_transposed(
    w: Tensor,
    layers: Layers,
    starts: Starts,
    blocks: Sequence[Tensor],
    activation_slopes: Sequence[Tensor],
    map_slopes: tuple[Tensor, Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """Solve ``J^T u = w``.

    Args:
        w: right-hand side ``(D, N)``.
        layers: masked weight ``(rows, columns)`` and bias of each level; biases are not used.
        starts: first row of each variable in each level.
        blocks: what :func:`block_rows` gives for them.
        activation_slopes: derivative of the activation at every hidden unit, per hidden level.
        map_slopes: derivatives of the elementwise map in x, ``(D, N)``, and theta, ``(D, P, N)``.

    Returns:
        ``u``, ``(D, N)``, and the gradients of what levels 1 and up take in, for the gradient
        ``f_theta u`` of theta, which is the last one.
    """
    slope_theta = map_slopes[1]
    diagonal = _diagonal_blocks(layers, blocks, activation_slopes, map_slopes)
    u = torch.empty_like(w)
    # Zeros, not garbage: a block's own parameters come last, after what later blocks bring.
    grads = [torch.zeros_like(s) for s in activation_slopes]
    grads.append(
        torch.zeros_like(slope_theta, memory_format=torch.contiguous_format).flatten(0, 1)
    )
    columns = [weight.t() for weight, _ in layers]
    for block in range(len(diagonal) - 1, -1, -1):
        begin, end = block * _BLOCK, min((block + 1) * _BLOCK, len(w))
        rows = [slice(start[begin], start[end]) for start in starts]
        steps = [
            (
                columns[level][rows[level], rows[level + 1].start :],
                grads[level][rows[level + 1].start :],
                grads[level - 1][rows[level]],
                activation_slopes[level - 1][rows[level]],
            )
            for level in range(len(layers) - 1, 0, -1)
        ]
        right = w[begin:end]
        if end < len(w):
            _push(steps)
            near = rows[1].start
            right = torch.addmm(right, columns[0][begin:end, near:], grads[0][near:], alpha=-1)
        matrix = diagonal[block, :, : end - begin, : end - begin].mT
        own = torch.linalg.solve_triangular(matrix, right.t().unsqueeze(-1), upper=True)
        own = u[begin:end].copy_(own.squeeze(-1).t())
        theta = grads[-1][rows[-1]].unflatten(0, (end - begin, -1))
        torch.mul(slope_theta[begin:end], own[:, None], out=theta)
        _push(steps)
    return u, grads


def _push(steps: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> None:
    """One block's gradients, level by level, from those of the level above."""
    for weight, source, target, slope in steps:
        torch.mm(weight, source, out=target).mul_(slope)


def _diagonal_blocks(
    layers: Layers,
    blocks: Sequence[Tensor],
    activation_slopes: Sequence[Tensor],
    map_slopes: tuple[Tensor, Tensor],
) -> Tensor:
    """Diagonal blocks of J, ``(num_blocks, N, length, length)``.

    Rows that fill up a last, shorter block come after its own, which do not depend on them.
    """
    slope_x, slope_theta = map_slopes
    rows = [level.clamp(min=0) for level in blocks]
    own, num_params = rows[0], slope_theta.shape[1]
    # Advanced indices around a slice give (block, variable, unit of the level below, parameter).
    weight = layers[-1][0].unflatten(0, (-1, num_params))
    weight = weight[own[:, :, None], :, rows[-1][:, None]]
    # (block, unit, variable, N): the product then runs over all variables of a block at once.
    grad = (weight @ slope_theta[own]).transpose(1, 2)
    for level in range(len(blocks) - 1, 0, -1):
        slope = activation_slopes[level - 1][rows[level]]
        slope = torch.where((blocks[level] >= 0)[..., None], slope, 0.0)
        weight = layers[level - 1][0][rows[level][:, :, None], rows[level - 1][:, None]]
        grad = (grad * slope[:, :, None]).flatten(2)
        grad = (weight.mT @ grad).unflatten(2, (own.shape[1], -1))
    matrix = grad.permute(0, 3, 2, 1).contiguous()
    matrix.diagonal(dim1=-2, dim2=-1).copy_(slope_x[own].mT)
    return matrix


def slopes(activation: Callable[[Tensor], Tensor], taken: Tensor) -> Tensor:
    """Derivative of an elementwise activation."""
    with torch.enable_grad():
        leaf = taken.detach().requires_grad_()
        return torch.autograd.grad(activation(leaf).sum(), leaf)[0]


def partials(elementwise: ElementwiseMap, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of the map in x, ``(D, N)``, and in its parameters, ``(D, P, N)``."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        theta = theta.detach().unflatten(0, (x.shape[0], -1)).requires_grad_()
        y, _ = elementwise.call_and_ladj(x.t(), theta.permute(2, 0, 1))
        return torch.autograd.grad(y.sum(), (x, theta))
