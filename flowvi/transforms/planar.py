"""Planar maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flowvi.transforms._algebra import above_minus_one
from flowvi.transforms._parameters import RawParameters
from flowvi.transforms._solvers import increasing_root, require_solved
from flowvi.transforms.base import Direction, FlowTransform

__all__ = ["Planar"]


class Planar(FlowTransform):
    r"""Planar map: bends space across one learned hyperplane.

    .. math:: y = x + \hat u \tanh(w^T x + b)

    with :math:`\hat u` equal to the free :math:`u` except along :math:`w`, where
    :math:`w^T \hat u > -1` is enforced; the constraint does nothing where
    :math:`w^T u \ge 0`. Costs ``2 * input_dim`` products and bends along one direction only;
    stack several. The inverse is numerical: one increasing equation in :math:`w^T x` per row.
    Its first derivatives are exact, its second ones are not.

    Args:
        input_dim: number of dimensions, at least 1.
        context_dim: length of the context vector; 0 learns one hyperplane.
        hidden_dims: widths of the context network's hidden layers; empty makes it linear.

    Shape:
        x: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; ladj: ``(*batch,)``, nats.

    Raises:
        RuntimeError: by the inverse, if it did not converge.

    References:
        Rezende and Mohamed (2015), Variational inference with normalizing flows,
        arXiv:1505.05770, equation 10; the constraint is appendix A.1 with another function of
        :math:`w^T u`, which is the identity above 0 and so finite as :math:`w` vanishes.

    Example:
        >>> y, ladj = Planar(2).call_and_ladj(torch.zeros(5, 2))
        >>> y.shape, ladj.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    exact_inverse = False
    has_score_recursion = True
    cheap = Direction.FORWARD

    def __init__(
        self, input_dim: int, context_dim: int = 0, *, hidden_dims: Sequence[int] = ()
    ) -> None:
        super().__init__(input_dim, context_dim)
        start = {
            "direction": torch.randn(input_dim) / math.sqrt(input_dim),
            "shift": 0.01 * torch.randn(input_dim),
            "bias": torch.zeros(()),
        }
        self.raw = RawParameters(start, context_dim, hidden_dims)

    def _parts(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Direction w, constrained shift u, bias b and the product w^T u."""
        w, u, b = self.raw(context)
        tiny = torch.finfo(w.dtype).tiny
        free = (w * u).sum(-1, keepdim=True)
        product = above_minus_one(free)
        u = u + (product - free) * w / w.square().sum(-1, keepdim=True).clamp_min(tiny)
        return w, u, b, product.squeeze(-1)

    def _call_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        w, u, b, product = self._parts(context)
        h = torch.tanh((x * w).sum(-1) + b)
        return x + u * h.unsqueeze(-1), torch.log1p(product * (1 - h * h))

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        w, u, b, product = self._parts(context)
        target = (y * w).sum(-1)
        root = solve_tanh(product, torch.ones_like(product), b, target, "Planar")
        h = torch.tanh(root + b)
        return y - u * h.unsqueeze(-1), -torch.log1p(product * (1 - h * h))

    def _call_ladj_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        w, u, b, product = self._parts(context)
        h = torch.tanh((x * w).sum(-1) + b)
        slope = product * (1 - h * h)
        y, ladj = x + u * h.unsqueeze(-1), torch.log1p(slope)
        with torch.no_grad():
            w, u, h, slope = (t.detach() for t in (w, u, h.unsqueeze(-1), slope.unsqueeze(-1)))
            # The gradient of ladj is along w, and so is what J^{-T} takes away:
            # I - w u^T h' / (1 + w^T u h') (Sherman and Morrison).
            score = score.detach() + w * (2 * h * slope / (1 + slope))
            along = (u * score).sum(-1, keepdim=True)
            pushed = score - w * ((1 - h * h) * along / (1 + slope))
        return y, ladj, pushed


def solve_tanh(r: Tensor, s: Tensor, offset: Tensor, target: Tensor, name: str) -> Tensor:
    """Root of ``v + r tanh(s v + offset) = target``, differentiable in all four arguments.

    Needs ``r s > -1``, which makes the left side increasing; the root is within ``|r|`` of
    ``target``.
    """
    r, s, offset, target = torch.broadcast_tensors(r, s, offset, target)
    r0, s0, offset0, target0 = (t.detach() for t in (r, s, offset, target))

    def excess(v: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(s0 * v + offset0)
        return v + r0 * h - target0, 1 + r0 * s0 * (1 - h * h)

    v = increasing_root(excess, target0 - r0.abs(), target0 + r0.abs())
    value, slope = excess(v)
    require_solved(name, value, target0)
    # One Newton step with a constant slope carries the implicit derivatives.
    return v - (v + r * torch.tanh(s * v + offset) - target) / slope
