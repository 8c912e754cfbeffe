"""Drift test: chains started at the guide's own draws must leave the guide's law unchanged."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowvi.diagnostics.shifts import (
    Shifts,
    chain_shifts,
    flatten_values,
    heavy_tails,
    natural_labels,
)
from flowvi.infer.draws import Draws
from flowvi.infer.target import Target

__all__ = ["DriftTest", "covariance_factor", "drift_test"]

_MAX_LEAPFROG = 8
_TRAJECTORY = 1.4  # just under a quarter period of a standard normal, pi / 2
_TARGET_ACCEPTANCE = 0.8


@dataclass(frozen=True)
class DriftTest:
    """Result of :func:`drift_test`.

    Args:
        natural: shifts of the constrained parameters.
        ends: what values of these parameters were limited to: the central 98 % of the guide's
            draws where tails are heavy (:func:`~.shifts.heavy_tails`), otherwise nothing.
        whitened: shifts along the axes in which the guide has unit covariance.
        acceptance: mean acceptance probability of the kept transitions.
        step_size: adapted step size, in guide standard deviations.
        num_gradients: gradient evaluations per chain.
        chains: kept unconstrained states ``(num_kept, num_chains, dim)``.
    """

    natural: Shifts
    ends: tuple[Tensor, Tensor]
    whitened: Shifts
    acceptance: float
    step_size: float
    num_gradients: int
    chains: Tensor = field(repr=False)

    @property
    def heavy(self) -> list[str]:
        """Parameters with heavy tails."""
        flags = self.ends[0].isfinite().tolist()
        return [name for name, flag in zip(self.natural.labels, flags, strict=True) if flag]

    @property
    def max_z(self) -> float:
        """Largest z-score of any mean or standard deviation, in natural and whitened axes."""
        groups = (self.natural, self.whitened)
        scores = torch.cat([s for g in groups for s in (g.mean_z, g.log_sd_z)]).abs()
        return float(torch.nan_to_num(scores, nan=math.inf).max())


@dataclass
class _State:
    """Where every chain is, in whitened coordinates."""

    u: Tensor
    log_p: Tensor
    grad: Tensor


def drift_test(
    draws: Draws,
    target: Target,
    *,
    num_chains: int = 200,
    num_transitions: int = 24,
    num_kept: int = 12,
) -> DriftTest:
    """Run vectorised HMC from the guide's draws and measure where their law moves.

    If the guide is the posterior, the chains stay in its law and every shift is Monte Carlo
    noise. If not, they move towards the posterior, and the shift says in which direction and,
    where the chains mix within a few transitions, by how much the guide is off; with slow mixing
    it is a lower bound. Chains do not cross between separated modes, so a missed mode is
    invisible here.

    The chains move in the unconstrained space whitened by the draws' covariance. The step size
    is adapted to acceptance 0.8 in the transitions that are not kept; a trajectory has
    ``ceil(1.4 / step_size)`` leapfrog steps, at most 8.

    Args:
        draws: scored draws of the guide, at least ``num_chains`` of them with finite ``log_p``.
        target: the model with its data.
        num_chains: number of chains.
        num_transitions: HMC transitions per chain.
        num_kept: last transitions that count.

    Raises:
        ValueError: if the numbers do not fit together, or too few draws have a finite density.

    References:
        Neal (2011), MCMC using Hamiltonian dynamics, arXiv:1206.1901, sections 3 and 5.
    """
    if not 1 <= num_kept < num_transitions:
        raise ValueError(
            f"`num_kept` must be from 1 to num_transitions - 1 ({num_transitions - 1}); "
            f"got {num_kept}."
        )
    if num_chains < 10:
        raise ValueError(f"`num_chains` must be at least 10; got {num_chains}.")
    finite = (torch.isfinite(draws.log_p) & torch.isfinite(draws.z).all(-1)).nonzero().flatten()
    if len(finite) < num_chains:
        raise ValueError(
            f"`draws` must hold at least {num_chains} draws with a finite log-density under the "
            f"model; got {len(finite)} of {len(draws)}."
        )
    z = draws.z[finite]
    # A random subset: a mixture guide may return its draws ordered by component.
    picked = torch.randperm(len(finite), device=z.device)[:num_chains]
    loc, scale_tril = z.mean(0), covariance_factor(z)
    walk = _Walk(target, loc, scale_tril)
    u, acceptance = walk.run(_whiten(z[picked], loc, scale_tril), num_transitions, num_kept)
    states = loc + u @ scale_tril.T
    flat = target.constrain(states.reshape(-1, target.dim))
    values = flatten_values(flat, target).reshape(num_kept, num_chains, -1)
    guide = flatten_values(draws.values, target)[finite]
    ends = heavy_tails(guide)[1:]
    guide, values = guide.clamp(*ends), values.clamp(*ends)
    axes = [f"axis {i}" for i in range(target.dim)]
    whitened = _whiten(z, loc, scale_tril)
    return DriftTest(
        natural=chain_shifts(natural_labels(target), guide, guide[picked], values),
        ends=ends,
        whitened=chain_shifts(axes, whitened, whitened[picked], u),
        acceptance=acceptance,
        step_size=walk.step_size,
        num_gradients=walk.num_gradients,
        chains=states,
    )


def covariance_factor(z: Tensor) -> Tensor:
    """Cholesky factor of the covariance of ``z``, computed after scaling to unit diagonal.

    Small eigenvalues of the correlation matrix are floored at 1e-11 of the largest (1e-6 in
    float32), so that a badly scaled or degenerate law has a factor too.
    """
    centred = z - z.mean(0)
    scale = centred.square().mean(0).sqrt().clamp(min=torch.finfo(z.dtype).tiny ** 0.5)
    unit = centred / scale
    eigenvalues, vectors = torch.linalg.eigh(unit.T @ unit / len(z))
    floor = 1e-6 if z.dtype == torch.float32 else 1e-11
    eigenvalues = eigenvalues.clamp(min=floor * eigenvalues[-1])
    return scale[:, None] * torch.linalg.cholesky((vectors * eigenvalues) @ vectors.T)


def _whiten(z: Tensor, loc: Tensor, scale_tril: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(scale_tril, (z - loc).T, upper=False).T


class _Walk:
    """Vectorised HMC on the target in whitened coordinates, with one shared step size."""

    def __init__(self, target: Target, loc: Tensor, scale_tril: Tensor) -> None:
        self.target = target
        self.loc = loc
        self.scale_tril = scale_tril
        self.step_size = len(loc) ** -0.25
        self.num_gradients = 0

    def run(self, u: Tensor, num_transitions: int, num_kept: int) -> tuple[Tensor, float]:
        """States after the last ``num_kept`` transitions, and their mean acceptance."""
        state = self._state(u)
        kept, rates = [], []
        for step in range(num_transitions):
            state, rate = self._transition(state)
            if step < num_transitions - num_kept:
                # Robbins-Monro on the mean over all chains, which is hardly noisy.
                gain = 2.0 / math.sqrt(step + 1)
                self.step_size *= math.exp(gain * (rate - _TARGET_ACCEPTANCE))
                self.step_size = min(self.step_size, _TRAJECTORY)
            else:
                kept.append(state.u)
                rates.append(rate)
        return torch.stack(kept), sum(rates) / len(rates)

    def _state(self, u: Tensor) -> _State:
        log_p, grad = self.target.log_prob_and_grad(self.loc + u @ self.scale_tril.T)
        self.num_gradients += 1
        return _State(u, log_p, grad @ self.scale_tril)

    def _transition(self, old: _State) -> tuple[_State, float]:
        num_leapfrog = min(math.ceil(_TRAJECTORY / self.step_size), _MAX_LEAPFROG)
        # A jittered step size keeps trajectories from being periodic.
        eps = self.step_size * (0.9 + 0.2 * torch.rand((), dtype=old.u.dtype).to(old.u.device))
        start = torch.randn_like(old.u)
        momentum, new = start, old
        for _ in range(num_leapfrog):
            momentum = momentum + 0.5 * eps * new.grad
            new = self._state(new.u + eps * momentum)
            momentum = momentum + 0.5 * eps * new.grad
        log_ratio = new.log_p - old.log_p - 0.5 * (momentum.square() - start.square()).sum(-1)
        probability = torch.nan_to_num(log_ratio, nan=-math.inf).clamp(max=0.0).exp()
        accept = torch.rand_like(probability) < probability
        mixed = _State(
            torch.where(accept[:, None], new.u, old.u),
            torch.where(accept, new.log_p, old.log_p),
            torch.where(accept[:, None], new.grad, old.grad),
        )
        return mixed, float(probability.mean())
