"""Pictures of one or several fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from flowvi.plots._figure import COLORS, GREY, array_of, axes_for, few_ticks, open_frame

if TYPE_CHECKING:
    from flowvi.diagnostics.shifts import Shifts
    from flowvi.plots._figure import Axes

__all__ = ["drift_scores", "elbo_trace", "marginals", "pairs", "pareto_k_bars", "shift_errors"]


def marginals(
    draws: Mapping[str, Tensor],
    ax: Axes | None = None,
    *,
    reference: Tensor | None = None,
    label: str = "",
) -> Axes:
    """Densities of one parameter under several guides, as curves over a common range.

    The range covers the central 99.8 % of all draws, so a heavy tail does not flatten the rest.

    Args:
        draws: name of a guide -> draws of the parameter ``(num_draws,)``.
        ax: Axes to draw on; new if left out.
        reference: trusted draws, shown as a grey area.
        label: name of the parameter.

    Raises:
        ValueError: if there is nothing to draw, or draws are not a vector of finite values.
    """
    named = {name: _vector(name, values) for name, values in draws.items()}
    if not named:
        raise ValueError("`draws` must hold at least one guide; got none.")
    truth = None if reference is None else _vector("reference", reference)
    ax = axes_for(ax)
    everything = list(named.values()) + ([] if truth is None else [truth])
    ends = [np.quantile(values, (0.001, 0.999)) for values in everything]
    low, high = min(e[0] for e in ends), max(e[1] for e in ends)
    pad = 0.05 * (high - low) or 0.5
    grid = np.linspace(low - pad, high + pad, 256)
    if truth is not None:
        ax.fill_between(grid, _density(truth, grid), color=GREY, alpha=0.35, label="reference")
    for index, (name, values) in enumerate(named.items()):
        color = COLORS[index % len(COLORS)]
        style = ("-", "--", ":")[index // len(COLORS) % 3]
        ax.plot(grid, _density(values, grid), style, color=color, lw=1.6, label=name)
    ax.set(xlabel=label, xlim=(grid[0], grid[-1]), yticks=[], ylabel="density")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, fontsize="small")
    open_frame(ax, left=False)
    return ax


def pairs(
    draws: Mapping[str, Tensor],
    ax: Axes | None = None,
    *,
    labels: Sequence[str],
    max_points: int = 600,
) -> Axes:
    """Small corner plot: marginals on the diagonal, points below it, inside one Axes.

    Args:
        draws: name of a guide -> draws ``(num_draws, num_parameters)``, at most 6 parameters.
        ax: Axes whose area is divided; new if left out.
        labels: names of the parameters.
        max_points: points shown per guide and panel.

    Raises:
        ValueError: if the numbers of parameters and labels differ, or there are more than 6.
    """
    size = len(labels)
    arrays = {name: array_of(values) for name, values in draws.items()}
    for name, array in arrays.items():
        if array.ndim != 2 or array.shape[1] != size or not 1 <= size <= 6:
            raise ValueError(
                f"`draws[{name!r}]` must have shape (num_draws, {size}), one column per label "
                f"and 1 to 6 labels; got {array.shape}."
            )
    ax = axes_for(ax, side=1.7 * size + 1)
    ax.axis("off")
    everything = np.concatenate(list(arrays.values()))
    limits = [np.quantile(column, (0.002, 0.998)) for column in everything.T]
    limits = [(a - 0.1 * (b - a or 1), b + 0.1 * (b - a or 1)) for a, b in limits]
    gap, cell = 0.02, (1 - 0.02 * (size - 1)) / size
    for row in range(size):
        for column in range(row + 1):
            box = (column * (cell + gap), (size - 1 - row) * (cell + gap), cell, cell)
            panel = ax.inset_axes(box)
            _fill_panel(panel, arrays, row, column, limits, max_points)
            _label_panel(panel, row, column, size, labels)
    handles = ax.inset_axes((0, 0, 1, 1), frameon=False)
    handles.axis("off")
    for index, name in enumerate(arrays):
        handles.plot([], [], "o", color=COLORS[index % len(COLORS)], label=name)
    if size > 1 or len(arrays) > 1:
        handles.legend(loc="upper right", frameon=False)
    return ax


def elbo_trace(losses: Tensor, ax: Axes | None = None, *, window: int = 50) -> Axes:
    """Moving average of the ELBO with a band of two standard errors.

    The vertical axis leaves out the worst of the first steps, which would flatten the rest.

    Args:
        losses: loss of every step ``(num_steps,)``, in nats; the ELBO is minus the loss.
        ax: Axes to draw on; new if left out.
        window: steps per average.

    Raises:
        ValueError: if there are fewer than two finite losses, or ``window`` is below 2.
    """
    if window < 2:
        raise ValueError(f"`window` must be at least 2; got {window}.")
    values = -array_of(losses)
    steps = np.flatnonzero(np.isfinite(values))
    if len(steps) < 2:
        raise ValueError(f"`losses` must hold at least 2 finite values; got {len(steps)}.")
    values = values[steps]
    window = min(window, len(values))
    mean = np.convolve(values, np.ones(window) / window, "valid")
    square = np.convolve((values - values.mean()) ** 2, np.ones(window) / window, "valid")
    error = np.sqrt(np.maximum(square - (mean - values.mean()) ** 2, 0) / (window - 1))
    steps = steps[window - 1 :]
    ax = axes_for(ax)
    ax.fill_between(steps, mean - 2 * error, mean + 2 * error, color=COLORS[0], alpha=0.25)
    ax.plot(steps, mean, color=COLORS[0], lw=1.5)
    later = slice(len(mean) // 10, None)
    low, high = (mean - 2 * error)[later].min(), (mean + 2 * error)[later].max()
    pad = 0.05 * (high - low) or 0.5
    ax.set(
        xlabel="step", ylabel=f"ELBO, mean of {window} steps (nats)", ylim=(low - pad, high + pad)
    )
    open_frame(ax)
    return ax


def shift_errors(shifts: Shifts, ax: Axes | None = None, *, limit: float = 0.1) -> Axes:
    """Errors of every mean and standard deviation with bars of two standard errors.

    Args:
        shifts: guide against posterior, for example ``Check.shifts``.
        ax: Axes to draw on; new if left out.
        limit: half-width of the band that counts as good.
    """
    ax = axes_for(ax, side=0.28 * len(shifts.labels) + 1.6)
    mean, log_sd = array_of(shifts.mean), array_of(shifts.log_sd)
    rows = np.arange(len(mean))
    ax.axvspan(-limit, limit, color=GREY, alpha=0.2, lw=0)
    options = {"fmt": "o", "ms": 4, "lw": 1.2}
    ax.errorbar(
        mean, rows - 0.14, xerr=2 * array_of(shifts.mean_se), color=COLORS[0],
        label="mean, in posterior sd", **options,
    )  # fmt: skip
    ax.errorbar(
        np.expm1(log_sd), rows + 0.14, xerr=2 * np.exp(log_sd) * array_of(shifts.log_sd_se),
        color=COLORS[1], label="sd, relative", **options,
    )  # fmt: skip
    _name_rows(ax, shifts.labels, "error of the guide")
    return ax


def drift_scores(shifts: Shifts, ax: Axes | None = None, *, limit: float = 3.0) -> Axes:
    """Drift z-scores of every mean and standard deviation.

    Args:
        shifts: result of a drift test, for example ``Check.drift.natural``.
        ax: Axes to draw on; new if left out.
        limit: z-score up to which drift is put down to Monte Carlo error.
    """
    ax = axes_for(ax, side=0.28 * len(shifts.labels) + 1.6)
    rows = np.arange(len(shifts.labels))
    ax.axvspan(-limit, limit, color=GREY, alpha=0.2, lw=0)
    ax.plot(array_of(shifts.mean_z), rows - 0.14, "o", ms=5, color=COLORS[0], label="mean")
    ax.plot(array_of(shifts.log_sd_z), rows + 0.14, "s", ms=5, color=COLORS[1], label="sd")
    _name_rows(ax, shifts.labels, "drift z-score (guide minus posterior)")
    return ax


def pareto_k_bars(
    values: Mapping[str, float], ax: Axes | None = None, *, threshold: float = 0.7
) -> Axes:
    """Pareto k of several guides, coloured by whether their weights can be trusted.

    Args:
        values: name of a guide -> Pareto k; infinite ones are drawn to the end of the axis.
        ax: Axes to draw on; new if left out.
        threshold: largest trusted k, drawn as a line.

    Raises:
        ValueError: if there is nothing to draw.
    """
    if not values:
        raise ValueError("`values` must hold at least one Pareto k; got none.")
    ax = axes_for(ax, side=0.35 * len(values) + 1.4)
    ks = np.array([float(k) for k in values.values()])
    finite = ks[np.isfinite(ks)]
    top = max(1.15, 1.1 * finite.max(initial=0))
    # A k below zero means no tail at all; a sliver keeps the bar visible.
    lengths = np.clip(np.nan_to_num(ks, nan=top, posinf=top, neginf=0.0), 0.01, top)
    rows = np.arange(len(ks))
    colors = [COLORS[2] if k <= threshold else COLORS[1] for k in ks]
    ax.barh(rows, lengths, color=colors, height=0.6)
    for row, k in enumerate(ks):
        ax.text(1.11 * top, row, f"{k:.2f}", va="center", ha="right", fontsize="small")
    ax.axvline(threshold, color="black", lw=1, ls="--")
    ax.set(xlim=(0, 1.13 * top), xlabel=f"Pareto k (trusted up to {threshold:.2f})")
    ax.set_yticks(rows, list(values))
    ax.invert_yaxis()
    open_frame(ax)
    return ax


def _vector(name: str, values: Tensor) -> np.ndarray:
    array = array_of(values)
    if array.ndim != 1 or len(array) < 2 or not np.isfinite(array).all():
        raise ValueError(
            f"`draws[{name!r}]` must be a vector of at least 2 finite values; got shape "
            f"{array.shape} with {int((~np.isfinite(array)).sum())} non-finite values."
        )
    return array


def _density(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Gaussian kernel density with Silverman's robust bandwidth, from at most 4000 values."""
    values = values[:: max(1, len(values) // 4000)]
    quarter = np.quantile(values, (0.25, 0.75))
    spread = min(values.std(), (quarter[1] - quarter[0]) / 1.34) or values.std()
    width = 0.9 * spread * len(values) ** -0.2 or (grid[1] - grid[0])
    kernel = np.exp(-0.5 * ((grid[:, None] - values) / width) ** 2)
    return kernel.mean(-1) / (width * math.sqrt(2 * math.pi))


def _fill_panel(
    panel: Axes,
    arrays: Mapping[str, np.ndarray],
    row: int,
    column: int,
    limits: Sequence[tuple[float, float]],
    max_points: int,
) -> None:
    for index, array in enumerate(arrays.values()):
        color = COLORS[index % len(COLORS)]
        if row == column:
            grid = np.linspace(*limits[row], 128)
            panel.plot(grid, _density(array[:, row], grid), color=color, lw=1.4)
        else:
            shown = array[:max_points]
            panel.plot(
                shown[:, column], shown[:, row], ".", ms=2, alpha=0.5, color=color, rasterized=True
            )
    panel.set_xlim(limits[column])
    if row == column:
        panel.set_ylim(bottom=0)
    else:
        panel.set_ylim(limits[row])


def _label_panel(panel: Axes, row: int, column: int, size: int, labels: Sequence[str]) -> None:
    panel.tick_params(labelsize="x-small")
    few_ticks(panel)
    if row == size - 1:
        panel.set_xlabel(labels[column], fontsize="small")
    else:
        panel.set_xticklabels([])
    if column == 0 and row > 0:
        panel.set_ylabel(labels[row], fontsize="small")
    else:
        panel.set_yticklabels([])
    if row == column:
        panel.set_yticks([])
        open_frame(panel, left=False)


def _name_rows(ax: Axes, labels: Sequence[str], xlabel: str) -> None:
    ax.axvline(0, color="black", lw=0.8)
    ax.set_yticks(np.arange(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.set_xlabel(xlabel)
    ax.grid(axis="y", color=GREY, alpha=0.25, lw=0.5)
    # Above the rows, where no point can be.
    ax.legend(
        frameon=False, fontsize="small", ncols=2, loc="lower left", bbox_to_anchor=(0, 1, 1, 0)
    )
    open_frame(ax)
