"""The stopping rule and the smoothed loss that the progress bar shows."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["Plateau", "mean_and_error"]


def mean_and_error(losses: Tensor) -> tuple[float, float]:
    """Mean of the finite losses and its standard error, in nats."""
    finite = losses[losses.isfinite()]
    if len(finite) == 0:
        return math.nan, math.nan
    error = (finite.std() / math.sqrt(len(finite))).item() if len(finite) > 1 else math.nan
    return finite.mean().item(), error


class Plateau:
    r"""Stop when going on brings no improvement worth having.

    After every window the improvement :math:`\Delta` of the mean loss over the window before is
    estimated, with its standard error :math:`s`. The rule ends the run after two windows in a row
    that surely brought too little, :math:`\Delta + 2 s < tolerance`, or after six in a row that
    brought nothing visible, :math:`\Delta < 2 s`.

    Args:
        window: number of steps in a window.
        tolerance: improvement per window, in nats, that is worth going on for.
    """

    SURE, UNSEEN = 2, 6

    def __init__(self, window: int, tolerance: float) -> None:
        self.window = window
        self.tolerance = tolerance
        self.strikes = [0, 0]

    def update(self, losses: Tensor) -> str | None:
        """Look at all losses so far (at a multiple of ``window``); a reason to stop, or None."""
        if len(losses) < 2 * self.window or len(losses) % self.window:
            return None
        before, before_error = mean_and_error(losses[-2 * self.window : -self.window])
        after, after_error = mean_and_error(losses[-self.window :])
        gain, error = before - after, math.hypot(before_error, after_error)
        # A NaN compares false, so it ends a row.
        sure, unseen = self.strikes
        self.strikes = [
            sure + 1 if gain + 2 * error < self.tolerance else 0,
            unseen + 1 if gain < 2 * error else 0,
        ]
        if self.strikes[0] >= self.SURE:
            return (
                f"{self.SURE} windows of {self.window} steps gained less than "
                f"{self.tolerance} nats each"
            )
        if self.strikes[1] >= self.UNSEEN:
            return f"{self.UNSEEN} windows of {self.window} steps gained nothing visible"
        return None
