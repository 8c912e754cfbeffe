"""Did the fit work? One call, one verdict in words."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowvi.diagnostics import verdict as words
from flowvi.diagnostics._random import seeded
from flowvi.diagnostics.drift import DriftTest, covariance_factor, drift_test
from flowvi.diagnostics.gradient import Gradient, elbo_gradient
from flowvi.diagnostics.importance import (
    Bound,
    effective_sample_size,
    elbo,
    iw_elbo,
    pareto_k_threshold,
    smoothed_log_weights,
)
from flowvi.diagnostics.modes import ModeCoverage, mode_coverage
from flowvi.diagnostics.shifts import (
    Shifts,
    combine_shifts,
    flatten_values,
    heavy_tails,
    importance_shifts,
    natural_labels,
    sample_shifts,
)
from flowvi.diagnostics.verdict import Finding, Limits
from flowvi.infer.draws import Draws, guide_draws
from flowvi.infer.modes import Mode
from flowvi.infer.start import warm_start
from flowvi.infer.target import Target
from flowvi.objectives.weights import log_mean_exp

__all__ = ["Check", "check"]

_PARTICLES = (10, 100)
_LEAST_CHAINS = 20


@dataclass(frozen=True)
class Check:
    """Result of :func:`check`; ``print`` it to read the verdict.

    Args:
        good: whether nothing was found to be off.
        findings: what is off, worst first.
        advice: what to do, in plain sentences.
        shifts: guide against posterior for every parameter, the best estimate; None if the
            guide has too few draws with a density.
        heavy: parameters with such heavy tails that ``shifts`` compares their central 98 % alone.
        guide_mean: means of the guide, one per label of ``shifts``.
        guide_sd: standard deviations of the guide.
        drift: the drift test; None as above.
        pareto_k: shape of the tail of the importance weights.
        pareto_k_threshold: up to which value the weights can be trusted.
        ess: effective sample size of the weights.
        elbo: bound of single draws.
        iw_elbo: number of particles -> importance-weighted bound; the last uses all draws, and
            its standard error is that of their log mean weight.
        modes: coverage of separated modes; None if none were looked for.
        gradient: gradient of the ELBO; None if the guide has no parameters or does not vectorise.
        draws: the scored draws that all of this is from.
        seconds: CPU seconds it took.
    """

    good: bool
    findings: tuple[Finding, ...]
    advice: tuple[str, ...]
    shifts: Shifts | None
    heavy: tuple[str, ...]
    guide_mean: Tensor
    guide_sd: Tensor
    drift: DriftTest | None
    pareto_k: float
    pareto_k_threshold: float
    ess: float
    elbo: Bound
    iw_elbo: dict[int, Bound]
    modes: ModeCoverage | None
    gradient: Gradient | None
    draws: Draws = field(repr=False)
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """The verdict in words."""
        if self.good:
            shift = float(self.shifts.mean.abs().max())
            spread = math.expm1(float(self.shifts.log_sd.abs().max()))
            return (
                "The fit looks good: nothing is off beyond what this check can see. Largest "
                f"error of a mean {shift:.2f} posterior sd, of an sd {100 * spread:.0f} %."
                + self._about_tails()
            )
        named = [f.message for f in self.findings[:6]]
        rest = len(self.findings) - len(named)
        lines = ["The fit is not good.", *[f"- {message}" for message in named]]
        lines += [f"- and {rest} more."] if rest else []
        return "\n".join(lines) + self._about_tails()

    def _about_tails(self) -> str:
        """What the verdict does not cover."""
        if not self.heavy:
            return ""
        named = ", ".join(self.heavy[:4]) + (", ..." if len(self.heavy) > 4 else "")
        return (
            f"\nTails of {len(self.heavy)} parameters ({named}) are too heavy for an sd to be "
            f"estimated from {len(self.draws)} draws: their central 98 % was compared, and how "
            "far they reach beyond it is not known."
        )

    def table(self) -> str:
        """Every parameter with the guide's mean and sd and their errors, as text."""
        if self.shifts is None:
            return ""
        s = self.shifts
        width = max(len("parameter"), *map(len, s.labels))
        rows = [
            f"{'parameter':{width}s} {'mean':>10s} {'sd':>10s} {'error of mean / sd':>20s} "
            f"{'sd / true sd':>16s}"
        ]
        for j, label in enumerate(s.labels):
            ratio = math.exp(float(s.log_sd[j]))
            rows.append(
                f"{label:{width}s} {float(self.guide_mean[j]):10.4g} "
                f"{float(self.guide_sd[j]):10.4g} "
                f"{float(s.mean[j]):+10.3f} +- {float(s.mean_se[j]):5.3f} "
                f"{ratio:7.3f} +- {ratio * float(s.log_sd_se[j]):5.3f}"
            )
        return "\n".join(rows)

    def __str__(self) -> str:
        k = f"{self.pareto_k:.2f} (trusted up to {self.pareto_k_threshold:.2f})"
        lines = [self.verdict, *self.advice, "", f"ELBO {self.elbo} nats"]
        lines += [f"IW-ELBO, {n} draws: {bound}" for n, bound in self.iw_elbo.items()]
        lines.append(f"Pareto k {k}, effective sample size {self.ess:.0f} of {len(self.draws)}")
        if self.gradient is not None:
            lines.append(
                f"gradient norm {self.gradient.norm:.3g} (noise alone {self.gradient.noise:.3g})"
            )
        if self.modes is not None:
            lines.append(f"separated modes found: {len(self.modes.modes)}")
        return "\n".join([*lines, "", self.table()]).rstrip()


def check(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_draws: int | None = None,
    num_chains: int | None = None,
    modes: Sequence[Mode] | None = None,
    search_modes: bool = True,
    other: Callable | None = None,
    limits: Limits | None = None,
    seed: int | None = None,
    target: Target | None = None,
    **kwargs: Any,
) -> Check:
    """Judge a trained guide against its model, without a reference.

    Two estimates of the error of every mean and standard deviation are combined: the drift of
    HMC chains that start at the guide's own draws (:func:`drift_test`), and the guide's
    importance weights, where Pareto k is at most 0.7 or the weights are nearly equal. With them
    go the gap between the ELBO and the evidence, the draws at which the model has no density, and
    the separated modes of the posterior against the guide's shares (chains and weights of a guide
    that misses a mode do not see it). Not good is what exceeds ``limits`` and is no noise, given
    how many parameters are looked at (Benjamini and Hochberg, 1995). A parameter whose draws have
    no fourth moment, so that rare draws decide its standard deviation, is compared in its central
    98 % alone, and the verdict says so.

    Costs a few hundred evaluations of the model on batches of some hundred draws. What it cannot
    see: a mode that the search misses too.

    Args:
        model: a Pyro model without a subsampled plate.
        guide: a guide for it.
        *args: arguments of model and guide.
        num_draws: draws of the guide; 4000, or 400 if the model does not vectorise.
        num_chains: HMC chains; 200, or 40 if the model does not vectorise.
        modes: separated modes, if they are known from a warm start.
        search_modes: look for modes if none are given.
        other: a second fit of the same model, from another start, that should agree.
        limits: what counts as good; by default a mean within 0.1 posterior sd, an sd within 10 %
            and a KL divergence of at most 0.5 nats.
        seed: seed of the check; the global random state is then left as it was.
        target: the model's :class:`Target`, if there is one already.
        **kwargs: keyword arguments of model and guide.

    Raises:
        ValueError: if the model is one that :class:`Target` refuses, the guide lacks a latent
            site, or no draw of the guide has a finite density.
        NotImplementedError: if a latent site is discrete.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(3.0, 2.0))
        >>> def guide():
        ...     pyro.sample("x", dist.Normal(3.0, 1.0))
        >>> result = check(model, guide, seed=0)
        >>> result.good, result.findings[0].subject, result.findings[0].cause
        (False, 'x', 'narrow')
    """
    began = time.process_time()
    limits = Limits() if limits is None else limits
    target = Target(model, args, kwargs) if target is None else target
    num_draws = num_draws or (4000 if target.vectorized else 400)
    num_chains = num_chains or (200 if target.vectorized else 40)
    with seeded(seed):
        draws = guide_draws(guide, target, num_draws, args, kwargs)
        if modes is None and search_modes:
            modes = _search(target)
        evidence = _gather(draws, target, num_chains, modes or ())
        if other is not None:
            second = flatten_values(
                guide_draws(other, target, num_draws, args, kwargs).values, target
            )
            first = flatten_values(draws.values, target)
            ends = heavy_tails(second)[1:]
            first, second = first.clamp(*ends), second.clamp(*ends)
            evidence.agreement = sample_shifts(natural_labels(target), first, second)
        evidence.gradient = elbo_gradient(
            model, guide, args, kwargs, max_plate_nesting=target.max_plate_nesting
        )
    return _report(evidence, draws, target, limits, began)


@dataclass
class _Evidence:
    """What was measured, before it is judged."""

    kept: Draws
    pareto_k: float
    ess: float
    bounds: dict[int, Bound]
    drift: DriftTest | None = None
    shifts: Shifts | None = None
    axes: list[str] = field(default_factory=list)
    coverage: ModeCoverage | None = None
    agreement: Shifts | None = None
    gradient: Gradient | None = None


def _gather(draws: Draws, target: Target, num_chains: int, modes: Sequence[Mode]) -> _Evidence:
    kept = draws[torch.isfinite(draws.log_weights) & torch.isfinite(draws.z).all(-1)]
    if len(kept) < 2:
        raise ValueError(
            "`guide` must have draws with a finite density under the model; got "
            f"{len(kept)} of {len(draws)}. Last error inside the model: {target.last_error}."
        )
    smoothed, k = smoothed_log_weights(kept.log_weights)
    ess = effective_sample_size(kept.log_weights)
    evidence = _Evidence(kept, k, ess, _bounds(kept.log_weights, ess))
    if modes:
        evidence.coverage = mode_coverage(kept, target, modes)
    if len(kept) >= _LEAST_CHAINS:
        drift = drift_test(kept, target, num_chains=min(num_chains, len(kept)))
        evidence.drift = drift
        evidence.axes = words.axis_names(covariance_factor(kept.z), target.labels)
        evidence.shifts = drift.natural
        if words.weights_usable(k, evidence.ess / len(kept)):
            values = flatten_values(kept.values, target).clamp(*drift.ends)
            weighted = importance_shifts(drift.natural.labels, values, smoothed)
            evidence.shifts = combine_shifts(drift.natural, weighted)
    return evidence


def _bounds(log_weights: Tensor, ess: float) -> dict[int, Bound]:
    """ELBO (1), IW-ELBOs, and the log mean weight of all draws with its delta-method error."""
    num_draws = len(log_weights)
    bounds = {1: elbo(log_weights)}
    for num_particles in _PARTICLES:
        if num_particles <= num_draws // 10:
            bounds[num_particles] = iw_elbo(log_weights, num_particles)
    value = float(log_mean_exp(log_weights.double()))
    bounds[num_draws] = Bound(value, math.sqrt(max(1 / ess - 1 / num_draws, 0.0)))
    return bounds


def _search(target: Target) -> list[Mode]:
    """Separated modes; none if the search cannot start."""
    try:
        return warm_start(target, num_matches=0, num_draws=32).modes
    except RuntimeError:
        return []


def _judge(evidence: _Evidence, dead: float, limits: Limits) -> list[Finding]:
    evidence_bound = evidence.bounds[max(evidence.bounds)]
    usable = words.weights_usable(evidence.pareto_k, evidence.ess / len(evidence.kept))
    findings = words.judge_density(dead, limits)
    findings += words.judge_bound(evidence.bounds[1], evidence_bound, len(evidence.kept), limits)
    findings += words.judge_modes(evidence.coverage, evidence_bound, usable, limits)
    if evidence.shifts is not None:
        named = words.judge_shifts(evidence.shifts, limits)
        found = {finding.subject for finding in named}
        axes = words.judge_drift(evidence.drift, evidence.axes, limits)
        findings += named + [f for f in axes if not set(f.subject.split(", ")) <= found]
    if evidence.agreement is not None:
        findings += words.judge_agreement(evidence.agreement, limits)
    return sorted(findings, key=lambda finding: -finding.size)


def _report(
    evidence: _Evidence, draws: Draws, target: Target, limits: Limits, began: float
) -> Check:
    kept = evidence.kept
    findings = _judge(evidence, 1 - len(kept) / len(draws), limits)
    share = evidence.ess / len(kept)
    values = flatten_values(kept.values, target)
    bounds = dict(evidence.bounds)
    return Check(
        good=not findings,
        findings=tuple(findings),
        advice=tuple(words.advice(findings, evidence.pareto_k, share, evidence.gradient)),
        shifts=evidence.shifts,
        heavy=() if evidence.drift is None else tuple(evidence.drift.heavy),
        guide_mean=values.mean(0),
        guide_sd=values.std(0),
        drift=evidence.drift,
        pareto_k=evidence.pareto_k,
        pareto_k_threshold=pareto_k_threshold(len(kept)),
        ess=evidence.ess,
        elbo=bounds.pop(1),
        iw_elbo=bounds,
        modes=evidence.coverage,
        gradient=evidence.gradient,
        draws=draws,
        seconds=time.process_time() - began,
    )
