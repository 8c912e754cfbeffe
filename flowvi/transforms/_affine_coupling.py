"""Affine coupling with its score recursion in one pass, and the backward of the value by hand.

Autograd would put as many steps on its tape again as the recursion itself takes; here the backward
uses the hidden values and the scale that the recursion has computed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from flowvi.nn.mlp import activate
from flowvi.transforms.elementwise import Additive, Affine

__all__ = ["AffineCouplingPass", "is_supported"]

# What autograd uses: one kernel each, from the activation's value.
_GRADS = {
    nn.ReLU: lambda grad, value: torch.ops.aten.threshold_backward(grad, value, 0),
    nn.Tanh: torch.ops.aten.tanh_backward,
}
Split = Callable[[Tensor], tuple[Tensor, Tensor]]


def is_supported(elementwise: object, activation: nn.Module) -> bool:
    """Whether this is plain eager code for an affine map and an activation known here."""
    return (
        type(elementwise) in (Additive, Affine)
        and type(activation) in _GRADS
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


class AffineCouplingPass(torch.autograd.Function):
    r"""``(x, score, network) -> (y, ladj, pushed score)``, differentiable once in y and ladj.

    Arguments of ``apply``: ``(split, join, elementwise, activation)``, x and score ``(N, D)``,
    then weight and bias of each layer in turn; the first bias may differ from row to row.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, spec: tuple, x: Tensor, score: Tensor, *flat: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        split, join, elementwise, activation = spec
        kept, moved = split(x)
        score_kept, score_moved = split(score)
        weights, biases = flat[::2], flat[1::2]
        values = [kept]
        for weight, bias in zip(weights[:-1], biases, strict=False):
            values.append(activate(activation, torch.addmm(bias, values[-1], weight.t())))
        raw = torch.addmm(biases[-1], values[-1], weights[-1].t())
        params = raw.unflatten(1, (elementwise.num_params, -1)).mT
        y, ladj, score_moved, grad = elementwise.call_with_score(moved, params, score_moved)
        # J is block triangular with the diagonal block exp(ladj): solve for the moved part,
        # then substitute; the network's share comes back through its own pullback.
        grad = grad.mT.flatten(1)
        for weight, value in zip(weights[:0:-1], values[:0:-1], strict=True):
            grad = _GRADS[type(activation)](grad @ weight, value)
        score_kept = torch.addmm(score_kept, grad, weights[0], alpha=-1)
        ctx.spec, ctx.depth = spec, len(weights)
        ctx.save_for_backward(moved, ladj, *values, *flat)
        pushed = join(score_kept, score_moved)
        ctx.mark_non_differentiable(pushed)
        ctx.set_materialize_grads(False)
        return join(kept, y), ladj.sum(-1), pushed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad_y: Tensor | None, grad_ladj: Tensor | None, _: None
    ) -> tuple:
        split, join, elementwise, activation = ctx.spec
        moved, ladj, *saved = ctx.saved_tensors
        values, flat = saved[: ctx.depth], saved[ctx.depth :]
        if grad_y is None:
            shape = (*moved.shape[:-1], values[0].shape[-1] + moved.shape[-1])
            grad_y = moved.new_zeros(shape)
        grad_kept, grad_moved = split(grad_y)
        grad_moved, grad = elementwise.pull_back(moved, ladj, grad_moved, grad_ladj)
        grad = grad.mT.flatten(1)
        needs, result = ctx.needs_input_grad[3:], [None] * len(flat)
        for layer in range(ctx.depth - 1, -1, -1):
            weight, bias, value = flat[2 * layer], flat[2 * layer + 1], values[layer]
            if needs[2 * layer]:
                result[2 * layer] = grad.t() @ value
            if needs[2 * layer + 1]:
                result[2 * layer + 1] = grad.sum(0) if bias.dim() == 1 else grad
            if layer:
                grad = _GRADS[type(activation)](grad @ weight, value)
        if ctx.needs_input_grad[1]:
            grad_x = join(torch.addmm(grad_kept, grad, flat[0]), grad_moved)
        else:
            grad_x = None
        return None, grad_x, None, *result
