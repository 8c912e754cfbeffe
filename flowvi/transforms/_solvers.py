"""Root finding for inverses without a formula; every element converges on its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["all_true", "damped_newton", "increasing_root", "require_solved"]

MAX_STEPS = 100
MAX_HALVINGS = 16


def all_true(mask: Tensor) -> bool | None:
    """Whether a mask is true everywhere; None where values cannot be looked at.

    That is so on the meta device, inside ``torch.vmap`` and while ``torch.compile`` traces; the
    solvers then take their full number of steps.
    """
    if mask.is_meta or torch.compiler.is_compiling():
        return None
    try:
        return bool(mask.all())
    except RuntimeError:
        return None


def require_solved(name: str, residual: Tensor, target: Tensor) -> None:
    """Stop if a residual is above rounding level; NaN passes, as the result shows it.

    Args:
        name: class name of the map, for the message.
        residual: distance of the image of the solution from ``target``, any shape.
        target: size of what was to be hit, broadcast with ``residual``.

    Raises:
        RuntimeError: if any element has not converged.
    """
    # Two thirds of the digits: rounding inside the map can cost the rest.
    tolerance = torch.finfo(residual.dtype).eps ** (2 / 3)
    relative = residual.abs() / (1 + target.abs())
    solved = ~(relative > tolerance)
    if all_true(solved) is not False:
        return
    raise RuntimeError(
        f"The numerical inverse of {name} did not converge for {int((~solved).sum())} of "
        f"{solved.numel()} values (largest relative residual {float(relative[~solved].max()):.1e}"
        "). Check that the map is invertible there."
    )


@torch.no_grad()
def increasing_root(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], lower: Tensor, upper: Tensor
) -> Tensor:
    """Root of an increasing function in a bracket, by Newton steps guarded by bisection.

    Args:
        function: gives value and slope, element by element.
        lower: points where the value is at most 0.
        upper: points where the value is at least 0, same shape.

    References:
        Press et al. (2007), Numerical recipes, section 9.4 (rtsafe).
    """
    eps = torch.finfo(lower.dtype).eps
    v = (lower + upper) / 2
    previous = before = upper - lower
    for _ in range(MAX_STEPS):
        value, slope = function(v)
        lower = torch.where(value <= 0, v, lower)
        upper = torch.where(value >= 0, v, upper)
        newton = value / slope
        candidate = v - newton
        # A Newton step that leaves the bracket or shrinks too slowly is replaced by bisection.
        trusted = (candidate >= lower) & (candidate <= upper) & (2 * newton.abs() <= before)
        moved = torch.where(trusted, candidate, (lower + upper) / 2)
        before, previous = previous, (moved - v).abs()
        v = moved
        if all_true(~(previous > 2 * eps * v.abs())):
            break
    return v


@torch.no_grad()
def damped_newton(
    function: Callable[[Tensor], Tensor], target: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """Solution of ``function(x) = target`` row by row, and the Jacobian there.

    Backtracking on the residual's norm. A smooth invertible map has an invertible Jacobian
    everywhere, so the norm has no stationary point but the solution.

    Args:
        function: maps ``(n, d)`` to ``(n, d)``, each row by itself.
        target: ``(n, d)``.
        start: first guess ``(n, d)``.
    """
    small = 4 * torch.finfo(target.dtype).eps * (1 + target.norm(dim=-1))
    x = start
    value, jacobian = _value_and_jacobian(function, x)
    norm = (value - target).norm(dim=-1)
    stalled = torch.zeros_like(norm, dtype=torch.bool)
    for _ in range(MAX_STEPS):
        if all_true(~(norm > small) | stalled):
            break
        step = _newton_step(jacobian, target - value)
        x, improved = _backtrack(function, target, x, step, norm)
        value, jacobian = _value_and_jacobian(function, x)
        norm = (value - target).norm(dim=-1)
        stalled = ~improved
    return x, jacobian


def _newton_step(jacobian: Tensor, residual: Tensor) -> Tensor:
    step = torch.linalg.solve_ex(jacobian, residual.unsqueeze(-1))[0].squeeze(-1)
    descent = (jacobian.mT @ residual.unsqueeze(-1)).squeeze(-1)
    return torch.where(step.isfinite().all(-1, keepdim=True), step, descent)


def _backtrack(
    function: Callable[[Tensor], Tensor], target: Tensor, x: Tensor, step: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor]:
    """Halve each row's step until its residual shrinks; rows that never do stay."""
    found, improved = x, torch.zeros_like(norm, dtype=torch.bool)
    for k in range(MAX_HALVINGS):
        trial = x + step / 2**k
        better = (function(trial) - target).norm(dim=-1) < norm
        found = torch.where((better & ~improved).unsqueeze(-1), trial, found)
        improved = improved | better
        if all_true(improved):
            break
    return found, improved


def _value_and_jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Value ``(n, d)`` and Jacobian ``(n, d, d)`` by ``d`` reverse passes over all rows."""
    value, pull = torch.func.vjp(function, x)
    size = x.shape[-1]
    unit = torch.eye(size, dtype=x.dtype, device=x.device)
    rows = [pull(unit[i].expand_as(value))[0] for i in range(size)]
    return value, torch.stack(rows, dim=-2)
