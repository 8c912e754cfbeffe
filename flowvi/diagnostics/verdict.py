"""From numbers to words: what is off, which way, by how much, and what to do."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowvi.diagnostics.drift import DriftTest
from flowvi.diagnostics.gradient import Gradient
from flowvi.diagnostics.importance import Bound
from flowvi.diagnostics.modes import ModeCoverage
from flowvi.diagnostics.shifts import Shifts

__all__ = [
    "Finding",
    "Limits",
    "advice",
    "axis_names",
    "judge_agreement",
    "judge_bound",
    "judge_density",
    "judge_drift",
    "judge_modes",
    "judge_shifts",
    "weights_usable",
]

_LARGEST_K = 0.7  # beyond it importance-weighted moments are not to be trusted
_EQUAL_WEIGHTS = 0.9  # share of effective draws from which on the weights hardly matter


@dataclass(frozen=True)
class Limits:
    """What counts as good.

    Args:
        mean: largest error of a mean, in posterior standard deviations.
        sd: largest relative error of a standard deviation.
        kl: largest gap between the evidence and the ELBO, in nats.
        direction: largest error along a combination of parameters, in standard deviations.
        direction_z: least z-score of such an error.
        mode: largest error of a mode's share, in standard deviations between the modes.
        unreached: largest log-ratio of the mass of all modes to the mass that the guide sees.
        dead: largest share of draws without a density under the model.
        false_alarms: expected share of parameters that are named by noise alone, among those
            named; for a guide without error, the chance that any is.
    """

    mean: float = 0.1
    sd: float = 0.1
    kl: float = 0.5
    direction: float = 0.25
    direction_z: float = 5.0
    mode: float = 0.25
    unreached: float = 1.0
    dead: float = 0.005
    false_alarms: float = 0.05


@dataclass(frozen=True)
class Finding:
    """One thing that is off.

    Args:
        subject: the parameter, or what else the finding is about.
        message: one sentence for a reader.
        size: how far beyond its limit, 1 at the limit.
        cause: the kind of error; picks the advice.
    """

    subject: str
    message: str
    size: float
    cause: str


def judge_shifts(shifts: Shifts, limits: Limits) -> list[Finding]:
    """Parameters whose mean or standard deviation is off, worst first.

    An error is named if it is beyond its limit and no noise, given how many are looked at.
    """
    findings = []
    clear = _discoveries(torch.cat([shifts.mean_z, shifts.log_sd_z]), limits.false_alarms)
    clear_mean, clear_sd = clear.chunk(2)
    for j, label in enumerate(shifts.labels):
        parts, sizes, causes = [], [], []
        mean, se = float(shifts.mean[j]), float(shifts.mean_se[j])
        if abs(mean) > limits.mean and clear_mean[j]:
            side = "high" if mean > 0 else "low"
            parts.append(f"its mean is {abs(mean):.2f} posterior sd too {side} (+- {se:.2f})")
            sizes.append(abs(mean) / limits.mean)
            causes.append("mean")
        log_sd, se = float(shifts.log_sd[j]), float(shifts.log_sd_se[j])
        if abs(log_sd) > math.log1p(limits.sd) and clear_sd[j]:
            parts.append(f"its sd is {_percent(log_sd)} (+- {100 * se:.0f} %)")
            sizes.append(abs(log_sd) / math.log1p(limits.sd))
            causes.append("narrow" if log_sd < 0 else "wide")
        if parts:
            worst = max(range(len(sizes)), key=sizes.__getitem__)
            message = f"{label}: {' and '.join(parts)}."
            findings.append(Finding(label, message, sizes[worst], causes[worst]))
    return sorted(findings, key=lambda f: -f.size)


def _discoveries(z: Tensor, rate: float) -> Tensor:
    """Which of many z-scores are no noise, at this rate of false discoveries.

    References:
        Benjamini and Hochberg (1995), Controlling the false discovery rate, section 3.1.
    """
    p_values = torch.special.erfc(z.double().abs().nan_to_num(nan=math.inf) / math.sqrt(2))
    ordered = p_values.sort().values
    allowed = rate * torch.arange(1, len(z) + 1, device=z.device) / len(z)
    passed = ordered[ordered <= allowed]
    return p_values <= passed[-1] if len(passed) else torch.zeros_like(p_values, dtype=torch.bool)


def judge_drift(drift: DriftTest, names: list[str], limits: Limits) -> list[Finding]:
    """Clear drift along the whitened axes, which single parameters may not show.

    Args:
        drift: the drift test.
        names: for every whitened axis, the parameters that it is made of.
        limits: what counts as good.
    """
    shifts = drift.whitened
    findings = []
    for j, name in enumerate(names):
        for value, se, cause in (
            (float(shifts.mean[j]), float(shifts.mean_se[j]), "mean"),
            (float(shifts.log_sd[j]), float(shifts.log_sd_se[j]), "spread"),
        ):
            if abs(value) > limits.direction and abs(value) > limits.direction_z * se:
                what = (
                    f"is off by {abs(value):.2f} sd"
                    if cause == "mean"
                    else f"has an sd {_percent(value)}"
                )
                prefix = "A combination of " if ", " in name else "On the unconstrained scale "
                message = f"{prefix}{name} {what} (+- {se:.2f})."
                if cause == "spread":
                    cause = "narrow" if value < 0 else "wide"
                findings.append(Finding(name, message, abs(value) / limits.direction, cause))
    return sorted(findings, key=lambda f: -f.size)


def judge_bound(elbo: Bound, iw: Bound, num_draws: int, limits: Limits) -> list[Finding]:
    """Gap between the ELBO and the evidence that the same draws give."""
    gap = iw.value - elbo.value
    if not math.isfinite(gap) or gap - 2 * elbo.se <= limits.kl:
        return []
    message = (
        f"The ELBO is {gap:.2f} nats below the bound of {num_draws} draws, so the guide is at "
        f"least that far (KL) from the posterior; {limits.kl:g} is still fine."
    )
    return [Finding("ELBO", message, gap / limits.kl, "gap")]


def judge_density(dead: float, limits: Limits) -> list[Finding]:
    """Draws where the model has no density."""
    if dead <= limits.dead:
        return []
    message = (
        f"The model has no finite density at {100 * dead:.1f} % of the guide's draws: the guide "
        "reaches where the model cannot be evaluated."
    )
    return [Finding("density", message, dead / limits.dead, "density")]


def judge_modes(
    coverage: ModeCoverage | None, iw: Bound, usable: bool, limits: Limits
) -> list[Finding]:
    """Separated modes that the guide misses or gives a wrong share.

    Args:
        coverage: modes found, if they were looked for.
        iw: log mean weight of the guide's draws.
        usable: whether the weights can be trusted; else the mass that the guide sees is unknown.
        limits: what counts as good.
    """
    if coverage is None:
        return []
    findings = []
    missing = coverage.log_evidence - iw.value
    if missing > limits.unreached and usable:
        message = (
            f"The modes found by a search hold exp({missing:.1f}) times the mass that the guide's "
            "draws see: the guide sits in a minor mode."
        )
        findings.append(Finding("modes", message, missing / limits.unreached, "missed mode"))
    if len(coverage.modes) < 2:
        return findings
    for k, shift in enumerate(coverage.shift.tolist()):
        weight, share = float(coverage.weights[k]), float(coverage.shares[k])
        if abs(shift) <= limits.mode:
            continue
        if share < 0.1 * weight:
            what = f"is missed: it has about {100 * weight:.0f} % of the posterior"
            cause = "missed mode"
        else:
            what = f"has about {100 * weight:.0f} % of the posterior"
            cause = "mode share"
        message = f"Mode {k + 1} of {len(coverage.modes)} {what} and {100 * share:.0f} % of the "
        findings.append(
            Finding(f"mode {k + 1}", message + "guide.", abs(shift) / limits.mode, cause)
        )
    # Where a mode is missed the shares of the others are too large by that alone.
    missed = [f for f in findings if f.cause == "missed mode"]
    return sorted(missed or findings, key=lambda f: -f.size)


_ADVICE = {
    "mean": "Train longer or from a warm start; if that does not help, use a richer guide.",
    "narrow": "The guide is too narrow, as mean-field guides are: do not trust its intervals, "
    "and use a flow or a full-rank guide.",
    "wide": "The guide is too wide: train longer, or use a guide with more layers.",
    "gap": "Marginals may look fine while dependence is wrong: use a flow or a full-rank guide, "
    "and train longer.",
    "density": "Look at the model's behaviour for extreme values, or tighten its priors.",
    "missed mode": "Use a mixture guide with one component per mode, for example AutoMixtureFlow.",
    "mode share": "Train the weights of a mixture guide longer, or resample the draws by their "
    "importance weights.",
    "disagreement": "At least one of the two fits is off: train both longer.",
}


def judge_agreement(agreement: Shifts, limits: Limits) -> list[Finding]:
    """Whether a second fit has the same means and standard deviations."""
    findings = []
    for finding in judge_shifts(agreement, limits):
        message = f"Two fits disagree about {finding.subject} (against the second: " + (
            finding.message.split(": ", 1)[1].rstrip(".") + ")."
        )
        findings.append(Finding(finding.subject, message, finding.size, "disagreement"))
    return findings


def weights_usable(k: float, ess_share: float) -> bool:
    """Whether importance-weighted moments can be trusted.

    Weights that are all nearly equal can have any tail shape, that of rounding errors included,
    without a moment depending on it.

    Args:
        k: Pareto k of the weights.
        ess_share: effective sample size over the number of draws.
    """
    return k <= _LARGEST_K or ess_share >= _EQUAL_WEIGHTS


def advice(
    findings: list[Finding], k: float, ess_share: float, gradient: Gradient | None
) -> list[str]:
    """Plain advice, each sentence once, worst cause first.

    Args:
        findings: what is off, worst first.
        k: Pareto k of the weights.
        ess_share: effective sample size over the number of draws.
        gradient: gradient of the ELBO, if known.
    """
    lines = list(dict.fromkeys(_ADVICE[finding.cause] for finding in findings))
    if findings and gradient is not None and not gradient.is_noise:
        ratio = gradient.norm / max(gradient.noise, 1e-300)
        lines.insert(0, f"The gradient is still {ratio:.1f} times its noise: train longer.")
    missed = any(finding.cause == "missed mode" for finding in findings)
    usable = weights_usable(k, ess_share)
    if findings and usable and not missed:
        lines.append("Meanwhile the importance-resampled draws are nearer the posterior.")
    if not usable:
        lines.append(
            f"Do not use importance weights of this guide: with Pareto k {k:.2f} a few draws "
            "would carry them."
        )
    elif k > _LARGEST_K:
        lines.append(
            f"Pareto k {k:.2f} comes from a few draws in the tails; with an effective sample size "
            f"of {100 * ess_share:.0f} % of the draws no mean or sd depends on them."
        )
    return lines


def axis_names(scale_tril: torch.Tensor, labels: list[str], most: int = 3) -> list[str]:
    """For every whitened axis the labels that it is mainly made of.

    Axis i is row i of the inverse Cholesky factor applied to the centred coordinates; entries are
    compared after scaling every coordinate to unit variance.
    """
    scale = scale_tril.square().sum(-1).sqrt()
    eye = torch.eye(len(scale), dtype=scale.dtype, device=scale.device)
    rows = torch.linalg.solve_triangular(scale_tril, eye, upper=False) * scale
    names = []
    for row in rows.abs():
        order = row.argsort(descending=True)[:most].tolist()
        names.append(", ".join(labels[i] for i in order if row[i] > 0.3 * row.max()))
    return names


def _percent(log_ratio: float) -> str:
    ratio = math.exp(log_ratio)
    if ratio > 2:
        return f"{ratio:.1f} times too large"
    return f"{100 * abs(ratio - 1):.0f} % too {'large' if ratio > 1 else 'small'}"
