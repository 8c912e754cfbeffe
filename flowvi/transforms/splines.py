"""Rational-quadratic spline as an elementwise map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from flowvi.transforms.elementwise import ElementwiseMap

__all__ = ["RationalQuadratic"]


@dataclass(frozen=True)
class RationalQuadratic(ElementwiseMap):
    r"""Monotone rational-quadratic spline on ``[-bound, bound]``, the identity outside.

    On the bin with left knot :math:`(x_k, y_k)`, width :math:`w`, height :math:`h`, mean slope
    :math:`s = h / w` and end slopes :math:`d_0, d_1`, with :math:`\xi = (x - x_k) / w`,

    .. math:: y = y_k + h \frac{s \xi^2 + d_0 \xi (1 - \xi)}{s + (d_0 + d_1 - 2 s) \xi (1 - \xi)}

    The slope at both ends of the box is 1, so the map is continuously differentiable. Raw
    parameters are ``num_bins`` widths, ``num_bins`` heights and ``num_bins - 1`` inner slopes.
    Inputs are clamped to the box before the arithmetic: far inputs give no overflow.

    Args:
        num_bins: number of bins, at least 2.
        bound: half-width of the box, positive.

    Raises:
        ValueError: if ``num_bins`` is below 2, or ``bound`` is not positive.

    References:
        Durkan, Bekasov, Murray and Papamakarios (2019), Neural spline flows, arXiv:1906.04032,
        section 3.1, equations 4 and 5, and the inverse that follows them.
    """

    num_bins: int = 8
    bound: float = 5.0

    def __post_init__(self) -> None:
        if self.num_bins < 2:
            raise ValueError(f"`num_bins` must be at least 2; got {self.num_bins}.")
        if not self.bound > 0:
            raise ValueError(f"`bound` must be positive; got {self.bound}.")

    @property
    def num_params(self) -> int:
        return 3 * self.num_bins - 1

    def call_and_ladj(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        inner = x.clamp(-self.bound, self.bound)
        x0, w, y0, h, d0, d1 = self._bin(inner, params, search_heights=False)
        xi = (inner - x0) / w
        y, log_slope = _segment(xi, w, y0, h, d0, d1)
        inside = x.abs() < self.bound
        return torch.where(inside, y, x), torch.where(inside, log_slope, 0.0)

    def inverse_and_ladj(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        inner = y.clamp(-self.bound, self.bound)
        x0, w, y0, h, d0, d1 = self._bin(inner, params, search_heights=True)
        s = h / w
        eta = inner - y0
        curve = d0 + d1 - 2 * s
        a = h * (s - d0) + eta * curve
        b = h * d0 - eta * curve
        c = s * eta
        # The root in [0, 1] in the form that does not cancel; where b < 0, a > h s > 0.
        q = b.abs() + torch.sqrt((b * b + 4 * a * c).clamp_min(0.0))
        positive = b >= 0
        xi = torch.where(positive, 2 * c, q) / torch.where(positive, q, 2 * a)
        x = x0 + xi * w
        log_slope = _segment(xi, w, y0, h, d0, d1)[1]
        inside = y.abs() < self.bound
        return torch.where(inside, x, y), torch.where(inside, -log_slope, 0.0)

    def _bin(self, value: Tensor, params: Tensor, *, search_heights: bool) -> tuple[Tensor, ...]:
        """Left knot, width, lower knot, height and end slopes of the bin that holds ``value``."""
        k = self.num_bins
        # Bins first: each step below then works on whole contiguous slices.
        params = params[(None,) * (value.dim() + 1 - params.dim())]
        widths, heights, slopes = params.movedim(-1, 0).split((k, k, k - 1))
        xs, ys = self._knots(widths), self._knots(heights)
        index = (value >= (ys if search_heights else xs)[1:-1]).sum(0, keepdim=True)
        shape = index.shape[1:]

        def pick(table: Tensor, offset: int = 0) -> Tensor:
            return table.expand(table.shape[0], *shape).gather(0, index + offset).squeeze(0)

        x0, y0 = pick(xs), pick(ys)
        slopes = F.pad(slopes.flatten(1), (0, 0, 1, 1)).unflatten(1, slopes.shape[1:])
        d0, d1 = (_slope(pick(slopes, offset)) for offset in (0, 1))
        return x0, pick(xs, 1) - x0, y0, pick(ys, 1) - y0, d0, d1

    def _knots(self, raw: Tensor) -> Tensor:
        """The ``num_bins + 1`` knots of one axis, the ends exactly on the box."""
        share = _MIN_SHARE / self.num_bins + (1 - _MIN_SHARE) * torch.softmax(raw, 0)
        inner = 2 * self.bound * torch.cumsum(share[:-1], 0) - self.bound
        end = inner.new_full((1, *inner.shape[1:]), self.bound)
        return torch.cat([-end, inner, end])


# Guards that keep the inverse well conditioned: the least bin as a share of an even one, and the
# largest log-slope at a knot (the same as the default of the affine map).
_MIN_SHARE = 0.05
_MAX_LOG_SLOPE = 4.0


def _slope(raw: Tensor) -> Tensor:
    return torch.exp(_MAX_LOG_SLOPE * torch.tanh(raw / _MAX_LOG_SLOPE))


def _segment(
    xi: Tensor, w: Tensor, y0: Tensor, h: Tensor, d0: Tensor, d1: Tensor
) -> tuple[Tensor, Tensor]:
    """Value and log-slope at position ``xi`` of a bin, equations 4 and 5 of the reference."""
    s = h / w
    rest = 1 - xi
    mixed = xi * rest
    bottom = s + (d0 + d1 - 2 * s) * mixed
    y = y0 + h * (s * xi * xi + d0 * mixed) / bottom
    top = s * s * (d1 * xi * xi + 2 * s * mixed + d0 * rest * rest)
    return y, torch.log(top) - 2 * torch.log(bottom)
