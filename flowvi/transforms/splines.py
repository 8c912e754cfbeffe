"""Rational-quadratic spline as an elementwise map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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

    So that the inverse stays well conditioned in single precision, no bin is smaller than 0.3
    of an even one, and the slope at an inner knot is the harmonic mean of the mean slopes of its
    two bins times a factor between ``exp(-1)`` and ``exp(1)``. (A slope far above those of its
    bins would make the middle of the bins nearly flat.)

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
    prefers_columns = True

    def __post_init__(self) -> None:
        if self.num_bins < 2:
            raise ValueError(f"`num_bins` must be at least 2; got {self.num_bins}.")
        if not self.bound > 0:
            raise ValueError(f"`bound` must be positive; got {self.bound}.")

    @property
    def num_params(self) -> int:
        return 3 * self.num_bins - 1

    def call_and_ladj(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        inner, params = _columns(x.clamp(-self.bound, self.bound), params)
        x0, w, y0, h, d0, d1 = self._bin(inner, params, search_heights=False)
        y, log_slope = _segment((inner - x0) / w, w, y0, h, d0, d1)
        return self._outside(x, y, log_slope)

    def inverse_and_ladj(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        inner, params = _columns(y.clamp(-self.bound, self.bound), params)
        x0, w, y0, h, d0, d1 = self._bin(inner, params, search_heights=True)
        s = h / w
        eta = inner - y0
        bent = eta * (d0 + d1 - 2 * s)
        a = h * (s - d0) + bent
        b = h * d0 - bent
        c = s * eta
        # The root in [0, 1] in the form that does not cancel; where b < 0, a > h s > 0.
        q = b.abs() + torch.sqrt((b * b + 4 * a * c).clamp_min(0.0))
        positive = b >= 0
        xi = torch.where(positive, 2 * c, q) / torch.where(positive, q, 2 * a)
        log_slope = _segment(xi, w, y0, h, d0, d1)[1]
        return self._outside(y, x0 + xi * w, -log_slope)

    def _outside(self, value: Tensor, result: Tensor, ladj: Tensor) -> tuple[Tensor, Tensor]:
        """Put the identity outside the box, and the dimensions back into the last place."""
        inside = value.abs() < self.bound
        result, ladj = result.movedim(0, -1), ladj.movedim(0, -1)
        return torch.where(inside, result, value), torch.where(inside, ladj, 0.0)

    def _bin(self, value: Tensor, params: Tensor, *, search_heights: bool) -> tuple[Tensor, ...]:
        """Left knot, width, lower knot, height and end slopes of the bin that holds ``value``."""
        k = self.num_bins
        raw_widths, raw_heights, raw_slopes = params.split((k, k, k - 1))
        widths, heights = _shares(raw_widths), _shares(raw_heights)
        xs, ys = self._knots(widths), self._knots(heights)
        index = (value >= (ys if search_heights else xs)[1:-1]).sum(0, keepdim=True)

        def pick(table: Tensor, offset: int = 0) -> Tensor:
            return table.expand(-1, *index.shape[1:]).gather(0, index + offset).squeeze(0)

        steepness = widths / heights
        # Sum of the inverse slopes of the bins beside each knot; 2 makes the end slopes 1.
        beside = _pad(steepness[1:] + steepness[:-1], 2.0)
        raw_slopes = _pad(raw_slopes, 0.0)
        d0, d1 = (
            2 * torch.exp(_soft_sign(pick(raw_slopes, side))) / pick(beside, side)
            for side in (0, 1)
        )
        x0, y0 = pick(xs), pick(ys)
        return x0, pick(xs, 1) - x0, y0, pick(ys, 1) - y0, d0, d1

    def _knots(self, shares: Tensor) -> Tensor:
        """The ``num_bins + 1`` knots of one axis, the ends exactly on the box."""
        inner = 2 * self.bound * torch.cumsum(shares[:-1], 0) - self.bound
        end = inner.new_full((1, *inner.shape[1:]), self.bound)
        return torch.cat([-end, inner, end])


_MIN_SHARE = 0.3  # least size of a bin, as a share of an even one


def _columns(value: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """Both with dimensions first (parameters: bins, dimensions), so that slices are contiguous."""
    params = params[(None,) * (value.dim() + 1 - params.dim())]
    value = value[(None,) * (params.dim() - 1 - value.dim())]
    return value.movedim(-1, 0).contiguous(), params.movedim((-1, -2), (0, 1)).contiguous()


def _shares(raw: Tensor) -> Tensor:
    # Half the raw numbers: the bins then follow a network's output more gently, which keeps the
    # rounding errors of stacked and autoregressive splines from growing.
    return _MIN_SHARE / raw.shape[0] + (1 - _MIN_SHARE) * torch.softmax(0.5 * raw, 0)


def _soft_sign(raw: Tensor) -> Tensor:
    """Tanh, by way of torch's much faster sigmoid."""
    return 2 * torch.sigmoid(2 * raw) - 1


def _pad(inner: Tensor, value: float) -> Tensor:
    end = inner.new_full((1, *inner.shape[1:]), value)
    return torch.cat([end, inner, end])


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
