"""Dense BFGS ascent of a log-density from many starts, one batched evaluation per round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowvi.infer._searches import Search

__all__ = ["Ascent", "Snapshot", "ascend"]

_SUFFICIENT = 1e-4  # the constant of the Armijo rule
_MEMORY = 4_000_000  # most matrix elements that the snapshots of one ascent may hold


@dataclass(frozen=True)
class Snapshot:
    """One iterate: ``loc`` and ``grad`` ``(dim,)``, ``inverse_hessian`` ``(dim, dim)``."""

    loc: Tensor
    grad: Tensor
    inverse_hessian: Tensor


@dataclass
class Ascent:
    """What :func:`ascend` found.

    Args:
        loc: last iterates, ``(num_starts, dim)``.
        log_prob: their log-densities, ``-inf`` for a start that had none.
        grad: their gradients.
        inverse_hessian: approximations of the inverse of minus the Hessian there.
        converged: whether the predicted gain fell below the tolerance.
        paths: per start, a thinned list of iterates in order.
        num_evaluations: number of batched evaluations.
    """

    loc: Tensor
    log_prob: Tensor
    grad: Tensor
    inverse_hessian: Tensor
    converged: Tensor
    paths: list[list[Snapshot]]
    num_evaluations: int = 1


@dataclass
class _LineSearch:
    """Line-search state of every start."""

    direction: Tensor
    step: Tensor
    cap: Tensor
    num_updates: Tensor
    active: Tensor
    strides: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)


def ascend(
    starts: Tensor,
    *,
    max_evaluations: int = 200,
    tolerance: float = 1e-4,
    max_snapshots: int = 24,
    grace: float = 0.3,
    absorb: Callable[[Tensor], Tensor] | None = None,
) -> Search[Ascent]:
    """Climb from every start with dense BFGS and Armijo backtracking.

    Each start is its own state machine: in one round every start that is still active tries one
    point, and all these points are one evaluation. The first step is at most 1 long; it doubles
    while the curvature is negative. Once the best start has converged the others
    have ``grace`` times the rounds spent so far, plus 10, to finish.

    Args:
        starts: first points, ``(num_starts, dim)``, float64.
        max_evaluations: number of rounds at most.
        tolerance: predicted gain, in nats, below which a start has converged.
        max_snapshots: number of iterates kept per start, at least 2.
        grace: see above.
        absorb: points ``(num_points, dim)`` to whether a start that gets there may stop.

    References:
        Nocedal and Wright (2006), Numerical Optimization, algorithms 3.1 and 6.1.
    """
    num_starts, dim = starts.shape
    max_snapshots = max(2, min(max_snapshots, _MEMORY // (num_starts * dim * dim)))
    log_prob, grad = yield starts
    eye = torch.eye(dim, dtype=starts.dtype)
    found = Ascent(
        loc=starts.clone(),
        log_prob=log_prob,
        grad=grad,
        inverse_hessian=eye.repeat(num_starts, 1, 1),
        converged=torch.zeros(num_starts, dtype=torch.bool),
        paths=[[] for _ in range(num_starts)],
    )
    search = _LineSearch(
        direction=grad.clone(),
        step=torch.ones_like(log_prob),
        cap=torch.ones_like(log_prob),
        num_updates=torch.zeros(num_starts, dtype=torch.long),
        active=torch.isfinite(log_prob),
        strides=[1] * num_starts,
        counts=[0] * num_starts,
    )
    _set_direction(found, search, torch.arange(num_starts), tolerance)
    deadline = max_evaluations
    while found.num_evaluations < deadline and bool(search.active.any()):
        yield from _round(found, search, tolerance, max_snapshots)
        found.num_evaluations += 1
        if absorb is not None:
            search.active &= ~absorb(found.loc)
        best = int(found.log_prob.argmax())
        if deadline == max_evaluations and found.converged[best]:
            deadline = min(deadline, int((1 + grace) * found.num_evaluations) + 10)
    return found


def _round(
    found: Ascent, search: _LineSearch, tolerance: float, max_snapshots: int
) -> Search[None]:
    """One trial point for every active start; accepted or shortened."""
    rows = search.active.nonzero()[:, 0]
    move = search.step[rows, None] * search.direction[rows]
    trial = found.loc[rows] + move
    log_prob, grad = yield trial
    old, slope = found.log_prob[rows], (found.grad[rows] * move).sum(-1)
    rounding = 8 * torch.finfo(torch.float64).eps * old.abs()
    gain = log_prob - old
    accepted = gain >= _SUFFICIENT * slope - rounding

    refused = rows[~accepted]
    if len(refused):
        bend = (0.5 * slope / (slope - gain))[~accepted]  # maximiser of the parabola, in steps
        factor = bend.nan_to_num(nan=0.1).clamp(0.1, 0.5)
        search.step[refused] *= factor
        _give_up_or_reset(found, search, refused, tolerance)
    taken = rows[accepted]
    if len(taken):
        change = found.grad[taken] - grad[accepted]
        _update(found, search, taken, move[accepted], change)
        found.loc[taken] = trial[accepted]
        found.log_prob[taken] = log_prob[accepted]
        found.grad[taken] = grad[accepted]
        _set_direction(found, search, taken, tolerance)
        _keep_snapshots(found, search, taken, max_snapshots)


def _update(
    found: Ascent, search: _LineSearch, rows: Tensor, move: Tensor, change: Tensor
) -> None:
    """BFGS update of the inverse of minus the Hessian; widened where the curvature is negative."""
    curvature = (move * change).sum(-1)
    positive = curvature > 1e-10 * move.norm(dim=-1) * change.norm(dim=-1)
    flat = rows[~positive]
    search.cap[flat] *= 2
    found.inverse_hessian[flat] *= 2

    rows, move, change, curvature = (v[positive] for v in (rows, move, change, curvature))
    if not len(rows):
        return
    inverse = found.inverse_hessian[rows]
    fresh = search.num_updates[rows] == 0
    scale = (curvature / (change**2).sum(-1))[:, None, None] * torch.eye(move.shape[-1]).to(move)
    inverse = torch.where(fresh[:, None, None], scale, inverse)
    mapped = (inverse @ change[:, :, None])[:, :, 0]
    rho = 1 / curvature
    quadratic = rho * (1 + rho * (change * mapped).sum(-1))
    cross = rho[:, None, None] * mapped[:, :, None] * move[:, None, :]
    outer = quadratic[:, None, None] * move[:, :, None] * move[:, None, :]
    found.inverse_hessian[rows] = inverse + outer - cross - cross.transpose(-1, -2)
    search.num_updates[rows] += 1


def _set_direction(found: Ascent, search: _LineSearch, rows: Tensor, tolerance: float) -> None:
    """Next direction of the given starts, and whether they are done."""
    grad = found.grad[rows]
    direction = (found.inverse_hessian[rows] @ grad[:, :, None])[:, :, 0]
    slope = (direction * grad).sum(-1)
    # Before the first update the inverse Hessian has no scale, so the length is capped.
    fresh = search.num_updates[rows] == 0
    length = direction.norm(dim=-1).clamp(min=1e-300)
    shrink = torch.where(fresh, (search.cap[rows] / length).clamp(max=1.0), 1.0)
    search.direction[rows] = direction * shrink[:, None]
    search.step[rows] = 1.0
    # Few updates underestimate the variance of flat directions, and with it the gain.
    learned = search.num_updates[rows] >= min(grad.shape[-1], 50)
    done = (slope < tolerance) & (learned | (grad.norm(dim=-1) < 1e-10))
    lost = ~torch.isfinite(slope) | (slope <= 0)
    found.converged[rows] = done
    search.active[rows] &= ~(done | lost)


def _give_up_or_reset(found: Ascent, search: _LineSearch, rows: Tensor, tolerance: float) -> None:
    """A start whose step has vanished restarts from the identity once, then stops."""
    stuck = rows[search.step[rows] < 1e-9]
    if not len(stuck):
        return
    slope = (search.direction[stuck] * found.grad[stuck]).sum(-1)
    rounding = 1e-10 * found.log_prob[stuck].abs()
    found.converged[stuck] = slope < tolerance + rounding
    spent = found.converged[stuck] | (search.num_updates[stuck] == 0)
    search.active[stuck[spent]] = False
    again = stuck[~spent]
    found.inverse_hessian[again] = torch.eye(found.loc.shape[-1], dtype=found.loc.dtype)
    search.num_updates[again] = 0
    search.cap[again] = 1e-3
    _set_direction(found, search, again, tolerance)


def _keep_snapshots(found: Ascent, search: _LineSearch, rows: Tensor, most: int) -> None:
    """Keep every ``stride``-th iterate, doubling the stride whenever the list is full."""
    for row in rows.tolist():
        search.counts[row] += 1
        if search.counts[row] % search.strides[row]:
            continue
        path = found.paths[row]
        grad, inverse = found.grad[row].clone(), found.inverse_hessian[row].clone()
        path.append(Snapshot(found.loc[row].clone(), grad, inverse))
        if len(path) >= most:
            del path[::2]
            search.strides[row] *= 2
