"""One tensor that holds a simulated path and what a likelihood ratio needs of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SimulatedDraw", "SimulatedLayout"]


@dataclass(frozen=True)
class SimulatedDraw:
    """The named parts of a drawn value.

    Args:
        states: at every time of the grid, ``(*batch, num_steps + 1, dim)``.
        drift: of the process that was simulated, at the start of every step,
            ``(*batch, num_steps, dim)``.
        diffusion: the same of the diffusion; ``None`` for a process without noise.
        increments: Brownian increments; ``None`` where no pathwise ratio is formed.
    """

    states: Tensor
    drift: Tensor
    diffusion: Tensor | None
    increments: Tensor | None

    @property
    def start(self) -> Tensor:
        """State at the first time, ``(*batch, dim)``."""
        return self.states[..., 0, :]

    @property
    def end(self) -> Tensor:
        """State at the last time, ``(*batch, dim)``."""
        return self.states[..., -1, :]


@dataclass(frozen=True)
class SimulatedLayout:
    """Where each part of a draw lies in its tensor.

    Args:
        dim: number of dimensions of the state.
        num_steps: steps of the grid.
        has_diffusion: whether there is noise.
        has_increments: whether the increments are stored.

    Example:
        >>> SimulatedLayout(dim=2, num_steps=3, has_diffusion=True, has_increments=False).size
        20
    """

    dim: int
    num_steps: int
    has_diffusion: bool
    has_increments: bool

    @property
    def _rows(self) -> list[int]:
        others = 1 + self.has_diffusion + self.has_increments
        return [self.num_steps + 1, *[self.num_steps] * others]

    @property
    def size(self) -> int:
        """Length of the tensor."""
        return self.dim * sum(self._rows)

    def pack(
        self, states: Tensor, drift: Tensor, diffusion: Tensor | None, increments: Tensor | None
    ) -> Tensor:
        """One tensor ``(*batch, size)``, graphs included, from parts whose times come first."""
        parts = [states, drift]
        parts += [diffusion] if self.has_diffusion else []
        parts += [increments] if self.has_increments else []
        return torch.cat(parts).movedim(0, -2).flatten(-2)

    def unpack(self, value: Tensor) -> SimulatedDraw:
        """The parts of a tensor, as views.

        Raises:
            ValueError: if the tensor has another length.
        """
        if value.shape[-1:] != (self.size,):
            raise ValueError(
                f"`value` must end with size {self.size}, a draw with dim = {self.dim} and "
                f"{self.num_steps} steps; got shape {tuple(value.shape)}. Give posterior and "
                "prior the same times and log_ratio."
            )
        rows = value.unflatten(-1, (-1, self.dim)).split(self._rows, -2)
        parts = list(rows[2:])
        diffusion = parts.pop(0) if self.has_diffusion else None
        increments = parts.pop(0) if self.has_increments else None
        return SimulatedDraw(rows[0], rows[1], diffusion, increments)
