"""One tensor that holds a draw of a path law, and its named parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PathDraw", "PathLayout", "PathTerms"]


@dataclass(frozen=True)
class PathDraw:
    r"""The named parts of a drawn value.

    Args:
        start: state at the first time, ``(*batch, dim)``.
        time: random times, ``(*batch, num_times, 1)``.
        weight: factor of each time in the integral, ``1 / (num_times * density)``, like ``time``.
        state: states at the random times, ``(*batch, num_times, dim)``.
        drift: drift of the posterior process there, like ``state``.
        diffusion: b there, like ``state``.
        observed: states at the observation times, ``(*batch, num_observed, dim)``.
        data: target of a data prediction, like ``state``; ``None`` without a schedule.
        noise: target of a noise prediction, likewise.
    """

    start: Tensor
    time: Tensor
    weight: Tensor
    state: Tensor
    drift: Tensor
    diffusion: Tensor
    observed: Tensor
    data: Tensor | None = None
    noise: Tensor | None = None

    @property
    def end(self) -> Tensor:
        """State at the last observation time, ``(*batch, dim)``."""
        return self.observed[..., -1, :]


@dataclass(frozen=True)
class PathLayout:
    """Where each part of a draw lies in its tensor.

    Args:
        dim: number of dimensions of the state.
        num_times: random times per item.
        num_observed: observation times.
        has_target: whether targets of predictions are stored.

    Example:
        >>> PathLayout(dim=2, num_times=1, num_observed=1, has_target=False).size
        12
    """

    dim: int
    num_times: int
    num_observed: int
    has_target: bool

    @property
    def size(self) -> int:
        """Length of the tensor."""
        return self.dim + self.num_times * self._row + self.num_observed * self.dim

    @property
    def _row(self) -> int:
        return 2 + self.dim * (5 if self.has_target else 3)

    def pack(self, draw: PathDraw) -> Tensor:
        """One tensor ``(*batch, size)`` with all parts, graphs included."""
        parts = [draw.time, draw.weight, draw.state, draw.drift, draw.diffusion]
        if self.has_target:
            parts += [draw.data, draw.noise]
        rows = torch.cat(parts, -1).flatten(-2)
        return torch.cat([draw.start, rows, draw.observed.flatten(-2)], -1)

    def unpack(self, value: Tensor) -> PathDraw:
        """The parts of a tensor, as views.

        Raises:
            ValueError: if the tensor has another length.
        """
        if value.shape[-1:] != (self.size,):
            raise ValueError(
                f"`value` must end with size {self.size}, a draw with dim = {self.dim}, "
                f"num_times = {self.num_times} and {self.num_observed} observation times; got "
                f"shape {tuple(value.shape)}. Give PathPosterior and PathPrior the same path, "
                "num_times and at."
            )
        middle = self.num_times * self._row
        start, rows, observed = value.split((self.dim, middle, self.num_observed * self.dim), -1)
        widths = [1, 1, *[self.dim] * (5 if self.has_target else 3)]
        time, weight, state, drift, diffusion, *target = rows.unflatten(
            -1, (self.num_times, self._row)
        ).split(widths, -1)
        observed = observed.unflatten(-1, (self.num_observed, self.dim))
        return PathDraw(start, time, weight, state, drift, diffusion, observed, *target)


class PathTerms(NamedTuple):
    """The parts of a path's log-probability, ``(*batch,)`` each, in nats.

    Args:
        start: log-density of the state at the first time.
        path: everything else; of a :class:`PathPrior`, minus the estimated path integral.
    """

    start: Tensor
    path: Tensor
