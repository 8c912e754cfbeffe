"""Paths of a process on a grid of times, with all noise drawn at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flowvi.paths.sde import SDE
from flowvi.samplers.solvers import EulerMaruyama, SDESolver, StepTime
from flowvi.samplers.torchsde_backend import TorchSDE

__all__ = ["Trajectory", "draw_increments", "simulate"]


@dataclass(frozen=True)
class Trajectory:
    """Simulated paths and what a likelihood ratio needs of them; times come first.

    Args:
        times: grid, ``(num_steps + 1,)`` or ``(num_steps + 1, *batch)``.
        states: ``(num_steps + 1, *batch, dim)``.
        drift: at the start of every step, ``(num_steps, *batch, dim)``.
        diffusion: the same of the diffusion; ``None`` for an ODE.
        increments: Brownian increments, of variance dt; ``None`` for an ODE.
    """

    times: Tensor
    states: Tensor
    drift: Tensor
    diffusion: Tensor | None
    increments: Tensor | None


def draw_increments(times: Tensor, start: Tensor) -> Tensor:
    """Brownian increments for every step of a grid, to be passed to several simulations.

    Args:
        times: grid, ``(num_steps + 1,)`` or ``(num_steps + 1, *batch)``.
        start: states at the first time, ``(*batch, dim)``; gives shape, dtype and device.

    Shape:
        result: ``(num_steps, *batch, dim)``.
    """
    noise = torch.randn(len(times) - 1, *start.shape, dtype=start.dtype, device=start.device)
    return noise * _steps(times, start.dim()).sqrt()


def simulate(
    sde: SDE,
    start: Tensor,
    times: Tensor,
    *,
    solver: SDESolver | TorchSDE | None = None,
    increments: Tensor | None = None,
    num_segments: int = 1,
) -> Trajectory:
    r"""Paths of ``sde`` from ``start`` at every time of a grid.

    All noise is drawn before the first step; passing the same ``increments`` to several calls
    gives common random numbers. With ``num_segments`` about :math:`\sqrt{\text{steps}}`, memory
    of the backward pass grows like the root of the number of steps, for one more forward pass:
    segments are simulated again from their first state and the same noise, so states are the same
    to the bit, and gradients are those of the discrete path.

    Args:
        sde: the process.
        start: states at the first time, ``(*batch, dim)``.
        times: grid, ``(num_steps + 1,)``, or one for each item, ``(num_steps + 1, *batch)``
            (broadcast against the batch). It may stand still (dt = 0), not run backwards.
        solver: fixed-grid solver, or the :class:`TorchSDE` back end; Euler-Maruyama if left out.
        increments: Brownian increments ``(num_steps, *batch, dim)``; drawn if left out.
        num_segments: segments that the backward pass makes again; 1 keeps everything.

    Raises:
        ValueError: if shapes do not match or ``num_segments`` is below 1.
        NotImplementedError: if the torchsde back end is asked for what it has not.

    Example:
        >>> ou = SDE(lambda x, t: -x, 0.5)
        >>> simulate(ou, torch.ones(10, 2), torch.linspace(0, 1, 21)).states.shape
        torch.Size([21, 10, 2])
    """
    solver = EulerMaruyama() if solver is None else solver
    _check(sde, start, times, increments, num_segments)
    if isinstance(solver, TorchSDE):
        if increments is not None or num_segments != 1:
            raise NotImplementedError(
                "TorchSDE draws its own noise and has no segments. Use one of flowvi's solvers, "
                "or leave `increments` and `num_segments` out."
            )
        return Trajectory(times, *solver.solve(sde, start, times))
    if increments is None and not sde.is_deterministic:
        increments = draw_increments(times, start)
    t = times.reshape(len(times), *(1,) * (start.dim() - times.dim()), *times.shape[1:], 1)
    pieces = _pieces(t, increments, num_segments)
    run, x, found = _Segment(sde, solver), start, []
    for t_piece, dw in pieces:
        if len(pieces) == 1:
            out = run(x, t_piece, dw)
        else:
            out = checkpoint(run, x, t_piece, dw, use_reentrant=False, preserve_rng_state=False)
        x = out[0][-1]
        found.append(out)
    states, drift, diffusion = (_join(parts) for parts in zip(*found, strict=True))
    states = torch.cat([start.unsqueeze(0), states])
    return Trajectory(times, states, drift, diffusion, increments)


class _Segment:
    """Some steps in a row: states after each, drift and diffusion before each."""

    def __init__(self, sde: SDE, solver: SDESolver) -> None:
        self.sde, self.solver = sde, solver

    def __call__(
        self, x: Tensor, t: Tensor, dw: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        sde, solver = self.sde, self.solver
        points = self._embed(t)
        dt = (t[1:] - t[:-1]).unbind(0)
        dws = (None,) * len(dt) if dw is None else dw.unbind(0)
        state, states, drifts, diffusions = solver.init(sde, x), [], [], []
        for k, (dt_k, dw_k) in enumerate(zip(dt, dws, strict=True)):
            end = points[k + 1] if solver.needs_end else None
            x, f, b, state = solver.step(sde, x, points[k], end, dt_k, dw_k, state)
            states.append(x)
            drifts.append(f)
            diffusions.append(b)
        stacked = None if dw is None else torch.stack([b.expand_as(x) for b in diffusions])
        return torch.stack(states), torch.stack(drifts), stacked

    def _embed(self, t: Tensor) -> list[StepTime]:
        drift = self.sde.drift.embed(t).unbind(0)
        if self.sde.is_deterministic:
            return [StepTime(d, d) for d in drift]
        diffusion = self.sde.embed_diffusion(t).unbind(0)
        return [StepTime(*both) for both in zip(drift, diffusion, strict=True)]


def _pieces(
    t: Tensor, increments: Tensor | None, num_segments: int
) -> list[tuple[Tensor, Tensor | None]]:
    """Times and noise of every segment; neighbours share a time."""
    steps = len(t) - 1
    size = -(-steps // num_segments)
    return [
        (t[k : k + size + 1], None if increments is None else increments[k : k + size])
        for k in range(0, steps, size)
    ]


def _join(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    if parts[0] is None:
        return None
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _steps(times: Tensor, dim: int) -> Tensor:
    """Lengths of the steps, ``(num_steps, *batch or ones, 1)`` for states of ``dim`` dims."""
    dt = times[1:] - times[:-1]
    return dt.reshape(len(dt), *(1,) * (dim - times.dim()), *times.shape[1:], 1)


def _check(
    sde: SDE, start: Tensor, times: Tensor, increments: Tensor | None, num_segments: int
) -> None:
    if not isinstance(num_segments, int) or num_segments < 1:
        raise ValueError(f"`num_segments` must be an integer of at least 1; got {num_segments!r}.")
    batch = start.shape[:-1]
    if times.dim() < 1 or len(times) < 2 or not _broadcasts(times.shape[1:], batch):
        raise ValueError(
            "`times` must have shape (num_steps + 1,) or (num_steps + 1, *batch) with at least "
            f"two times and batch {tuple(batch)}; got {tuple(times.shape)}."
        )
    wanted = (len(times) - 1, *start.shape)
    if increments is not None and tuple(increments.shape) != wanted:
        raise ValueError(
            f"`increments` must have shape {wanted} (num_steps, *batch, dim); got "
            f"{tuple(increments.shape)}."
        )


def _broadcasts(shape: torch.Size, batch: torch.Size) -> bool:
    pairs = zip(reversed(shape), reversed(batch), strict=False)
    return len(shape) <= len(batch) and all(a in (1, b) for a, b in pairs)
