"""What all laws of paths share as Pyro distributions: drawing, expansion, checks of a grid."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from pyro.distributions import Distribution, TorchDistribution
from torch import Tensor

from flowvi.distributions.flow import check_expand
from flowvi.transforms.base import common_shape

__all__ = ["ProcessLaw", "check_grid"]


class ProcessLaw(TorchDistribution):
    """Base of the laws of paths; a new one writes ``_draw`` and has a law ``start``."""

    arg_constraints: dict = {}
    start: Distribution | None

    @abstractmethod
    def _draw(self, sample_shape: torch.Size) -> Tensor:
        """One value per place, with the graph to the parameters where there is one."""

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self._draw(torch.Size(sample_shape))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        if not self.has_rsample:
            raise NotImplementedError(
                "`start` has no reparameterised draw, so the path has none. Use sample."
            )
        return self._draw(torch.Size(sample_shape))

    def _draw_start(self, sample_shape: torch.Size) -> tuple[Tensor, Distribution]:
        """Start of every path, and the expanded law that it comes from."""
        law = self.start.expand(self.batch_shape)
        draw = law.rsample if law.has_rsample else law.sample
        return draw(sample_shape), law

    def expand(
        self, batch_shape: Sequence[int], _instance: Distribution | None = None
    ) -> ProcessLaw:
        check_expand(self.batch_shape, batch_shape)
        return self._replace(torch.Size(batch_shape))

    def _replace(self, batch_shape: torch.Size | None = None, **changes: object) -> ProcessLaw:
        """The same law with another batch shape or other attributes."""
        batch_shape = self.batch_shape if batch_shape is None else batch_shape
        new = self.__class__.__new__(self.__class__)
        new.__dict__.update(self.__dict__, **changes)
        TorchDistribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new


def check_grid(times: Tensor, start: Distribution) -> None:
    """Refuse a time grid and a law of the start that do not go together.

    Raises:
        ValueError: if there are fewer than two times, the start is no vector, or their batch
            shapes do not broadcast.
    """
    if times.dim() < 1 or times.shape[-1] < 2:
        raise ValueError(f"`times` must end with at least 2 times; got {tuple(times.shape)}.")
    if len(start.event_shape) != 1:
        raise ValueError(
            f"`start` must have an event shape of one dim; got {tuple(start.event_shape)}."
        )
    try:
        common_shape(start.batch_shape, times.shape[:-1])
    except RuntimeError:
        raise ValueError(
            "`times` must have a batch shape that broadcasts with that of `start`, "
            f"{tuple(start.batch_shape)}; got {tuple(times.shape[:-1])}."
        ) from None
