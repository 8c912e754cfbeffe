"""Map of the line to an interval, for data with bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional as F

from flowvi.transforms.base import FlowTransform

__all__ = ["ToInterval"]


class ToInterval(FlowTransform):
    r"""Elementwise logistic map of the line to an interval; its inverse is the logit of the data.

    .. math:: y = low + (high - low) \frac{s(x) - \alpha}{1 - 2 \alpha},
        \qquad s(x) = 1 / (1 + e^{-x})

    The interval reached is wider than ``[low, high]`` by the share :math:`\alpha / (1 - 2\alpha)`
    on each side, so that data on a bound keep a moderate logit. The density has that much room
    outside the data. The inverse of a value beyond the reached interval is that of a value just
    inside it.

    Args:
        input_dim: number of dimensions, at least 1; or an event shape.
        low: lower bound of the data.
        high: upper bound of the data, above ``low``.
        margin: the share :math:`\alpha`, at least 0 and below one half.

    Shape:
        x: ``(*batch, *event_shape)``; ladj: ``(*batch,)``, in nats.

    Raises:
        ValueError: if the bounds or the margin are out of order.

    References:
        Dinh, Sohl-Dickstein and Bengio (2017), RealNVP, arXiv:1605.08803, section 4.1.

    Example:
        >>> ToInterval(2, 0.0, 256.0)(torch.zeros(2))
        tensor([128., 128.])
    """

    def __init__(
        self,
        input_dim: int | Sequence[int],
        low: float = 0.0,
        high: float = 1.0,
        *,
        margin: float = 0.0,
    ) -> None:
        super().__init__(input_dim)
        if not low < high:
            raise ValueError(f"`high` must be above `low`; got {high} and {low}.")
        if not 0 <= margin < 0.5:
            raise ValueError(f"`margin` must be at least 0 and below 0.5; got {margin}.")
        self.margin = margin
        self.scale = (high - low) / (1 - 2 * margin)
        self.low = low - margin * self.scale

    @property
    def codomain(self) -> constraints.Constraint:
        reached = constraints.interval(self.low, self.low + self.scale)
        return constraints.independent(reached, len(self.event_shape))

    def _call_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.low + self.scale * torch.sigmoid(x), self._ladj(x)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        share = (y - self.low) / self.scale
        finfo = torch.finfo(y.dtype)
        x = torch.logit(share.clamp(finfo.tiny, 1 - finfo.eps / 2))
        return x, -self._ladj(x)

    def _ladj(self, x: Tensor) -> Tensor:
        slope = math.log(self.scale) - F.softplus(x) - F.softplus(-x)
        return slope.flatten(-len(self.event_shape)).sum(-1)
