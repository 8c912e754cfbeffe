"""Radial maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowvi.transforms._algebra import above_minus_one
from flowvi.transforms._parameters import RawParameters
from flowvi.transforms.base import FlowTransform

__all__ = ["Radial"]


class Radial(FlowTransform):
    r"""Radial map: stretches or squeezes space around one learned centre.

    .. math:: y = x + \frac{\beta}{\alpha + r} (x - c), \qquad r = \lVert x - c \rVert

    with :math:`\beta = \alpha m` and :math:`m > -1`. Cheap (linear in ``input_dim``) and
    expressive only near the centre; stack several. The inverse is a formula: the distance of
    ``y`` from the centre is a quadratic equation in :math:`r`. At the centre itself the
    log-determinant has a cusp.

    Args:
        input_dim: number of dimensions, at least 1.
        context_dim: length of the context vector; 0 learns one centre.
        hidden_dims: widths of the context network's hidden layers; empty makes it linear.

    Shape:
        x: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; ladj: ``(*batch,)``, nats.

    References:
        Rezende and Mohamed (2015), Variational inference with normalizing flows,
        arXiv:1505.05770, equation 14; the constraint :math:`\beta > -\alpha` is appendix A.2.

    Example:
        >>> y, ladj = Radial(input_dim=2).call_and_ladj(torch.zeros(5, 2))
        >>> y.shape, ladj.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    has_score_recursion = True

    def __init__(
        self, input_dim: int, context_dim: int = 0, *, hidden_dims: Sequence[int] = ()
    ) -> None:
        super().__init__(input_dim, context_dim)
        start = {
            "centre": 0.1 * torch.randn(input_dim),
            "log_width": torch.zeros(1),
            "strength": 0.01 * torch.randn(1),
        }
        self.raw = RawParameters(start, context_dim, hidden_dims)

    def _parts(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Centre c, width alpha and strength beta, the last two with a final size of 1."""
        centre, log_width, strength = self.raw(context)
        width = log_width.exp()
        return centre, width, width * above_minus_one(strength)

    def _forward(
        self, x: Tensor, centre: Tensor, width: Tensor, beta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Offset from the centre, distance, and relative stretch across and along the ray."""
        offset = x - centre
        r = torch.linalg.vector_norm(offset, dim=-1, keepdim=True)
        across = beta / (width + r)
        return offset, r, across, across * width / (width + r)

    def _call_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        centre, width, beta = self._parts(context)
        offset, _, across, along = self._forward(x, centre, width, beta)
        return x + across * offset, self._ladj(across, along)

    def _ladj(self, across: Tensor, along: Tensor) -> Tensor:
        ladj = torch.log1p(along) + (self.input_dim - 1) * torch.log1p(across)
        return ladj.squeeze(-1)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        centre, width, beta = self._parts(context)
        offset = y - centre
        distance = torch.linalg.vector_norm(offset, dim=-1, keepdim=True)
        # |y - c| = r (1 + beta / (alpha + r)), so r^2 - excess r - alpha |y - c| = 0.
        excess = distance - width - beta
        product = width * distance
        root = torch.sqrt(excess.square() + 4 * product)
        # The form without cancellation for each sign of the excess.
        r = torch.where(excess >= 0, (root + excess) / 2, 2 * product / (root + excess.abs()))
        across = beta / (width + r)
        return centre + offset / (1 + across), -self._ladj(across, across * width / (width + r))

    def _call_ladj_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        centre, width, beta = self._parts(context)
        offset, r, across, along = self._forward(x, centre, width, beta)
        y, ladj = x + across * offset, self._ladj(across, along)
        with torch.no_grad():
            tiny = torch.finfo(x.dtype).tiny
            ray = offset / r.clamp_min(tiny)
            slope = -(2 * along / (1 + along) + (self.input_dim - 1) * across / (1 + across))
            score = score.detach() - ray * (slope / (width + r))
            radial = ray * (ray * score).sum(-1, keepdim=True)
            # J is symmetric: 1 + along on the ray, 1 + across on what is orthogonal to it.
            pushed = (score - radial) / (1 + across) + radial / (1 + along)
        return y, ladj, pushed.detach()
