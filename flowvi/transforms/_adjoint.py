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

from collections.abc import Sequence

import torch
from torch import Tensor

from flowvi.transforms.elementwise import ElementwiseMap

__all__ = ["block_rows", "partials", "pull_back", "solve_adjoint", "solve_transposed"]

_BLOCK = 8

Layers = Sequence[tuple[Tensor, Tensor]]
Starts = Sequence[Sequence[int]]


def block_rows(starts: Starts) -> list[tuple[Tensor, Tensor]]:
    """Row numbers of every block of variables in the variables and each hidden level.

    Shape:
        each: ``(num_blocks, most rows of a block)``, filled up with ``0``, and a mask of what is
        not filled up, with one more dimension.
    """
    dim = len(starts[0]) - 1
    ends = [(i, min(i + _BLOCK, dim)) for i in range(0, dim, _BLOCK)]
    levels = []
    for start in starts[:-1]:
        rows = [list(range(start[begin], start[end])) for begin, end in ends]
        width = max(map(len, rows))
        levels.append(
            (
                torch.tensor([r + [0] * (width - len(r)) for r in rows]),
                torch.tensor([[[i < len(r)] for i in range(width)] for r in rows]),
            )
        )
    return levels


def solve_adjoint(
    grad_x: Tensor,
    grad_theta: Tensor,
    layers: Layers,
    starts: Starts,
    blocks: Sequence[tuple[Tensor, Tensor]],
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
    columns = [weight.t() for weight, _ in layers]
    # The first block's hidden units once more, now with its own parameters.
    _push(columns, taken, activation_slopes, [start[: _BLOCK + 1] for start in starts])
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
    blocks: Sequence[tuple[Tensor, Tensor]],
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
        ``f_theta u`` of theta, which is the last one. Those of hidden units of the first block are
        not complete: no variable is left to solve for that would need them.
    """
    slope_theta = map_slopes[1]
    diagonal = _diagonal_blocks(layers, blocks, activation_slopes, map_slopes)
    columns = [weight.t() for weight, _ in layers]
    # Zeros, not garbage: parameters of blocks that are not solved yet count as none.
    grads = [torch.zeros_like(s) for s in activation_slopes]
    grads.append(
        torch.zeros_like(slope_theta, memory_format=torch.contiguous_format).flatten(0, 1)
    )
    u = torch.empty_like(w)
    dim = stop = len(w)
    for block in range(len(diagonal) - 1, -1, -1):
        begin, end = block * _BLOCK, min((block + 1) * _BLOCK, dim)
        right = w[begin:end]
        if end < dim:
            # This block's hidden units, and again those of the block just solved.
            _push(columns, grads, activation_slopes, [start[begin : stop + 1] for start in starts])
            near = starts[1][begin]
            right = torch.addmm(right, columns[0][begin:end, near:], grads[0][near:], alpha=-1)
        matrix = diagonal[block, :, : end - begin, : end - begin].mT
        own = torch.linalg.solve_triangular(matrix, right.t().unsqueeze(-1), upper=True)
        own = u[begin:end].copy_(own.squeeze(-1).t())
        theta = grads[-1][starts[-1][begin] : starts[-1][end]].unflatten(0, (end - begin, -1))
        torch.mul(slope_theta[begin:end], own[:, None], out=theta)
        stop = end
    return u, grads


def _push(
    columns: Sequence[Tensor],
    grads: Sequence[Tensor],
    activation_slopes: Sequence[Tensor],
    starts: Starts,
) -> None:
    """Gradients of some variables' hidden units from those of the level above, in place."""
    for level in range(len(columns) - 1, 0, -1):
        rows, near = slice(starts[level][0], starts[level][-1]), starts[level + 1][0]
        target = grads[level - 1][rows]
        torch.mm(columns[level][rows, near:], grads[level][near:], out=target)
        target.mul_(activation_slopes[level - 1][rows])


def _diagonal_blocks(
    layers: Layers,
    blocks: Sequence[tuple[Tensor, Tensor]],
    activation_slopes: Sequence[Tensor],
    map_slopes: tuple[Tensor, Tensor],
) -> Tensor:
    """Diagonal blocks of J, ``(num_blocks, N, length, length)``.

    Rows that fill up a last, shorter block come after its own, which do not depend on them.
    """
    slope_x, slope_theta = map_slopes
    rows = [level for level, _ in blocks]
    own, num_params = rows[0], slope_theta.shape[1]
    # Advanced indices around a slice give (block, variable, unit of the level below, parameter).
    weight = layers[-1][0].unflatten(0, (-1, num_params))
    weight = weight[own[:, :, None], :, rows[-1][:, None]]
    # (block, unit, variable, N): the product then runs over all variables of a block at once.
    grad = (weight @ slope_theta[own]).transpose(1, 2)
    for level in range(len(blocks) - 1, 0, -1):
        slope = torch.where(blocks[level][1], activation_slopes[level - 1][rows[level]], 0.0)
        weight = layers[level - 1][0][rows[level][:, :, None], rows[level - 1][:, None]]
        grad = (grad * slope[:, :, None]).flatten(2)
        grad = (weight.mT @ grad).unflatten(2, (own.shape[1], -1))
    matrix = grad.permute(0, 3, 2, 1).contiguous()
    matrix.diagonal(dim1=-2, dim2=-1).copy_(slope_x[own].mT)
    return matrix


def partials(elementwise: ElementwiseMap, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of the map in x, ``(D, N)``, and in its parameters, ``(D, P, N)``."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        theta = theta.detach().unflatten(0, (x.shape[0], -1)).requires_grad_()
        y, _ = elementwise.call_and_ladj(x.t(), theta.permute(2, 0, 1))
        return torch.autograd.grad(y.sum(), (x, theta))
