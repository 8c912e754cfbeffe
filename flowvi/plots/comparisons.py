"""Pictures of objectives and gradient estimators side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flowvi.plots._figure import COLORS, GREY, axes_for, few_ticks, open_frame

if TYPE_CHECKING:
    from flowvi.diagnostics.compare import Comparison, ComparisonRow
    from flowvi.diagnostics.gradient_report import GradientReport
    from flowvi.plots._figure import Axes

__all__ = ["comparison", "gradients"]

_GOOD, _BAD = COLORS[2], COLORS[1]
_FLOOR = -1e4  # nats; what is worse is drawn there, so that the rest can be seen


def comparison(result: Comparison, ax: Axes | None = None) -> Axes:
    """All pairs of a comparison, one per line: bounds, Pareto k, signal-to-noise, time.

    Bounds are drawn against log p(x) where it is known, else against the highest lower bound:
    circles from the ELBO (open) to the bound of most particles (filled), and triangles where an
    objective's own value is an upper bound. Refused pairs keep their line; bounds more than
    10,000 nats low are drawn at 10,000.

    Args:
        result: what :func:`flowvi.diagnostics.compare` gave.
        ax: Axes whose area is divided; new if left out.

    Raises:
        ValueError: if there is no pair.
    """
    if not result.rows:
        raise ValueError("`result` must hold at least one row; got none.")
    lines = _lines(result.rows)
    height = len(lines)
    ax = axes_for(ax, size=(9.5, 0.21 * height + 1.2))
    ax.axis("off")
    panels = _panels(ax, (0.58, 0.12, 0.12, 0.12), 0.02, left=0.0)
    for panel in panels:
        _prepare(panel, lines)
    _draw_bounds(panels[0], lines, result)
    _draw_dots(
        panels[1],
        lines,
        [min(max(r.pareto_k, 0.0), 1.5) if r else math.nan for _, r in lines],
        "Pareto k",
    )
    panels[1].axvline(0.7, color="black", lw=0.8, ls="--")
    panels[1].set_xlim(-0.1, 1.6)
    for panel, name, title in (
        (panels[2], "signal_to_noise", "SNR, start"),
        (panels[3], "milliseconds", "ms per step"),
    ):
        _draw_dots(panel, lines, [getattr(r, name) if r else math.nan for _, r in lines], title)
        _log_if_wide(panel)
    return ax


def gradients(report: GradientReport, ax: Axes | None = None) -> Axes:
    """Signal-to-noise of gradient estimators against their number of particles.

    One line per class of objective on logarithmic axes. Open markers cannot be told from zero
    with the number of gradients of the report.

    Args:
        report: what :func:`flowvi.diagnostics.gradient_report` gave.
        ax: Axes to draw on; new if left out.

    Raises:
        ValueError: if no estimator has a finite signal-to-noise.
    """
    series: dict[str, list[tuple[int, float, bool]]] = {}
    for row in report.rows:
        if math.isfinite(row.signal_to_noise):
            sure = not row.signal_to_noise < row.floor
            point = (row.num_particles, row.signal_to_noise if sure else row.floor, sure)
            series.setdefault(row.kind, []).append(point)
    if not series:
        raise ValueError("`report` must hold a finite signal-to-noise; got none.")
    ax = axes_for(ax)
    for index, (kind, points) in enumerate(series.items()):
        points.sort()
        color, marker = COLORS[index % len(COLORS)], "os^Dv<>"[index % 7]
        x, y, _ = zip(*points, strict=True)
        ax.plot(x, y, "-" + marker, color=color, ms=5, lw=1.4, label=kind)
        open_ones = [(k, v) for k, v, known in points if not known]
        if open_ones:
            ax.plot(*zip(*open_ones, strict=True), marker, color=color, mfc="white", ms=5)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    particles = sorted({point[0] for points in series.values() for point in points})
    ax.set_xticks(particles, [str(k) for k in particles])
    ax.minorticks_off()
    ax.set(xlabel="particles K", ylabel="signal-to-noise of one gradient")
    ax.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    open_frame(ax)
    return ax


Line = "tuple[str, ComparisonRow | None]"


def _lines(rows: Sequence[ComparisonRow]) -> list[Line]:
    """Lines of the picture from the top: a guide's name, then its objectives."""
    lines, last = [], None
    for row in rows:
        if row.guide != last:
            lines.append((row.guide, None))
            last = row.guide
        lines.append((row.objective, row))
    return lines


def _panels(ax: Axes, widths: Sequence[float], gap: float, left: float) -> list[Axes]:
    panels = []
    for width in widths:
        panels.append(ax.inset_axes((left, 0, width, 1)))
        left += width + gap
    return panels


def _prepare(panel: Axes, lines: Sequence[Line]) -> None:
    panel.set_ylim(len(lines) - 0.5, -0.5)
    panel.set_yticks([])
    for y, (_, row) in enumerate(lines):
        if row is None:
            panel.axhspan(y - 0.5, y + 0.5, color=GREY, alpha=0.18, lw=0)
        else:
            panel.axhline(y, color=GREY, lw=0.4, alpha=0.35)
    panel.tick_params(labelsize="x-small")
    open_frame(panel, left=False)


def _draw_bounds(panel: Axes, lines: Sequence[Line], result: Comparison) -> None:
    zero, name = result.reference
    for y, (_, row) in enumerate(lines):
        if row is None:
            continue
        if row.failure:
            text = "refused: " + row.failure.split(": ", 1)[-1]
            text = text if len(text) <= 88 else text[:85] + "..."
            panel.text(0.01, y, text, transform=panel.get_yaxis_transform(), va="center",
                       fontsize=6, color=GREY)  # fmt: skip
            continue
        ends = [max(bound.value - zero, _FLOOR) for bound in (row.elbo, row.best)]
        panel.plot(ends, [y, y], "-", color=COLORS[0], lw=1.2)
        panel.plot(ends[:1], [y], "o", color=COLORS[0], mfc="white", ms=4.5)
        panel.plot(ends[1:], [y], "o", color=COLORS[0], ms=4.5)
        if row.is_upper_bound:
            panel.plot([max(row.bound.value - zero, _FLOOR)], [y], "<", color=COLORS[1], ms=4.5)
    panel.axvline(0, color="black", lw=1)
    panel.set_xscale("symlog", linthresh=0.1, linscale=0.6)
    panel.set_yticks(range(len(lines)), [label for label, _ in lines])
    for text, (_, row) in zip(panel.get_yticklabels(), lines, strict=True):
        text.set_fontsize(8)
        text.set_fontweight("bold" if row is None else "normal")
    panel.tick_params(axis="y", length=0)
    panel.set_xlabel(f"bound - {name} (nats)", fontsize=8)
    handles = [
        panel.plot([], [], "o", color=COLORS[0], mfc="white", ms=4.5, label="ELBO")[0],
        panel.plot([], [], "o", color=COLORS[0], ms=4.5, label=_most(lines))[0],
    ]
    if any(row and row.is_upper_bound and not row.failure for _, row in lines):
        handles += panel.plot([], [], "<", color=COLORS[1], ms=4.5, label="own upper bound")
    panel.legend(handles=handles, frameon=False, fontsize=7, ncols=3, loc="lower left",
                 bbox_to_anchor=(0, 1), borderaxespad=0.1)  # fmt: skip


def _most(lines: Sequence[Line]) -> str:
    particles = [max(row.iw_elbo) for _, row in lines if row is not None and row.iw_elbo]
    return f"IW-ELBO, {max(particles)} draws" if particles else "tightest bound"


def _draw_dots(panel: Axes, lines: Sequence[Line], values: Sequence[float], title: str) -> None:
    for y, ((_, row), value) in enumerate(zip(lines, values, strict=True)):
        if row is not None and not row.failure and math.isfinite(value):
            color = _GOOD if row.trusted else _BAD
            panel.plot([value], [y], "o", color=color if title == "Pareto k" else "black", ms=4)
    panel.set_xlabel(title, fontsize=8)


def _log_if_wide(panel: Axes) -> None:
    """A logarithmic axis where values differ much; else one from zero."""
    values = [float(line.get_xdata()[0]) for line in panel.lines if line.get_marker() == "o"]
    positive = [v for v in values if v > 0]
    if positive and len(positive) == len(values) and max(positive) > 8 * min(positive):
        panel.set_xscale("log")
        ticks = _round_numbers(min(positive), max(positive))
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
    else:
        few_ticks(panel)
        panel.set_yticks([])
        panel.set_xlim(left=0)


def _round_numbers(low: float, high: float) -> list[float]:
    """At most four of 1, 2 and 5 times a power of ten, from ``low`` to ``high``."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high]
        if len(ticks) <= 4:
            return ticks
    return ticks[:: math.ceil(len(ticks) / 4)]
