"""The one call that samples from any model with any sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Distribution
from torch import Tensor
from tqdm.auto import tqdm

from flowvi.samplers.base import Sampler
from flowvi.samplers.process import Ability, GenerativeProcess, as_process

__all__ = ["SampledPath", "log_snr_times", "sample", "sample_path", "uniform_times"]

Grid = Callable[[GenerativeProcess, int, Tensor], Tensor]


@dataclass(frozen=True)
class SampledPath:
    """States on the way from noise to data.

    Args:
        times: ``(num_steps + 1,)``.
        states: ``(num_steps + 1, *shape, dim)``.
        num_calls: sequential calls of the network.
    """

    times: Tensor
    states: Tensor
    num_calls: int

    @property
    def end(self) -> Tensor:
        """States at the last time, ``(*shape, dim)``."""
        return self.states[-1]


def uniform_times(process: GenerativeProcess, num_steps: int, like: Tensor) -> Tensor:
    """Times in equal steps from the first to the last of the process."""
    return torch.linspace(
        process.low, process.high, num_steps + 1, dtype=like.dtype, device=like.device
    )


def log_snr_times(process: GenerativeProcess, num_steps: int, like: Tensor) -> Tensor:
    """Times in equal steps of the log signal-to-noise ratio.

    Raises:
        NotImplementedError: if the process has no schedule.
    """
    process.require([Ability.SCHEDULE], "log_snr_times", "Use uniform_times.")
    ends = like.new_tensor([process.low, process.high])
    low, high = process.schedule.log_snr(ends).unbind()
    steps = torch.linspace(0, 1, num_steps + 1, dtype=like.dtype, device=like.device)
    inner = process.schedule.time_of(low + (high - low) * steps[1:-1])
    # The ends are known, and the search for them would only round.
    return torch.cat([ends[:1], inner, ends[1:]])


@torch.no_grad()
def sample_path(
    source: object,
    sampler: Sampler,
    shape: Sequence[int],
    num_steps: int = 50,
    *,
    start: Tensor | Distribution | None = None,
    grid: Grid = uniform_times,
    progress_bar: bool = False,
) -> SampledPath:
    """Draws from a generative model, with all states on the way.

    Args:
        source: a model with a method ``process``, a :class:`GenerativeProcess`, or a
            :class:`~flowvi.paths.PredictedDrift` (then with the law of its start).
        sampler: how states are moved.
        shape: shape of the batch of draws; ``()`` for one.
        num_steps: steps of the grid.
        start: first states ``(*shape, dim)`` or their law; drawn from the process if left out.
        grid: makes the times, ``grid(process, num_steps, like) -> (num_steps + 1,)``.
        progress_bar: show how many steps are done.

    Raises:
        TypeError: if ``source`` or ``sampler`` are of another kind.
        ValueError: if sizes do not fit.
        NotImplementedError: if the process cannot serve the sampler.

    Example:
        >>> from pyro.distributions import Normal
        >>> from flowvi.samplers import DriftProcess, ProbabilityFlow
        >>> decay = DriftProcess(lambda x, t: -x, None, Normal(torch.zeros(2), 1.0).to_event(1))
        >>> path = sample_path(decay, ProbabilityFlow(), (5,), 4)
        >>> path.states.shape, path.num_calls
        (torch.Size([5, 5, 2]), 16)
    """
    if not isinstance(sampler, Sampler):
        raise TypeError(f"`sampler` must be a Sampler; got {type(sampler).__name__}.")
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"`num_steps` must be an integer of at least 1; got {num_steps!r}.")
    law = None if torch.is_tensor(start) else start
    process = as_process(source, law).counted()
    sampler.check(process)
    x = start if torch.is_tensor(start) else (law or process.start).sample(torch.Size(shape))
    if x.shape != (*shape, process.dim):
        raise ValueError(
            f"`start` must have shape {(*shape, process.dim)} (*shape, dim); got {tuple(x.shape)}."
        )
    times = grid(process, num_steps, x)
    with tqdm(total=num_steps, disable=not progress_bar, desc=type(sampler).__name__) as bar:
        states = sampler.run(process, x, times, bar.update)
    return SampledPath(times, states, process.num_calls)


def sample(
    source: object, sampler: Sampler, shape: Sequence[int], num_steps: int = 50, **options: Any
) -> Tensor:
    """States at the data end, ``(*shape, dim)``; arguments are those of :func:`sample_path`.

    Example:
        >>> from pyro.distributions import Normal
        >>> from flowvi.samplers import DriftProcess, ReverseSDE
        >>> ou = DriftProcess(lambda x, t: -x, 0.5, Normal(torch.zeros(2), 1.0).to_event(1))
        >>> sample(ou, ReverseSDE(), (7,), 10).shape
        torch.Size([7, 2])
    """
    return sample_path(source, sampler, shape, num_steps, **options).end
