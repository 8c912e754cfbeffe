"""An inverse for maps that have only a forward formula."""

from __future__ import annotations

import torch
from torch import Tensor

from flowvi.transforms._solvers import damped_newton, require_solved
from flowvi.transforms.base import Direction, FlowTransform, flatten_batch, require_vectors

__all__ = ["NumericalInverse"]


class NumericalInverse(FlowTransform):
    r"""The same map with an inverse found by damped Newton steps, row by row.

    Forward is the wrapped map itself. The inverse solves :math:`T(x) = y`; one more Newton step
    at the solution, :math:`x = x_0 - J_0^{-1} (T(x_0) - y)` with constant :math:`x_0, J_0`, gives
    first derivatives by the implicit function theorem, exact in ``y``, parameters and context.
    A Newton step costs ``input_dim`` reverse passes, so this is for moderate ``input_dim``.
    Second derivatives of the inverse are not exact.

    Args:
        transform: a differentiable, invertible map of the whole space that treats every row of a
            batch by itself.

    Shape:
        as ``transform``.

    Raises:
        TypeError: if ``transform`` is not a FlowTransform.
        RuntimeError: by the inverse, if it did not converge (not checked where values cannot be
            looked at: on the meta device, under ``vmap``, while compiling).

    Example:
        >>> class Cubic(FlowTransform):
        ...     has_inverse = False
        ...     def _call_and_ladj(self, x, context):
        ...         return x + x**3, torch.log1p(3 * x**2).sum(-1)
        >>> x, _ = NumericalInverse(Cubic(1)).inverse_and_ladj(torch.tensor([10.0]))
        >>> x
        tensor([2.])
    """

    exact_inverse = False
    cheap = Direction.FORWARD

    def __init__(self, transform: FlowTransform) -> None:
        if not isinstance(transform, FlowTransform):
            raise TypeError(
                f"`transform` must be a FlowTransform; got {type(transform).__name__}."
            )
        require_vectors("transform", transform.event_shape)
        super().__init__(transform.input_dim, transform.context_dim)
        self.transform = transform

    @property
    def has_score_recursion(self) -> bool:
        return self.transform.has_score_recursion

    def _call_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.transform._call_and_ladj(x, context)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        rows, context, batch = flatten_batch(y, context)
        target = rows.detach()
        fixed = None if context is None else context.detach()
        solved, jacobian = damped_newton(
            lambda x: self.transform._call_and_ladj(x, fixed)[0], target, target
        )
        residual = self.transform._call_and_ladj(solved, context)[0] - rows
        require_solved(
            type(self.transform).__name__,
            residual.detach().norm(dim=-1),
            target.norm(dim=-1),
        )
        step = torch.linalg.solve_ex(jacobian, residual.unsqueeze(-1))[0].squeeze(-1)
        x = solved - step
        ladj = self.transform._call_and_ladj(x, context)[1]
        return x.reshape(*batch, self.input_dim), -ladj.reshape(batch)

    def _call_ladj_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.transform._call_ladj_and_score(x, score, context)
