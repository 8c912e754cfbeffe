"""How far from a stationary point the training of a guide stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor

__all__ = ["Gradient", "elbo_gradient"]


@dataclass(frozen=True)
class Gradient:
    """Norm of the mean gradient of the ELBO over all unconstrained parameters, in nats per unit.

    Args:
        norm: norm of the averaged gradient.
        noise: norm that pure noise of the same spread would give.
    """

    norm: float
    noise: float

    @property
    def is_noise(self) -> bool:
        """Whether the gradient cannot be told from noise."""
        return self.norm <= 2 * self.noise


def elbo_gradient(
    model: Callable,
    guide: Callable,
    args: tuple = (),
    kwargs: Mapping | None = None,
    *,
    max_plate_nesting: int,
    num_batches: int = 6,
    num_particles: int = 16,
) -> Gradient | None:
    """Mean gradient of the stock ELBO against its own Monte Carlo noise.

    Args:
        model: a Pyro model.
        guide: a guide for it.
        args: arguments of both.
        kwargs: keyword arguments of both.
        max_plate_nesting: depth of the model's plates.
        num_batches: independent estimates that give the noise, at least 2.
        num_particles: particles per estimate.

    Returns:
        None if the guide has no parameter or does not run with vectorised particles.
    """
    if num_batches < 2:
        raise ValueError(f"`num_batches` must be at least 2; got {num_batches}.")
    loss = Trace_ELBO(
        num_particles=num_particles,
        vectorize_particles=True,
        max_plate_nesting=max_plate_nesting,
    )
    rows = []
    for _ in range(num_batches):
        try:
            row = _gradient(loss, model, guide, args, dict(kwargs or {}))
        except Exception:  # a model may fail in any way under the extra dimension
            return None
        if row is None or not bool(torch.isfinite(row).all()):
            return None
        rows.append(row)
    grads = torch.stack(rows)
    noise = (grads.var(0) / num_batches).sum().sqrt()
    return Gradient(float(grads.mean(0).norm()), float(noise))


def _gradient(
    loss: Trace_ELBO, model: Callable, guide: Callable, args: tuple, kwargs: dict
) -> Tensor | None:
    with torch.enable_grad(), poutine.trace(param_only=True) as capture:
        value = loss.differentiable_loss(model, guide, *args, **kwargs)
    params = [_unconstrained(site["value"]) for site in capture.trace.nodes.values()]
    params = [p for p in params if p.requires_grad]
    if not params or not isinstance(value, Tensor) or not value.requires_grad:
        return None
    grads = torch.autograd.grad(value, params, allow_unused=True)
    parts = [
        torch.zeros_like(p).flatten() if g is None else g.flatten()
        for p, g in zip(params, grads, strict=True)
    ]
    return torch.cat(parts)


def _unconstrained(param: Tensor) -> Tensor:
    return param.unconstrained() if hasattr(param, "unconstrained") else param
