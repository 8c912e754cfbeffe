"""Adaptive solves by torchdiffeq, with an error norm that looks at every row by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Block",
    "NotSolvedError",
    "TooManyEvaluationsError",
    "Tolerance",
    "natural_size",
    "solve_adaptively",
]

Function = Callable[[Tensor, list[Tensor]], Sequence[Tensor]]


class TooManyEvaluationsError(Exception):
    """The tolerance was not reached within the evaluations allowed."""


class NotSolvedError(Exception):
    """The step size fell to nothing."""


@dataclass(frozen=True)
class Block:
    """One part of a state.

    Args:
        start: initial value ``(N, width)`` of ``N`` rows, or of any shape where ``controlled``
            is false.
        scale: natural size of each row ``(N,)``, for the absolute tolerance; None for 1.
        controlled: whether its error is looked at.
    """

    start: Tensor
    scale: Tensor | None = None
    controlled: bool = True


@dataclass(frozen=True)
class Tolerance:
    """When a step is good enough.

    Args:
        method: torchdiffeq's name of the method.
        rtol: tolerance relative to the size of a row.
        atol: tolerance relative to the natural size of a row.
        max_evaluations: evaluations allowed.
    """

    method: str
    rtol: float
    atol: float
    max_evaluations: int


class _Controlled:
    """The right-hand side on the flattened state, and the norm of its error.

    torchdiffeq's tolerance is per number, so a number near zero in a row of large ones would
    have to be better than rounding allows, and its norm is a mean over all rows, so a bad row is
    lost among many. Here a step is accepted when every row is right relative to its own size.
    For that torchdiffeq hands over plain errors (tolerance 1), and the sizes are those of the
    state at which the field was evaluated last.
    """

    def __init__(self, function: Function, blocks: Sequence[Block], tolerance: Tolerance) -> None:
        self.function = function
        self.blocks = blocks
        self.tolerance = tolerance
        self.sizes = [block.start.numel() for block in blocks]
        self.num_evaluations = 0
        self.finite = True
        self.seen: list[Tensor] = [block.start.detach() for block in blocks]
        # Below a few units of rounding no step would ever be good enough.
        self.rtol = max(tolerance.rtol, 10 * torch.finfo(blocks[0].start.dtype).eps)

    def split(self, flat: Tensor) -> list[Tensor]:
        pieces = flat.split(self.sizes)
        return [p.view(b.start.shape) for p, b in zip(pieces, self.blocks, strict=True)]

    def __call__(self, t: Tensor, flat: Tensor) -> Tensor:
        if self.num_evaluations >= self.tolerance.max_evaluations:
            raise TooManyEvaluationsError
        self.num_evaluations += 1
        state = self.split(flat)
        self.seen = [part.detach() for part in state]
        return torch.cat([rate.reshape(-1) for rate in self.function(t, state)])

    @torch.no_grad()
    def norm(self, error: Tensor) -> Tensor:
        ratios = [error.new_zeros(())]
        for block, seen, part in zip(self.blocks, self.seen, self.split(error), strict=True):
            if block.controlled and part.numel():
                scale = 1.0 if block.scale is None else block.scale
                allowed = self.tolerance.atol * scale + self.rtol * _size(seen)
                ratios.append((_size(part) / allowed).max())
        largest = torch.stack(ratios).max()
        self.finite = bool(largest.isfinite())
        # Infinity makes the step shorter, where NaN would end the solve.
        return largest.nan_to_num(nan=torch.inf, posinf=torch.inf)


def solve_adaptively(
    function: Function, blocks: Sequence[Block], start: float, end: float, tolerance: Tolerance
) -> tuple[list[Tensor], int]:
    """The blocks at the end, and the number of evaluations.

    Raises:
        TooManyEvaluationsError: if more evaluations than allowed are needed.
        NotSolvedError: if no step is short enough.
    """
    # Imported here, as it imports scipy, which changes the warning filters.
    import torchdiffeq

    controlled = _Controlled(function, blocks, tolerance)
    flat = torch.cat([block.start.reshape(-1) for block in blocks])
    ends = torch.tensor([start, end], dtype=flat.dtype, device=flat.device)
    options = {"norm": controlled.norm, "step_t": ends[1:]}
    try:
        path = torchdiffeq.odeint(
            controlled, flat, ends, rtol=0.0, atol=1.0, method=tolerance.method, options=options
        )
    except AssertionError as error:
        reason = "its step became too short" if controlled.finite else "it is not finite"
        raise NotSolvedError(reason) from error
    return controlled.split(path[-1]), controlled.num_evaluations


def natural_size(start: Tensor, change: Tensor) -> Tensor:
    """Size of each row, from where it starts and how it would move; 1 for a row of zeros."""
    size = sum(part.detach().square().mean(-1).sqrt() for part in (start, change))
    return torch.where(size > 0, size, torch.ones_like(size))


def _size(rows: Tensor) -> Tensor:
    return rows.square().mean(-1).sqrt()
