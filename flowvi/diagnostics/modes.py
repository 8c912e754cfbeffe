"""Whether a guide covers the separated modes of a posterior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowvi.infer.draws import Draws
from flowvi.infer.modes import Mode
from flowvi.infer.target import Target
from flowvi.objectives.weights import log_mean_exp

__all__ = ["ModeCoverage", "mode_coverage"]


@dataclass(frozen=True)
class ModeCoverage:
    """Separated modes of the posterior, and how much of each the guide has.

    Args:
        modes: the modes, by decreasing weight.
        weights: estimated share of the posterior's mass near each mode ``(num_modes,)``.
        shares: share of the guide's draws near each mode ``(num_modes,)``.
        log_evidence: estimated log mass of all modes together, in nats.
    """

    modes: tuple[Mode, ...]
    weights: Tensor
    shares: Tensor
    log_evidence: float

    @property
    def shift(self) -> Tensor:
        r"""Error of each share in posterior standard deviations, ``(num_modes,)``.

        A mode of weight w far from the others sets a coordinate of standard deviation
        :math:`\sqrt{w (1 - w)}` times the distance, so a wrong share s moves the mean by
        :math:`(s - w) / \sqrt{w (1 - w)}`.
        """
        spread = (self.weights * (1 - self.weights)).clamp(min=1e-6).sqrt()
        return (self.shares - self.weights) / spread


def mode_coverage(
    draws: Draws, target: Target, modes: Sequence[Mode], *, num_draws: int = 400
) -> ModeCoverage:
    r"""Compare the guide's share of every mode with the mode's mass under the posterior.

    Point z belongs to mode k with responsibility :math:`r_k(z)` under the mixture of the modes'
    Gaussians. The mass :math:`\int r_k\,\tilde p` of a mode is estimated by importance sampling
    from its own Gaussian, so it does not depend on the guide.

    Args:
        draws: scored draws of the guide.
        target: the model with its data.
        modes: modes found by :func:`flowvi.infer.modes.find_modes`, one or more.
        num_draws: draws per mode for its mass.

    Raises:
        ValueError: if ``modes`` is empty.
    """
    if not modes:
        raise ValueError("`modes` must hold at least one mode; got none.")
    kept = draws.z[torch.isfinite(draws.z).all(-1)]
    shares = _log_shares(kept, modes).exp().mean(0)
    log_mass = []
    for k, mode in enumerate(modes):
        loc, tril = mode.loc.to(kept), mode.scale_tril.to(kept)
        z = loc + torch.randn(num_draws, len(loc), dtype=kept.dtype, device=kept.device) @ tril.T
        log_p, _ = target.log_prob_and_grad(z)
        log_w = log_p + _log_shares(z, modes)[:, k] - _log_normal(z, mode)
        log_mass.append(log_mean_exp(log_w))
    log_mass = torch.stack(log_mass)
    return ModeCoverage(
        modes=tuple(modes),
        weights=log_mass.softmax(0),
        shares=shares,
        log_evidence=float(log_mass.logsumexp(0)),
    )


def _log_shares(z: Tensor, modes: Sequence[Mode]) -> Tensor:
    """Log responsibilities ``(num_draws, num_modes)``."""
    terms = [_log_normal(z, mode) + math.log(max(mode.weight, 1e-12)) for mode in modes]
    return torch.stack(terms, -1).log_softmax(-1)


def _log_normal(z: Tensor, mode: Mode) -> Tensor:
    loc, tril = mode.loc.to(z), mode.scale_tril.to(z)
    white = torch.linalg.solve_triangular(tril, (z - loc).T, upper=False)
    log_det = tril.diagonal().abs().log().sum() + 0.5 * len(loc) * math.log(2 * math.pi)
    return -0.5 * white.square().sum(0) - log_det
