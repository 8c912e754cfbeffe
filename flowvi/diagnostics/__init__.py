"""Did it work, and which works best: verdict in words, comparison of objectives, ArviZ export."""

from flowvi.diagnostics.aggregate import (
    ActiveUnits,
    AggregatePosterior,
    active_units,
    aggregate_posterior,
)
from flowvi.diagnostics.check import Check, check
from flowvi.diagnostics.compare import Comparison, ComparisonRow, compare
from flowvi.diagnostics.drift import DriftTest, drift_test
from flowvi.diagnostics.export import to_arviz
from flowvi.diagnostics.gradient import Gradient, elbo_gradient
from flowvi.diagnostics.gradient_report import GradientReport, GradientRow, gradient_report
from flowvi.diagnostics.importance import (
    Bound,
    effective_sample_size,
    elbo,
    iw_elbo,
    pareto_k,
    pareto_k_threshold,
    resample,
    smoothed_log_weights,
)
from flowvi.diagnostics.modes import ModeCoverage, mode_coverage
from flowvi.diagnostics.shifts import Shifts
from flowvi.diagnostics.verdict import Finding, Limits

__all__ = [
    "ActiveUnits",
    "AggregatePosterior",
    "Bound",
    "Check",
    "Comparison",
    "ComparisonRow",
    "DriftTest",
    "Finding",
    "Gradient",
    "GradientReport",
    "GradientRow",
    "Limits",
    "ModeCoverage",
    "Shifts",
    "active_units",
    "aggregate_posterior",
    "check",
    "compare",
    "drift_test",
    "effective_sample_size",
    "elbo",
    "elbo_gradient",
    "gradient_report",
    "iw_elbo",
    "mode_coverage",
    "pareto_k",
    "pareto_k_threshold",
    "resample",
    "smoothed_log_weights",
    "to_arviz",
]
