"""A flow that depends on time and data as the marginals of a path."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowvi.paths._derivative import time_derivative
from flowvi.paths.base import Path, PathPoint, with_time
from flowvi.paths.diffusion import Diffusion
from flowvi.paths.gaussian import normal_log_prob

if TYPE_CHECKING:
    from flowvi.transforms import FlowTransform

__all__ = ["FlowPath"]


class FlowPath(Path):
    r"""Marginals given by any conditional transform of data and time.

    .. math:: x_t = T(\epsilon \mid c(y, t)), \qquad v = \partial_t T, \qquad
        s = \nabla_x \log q(x \mid c(y, t))

    The velocity is one forward-mode pass. The score is the gradient of the flow's log-density,
    which needs the inverse pass; where only the forward direction is cheap (IAF), it is solved
    for with the forward Jacobian, at ``input_dim`` backward passes.

    Args:
        transform: map from noise to state, with ``context_dim`` at least 1 and an inverse.
        diffusion: b; a positive number, a function of time, or a :class:`Diffusion`.
        context: makes the context vector ``(*batch, context_dim)`` of ``(y, t)``; ``y`` with the
            time appended if left out, or the time alone where ``y`` is None. Transforms that
            are smooth in their context give smooth velocities.

    Shape:
        y: what ``context`` understands; t: ``(*batch, 1)``; state: ``(*batch, input_dim)``.

    Raises:
        ValueError: if the transform takes no context.
        NotImplementedError: if it has no inverse.

    References:
        Bartosh, Vetrov and Naesseth (2024), Neural flow diffusion models, arXiv:2404.12940,
        equations 9 to 11.

    Example:
        >>> from flowvi.flows import realnvp
        >>> path = FlowPath(realnvp(2, context_dim=4).transform, diffusion=0.5)
        >>> path.sample(torch.full((5, 1), 0.5), torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        transform: FlowTransform,
        diffusion: float | Tensor | Callable | Diffusion,
        context: Callable[[Tensor | None, Tensor], Tensor] | None = None,
    ) -> None:
        if transform.context_dim < 1:
            raise ValueError(
                "`transform` must take a context, in which the time comes; got context_dim 0."
            )
        if not transform.has_inverse:
            raise NotImplementedError(
                f"{type(transform).__name__} has no inverse, so the path would have no score. "
                "Wrap it in NumericalInverse."
            )
        super().__init__(transform.input_dim, diffusion)
        self.map = transform
        self.context = context
        # By name, since the enumeration belongs to the transforms, which paths do not import.
        self._forward_only = transform.cheap.name == "FORWARD"

    def transform(self, eps: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.map.call_and_ladj(eps, self._context(y, t))[0]

    def point(self, eps: Tensor, t: Tensor, y: Tensor | None = None) -> PathPoint:
        state, velocity = time_derivative(lambda t: self.transform(eps, t, y), t)
        score = self._forward_score(eps, t, y) if self._forward_only else self._score(state, t, y)
        return self._complete(state, t, velocity, score)

    def noise_of(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.map.inverse_and_ladj(x, self._context(y, t))[0]

    def log_prob(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        eps, ladj = self.map.inverse_and_ladj(x, self._context(y, t))
        return normal_log_prob(eps, eps.new_zeros(()), eps.new_ones(1)) + ladj

    def _context(self, y: Tensor | None, t: Tensor) -> Tensor:
        if self.context is not None:
            return self.context(y, t)
        return t if y is None else with_time(y, t)

    def _score(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        # The drift is trained through the score, and divergences are taken through it: the
        # functional gradient keeps a graph where there is one, and can be nested.
        return torch.func.grad(lambda x: self.log_prob(x, t, y).sum())(x)

    def _forward_score(self, eps: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """Score of ``T(eps)``: with J the Jacobian, its transpose maps it to that of eps."""
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            eps = eps if eps.requires_grad and keep else eps.detach().requires_grad_()
            x, ladj = self.map.call_and_ladj(eps, self._context(y, t))
            log_q = -eps.square().sum() / 2 - ladj.sum()
            *rows, right = (
                torch.autograd.grad(out, eps, create_graph=keep, retain_graph=True)[0]
                for out in (*x.reshape(-1, x.shape[-1]).sum(0).unbind(), log_q)
            )
            return torch.linalg.solve(torch.stack(rows, -1), right.unsqueeze(-1)).squeeze(-1)
