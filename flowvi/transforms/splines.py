"""Rational-quadratic spline as an elementwise map."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from torch.autograd import forward_ad

from flowvi.nn._compiled import can_compile
from flowvi.transforms._spline_bins import SideBySide
from flowvi.transforms._spline_pass import SplinePass, fastest, invert, run
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

    With ``compiled`` each direction, and its backward, is one loop made by ``torch.compile``;
    ``benchmarks/flows.py`` says what that saves. The first call of a kind then takes tens of
    seconds, and one more for other sizes than the first; without a C++ compiler a warning says so
    and the map runs as without. Second derivatives, ``torch.func`` transforms and parameters
    shared by a batch go as without.

    Args:
        num_bins: number of bins, at least 2.
        bound: half-width of the box, positive.
        compiled: run through ``torch.compile``.

    Raises:
        ValueError: if ``num_bins`` is below 2, or ``bound`` is not positive.

    References:
        Durkan, Bekasov, Murray and Papamakarios (2019), Neural spline flows, arXiv:1906.04032,
        section 3.1, equations 4 and 5, and the inverse that follows them.
    """

    num_bins: int = 8
    bound: float = 5.0
    compiled: bool = field(default=False, kw_only=True)
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
        return self._map(x, params, False)

    def inverse_and_ladj(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._map(y, params, True)

    def inverse(self, y: Tensor, params: Tensor) -> Tensor:
        y, params = _columns(y, params)
        return invert(SideBySide(self.num_bins, self.bound), y, params).movedim(0, -1)

    def _map(self, value: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        value, params = _columns(value, params)
        if value.shape == params.shape[1:] and can_compile(value) and not _is_dual(value, params):
            bins = fastest(self.num_bins, self.bound, compiled=self.compiled)
            result, ladj = SplinePass.apply(bins, inverse, value, params)
        else:
            bins = SideBySide(self.num_bins, self.bound)
            result, ladj, _ = run(bins, value, params, inverse)
        return result.movedim(0, -1), ladj.movedim(0, -1)


def _is_dual(*tensors: Tensor) -> bool:
    """Whether a forward derivative goes along with one of them."""
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _columns(value: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """Both with dimensions first (parameters: bins, dimensions), so that slices are contiguous."""
    params = params[(None,) * (value.dim() + 1 - params.dim())]
    value = value[(None,) * (params.dim() - 1 - value.dim())]
    return value.movedim(-1, 0).contiguous(), params.movedim((-1, -2), (0, 1)).contiguous()
