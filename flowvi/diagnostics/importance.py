"""What importance weights say about a fit: Pareto k, effective sample size, bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowvi.diagnostics.arviz_adapter import pareto_smooth
from flowvi.infer.draws import Draws

__all__ = [
    "Bound",
    "effective_sample_size",
    "elbo",
    "iw_elbo",
    "pareto_k",
    "pareto_k_threshold",
    "resample",
    "smoothed_log_weights",
]

_MIN_PARETO_DRAWS = 25  # below, the tail of a fifth of the draws has fewer than five


@dataclass(frozen=True)
class Bound:
    """An estimate of a lower bound on the log-evidence, with its standard error, in nats."""

    value: float
    se: float

    def __str__(self) -> str:
        return f"{self.value:.3f} +- {self.se:.3f}"


def pareto_k_threshold(num_draws: int) -> float:
    r"""Largest Pareto k at which importance weights can be trusted: min(1 - 1/log10 S, 0.7).

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), arXiv:1507.02646, section 3.
    """
    if num_draws < 2:
        raise ValueError(f"`num_draws` must be at least 2; got {num_draws}.")
    return min(1 - 1 / math.log10(num_draws), 0.7)


def smoothed_log_weights(log_weights: Tensor) -> tuple[Tensor, float]:
    """Pareto-smoothed normalised log weights and Pareto k.

    Weights of ``-inf`` stay so. k is infinite for fewer than 25 finite weights and ``-inf`` if
    all weights of the tail are equal: weights that are bounded and reach their bound.

    Args:
        log_weights: log importance weights ``(num_draws,)``, in nats.

    Raises:
        ValueError: if the weights are not a vector, contain NaN or ``+inf``, or are all ``-inf``.
    """
    finite = _check(log_weights)
    kept = log_weights[finite].double()
    smoothed = log_weights.new_full(log_weights.shape, -math.inf, dtype=torch.float64)
    if len(kept) < _MIN_PARETO_DRAWS:
        smoothed[finite], k = kept - kept.logsumexp(0), math.inf
    elif _tail_spread(kept) < 1e-9:
        # Equal up to rounding: a tail fit to rounding errors would say nothing.
        smoothed[finite], k = kept - kept.logsumexp(0), -math.inf
    else:
        values, k = pareto_smooth(kept.detach().cpu().numpy())
        smoothed[finite] = torch.as_tensor(values, device=kept.device)
    return smoothed, k


def pareto_k(log_weights: Tensor) -> float:
    """Shape of the generalised Pareto tail of the weights; see :func:`smoothed_log_weights`."""
    return smoothed_log_weights(log_weights)[1]


def effective_sample_size(log_weights: Tensor) -> float:
    r"""Effective sample size of importance weights.

    .. math:: \mathrm{ESS} = (\textstyle\sum_i w_i)^2 / \sum_i w_i^2

    References:
        Kong (1992), A note on importance sampling using standardized weights.
    """
    _check(log_weights)
    log_w = log_weights.double()
    return float((2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp())


def elbo(log_weights: Tensor) -> Bound:
    """Mean log weight and its standard error, in nats; ``-inf`` if any weight is zero."""
    _check(log_weights)
    log_w = log_weights.double()
    if len(log_w) < 2 or not torch.isfinite(log_w).all():
        return Bound(float(log_w.mean()), math.nan)
    return Bound(float(log_w.mean()), float(log_w.std()) / math.sqrt(len(log_w)))


def iw_elbo(log_weights: Tensor, num_particles: int) -> Bound:
    r"""Importance-weighted bound, averaged over disjoint groups of draws.

    .. math:: \mathcal L_K = \mathbb E\, \log \frac1K \sum_{k=1}^K w_k

    Draws left over by the division into groups are not used.

    Args:
        log_weights: log importance weights ``(num_draws,)``, in nats.
        num_particles: draws per group K, from 1 to half the number of draws.

    References:
        Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders,
        arXiv:1509.00519, equation 8.
    """
    _check(log_weights)
    if not 1 <= num_particles <= len(log_weights) // 2:
        raise ValueError(
            "`num_particles` must be from 1 to half the number of draws "
            f"({len(log_weights) // 2}); got {num_particles}."
        )
    num_groups = len(log_weights) // num_particles
    groups = log_weights.double()[: num_groups * num_particles].reshape(num_groups, num_particles)
    return elbo(groups.logsumexp(-1) - math.log(num_particles))


def resample(draws: Draws, num_draws: int) -> Draws:
    """Draws nearer the posterior: picked with replacement by their Pareto-smoothed weights.

    Systematic resampling. With an effective sample size far below ``num_draws`` the result
    repeats few draws; look at :func:`pareto_k` first.

    Args:
        draws: scored draws of a guide.
        num_draws: number of draws to return, at least 1.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), arXiv:1507.02646.
    """
    if num_draws < 1:
        raise ValueError(f"`num_draws` must be at least 1; got {num_draws}.")
    log_w, _ = smoothed_log_weights(draws.log_weights)
    total = log_w.exp().cumsum(0)
    points = torch.arange(num_draws, dtype=total.dtype, device=total.device)
    points = (points + torch.rand((), dtype=total.dtype, device=total.device)) / num_draws
    index = torch.searchsorted(total, points * total[-1]).clamp(max=len(total) - 1)
    # Systematic picks come ordered; shuffled, any leading part of them is a fair sample.
    return draws[index[torch.randperm(num_draws, device=index.device)]]


def _tail_spread(log_weights: Tensor) -> float:
    """Range of the weights that Pareto smoothing replaces, in nats."""
    number = len(log_weights)
    tail = log_weights.topk(int(min(0.2 * number, 3 * number**0.5))).values
    return float(tail[0] - tail[-1])


def _check(log_weights: Tensor) -> Tensor:
    """Mask of the finite weights."""
    if log_weights.dim() != 1 or len(log_weights) == 0:
        raise ValueError(
            f"`log_weights` must have shape (num_draws,); got {tuple(log_weights.shape)}."
        )
    finite = torch.isfinite(log_weights)
    if bool((log_weights.isnan() | (log_weights == math.inf)).any()):
        bad = int((log_weights.isnan() | (log_weights == math.inf)).sum())
        raise ValueError(f"`log_weights` must be finite or -inf; got {bad} other values.")
    if not bool(finite.any()):
        raise ValueError("`log_weights` must have a finite value; got only -inf.")
    return finite
