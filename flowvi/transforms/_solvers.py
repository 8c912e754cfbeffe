"""Root finding for inverses without a formula; every element converges on its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["all_true", "damped_newton", "increasing_root", "require_solved"]

MAX_ROOT_STEPS = 100
MAX_NEWTON_STEPS = 300
MAX_HALVINGS = 20
MIN_LENGTH = 1e-8


def all_true(mask: Tensor) -> bool | None:
    """Whether a mask is true everywhere; None where values cannot be looked at.

    That is so inside ``torch.vmap`` and while ``torch.compile`` traces; the solvers then take
    their full number of steps. On the meta device, without values, everything counts as true.
    """
    if mask.is_meta:
        return True
    if torch.compiler.is_compiling():
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
    for _ in range(MAX_ROOT_STEPS):
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

    Newton steps, shortened until the simplified Newton step that would follow is what a linear
    map would leave, to half its change. The test does not change under linear maps of the
    target, so the iterates follow the path whose image is a straight line to the target, also
    through curved and narrow valleys in which a test on the residual would force tiny steps.

    Args:
        function: maps ``(n, d)`` to ``(n, d)``, each row by itself.
        target: ``(n, d)``.
        start: first guess ``(n, d)``.

    References:
        Deuflhard (2004), Newton methods for nonlinear problems, restricted natural
        monotonicity (section 3.3).
    """
    small = 4 * torch.finfo(target.dtype).eps * (1 + target.norm(dim=-1))
    x, length = start, torch.ones_like(small)
    for _ in range(MAX_NEWTON_STEPS):
        value, jacobian = _value_and_jacobian(function, x)
        norm = (value - target).norm(dim=-1)
        # Rows that have arrived, or whose step has been cut to nothing, are finished.
        if all_true(~(norm > small) | (length < MIN_LENGTH)):
            break
        step = _solve_rows(jacobian, target - value)
        # A singular Jacobian gives no step: the row stays where it is and is found unsolved.
        step = torch.where(step.isfinite().all(-1, keepdim=True), step, torch.zeros_like(step))
        size = step.norm(dim=-1)
        length = (4 * length).clamp_max(1.0)
        for _ in range(MAX_HALVINGS):
            trial = x + length.unsqueeze(-1) * step
            residual = target - function(trial)
            left = _solve_rows(jacobian, residual)
            off = (left - (1 - length).unsqueeze(-1) * step).norm(dim=-1)
            near = off <= 0.5 * length * size
            good = near | (residual.norm(dim=-1) <= small) | (norm <= small)
            if all_true(good):
                break
            length = torch.where(good, length, length / 2)
        x = torch.where((good & (norm > small)).unsqueeze(-1), trial, x)
    return x, jacobian


def _solve_rows(jacobian: Tensor, rows: Tensor) -> Tensor:
    return torch.linalg.solve_ex(jacobian, rows.unsqueeze(-1))[0].squeeze(-1)


def _value_and_jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Value ``(n, d)`` and Jacobian ``(n, d, d)`` by ``d`` reverse passes over all rows."""
    value, pull = torch.func.vjp(function, x)
    size = x.shape[-1]
    unit = torch.eye(size, dtype=x.dtype, device=x.device)
    rows = [pull(unit[i].expand_as(value))[0] for i in range(size)]
    return value, torch.stack(rows, dim=-2)
