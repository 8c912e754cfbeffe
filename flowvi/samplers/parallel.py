"""Sampling many steps at once, by fixed-point iteration over a window of times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowvi.samplers.base import Sampler, Span
from flowvi.samplers.flow_ode import ProbabilityFlow
from flowvi.samplers.process import Ability, GenerativeProcess

__all__ = ["Parallel"]


class Parallel(Sampler):
    r"""Another sampler's steps, a whole window of them in one network call (Picard iteration).

    .. math:: x_{j+1} \leftarrow x_0 + \sum_{i \le j} \big(\Phi_i(x_i) - x_i\big)

    with :math:`\Phi_i` the sampler's step. States that no longer change are done, and the window
    moves on. The result is that of the sequential sampler up to the tolerance, in fewer
    sequential calls of the network, each on ``window`` times as many states: it pays where the
    device is not filled by a batch. Noise is drawn as the sequential sampler draws it.

    Args:
        sampler: a sampler without a memory and with steps of fixed size.
        window: steps at once, at least 1.
        tolerance: largest root-mean-square change of a state that counts as none.

    Raises:
        TypeError: if ``sampler`` is no :class:`Sampler`.
        ValueError: if a number is too small.
        NotImplementedError: if the sampler has a memory or chooses its steps.

    References:
        Shih, Belkhale, Ermon, Sadigh and Anari (2023), Parallel sampling of diffusion models,
        arXiv:2305.16317, algorithm 1.

    Example:
        >>> from flowvi.samplers import DDIM
        >>> Parallel(DDIM(), window=8).is_stochastic
        False
    """

    def __init__(self, sampler: Sampler, window: int = 16, tolerance: float = 1e-3) -> None:
        if not isinstance(sampler, Sampler):
            raise TypeError(f"`sampler` must be a Sampler; got {type(sampler).__name__}.")
        chooses = isinstance(sampler, ProbabilityFlow) and sampler.is_adaptive
        if sampler.has_memory or chooses or isinstance(sampler, Parallel):
            raise NotImplementedError(
                f"The steps of {type(sampler).__name__} cannot be taken at once, as they rest on "
                "each other. Use DDIM, Ancestral, ReverseSDE or ProbabilityFlow with fixed steps."
            )
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"`window` must be an integer of at least 1; got {window!r}.")
        if not tolerance >= 0:
            raise ValueError(f"`tolerance` must not be negative; got {tolerance!r}.")
        self.sampler = sampler
        self.window = window
        self.tolerance = tolerance
        self.order = sampler.order
        self.num_noises = sampler.num_noises

    @property
    def needs(self) -> frozenset[Ability]:
        return self.sampler.needs

    def check(self, process: GenerativeProcess) -> None:
        self.sampler.check(process)

    def step(
        self, process: GenerativeProcess, x: Tensor, span: Span, state: Any
    ) -> tuple[Tensor, Any]:
        return self.sampler.step(process, x, span, state)

    def run(
        self,
        process: GenerativeProcess,
        x: Tensor,
        times: Tensor,
        report: Callable[[int], object],
    ) -> Tensor:
        num_steps, first = len(times) - 1, 0
        t = times.reshape(-1, *(1,) * x.dim()).expand(-1, *x.shape[:-1], 1)
        states = x.unsqueeze(0).repeat(num_steps + 1, *(1,) * x.dim())
        noises: list[Tensor | None] = []
        while first < num_steps:
            last = min(first + self.window, num_steps)
            noises.extend(self.draw(x) for _ in range(last - len(noises)))
            drawn = torch.stack(noises[first:last], 1) if self.num_noises else None
            here = states[first:last]
            span = Span(t[first:last], t[first + 1 : last + 1], drawn)
            there, _ = self.step(process, here, span, None)
            moved = states[first] + (there - here).cumsum(0)
            change = (moved - states[first + 1 : last + 1]).square().mean(-1).sqrt()
            states[first + 1 : last + 1] = moved
            states[last + 1 :] = moved[-1]
            # The first step starts from a state that is done, so it is done itself.
            settled = change.reshape(len(change), -1).amax(1) <= self.tolerance
            settled[0] = True
            done = int(settled.long().cumprod(0).sum())
            first += done
            report(done)
        return states
