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
        x0, w, y0, h, d0, d1 = self._bin(inner, params, axis=0)
        y, log_slope = _segment((inner - x0) / w, w, y0, h, d0, d1)
        return self._outside(x, y), self._outside(x, log_slope, 0.0)

    def inverse_and_ladj(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        inner, params = _columns(y.clamp(-self.bound, self.bound), params)
        x0, w, y0, h, d0, d1 = self._bin(inner, params, axis=1)
        xi = _root(inner - y0, w, h, d0, d1)
        log_slope = _segment(xi, w, y0, h, d0, d1)[1]
        return self._outside(y, x0 + xi * w), self._outside(y, -log_slope, 0.0)

    def inverse(self, y: Tensor, params: Tensor) -> Tensor:
        inner, params = _columns(y.clamp(-self.bound, self.bound), params)
        x0, w, y0, h, d0, d1 = self._bin(inner, params, axis=1)
        return self._outside(y, x0 + _root(inner - y0, w, h, d0, d1) * w)

    def _outside(self, value: Tensor, result: Tensor, outside: float | None = None) -> Tensor:
        """Put ``outside`` (or the value itself) outside the box, and dimensions back in place."""
        inside = value.abs() < self.bound
        return torch.where(inside, result.movedim(0, -1), value if outside is None else outside)

    def _bin(self, value: Tensor, params: Tensor, axis: int) -> tuple[Tensor, ...]:
        """Left knot, width, lower knot, height and end slopes of the bin that holds ``value``.

        ``axis`` says what ``value`` is: 0 for x, 1 for y.
        """
        k, bound = self.num_bins, self.bound
        raw, raw_slopes = params.split((2 * k, k - 1))
        # Half the raw numbers: the bins then follow a network's output more gently, which keeps
        # the rounding errors of stacked and autoregressive splines from growing.
        soft = torch.softmax(0.5 * raw.unflatten(0, (2, k)), 1)
        # Inner knots of x and y: a share of evenly spread ones and a share of the network's.
        even = torch.arange(1, k, dtype=soft.dtype, device=soft.device) * (2 * bound / k)
        knots = torch.add(
            _as_column(_MIN_SHARE * even - bound, soft.dim() - 1),
            soft[:, :-1].cumsum(1),
            alpha=2 * bound * (1 - _MIN_SHARE),
        )
        index = (value >= knots[axis]).sum(0)
        # From here on all is as small as ``value``: four knots around it, and three bins.
        number = index + _as_column(torch.arange(-1, 3, device=index.device), value.dim() + 1)
        place = (number - 1).clamp(0, k - 2)
        near = knots.expand(-1, -1, *index.shape).gather(1, place.expand(2, -1, *index.shape))
        near = torch.where(number <= 0, -bound, torch.where(number >= k, bound, near))
        widths, heights = near.diff(dim=1).unbind(0)
        # Beyond the box there is no bin: 0 / 1, not 0 / 0, and the slope of the end knot is 1.
        steepness = widths / torch.where(heights > 0, heights, 1.0)
        picked = raw_slopes.expand(-1, *index.shape).gather(0, place[1:3])
        slopes = 2 * torch.exp(_soft_sign(picked)) / (steepness[1:] + steepness[:-1])
        inner = (number[1:3] > 0) & (number[1:3] < k)
        d0, d1 = torch.where(inner, slopes, 1.0).unbind(0)
        return near[0, 1], widths[1], near[1, 1], heights[1], d0, d1


_MIN_SHARE = 0.3  # least size of a bin, as a share of an even one


def _columns(value: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """Both with dimensions first (parameters: bins, dimensions), so that slices are contiguous."""
    params = params[(None,) * (value.dim() + 1 - params.dim())]
    value = value[(None,) * (params.dim() - 1 - value.dim())]
    return value.movedim(-1, 0).contiguous(), params.movedim((-1, -2), (0, 1)).contiguous()


def _as_column(values: Tensor, num_dims: int) -> Tensor:
    """One value per first index, to broadcast against a tensor of so many dimensions."""
    return values[(...,) + (None,) * (num_dims - 1)]


def _soft_sign(raw: Tensor) -> Tensor:
    """Tanh, by way of torch's much faster sigmoid."""
    return 2 * torch.sigmoid(2 * raw) - 1


def _root(eta: Tensor, w: Tensor, h: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
    """Position in a bin at height ``eta`` above its lower knot: a quadratic's root in [0, 1]."""
    s = h / w
    bent = eta * (d0 + d1 - 2 * s)
    a = h * (s - d0) + bent
    b = h * d0 - bent
    c = s * eta
    # The form that does not cancel; where b < 0, a > h s > 0.
    q = b.abs() + torch.sqrt((b * b + 4 * a * c).clamp_min(0.0))
    positive = b >= 0
    return torch.where(positive, 2 * c, q) / torch.where(positive, q, 2 * a)


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
