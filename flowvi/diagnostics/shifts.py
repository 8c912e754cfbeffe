"""How far a guide's means and standard deviations are from the posterior's, with errors."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowvi.infer.target import Target

__all__ = [
    "Shifts",
    "chain_shifts",
    "combine_shifts",
    "flatten_values",
    "heavy_tails",
    "importance_shifts",
    "natural_labels",
    "sample_shifts",
]

# Importance weights underestimate their own error a little; a floor keeps a lucky estimate from
# overruling the chains entirely.
_LEAST_ERROR = 0.005
_CLASH = 4.0

_TAIL = 0.05  # share of the draws that a tail index is fitted to
_HEAVY = 0.25  # from here on the fourth moment is infinite
_CENTRE = 0.98


@dataclass(frozen=True)
class Shifts:
    """Guide against posterior, one entry per coordinate.

    Args:
        labels: names of the coordinates.
        mean: guide's mean minus the posterior's, in posterior standard deviations.
        mean_se: standard error of ``mean``.
        log_sd: log of the guide's standard deviation over the posterior's.
        log_sd_se: standard error of ``log_sd``.
    """

    labels: list[str]
    mean: Tensor
    mean_se: Tensor
    log_sd: Tensor
    log_sd_se: Tensor

    @property
    def mean_z(self) -> Tensor:
        """``mean`` over its standard error."""
        return self.mean / self.mean_se

    @property
    def log_sd_z(self) -> Tensor:
        """``log_sd`` over its standard error."""
        return self.log_sd / self.log_sd_se


def natural_labels(target: Target) -> list[str]:
    """One label per element of every latent site: ``mu``, ``theta[2]``, ``L[0,1]``."""
    labels = []
    for name, site in target.sites.items():
        grid = itertools.product(*map(range, site.shape))
        labels += [f"{name}[{','.join(map(str, i))}]" if i else name for i in grid]
    return labels


def flatten_values(values: dict[str, Tensor], target: Target) -> Tensor:
    """Latent values side by side, ``(num_draws, number of natural_labels)``."""
    return torch.cat([values[name].reshape(len(values[name]), -1) for name in target.sites], -1)


def heavy_tails(guide: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Coordinates whose standard deviation no sample of this size shows, and their centre.

    The error of a sample's standard deviation is governed by the fourth moment. Where that is
    infinite, or the tail looks so as far as the draws reach, rare draws beyond the last one
    decide, and an error computed from the sample is far too small. The index of the tail of
    :math:`|x - \operatorname{median}|` is found by the moment estimator on its largest
    twentieth.

    Args:
        guide: draws ``(num_draws, num_labels)``.

    Returns:
        Which coordinates are heavy, and the ends of the central 98 % of those (infinite ends for
        all others), each ``(num_labels,)``.

    References:
        Dekkers, Einmahl and de Haan (1989), A moment estimator for the index of an extreme-value
        distribution, equation 1.7.
    """
    far = (guide - guide.median(0).values).abs()
    number = max(int(_TAIL * len(guide)), 5)
    top = far.topk(min(number + 1, len(guide)), dim=0).values
    tiny = torch.finfo(guide.dtype).tiny
    logs = (top[:-1].clamp(min=tiny) / top[-1].clamp(min=tiny)).log()
    first, second = logs.mean(0), logs.square().mean(0)
    index = first + 1 - 0.5 / (1 - first.square() / second)
    heavy = index.nan_to_num(nan=0.0) > _HEAVY
    low, high = torch.full_like(guide[0], -math.inf), torch.full_like(guide[0], math.inf)
    if bool(heavy.any()):
        ordered = guide[:, heavy].sort(0).values
        cut = int((1 - _CENTRE) / 2 * len(guide))
        low[heavy], high[heavy] = ordered[cut], ordered[len(guide) - 1 - cut]
    return heavy, low, high


def chain_shifts(labels: list[str], guide: Tensor, start: Tensor, chains: Tensor) -> Shifts:
    r"""Shifts from chains that start at guide draws and move towards the posterior.

    Both averages are linearised, so every chain has an influence value :math:`y_i` on the
    posterior's moment and every start an influence :math:`x_i` on the guide's. The starts act as
    a control variate with the fitted coefficient :math:`\beta`, which removes the noise that a
    slowly mixing chain keeps from its start; the error is
    :math:`\operatorname{var}(y - \beta x) / n + (1 - \beta)^2 \operatorname{var}(x) / N`.

    Args:
        labels: names of the coordinates.
        guide: all guide draws ``(num_draws, num_labels)``.
        start: those at which chains start ``(num_chains, num_labels)``.
        chains: kept states ``(num_kept, num_chains, num_labels)``.
    """
    loc_q, var_q = guide.mean(0), _variance(guide)
    loc_p = chains.mean((0, 1))
    var_p = (chains - loc_p).square().mean((0, 1)) + _tiny(var_q)
    mean, mean_se = _controlled(
        loc_q - loc_p,
        loc_p - chains.mean(0),
        loc_q - start,
        loc_q - guide,
    )
    log_sd, log_sd_se = _controlled(
        0.5 * (var_q / var_p).log(),
        0.5 * (1 - (chains - loc_p).square().mean(0) / var_p),
        0.5 * (1 - (start - loc_q).square() / var_q),
        0.5 * (1 - (guide - loc_q).square() / var_q),
    )
    sd = var_p.sqrt()
    return Shifts(labels, mean / sd, mean_se / sd, log_sd, log_sd_se)


def importance_shifts(labels: list[str], guide: Tensor, log_weights: Tensor) -> Shifts:
    r"""Shifts from self-normalised importance weights.

    Errors by the delta method: draw i has influence
    :math:`S \bar w_i (x_i - \mu_p) - (x_i - \mu_q)` on the difference of means. They hold only
    where the weights have a finite variance.

    Args:
        labels: names of the coordinates.
        guide: guide draws ``(num_draws, num_labels)``.
        log_weights: normalised log weights ``(num_draws,)``.
    """
    ratio = (log_weights - log_weights.logsumexp(0)).exp()[:, None] * len(guide)
    loc_q, var_q = guide.mean(0), guide.var(0, unbiased=False)
    var_q = var_q + _tiny(var_q)
    loc_p = (ratio * guide).mean(0)
    var_p = (ratio * (guide - loc_p).square()).mean(0) + _tiny(var_q)
    influence = ratio * (guide - loc_p) - (guide - loc_q)
    spread = 0.5 * ratio * ((guide - loc_p).square() / var_p - 1)
    spread = spread - 0.5 * ((guide - loc_q).square() / var_q - 1)
    root = math.sqrt(len(guide))
    sd = var_p.sqrt()
    return Shifts(
        labels,
        (loc_q - loc_p) / sd,
        (influence.std(0) + _tiny(sd)) / sd / root,
        0.5 * (var_q / var_p).log(),
        (spread.std(0) + _tiny(sd)) / root,
    )


def sample_shifts(labels: list[str], first: Tensor, second: Tensor) -> Shifts:
    """Shifts of one sample of independent draws against another ``(num_draws, num_labels)``."""
    loc_a, loc_b, var_a, var_b = first.mean(0), second.mean(0), _variance(first), _variance(second)
    spread_a = 0.5 * ((first - loc_a).square() / var_a - 1)
    spread_b = 0.5 * ((second - loc_b).square() / var_b - 1)
    sd = var_b.sqrt()
    return Shifts(
        labels,
        (loc_a - loc_b) / sd,
        (var_a / len(first) + var_b / len(second)).sqrt() / sd,
        0.5 * (var_a / var_b).log(),
        (spread_a.var(0) / len(first) + spread_b.var(0) / len(second)).sqrt(),
    )


def combine_shifts(chains: Shifts, importance: Shifts) -> Shifts:
    """Weighted mean of two estimates by their inverse variance.

    Where the two contradict each other by more than four standard errors, one of them is blind
    (chains that hardly mix, weights without draws in a tail), and both then err towards no shift;
    the one with the clearer shift is taken.

    Args:
        chains: shifts from a drift test.
        importance: shifts of the same coordinates from importance weights.
    """
    mean = _merge(chains.mean, chains.mean_se, importance.mean, importance.mean_se)
    log_sd = _merge(chains.log_sd, chains.log_sd_se, importance.log_sd, importance.log_sd_se)
    return Shifts(chains.labels, *mean, *log_sd)


def _merge(a: Tensor, a_se: Tensor, b: Tensor, b_se: Tensor) -> tuple[Tensor, Tensor]:
    b_se = (b_se.square() + _LEAST_ERROR**2).sqrt()
    precision = a_se**-2 + b_se**-2
    merged, merged_se = (a / a_se**2 + b / b_se**2) / precision, precision.rsqrt()
    clash = (a - b).abs() > _CLASH * (a_se.square() + b_se.square()).sqrt()
    a_clearer = a.abs() - 2 * a_se > b.abs() - 2 * b_se
    value = torch.where(clash, torch.where(a_clearer, a, b), merged)
    return value, torch.where(clash, torch.where(a_clearer, a_se, b_se), merged_se)


def _controlled(
    difference: Tensor, chains: Tensor, start: Tensor, guide: Tensor
) -> tuple[Tensor, Tensor]:
    """Difference and its error after regressing the chains' influence on their starts'."""
    num_chains, num_draws = len(chains), len(guide)
    centred = start - start.mean(0)
    scale = centred.square().mean(0)
    beta = (centred * (chains - chains.mean(0))).mean(0) / (scale + _tiny(scale))
    residual = chains - chains.mean(0) - beta * centred
    variance = residual.square().mean(0) / (num_chains - 2)
    variance = variance + (1 - beta).square() * _variance(guide) / num_draws
    return difference - beta * start.mean(0), variance.sqrt()


def _variance(x: Tensor) -> Tensor:
    variance = x.var(0)
    return variance + _tiny(variance)


def _tiny(x: Tensor) -> Tensor:
    """Keeps a constant coordinate (a simplex of one, say) from dividing by zero."""
    return x.new_tensor(torch.finfo(x.dtype).tiny)
