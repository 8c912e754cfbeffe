r"""The inverse of an autoregressive map, at about the arithmetic of one pass of its network.

A masked network whose hidden units are sorted by degree has block-triangular weights. Level 0 is
the variables, levels 1 to L the hidden layers, level L + 1 the parameters of the variables;
``starts[l][i]`` is the number of rows of level ``l`` that belong to variables before ``i``. With
``i`` variables known, exactly the rows ``starts[l][i]`` to ``starts[l][i + 1]`` of each level
become known, then variable ``i`` itself. So the inverse of :math:`y_i = f(x_i; \theta_i(x_{<i}))`
is found in ascending order, in blocks: what a block takes from earlier blocks is one dense
product per level, and only what its variables take from each other goes step by step. Tensors
are ``(rows, N)`` for a batch of ``N``, so that every slice is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from flowvi.nn.mlp import slope_of
from flowvi.transforms._adjoint import partials, solve_adjoint
from flowvi.transforms.elementwise import ElementwiseMap

__all__ = ["Inversion", "solve"]

_BLOCK = 8


def solve(
    y: Tensor,
    layers: Sequence[tuple[Tensor, Tensor]],
    starts: Sequence[Sequence[int]],
    activation: Callable[[Tensor], Tensor],
    elementwise: ElementwiseMap,
) -> tuple[list[Tensor], list[Tensor]]:
    """Invert an autoregressive map.

    Args:
        y: values to invert, ``(D, N)``.
        layers: masked weight ``(rows, columns)`` and bias ``(rows, 1 or N)`` of each level above
            the variables.
        starts: first row of each variable in each level, ``D + 1`` integers per level.
        activation: elementwise nonlinearity of the hidden levels.
        elementwise: the map of one variable.

    Returns:
        What each level puts out (x, then hidden units) and what levels 1 and up take in (hidden
        units before the activation, or after a ReLU, which has the same slope there; then theta).
    """
    last = len(layers)
    inputs = [y.new_empty(weight.shape[0], y.shape[1]) for weight, _ in layers]
    in_place = type(activation) is nn.ReLU
    # Zeros, not garbage: columns not known yet meet weights that are zero.
    outputs = [torch.zeros_like(y)]
    outputs += inputs[:-1] if in_place else [torch.zeros_like(taken) for taken in inputs[:-1]]
    x_rows, y_rows = outputs[0].unbind(0), y.unbind(0)
    for begin in range(0, y.shape[0], _BLOCK):
        end = min(begin + _BLOCK, y.shape[0])
        steps = _take_from_earlier(layers, starts, inputs, outputs, begin, end)
        nears = _block_rows(outputs, starts, begin, end)
        for i in range(begin, end):
            for level in range(last):
                taken, weight, made = steps[level][i - begin]
                if taken.shape[0] == 0:
                    continue
                taken.addmm_(weight, nears[level])
                if level == last - 1:
                    break
                if in_place:
                    taken.relu_()
                else:
                    made.copy_(activation(taken))
            x_rows[i].copy_(elementwise.inverse(y_rows[i], taken.t()))
    return outputs, inputs


def _take_from_earlier(
    layers: Sequence[tuple[Tensor, Tensor]],
    starts: Sequence[Sequence[int]],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    begin: int,
    end: int,
) -> list[list[tuple[Tensor, ...]]]:
    """What a block takes from earlier ones, in place; per level and variable, what is left to do.

    That is the rows it takes in, the weights that meet its own block, and the rows it puts out.
    """
    steps = []
    for level, (weight, bias) in enumerate(layers, 1):
        first, stop = starts[level][begin], starts[level][end]
        known, near = starts[level - 1][begin], starts[level - 1][end]
        taken = inputs[level - 1][first:stop]
        earlier = outputs[level - 1][:known]
        torch.addmm(bias[first:stop], weight[first:stop, :known], earlier, out=taken)
        made = outputs[level][first:stop] if level < len(layers) else taken
        parts = (taken, weight[first:stop, known:near], made)
        sizes = _sizes(starts[level], begin, end)
        steps.append(list(zip(*(part.split(sizes) for part in parts), strict=True)))
    return steps


def _block_rows(
    tensors: Sequence[Tensor], starts: Sequence[Sequence[int]], begin: int, end: int
) -> list[Tensor]:
    return [t[s[begin] : s[end]] for t, s in zip(tensors, starts, strict=False)]


def _sizes(starts: Sequence[int], begin: int, end: int) -> list[int]:
    return [starts[i + 1] - starts[i] for i in range(begin, end)]


class Inversion(torch.autograd.Function):
    """``(y, weights) -> (x, theta)``; its backward is the adjoint solve, not a loop's tape.

    Arguments of ``apply``: ``(starts, blocks, activation, elementwise)``, y ``(D, N)``, then
    weight and bias of each level in turn. Differentiable once.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, spec: tuple, y: Tensor, *flat: Tensor) -> tuple[Tensor, Tensor]:
        starts, _, activation, elementwise = spec
        layers = list(zip(flat[::2], flat[1::2], strict=True))
        outputs, inputs = solve(y, layers, starts, activation, elementwise)
        ctx.spec = spec
        ctx.save_for_backward(*outputs, *inputs, *flat)
        return outputs[0], inputs[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_x: Tensor, grad_theta: Tensor) -> tuple:
        starts, blocks, activation, elementwise = ctx.spec
        depth = len(starts) - 1
        saved = ctx.saved_tensors
        outputs, inputs, flat = saved[:depth], saved[depth : 2 * depth], saved[2 * depth :]
        layers = list(zip(flat[::2], flat[1::2], strict=True))
        grad_y, grads = solve_adjoint(
            grad_x,
            grad_theta,
            layers,
            starts,
            blocks,
            [
                slope_of(activation, taken, made)
                for taken, made in zip(inputs[:-1], outputs[1:], strict=True)
            ],
            partials(elementwise, outputs[0], inputs[-1]),
        )
        result = [None, grad_y]
        for k, (grad, output, (_, bias)) in enumerate(zip(grads, outputs, layers, strict=True)):
            needs_weight, needs_bias = ctx.needs_input_grad[2 + 2 * k : 4 + 2 * k]
            result.append(grad @ output.t() if needs_weight else None)
            result.append(_sum_to(grad, bias) if needs_bias else None)
        return tuple(result)


def _sum_to(grad: Tensor, bias: Tensor) -> Tensor:
    return grad if bias.shape == grad.shape else grad.sum(1, keepdim=True)
