"""What posterior and prior processes share as Pyro distributions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import constraints

from flowvi.distributions._process_law import ProcessLaw
from flowvi.distributions.path_draw import PathDraw, PathLayout
from flowvi.paths.base import Path
from flowvi.paths.times import TimeLaw, UniformTimes
from flowvi.transforms.base import common_shape

__all__ = ["PathLaw"]


class PathLaw(ProcessLaw):
    """Base of the path laws: the layout of a draw, the observation times, expansion.

    Bounds that exponentiate log-weights refuse sites of such a law by ``is_log_ratio_estimate``.
    """

    support = constraints.real_vector
    is_log_ratio_estimate = True

    def __init__(
        self,
        path: Path,
        batch_shape: torch.Size,
        at: Sequence[float] | Tensor | None,
        times: TimeLaw | None,
        num_times: int,
        validate_args: bool | None,
    ) -> None:
        if not isinstance(path, Path):
            raise TypeError(f"`path` must be a Path; got {type(path).__name__}.")
        if not isinstance(num_times, int) or num_times < 1:
            raise ValueError(f"`num_times` must be an integer of at least 1; got {num_times!r}.")
        self.path = path
        self.times = UniformTimes() if times is None else times
        at = (self.times.high,) if at is None else at
        self.at = at if torch.is_tensor(at) else torch.as_tensor(at, dtype=torch.float64)
        if not self.at.shape or self.at.shape[-1] == 0:
            raise ValueError(
                f"`at` must hold at least one observation time; got shape {tuple(self.at.shape)}."
            )
        self.num_times = num_times
        self.layout = PathLayout(path.dim, num_times, self.at.shape[-1], path.has_target)
        batch_shape = common_shape(batch_shape, self.at.shape[:-1])
        super().__init__(batch_shape, torch.Size([self.layout.size]), validate_args=validate_args)
        if self._validate_args:
            self._check_at()

    def unpack(self, value: Tensor) -> PathDraw:
        """The named parts of a drawn value: start, time, state, drift, end and the rest."""
        return self.layout.unpack(value)

    def _replace(self, batch_shape: torch.Size | None = None, **changes: object) -> PathLaw:
        return super()._replace(batch_shape, _remembered=None, **changes)

    _remembered: tuple | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_remembered": None}

    def _check_at(self) -> None:
        if self.at.is_meta:
            return
        low, high = self.times.low, self.times.high
        inside = bool(((self.at >= low) & (self.at <= high)).all())
        if not inside or bool((self.at.diff(dim=-1) < 0).any()):
            raise ValueError(
                f"`at` must hold times in increasing order between {low:g} and {high:g}, the "
                f"ends of `times`; got {self.at.tolist()}."
            )

    def _random_times(self, shape: torch.Size, like: Tensor) -> tuple[Tensor, Tensor]:
        """Times and weights ``(num_times, *shape, 1)``; the weights average over the times."""
        t, weight = self.times.draw((self.num_times, *shape), like)
        return t.unsqueeze(-1), weight.unsqueeze(-1) / self.num_times

    def _observation_times(self, shape: torch.Size, like: Tensor) -> Tensor:
        """Observation times ``(num_observed, *shape, 1)``."""
        at = self.at.to(like).expand(*shape, -1)
        return at.movedim(-1, 0).unsqueeze(-1)
