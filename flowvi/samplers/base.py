"""What every sampler of a generative process is: one step, and one loop over a grid of times."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowvi.samplers.process import Ability, GenerativeProcess

__all__ = ["Sampler", "Span"]


class Span(NamedTuple):
    """One step of a grid, and the noise that it may use.

    Args:
        start: time at which the states are, ``(*batch, 1)``.
        end: later time at which they are wanted, like ``start``.
        noise: ``(num_noises, *batch, dim)``; ``None`` where no noise is used.
    """

    start: Tensor
    end: Tensor
    noise: Tensor | None = None


class Sampler(ABC):
    """Base of samplers; a new one writes ``needs`` and ``step``.

    Attributes:
        order: order of convergence in the step size, of the law of the last state (weak order
            where there is noise); ``None`` where no order is claimed.
        num_noises: standard normal tensors of the shape of the state that one step uses.
        has_memory: whether a step uses what earlier steps have found.
    """

    order: float | None
    num_noises: int = 0
    has_memory: bool = False

    @property
    @abstractmethod
    def needs(self) -> frozenset[Ability]:
        """What a process must be able to say."""

    @property
    def is_stochastic(self) -> bool:
        """Whether two runs from the same start differ."""
        return self.num_noises > 0

    @property
    def way_out(self) -> str:
        """What to use where a process cannot serve this."""
        if Ability.FLOW in self.needs:
            return "Use Ancestral or ReverseSDE."
        return "Use ProbabilityFlow."

    def check(self, process: GenerativeProcess) -> None:
        """Refuse a process that this cannot move.

        Raises:
            NotImplementedError: if the process lacks an ability.
        """
        process.require(self.needs, type(self).__name__, self.way_out)

    @abstractmethod
    def step(
        self, process: GenerativeProcess, x: Tensor, span: Span, state: Any
    ) -> tuple[Tensor, Any]:
        """States at the end of a step.

        Args:
            process: what is sampled from.
            x: states at its start, ``(*batch, dim)``.
            span: times and noise.
            state: what the last step left; ``None`` at the first.
        """

    def run(
        self,
        process: GenerativeProcess,
        x: Tensor,
        times: Tensor,
        report: Callable[[int], object],
    ) -> Tensor:
        """States at all times ``(num_steps + 1, *batch, dim)``; ``report`` gets steps done."""
        states, state = [x], None
        for t, s in zip(times, times[1:], strict=False):
            span = Span(spread(t, x), spread(s, x), self.draw(x))
            x, state = self.step(process, x, span, state)
            states.append(x)
            report(1)
        return torch.stack(states)

    def draw(self, x: Tensor) -> Tensor | None:
        """Noise of one step from states ``x``."""
        if not self.num_noises:
            return None
        return torch.randn(self.num_noises, *x.shape, dtype=x.dtype, device=x.device)


def spread(t: Tensor, x: Tensor) -> Tensor:
    """One time for every state, ``(*batch, 1)``."""
    return t.expand(*x.shape[:-1], 1)
