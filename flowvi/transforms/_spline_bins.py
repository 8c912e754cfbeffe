"""Finding the bin of a spline that holds a number, and the way back to raw parameters.

Two ways to the same numbers: :class:`SideBySide` works on all bins at once, with few operations
for torch to call one by one; :class:`OneByOne` writes the bins out, so that a compiler makes one
loop of everything that keeps its numbers in registers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowvi.nn._compiled import can_compile
from flowvi.transforms._rational_quadratic import Cell, CellGrad

__all__ = ["Bins", "OneByOne", "SideBySide"]

_MIN_SHARE = 0.3  # least size of a bin, as a share of an even one


@dataclass(frozen=True)
class Bins(ABC):
    """Bins of splines with ``num_bins`` bins on ``[-bound, bound]``.

    Shape:
        value: ``(*batch)`` within the box; params: ``(3 num_bins - 1, *batch)``, or with sizes of
        1 that broadcast.
    """

    num_bins: int
    bound: float

    @property
    def least(self) -> float:
        """Least size of a bin."""
        return _MIN_SHARE * 2 * self.bound / self.num_bins

    @property
    def spread(self) -> float:
        """What the raw sizes share out, beyond the least sizes."""
        return 2 * self.bound * (1 - _MIN_SHARE)

    @abstractmethod
    def find(self, value: Tensor, params: Tensor, axis: int) -> tuple[Cell, tuple]:
        """The cell that holds ``value`` (0: an x, 1: a y), and what :meth:`pull_back` needs."""

    @abstractmethod
    def pull_back(self, grad: CellGrad, kept: tuple) -> Tensor:
        """Gradient for ``params``, given that for the cell."""


@dataclass(frozen=True)
class SideBySide(Bins):
    """All bins at once."""

    def find(self, value: Tensor, params: Tensor, axis: int) -> tuple[Cell, tuple]:
        k = self.num_bins
        raw, raw_slopes = params.split((2 * k, k - 1))
        # Half the raw numbers: the bins then follow a network's output more gently, which keeps
        # the rounding errors of stacked and autoregressive splines from growing.
        soft = torch.softmax(0.5 * raw.unflatten(0, (2, k)), 1)
        # Inner knots of x and y: a share of evenly spread ones and a share of the network's.
        even = torch.arange(1, k, dtype=soft.dtype, device=soft.device) * self.least
        even = _as_column(even - self.bound, soft.dim() - 1)
        knots = torch.add(even, _running_sums(soft[:, :-1]), alpha=self.spread)
        index = (value >= knots[axis]).sum(0)
        # From here on all is as small as ``value``. What is found beyond the box is not used.
        before, after = (index - 1).clamp_min(0), (index + 1).clamp_max(k - 1)
        look_up = _lookup(torch.stack([after, index, before, index.clamp_max(k - 2)]), params)
        inner = index > 0, index < k - 1
        x0, y0 = (torch.where(inner[0], look_up(table, 2, 3)[0], -self.bound) for table in knots)
        widths, heights = (
            torch.add(shares.new_tensor(self.least), look_up(shares, 0, 3), alpha=self.spread)
            for shares in soft
        )
        right, own, left = zip(widths, heights, strict=True)
        widths, heights = zip(left, own, right, strict=True)
        slopes = look_up(raw_slopes, 2, 4).unbind(0)
        return Cell(x0, y0, widths, heights, slopes, inner), (soft, index)

    def pull_back(self, grad: CellGrad, kept: tuple) -> Tensor:
        soft, index = kept
        k, batch = self.num_bins, index.shape
        out = soft.new_empty(3 * k - 1, *batch)
        # What a bin's size is worth: it also moves the knots on its right.
        worth = out[: 2 * k].view(2, k, *batch)
        before = _as_column(torch.arange(k, device=index.device), index.dim() + 1) < index
        torch.mul(before, torch.stack([grad.x0, grad.y0]).unsqueeze(1), out=worth)
        sizes = torch.stack([*grad.widths, *grad.heights]).view(2, 3, *batch)
        place = index + _as_column(torch.arange(-1, 2, device=index.device), index.dim() + 1)
        worth.scatter_add_(1, place.clamp_(0, k - 1).expand_as(sizes), sizes)
        worth.sub_((soft * worth).sum(1, keepdim=True)).mul_(soft).mul_(0.5 * self.spread)
        slopes = soft.new_zeros(k + 1, *batch)
        slopes.scatter_(0, torch.stack([index, index + 1]), torch.stack(grad.raw))
        out[2 * k :] = slopes[1:-1]
        return out


@dataclass(frozen=True)
class OneByOne(Bins):
    """Bin after bin, without indexing."""

    def find(self, value: Tensor, params: Tensor, axis: int) -> tuple[Cell, tuple]:
        k, raw = self.num_bins, params.unbind(0)
        shares = _softmax(raw[:k]), _softmax(raw[k : 2 * k])
        widths, heights = ([self.least + self.spread * p for p in share] for share in shares)
        slopes = raw[2 * k :]
        knots = _knots(widths, -self.bound), _knots(heights, -self.bound)
        above = [value >= knot for knot in knots[axis][1:]]

        def pick(choices: Sequence[Tensor]) -> Tensor:
            found = choices[0]
            for mask, choice in zip(above, choices[1:], strict=True):
                found = torch.where(mask, choice, found)
            return found

        def around(sizes: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            left, right = sizes[:1] + sizes[:-1], sizes[1:] + sizes[-1:]
            return pick(left), pick(sizes), pick(right)

        cell = Cell(
            pick(knots[0]),
            pick(knots[1]),
            around(widths),
            around(heights),
            (pick(slopes[:1] + slopes), pick(slopes + slopes[-1:])),
            (above[0], ~above[-1]),
        )
        return cell, (shares, above)

    def pull_back(self, grad: CellGrad, kept: tuple) -> Tensor:
        shares, above = kept
        k = self.num_bins
        # Whether the number is in a bin, or at most in it.
        here = [~above[0], *(a & ~b for a, b in zip(above, above[1:], strict=False)), above[-1]]
        out = []
        for share, knot, (left, own, right) in (
            (shares[0], grad.x0, grad.widths),
            (shares[1], grad.y0, grad.heights),
        ):
            worth = []
            for i in range(k):
                value = torch.where(here[i], own, 0.0)
                if i < k - 1:
                    value = value + torch.where(above[i], knot, 0.0)
                    value = value + torch.where(here[i + 1], left, 0.0)
                if i > 0:
                    value = value + torch.where(here[i - 1], right, 0.0)
                worth.append(value)
            mean = sum(p * v for p, v in zip(share, worth, strict=True))
            out += [0.5 * self.spread * p * (v - mean) for p, v in zip(share, worth, strict=True)]
        for i in range(k - 1):
            of_right = torch.where(here[i], grad.raw[1], 0.0)
            out.append(of_right + torch.where(here[i + 1], grad.raw[0], 0.0))
        return torch.stack(out)


def _softmax(raw: Sequence[Tensor]) -> list[Tensor]:
    """Softmax of half the raw numbers."""
    top = raw[0]
    for other in raw[1:]:
        top = torch.maximum(top, other)
    parts = [torch.exp(0.5 * (r - top)) for r in raw]
    over = sum(parts[1:], parts[0]).reciprocal()
    return [part * over for part in parts]


def _knots(sizes: Sequence[Tensor], start: float) -> list[Tensor]:
    knots = [torch.full_like(sizes[0], start)]
    for size in sizes[:-1]:
        knots.append(knots[-1] + size)
    return knots


def _running_sums(parts: Tensor) -> Tensor:
    """Running sums along the second axis, in place where nothing looks on."""
    if torch.is_grad_enabled() or not can_compile(parts):
        return parts.cumsum(1)
    sums = torch.empty_like(parts)
    sums[:, 0] = parts[:, 0]
    for i in range(1, parts.shape[1]):
        torch.add(sums[:, i - 1], parts[:, i], out=sums[:, i])
    return sums


def _lookup(rows: Tensor, like: Tensor) -> Callable[[Tensor, int, int], Tensor]:
    """Function ``(table, first, stop)`` that takes one row of a table for every number.

    Args:
        rows: several row numbers for every number, ``(choices, *batch)``; ``first`` to ``stop``
            are the choices wanted.
        like: the tables' batch sizes are its own, ``(*, *batch)``, which may be 1.
    """
    if like.shape[1:] != rows.shape[1:]:
        return lambda table, first, stop: table.expand(-1, *rows.shape[1:]).gather(
            0, rows[first:stop]
        )
    size = rows[0].numel()
    flat = rows.flatten(1) * size + torch.arange(size, device=rows.device)
    return lambda table, first, stop: (
        table.reshape(-1).index_select(0, flat[first:stop].reshape(-1)).view_as(rows[first:stop])
    )


def _as_column(values: Tensor, num_dims: int) -> Tensor:
    """One value per first index, to broadcast against a tensor of so many dimensions."""
    return values[(...,) + (None,) * (num_dims - 1)]
