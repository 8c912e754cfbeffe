"""The progress bar of a fit."""

from __future__ import annotations

from torch import Tensor
from tqdm.auto import tqdm

from flowvi.infer._plateau import mean_and_error

__all__ = ["Progress"]

_WINDOW = 50


class Progress:
    """Steps done, with the ELBO smoothed over the last steps and its standard error.

    Args:
        num_steps: planned number of steps.
        start: steps done already.
        visible: whether anything is shown.
    """

    def __init__(self, num_steps: int, start: int, *, visible: bool) -> None:
        self._bar = tqdm(total=num_steps, initial=start, disable=not visible, desc="fit")

    def update(self, losses: Tensor, num_steps: int) -> None:
        """Show the state after ``len(losses)`` steps of now ``num_steps`` planned ones."""
        if self._bar.disable:
            return
        mean, error = mean_and_error(losses[-_WINDOW:])
        self._bar.total = num_steps
        self._bar.set_postfix_str(f"ELBO {-mean:.3f} +- {error:.3f}", refresh=False)
        self._bar.update(len(losses) - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
