"""Laplace approximation by modified Newton steps in whitened coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from flowvi.infer._gaussian import Gaussian, lower_factor
from flowvi.infer._searches import Search

__all__ = ["laplace"]

_STEPS = (1.0, 0.5, 0.25, 0.1, 0.03, 0.01, 1e-3)


def laplace(
    start: Gaussian,
    *,
    num_steps: int = 4,
    difference: float = 1e-3,
    floor: float = 1e-6,
) -> Search[Gaussian]:
    r"""Search for the Laplace approximation: the mode as mean, minus the inverse Hessian there.

    With the scale :math:`L` of ``start``, the Hessian is taken by central differences of the
    gradient along the columns of :math:`L`, one evaluation of ``2 dim + 1`` points. It is then
    scaled to unit diagonal, and only after that are its eigenvalues made positive and floored:
    flooring an unscaled Hessian destroys posteriors whose parameters differ in scale.

    Args:
        start: where to begin, with a rough scale.
        num_steps: number of Newton steps at most.
        difference: step of the differences, in units of the current scale.
        floor: least eigenvalue, relative to the largest.

    References:
        Nocedal and Wright (2006), Numerical Optimization, section 3.4 (eigenvalue modification).
    """
    here = start
    for _ in range(num_steps):
        here, gain = yield from _newton(here, difference, floor)
        if gain < 1e-9:
            break
    white, _ = yield from _whitened_scale(here, difference, floor)
    return Gaussian(here.loc, here.scale_tril @ white)


def _newton(here: Gaussian, difference: float, floor: float) -> Search[tuple[Gaussian, float]]:
    """One modified Newton step, the best of several lengths, and what it gained in nats."""
    white, grad = yield from _whitened_scale(here, difference, floor)
    scale_tril = here.scale_tril @ white
    direction = scale_tril @ (white.T @ grad)
    steps = here.loc.new_tensor((0.0, *_STEPS))
    trials = here.loc + steps[:, None] * direction
    log_probs, _ = yield trials
    best = int(log_probs.argmax())
    return Gaussian(trials[best], scale_tril), float(log_probs[best] - log_probs[0])


def _whitened_scale(
    here: Gaussian, difference: float, floor: float
) -> Search[tuple[Tensor, Tensor]]:
    """Lower factor of the inverse of minus the whitened Hessian, and the whitened gradient."""
    dim = len(here.loc)
    offsets = difference * torch.eye(dim, dtype=here.loc.dtype)
    points = here.at(torch.cat([offsets, -offsets, offsets[:1] * 0]))
    _, grads = yield points
    grads = grads @ here.scale_tril
    curvature = -(grads[:dim] - grads[dim:-1]) / (2 * difference)
    curvature = 0.5 * (curvature + curvature.T)
    diagonal = curvature.diagonal().abs()
    scale = diagonal.clamp(min=1e-12 * diagonal.max().clamp(min=1e-300)).sqrt()
    values, vectors = torch.linalg.eigh(curvature / scale[:, None] / scale)
    values = values.abs().clamp(min=floor * values.abs().max())
    white = lower_factor(vectors / values.sqrt() / scale[:, None])
    return white, grads[-1]
