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
    r"""Stop when two windows in a row bring no improvement worth having.

    A window brings none when the mean loss over it is not lower than the mean over the window
    before by more than the larger of ``tolerance`` and ``2`` standard errors of the difference.

    Args:
        window: number of steps in a window.
        tolerance: improvement per window, in nats, that is worth going on for.
        patience: number of windows in a row.
    """

    def __init__(self, window: int, tolerance: float, patience: int = 2) -> None:
        self.window = window
        self.tolerance = tolerance
        self.patience = patience
        self.strikes = 0

    def update(self, losses: Tensor) -> bool:
        """Look at all losses so far (at a multiple of ``window``) and say whether to stop."""
        if len(losses) < 2 * self.window or len(losses) % self.window:
            return False
        before, before_error = mean_and_error(losses[-2 * self.window : -self.window])
        after, after_error = mean_and_error(losses[-self.window :])
        bar = max(self.tolerance, 2 * math.hypot(before_error, after_error))
        # Written so that a NaN counts as no strike.
        self.strikes = self.strikes + 1 if before - after <= bar else 0
        return self.strikes >= self.patience
