"""How the times of a path law are drawn: spread evenly over a plate, by a density."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor, nn

__all__ = ["DensityTimes", "LateTimes", "TimeLaw", "UniformTimes"]


class TimeLaw(nn.Module, ABC):
    r"""Random times with density :math:`\rho`, and the weights :math:`1 / \rho` of an integral.

    .. math:: \int_{low}^{high} h(t)\,dt = E_\rho\big[h(t) / \rho(t)\big]

    Times are low-discrepancy: one uniform number shifts an even grid over all items that are
    drawn together (particles, plate, several times for an item). Each alone has density
    :math:`\rho`, so sums over items stay unbiased and vary less.

    Args:
        low: first time; the process starts there.
        high: last time.
        stratified: draw on a shifted grid; otherwise independently.

    Raises:
        ValueError: if the two are not ordered or not finite.
    """

    def __init__(self, low: float = 0.0, high: float = 1.0, *, stratified: bool = True) -> None:
        super().__init__()
        if not -float("inf") < low < high < float("inf"):
            raise ValueError(f"`high` must be above `low`, both finite; got {high} and {low}.")
        self.low = float(low)
        self.high = float(high)
        self.stratified = stratified

    @abstractmethod
    def place(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Times and weights ``1 / density`` from numbers uniform on [0, 1)."""

    def draw(self, shape: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
        """Times of this shape and their weights, of dtype and device of ``like``.

        The dims further left vary slowest, so put the times of one item there. The last of
        several dims, the items, takes its part of the grid in random order: otherwise all of a
        class would have nearly one time wherever a batch is sorted by class.
        """
        kind = {"dtype": like.dtype, "device": like.device}
        number = prod(shape)
        if not self.stratified or number < 2:
            return self.place(torch.rand(*shape, **kind))
        shift = torch.rand((), **kind)
        # Round the circle, so that no item keeps to a part of the interval.
        even = (torch.arange(number, **kind) / number + shift).frac()
        even = even.reshape(shape)
        if len(shape) > 1:
            even = even[..., torch.rand(shape[-1], **kind).argsort()]
        return self.place(even)


class UniformTimes(TimeLaw):
    """Times that are uniform between two ends.

    Args:
        low: first time; the process starts there.
        high: last time.
        stratified: draw on a shifted grid; otherwise independently.

    References:
        Kingma, Salimans, Poole and Ho (2021), Variational diffusion models, arXiv:2107.00630,
        appendix I.1, for the shifted grid.

    Example:
        >>> times, weights = UniformTimes(0.0, 2.0).draw((4,), torch.empty(0))
        >>> weights
        tensor([2., 2., 2., 2.])
        >>> bool((times.sort().values.diff() - 0.5).abs().max() < 1e-6)
        True
    """

    def place(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        width = self.high - self.low
        return self.low + width * uniform, torch.full_like(uniform, width)


class LateTimes(TimeLaw):
    r"""Times that crowd towards the last one, for integrands that are large there.

    .. math:: \rho(t) = \frac{1}{2 \sqrt{(high - low)(high - t)}}

    The drift of a bridge that is tied at the last time has noise of variance
    :math:`\sigma^2 t / (1 - t)`, whose integral is infinite under uniform times and finite under
    these.

    Args:
        low: first time; the process starts there.
        high: last time.
        stratified: draw on a shifted grid; otherwise independently.

    Example:
        >>> times, weights = LateTimes().draw((1000,), torch.empty(0))
        >>> bool((times.median() - 0.75).abs() < 0.01), bool((weights.mean() - 1).abs() < 0.01)
        (True, True)
    """

    def place(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        # No time rounds to the last one, where a bridge has no drift.
        rest = (1 - uniform).clamp(min=torch.finfo(uniform.dtype).eps ** 0.5)
        width = self.high - self.low
        return self.low + width * (1 - rest.square()), 2 * width * rest


class DensityTimes(TimeLaw):
    r"""Times drawn where an integrand is large (importance sampling).

    The density is taken as constant on each of many small bins, and that step function is both
    drawn from and divided by, so there is no error of discretisation.

    Args:
        density: positive function of times, need not be normalised; evaluated once, here.
        low: first time; the process starts there.
        high: last time.
        num_bins: number of steps, at least 1.
        stratified: draw on a shifted grid; otherwise independently.

    Raises:
        ValueError: if the density is not positive and finite in the middle of each bin.

    Example:
        >>> times, weights = DensityTimes(lambda t: 1 / (0.1 + t)).draw((1000,), torch.empty(0))
        >>> bool((weights.mean() - 1).abs() < 0.01)
        True
    """

    def __init__(
        self,
        density: Callable[[Tensor], Tensor],
        low: float = 0.0,
        high: float = 1.0,
        *,
        num_bins: int = 512,
        stratified: bool = True,
    ) -> None:
        super().__init__(low, high, stratified=stratified)
        if num_bins < 1:
            raise ValueError(f"`num_bins` must be at least 1; got {num_bins}.")
        edges = torch.linspace(low, high, num_bins + 1, dtype=torch.get_default_dtype())
        with torch.no_grad():
            mass = density((edges[1:] + edges[:-1]) / 2)
        if mass.shape != (num_bins,) or not bool(((mass > 0) & mass.isfinite()).all()):
            raise ValueError(
                "`density` must be positive and finite, one number for each time; got values "
                f"between {float(mass.min())} and {float(mass.max())}, shape {tuple(mass.shape)}."
            )
        total = torch.cat([mass.new_zeros(1), mass.cumsum(0)])
        self.register_buffer("cumulative", total / total[-1])

    def place(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        cumulative = self.cumulative.to(uniform)
        bins = len(cumulative) - 1
        index = torch.searchsorted(cumulative, uniform.contiguous(), right=True)
        index = index.clamp(1, bins) - 1
        start = cumulative[index]
        mass = cumulative[index + 1] - start
        width = (self.high - self.low) / bins
        return self.low + width * (index + (uniform - start) / mass), width / mass
