"""Plain text tables and numbers in few characters."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["number", "text_table", "with_error"]


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits; a dash for none."""
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if not -3 <= size < 5:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(digits - 1 - size, 0)}f}"


def with_error(value: float, se: float) -> str:
    """``value±se`` with one digit of the error, two where that one is a 1."""
    if not math.isfinite(value) or abs(value) >= 1e6:
        return number(value)
    if not math.isfinite(se) or se <= 0:
        return f"{value:.3f}"
    size = math.floor(math.log10(se))
    places = min(max((1 if se < 2 * 10**size else 0) - size, 0), 4)
    return f"{value:.{places}f}±{se:.{places}f}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], num_left: int = 1) -> str:
    """Columns padded to one width, the first ones to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, ["-" * w for w in widths], *rows]:
        cells = [
            cell.ljust(w) if i < num_left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
