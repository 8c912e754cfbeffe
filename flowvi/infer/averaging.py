"""Exponential moving average of the iterates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["Average"]


class Average:
    r"""Moving average :math:`a_t = \gamma a_{t-1} + (1 - \gamma)\,\theta_t` of named parameters.

    It starts at the first value seen, so it needs no correction for a start at zero.

    Args:
        decay: :math:`\gamma`, in [0, 1).

    References:
        Polyak and Juditsky (1992), Acceleration of stochastic approximation by averaging;
        the exponential form is Kingma and Ba (2015), arXiv:1412.6980, section 7.2.
    """

    def __init__(self, decay: float = 0.99) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must lie in [0, 1); got {decay!r}.")
        self.decay = decay
        self.values: dict[str, Tensor] = {}

    @classmethod
    def over(cls, num_updates: int, decay: float = 0.99) -> Average:
        """One that has all but forgotten its first values after so many updates.

        Args:
            num_updates: number of updates to come.
            decay: largest decay, in [0, 1); fewer updates get a smaller one.
        """
        average = cls(decay)
        average.decay = max(min(decay, 1 - 6.25 / num_updates), 0.0)
        return average

    @torch.no_grad()
    def update(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Move towards the present values; new names start at theirs."""
        known, current = [], []
        for name, param in named:
            if name in self.values:
                known.append(self.values[name])
                current.append(param)
            else:
                self.values[name] = param.detach().clone()
        if known:
            torch._foreach_lerp_(known, current, 1 - self.decay)

    @contextmanager
    def swapped(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
        """Put the averages into the parameters inside the context."""
        pairs = [(p, self.values[n]) for n, p in named if n in self.values]
        raw = [p.detach().clone() for p, _ in pairs]
        try:
            copy_into(pairs)
            yield
        finally:
            copy_into((p, r) for (p, _), r in zip(pairs, raw, strict=True))


@torch.no_grad()
def copy_into(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Overwrite each first tensor by the second, in place."""
    for target, source in pairs:
        target.copy_(source)
