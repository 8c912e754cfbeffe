"""A fixed-step Euler-Maruyama loop, so that a prior can be drawn from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["euler_maruyama"]


def euler_maruyama(
    drift: Callable[[Tensor, Tensor], Tensor],
    diffusion: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    times: Tensor,
) -> Tensor:
    r"""States of :math:`dx = f\,dt + b\,dW` at all times, all noise drawn at once.

    Times may also run backwards; the noise then has the size of the step.

    Args:
        drift: f, called with ``(x, t)``.
        diffusion: b, called with ``(x, t)``; broadcasts to the state.
        start: state at the first time, ``(*batch, dim)``.
        times: ``(num_times, *batch, 1)``, monotone along the first dim.

    Shape:
        result: ``(num_times, *batch, dim)``.
    """
    noise = torch.randn(len(times) - 1, *start.shape, dtype=start.dtype, device=start.device)
    steps = times.diff(dim=0)
    kicks = noise * steps.abs().sqrt()
    x = start
    states = [x]
    for t, dt, kick in zip(times, steps, kicks, strict=False):
        x = x + drift(x, t) * dt + diffusion(x, t) * kick
        states.append(x)
    return torch.stack(states)
