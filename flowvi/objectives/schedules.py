"""Schedules: numbers that change with the training step."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor

__all__ = ["CyclicalSchedule", "GeometricSchedule", "LinearSchedule", "ScheduleLike", "value_at"]

ScheduleLike = float | Callable[[Tensor], Tensor | float]


class LinearSchedule:
    r"""Straight line from ``start`` to ``end``, constant afterwards.

    .. math:: \beta_t = \text{start} + (\text{end} - \text{start}) \min(t / \text{num\_steps}, 1)

    Args:
        num_steps: length of the line in steps, at least 1.
        start: value at step 0, at least 0.
        end: value from step ``num_steps`` on, at least 0.

    Shape:
        step: a tensor of any shape, counted from 0; result: the same.

    References:
        Bowman et al. (2016), Generating sentences from a continuous space, arXiv:1511.06349,
        section 3.1.

    Example:
        >>> LinearSchedule(10)(torch.tensor([0, 5, 20]))
        tensor([0.0000, 0.5000, 1.0000])
    """

    def __init__(self, num_steps: int, *, start: float = 0.0, end: float = 1.0) -> None:
        _check_num_steps(num_steps)
        self.num_steps = num_steps
        self.start = _checked("start", start, 0.0)
        self.end = _checked("end", end, 0.0)

    def __call__(self, step: Tensor) -> Tensor:
        left = 1 - (step / self.num_steps).clamp(max=1.0)
        return self.end + (self.start - self.end) * left


class GeometricSchedule:
    r"""Straight line in the logarithm from ``start`` to ``end``, constant afterwards.

    .. math:: \beta_t = \text{start}\,(\text{end} / \text{start})^{\min(t / \text{num\_steps}, 1)}

    Args:
        num_steps: length of the way in steps, at least 1.
        start: value at step 0, positive.
        end: value from step ``num_steps`` on, positive.

    Shape:
        step: a tensor of any shape, counted from 0; result: the same.

    Example:
        >>> GeometricSchedule(10, start=0.01)(torch.tensor([0, 5, 20]))
        tensor([0.0100, 0.1000, 1.0000])
    """

    def __init__(self, num_steps: int, *, start: float = 0.01, end: float = 1.0) -> None:
        _check_num_steps(num_steps)
        self.num_steps = num_steps
        self.start = _checked("start", start, 0.0, strict=True)
        self.end = _checked("end", end, 0.0, strict=True)

    def __call__(self, step: Tensor) -> Tensor:
        left = 1 - (step / self.num_steps).clamp(max=1.0)
        return self.end * torch.exp(math.log(self.start / self.end) * left)


class CyclicalSchedule:
    r"""Several lines from ``start`` to ``end``, each followed by a stretch at ``end``.

    .. math:: \beta_t = \text{start} + (\text{end} - \text{start}) \min(\tau_t / R, 1), \qquad
        \tau_t = \frac{t \bmod T/M}{T/M}

    for :math:`t < T`, and ``end`` afterwards, with T steps, M cycles and the proportion R.

    Args:
        num_steps: length of all cycles together, at least ``num_cycles``.
        num_cycles: number of cycles, at least 1.
        proportion: share of a cycle in which the value rises, in (0, 1].
        start: value at the start of each cycle, at least 0.
        end: value at the end of each cycle, at least 0.

    Shape:
        step: a tensor of any shape, counted from 0; result: the same.

    References:
        Fu et al. (2019), Cyclical annealing schedule, arXiv:1903.10145, equations 6 and 7.

    Example:
        >>> CyclicalSchedule(20, num_cycles=2)(torch.tensor([0, 2, 5, 10, 12, 20]))
        tensor([0.0000, 0.4000, 1.0000, 0.0000, 0.4000, 1.0000])
    """

    def __init__(
        self,
        num_steps: int,
        *,
        num_cycles: int = 4,
        proportion: float = 0.5,
        start: float = 0.0,
        end: float = 1.0,
    ) -> None:
        _check_num_steps(num_steps)
        if not _is_count(num_cycles) or num_cycles > num_steps:
            raise ValueError(
                f"`num_cycles` must be an integer from 1 to `num_steps`; got {num_cycles!r}."
            )
        if not isinstance(proportion, Real) or not 0 < proportion <= 1:
            raise ValueError(f"`proportion` must be in (0, 1]; got {proportion!r}.")
        self.num_steps = num_steps
        self.num_cycles = num_cycles
        self.proportion = float(proportion)
        self.start = _checked("start", start, 0.0)
        self.end = _checked("end", end, 0.0)

    def __call__(self, step: Tensor) -> Tensor:
        # In integers, so that a cycle starts at its first step whatever the precision.
        within = (step * self.num_cycles) % self.num_steps / self.num_steps
        left = 1 - (within / self.proportion).clamp(max=1.0)
        left = torch.where(step < self.num_steps, left, torch.zeros_like(left))
        return self.end + (self.start - self.end) * left


def value_at(schedule: ScheduleLike, step: Tensor, like: Tensor) -> Tensor | float:
    """Value of a schedule at a step, as a number or a tensor of ``like``'s device and dtype."""
    if not callable(schedule):
        return schedule
    value = schedule(step)
    return value.to(like) if torch.is_tensor(value) else value


def check_schedule(name: str, schedule: object) -> None:
    """Refuse what is neither a number of at least 0 nor a function of the step.

    Args:
        name: of the argument, for the message.
        schedule: what was given.
    """
    if not callable(schedule):
        _checked(name, schedule, 0.0, or_else=" or a function of the step")


def last_change(schedule: ScheduleLike) -> float:
    """Step from which a schedule is constant; infinity where that is not known."""
    return getattr(schedule, "num_steps", math.inf) if callable(schedule) else 0


def _check_num_steps(num_steps: object) -> None:
    if not _is_count(num_steps):
        raise ValueError(f"`num_steps` must be an integer of at least 1; got {num_steps!r}.")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _checked(
    name: str, value: object, least: float, *, strict: bool = False, or_else: str = ""
) -> float:
    good = isinstance(value, Real) and math.isfinite(value)
    if not good or not (value > least if strict else value >= least):
        rule = "positive" if strict else f"a finite number of at least {least:g}"
        raise ValueError(f"`{name}` must be {rule}{or_else}; got {value!r}.")
    return float(value)
