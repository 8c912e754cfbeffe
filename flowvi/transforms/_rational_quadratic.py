r"""One bin of a rational-quadratic spline: value, log-slope, root, and their derivatives.

On the bin with left knot :math:`(x_0, y_0)`, width :math:`w`, height :math:`h`, mean slope
:math:`s = h / w` and end slopes :math:`d_0, d_1`, with :math:`\xi = (x - x_0) / w` and
:math:`m = \xi (1 - \xi)`,

.. math:: y = y_0 + h \frac{s \xi^2 + d_0 m}{b}, \qquad b = s + (d_0 + d_1 - 2 s) m, \qquad
    \frac{dy}{dx} = \frac{s^2 u}{b^2}, \qquad u = d_1 \xi^2 + 2 s m + d_0 (1 - \xi)^2

Everything here is elementwise, so it fuses into one loop where it is compiled.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Cell", "CellGrad", "bend", "end_slopes", "pull_back", "root", "segment"]


class Cell(NamedTuple):
    """The bin that holds a number, and its neighbours.

    ``widths`` and ``heights`` are those of the bin on the left, of its own and of the one on the
    right, ``raw`` the raw slopes of its two knots. A knot that is not ``inner`` is an end of the
    box and has slope 1; its raw slope and the bin beyond it may be anything positive.
    """

    x0: Tensor
    y0: Tensor
    widths: tuple[Tensor, Tensor, Tensor]
    heights: tuple[Tensor, Tensor, Tensor]
    raw: tuple[Tensor, Tensor]
    inner: tuple[Tensor, Tensor]


class CellGrad(NamedTuple):
    """Gradients for the parts of a :class:`Cell`."""

    x0: Tensor
    y0: Tensor
    widths: tuple[Tensor, Tensor, Tensor]
    heights: tuple[Tensor, Tensor, Tensor]
    raw: tuple[Tensor, Tensor]


def end_slopes(cell: Cell) -> tuple[Tensor, Tensor]:
    """Slopes at the two knots of the bin."""
    left, own, right = (w / h for w, h in zip(cell.widths, cell.heights, strict=True))
    return (
        _slope(cell.raw[0], left + own, cell.inner[0]),
        _slope(cell.raw[1], own + right, cell.inner[1]),
    )


def _slope(raw: Tensor, steepness: Tensor, inner: Tensor) -> Tensor:
    return torch.where(inner, 2 * torch.exp(soft_sign(raw)) / steepness, 1.0)


def soft_sign(raw: Tensor) -> Tensor:
    """Tanh, by way of torch's much faster sigmoid."""
    return 2 * torch.sigmoid(2 * raw) - 1


def segment(xi: Tensor, cell: Cell, slopes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Value and log-slope at position ``xi`` of a bin, equations 4 and 5 of the reference."""
    d0, d1 = slopes
    w, h = cell.widths[1], cell.heights[1]
    s = h / w
    rest = 1 - xi
    mixed = xi * rest
    bottom = s + (d0 + d1 - 2 * s) * mixed
    y = cell.y0 + h * (s * xi * xi + d0 * mixed) / bottom
    top = d1 * xi * xi + 2 * s * mixed + d0 * rest * rest
    # One logarithm, which is dear; the slope is far from overflow.
    return y, torch.log(s * s * top / (bottom * bottom))


def root(eta: Tensor, cell: Cell, slopes: tuple[Tensor, Tensor]) -> Tensor:
    """Position in a bin at height ``eta`` above its lower knot: a quadratic's root in [0, 1]."""
    d0, d1 = slopes
    w, h = cell.widths[1], cell.heights[1]
    s = h / w
    bent = eta * (d0 + d1 - 2 * s)
    a = h * (s - d0) + bent
    b = h * d0 - bent
    c = s * eta
    # The form that does not cancel; where b < 0, a > h s > 0.
    q = b.abs() + torch.sqrt((b * b + 4 * a * c).clamp_min(0.0))
    positive = b >= 0
    return torch.where(positive, 2 * c, q) / torch.where(positive, q, 2 * a)


def bend(xi: Tensor, cell: Cell, slopes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Slope at position ``xi``, and the derivative of its logarithm in x."""
    d0, d1 = slopes
    w = cell.widths[1]
    s = cell.heights[1] / w
    rest = 1 - xi
    mixed, turn = xi * rest, d0 + d1 - 2 * s
    bottom = s + turn * mixed
    top = d1 * xi * xi + 2 * s * mixed + d0 * rest * rest
    change = 1 - 2 * xi
    change_top = 2 * (d1 * xi - d0 * rest + s * change)
    slope = s * s * top / (bottom * bottom)
    return slope, (change_top / top - 2 * turn * change / bottom) / w


def pull_back(
    xi: Tensor, cell: Cell, slopes: tuple[Tensor, Tensor], grad_y: Tensor, grad_ladj: Tensor
) -> tuple[Tensor, CellGrad]:
    """Gradients for x, at position ``xi``, and for the cell, given those of y and log-slope."""
    d0, d1 = slopes
    w, h = cell.widths[1], cell.heights[1]
    s = h / w
    rest = 1 - xi
    mixed, turn, square = xi * rest, d0 + d1 - 2 * s, xi * xi
    over = (s + turn * mixed).reciprocal()
    rise = (s * square + d0 * mixed) * over
    # Of numerator, b and u; then of s, slopes, m and xi.
    of_num = grad_y * h * over
    of_bottom = -(of_num * rise + 2 * grad_ladj * over)
    of_top = grad_ladj / (d1 * square + 2 * s * mixed + d0 * rest * rest)
    of_s = of_num * square + of_bottom * (1 - 2 * mixed) + 2 * (of_top * mixed + grad_ladj / s)
    of_d0 = (of_num + of_bottom) * mixed + of_top * rest * rest
    of_d1 = of_bottom * mixed + of_top * square
    of_mixed = of_num * d0 + of_bottom * turn + 2 * of_top * s
    of_xi = 2 * (of_num * s * xi + of_top * (d1 * xi - d0 * rest)) + of_mixed * (1 - 2 * xi)
    raw0, left = _pull_back_slope(cell, 0, d0, of_d0)
    raw1, right = _pull_back_slope(cell, 1, d1, of_d1)
    # The steepness w / h enters both slopes.
    of_s = of_s - (left + right) / (s * s)
    grad_x = of_xi / w
    steep_left, steep_right = (cell.widths[i] / cell.heights[i] for i in (0, 2))
    of_w = -(of_s * s / w + grad_x * xi)
    of_h = grad_y * rise + of_s / w
    widths = (left / cell.heights[0], of_w, right / cell.heights[2])
    heights = (-widths[0] * steep_left, of_h, -widths[2] * steep_right)
    return grad_x, CellGrad(-grad_x, grad_y, widths, heights, (raw0, raw1))


def _pull_back_slope(cell: Cell, end: int, slope: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients for a raw slope, and for the steepness of each of the two bins at its knot."""
    scaled = torch.where(cell.inner[end], grad * slope, 0.0)
    sign = soft_sign(cell.raw[end])
    # With slope = 2 exp(sign) / steepness, so 1 / steepness = slope exp(-sign) / 2.
    return scaled * (1 - sign * sign), -0.5 * scaled * slope * torch.exp(-sign)
