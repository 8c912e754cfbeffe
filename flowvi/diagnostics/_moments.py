"""Mean, spread and cost of a gradient estimator at fixed parameters."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pyro
import torch
from pyro import poutine
from torch import Tensor

from flowvi.objectives import Objective

__all__ = [
    "Moments",
    "gradient_moments",
    "guide_parameters",
    "placed",
    "plate_depth",
    "reason_of",
]


@dataclass(frozen=True)
class Moments:
    """What repeated gradients of one estimator say.

    Args:
        mean: average gradient, all parameters in one vector.
        variance: trace of the covariance of one gradient.
        num_repeats: number of finite gradients.
        num_bad: number of gradients with an entry that is not finite; they are left out.
        milliseconds: median wall time of one gradient.
        value: average of the objective's loss, in nats.
        value_se: its standard error.
    """

    mean: Tensor = field(repr=False)
    variance: float
    num_repeats: int
    num_bad: int
    milliseconds: float
    value: float
    value_se: float

    @property
    def sd(self) -> float:
        """Root of the trace of the covariance."""
        return math.sqrt(self.variance)

    @property
    def norm(self) -> float:
        """Norm of the expected gradient, corrected for the noise of the average; at least 0."""
        noise = self.variance / self.num_repeats
        return math.sqrt(max(float(self.mean.square().sum()) - noise, 0.0))

    @property
    def signal_to_noise(self) -> float:
        r"""``|E g| / sqrt(tr Cov g)``; infinite for a gradient without noise, NaN for none."""
        if self.variance > 0:
            return self.norm / self.sd
        return math.inf if self.norm > 0 else math.nan


def guide_parameters(
    guide: Callable, args: tuple, kwargs: Mapping, model: Callable | None = None
) -> dict[str, Tensor]:
    """Unconstrained trainable tensors that a guide uses, with the model's if it is given.

    Modules that are not registered with Pyro are found as attributes of the guide.

    Raises:
        ValueError: if there is none.
    """
    found: dict[str, Tensor] = {}
    for program in (guide, model):
        if program is None:
            continue
        with torch.no_grad(), poutine.trace(param_only=True) as capture:
            program(*args, **kwargs)
        for name, site in capture.trace.nodes.items():
            value = site["value"]
            found[name] = value.unconstrained() if hasattr(value, "unconstrained") else value
        if isinstance(program, torch.nn.Module):
            found.update(program.named_parameters())
    unique = {id(t): (name, t) for name, t in found.items() if t.requires_grad and t.is_leaf}
    if not unique:
        raise ValueError("`guide` must have at least one trainable parameter; got none.")
    return dict(unique.values())


def plate_depth(model: Callable, guide: Callable, args: tuple, kwargs: Mapping) -> int:
    """Number of nested plates of model and guide."""
    with torch.no_grad(), pyro.validation_enabled(False):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
    sites = [*guide_trace.nodes.values(), *model_trace.nodes.values()]
    frames = (f for s in sites for f in s.get("cond_indep_stack", ()))
    return max((-f.dim for f in frames if f.vectorized), default=0)


def placed(objective: Objective, depth: int) -> Objective:
    """A copy that knows the depth of the plates, so that it need not guess (and say so)."""
    objective = copy.copy(objective)
    batched = objective.vectorize_particles and objective.num_particles > 1
    objective.max_plate_nesting = depth + 1 if batched else depth
    return objective


def reason_of(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"


def gradient_moments(
    objective: Objective,
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: Mapping,
    params: Sequence[Tensor],
    num_repeats: int,
) -> Moments:
    """Repeat a gradient estimate at fixed parameters; the sums are kept in float64.

    Raises:
        ValueError: if fewer than two of the gradients are finite.
    """
    objective = copy.copy(objective)
    total = square = None
    values, seconds, bad = [], [], 0
    with pyro.validation_enabled(False):
        # The first call finds the depth of the plates and is not timed.
        _flat_gradient(objective, model, guide, args, kwargs, params)
        for _ in range(num_repeats):
            began = time.perf_counter()
            value, grad = _flat_gradient(objective, model, guide, args, kwargs, params)
            finite = bool(grad.isfinite().all())
            seconds.append(time.perf_counter() - began)
            if not finite:
                bad += 1
                continue
            values.append(float(value))
            if total is None:
                # Deviations from the first gradient: no cancellation where the spread is small.
                first = grad
                total, square = torch.zeros_like(grad), grad.new_zeros(())
            total, square = total + (grad - first), square + (grad - first).square().sum()
    number = len(values)
    if number < 2:
        raise ValueError(
            f"`num_repeats` must give at least 2 finite gradients; got {number} of {num_repeats}."
        )
    variance = float(square - total.square().sum() / number) / (number - 1)
    return Moments(
        mean=first + total / number,
        variance=max(variance, 0.0),
        num_repeats=number,
        num_bad=bad,
        milliseconds=1e3 * statistics.median(seconds),
        value=statistics.fmean(values),
        value_se=statistics.stdev(values) / math.sqrt(number),
    )


def _flat_gradient(
    objective: Objective,
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: Mapping,
    params: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    loss = objective.differentiable_loss(model, guide, *args, **kwargs)
    if not loss.requires_grad:
        return loss, loss.new_zeros(sum(p.numel() for p in params), dtype=torch.float64)
    grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
    return loss.detach(), torch.cat([g.flatten() for g in grads]).double()
