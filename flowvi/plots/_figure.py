"""What all pictures share; the only place that imports Matplotlib, inside the functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLORS", "GREY", "array_of", "axes_for", "few_ticks", "open_frame"]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
GREY = "#888888"


def axes_for(
    ax: Axes | None, side: float | None = None, size: tuple[float, float] | None = None
) -> Axes:
    """The given Axes, or new ones of a figure of their own.

    Args:
        ax: Axes to draw on; new if left out.
        side: height, and width if that is more than usual, in inches.
        size: width and height in inches, instead.
    """
    if ax is not None:
        return ax
    from matplotlib import pyplot

    if size is None:
        size = (6.0, 4.0) if side is None else (max(6.0, side), max(2.0, side))
    return pyplot.subplots(figsize=size, layout="constrained")[1]


def array_of(values: Tensor) -> np.ndarray:
    """Values as a float64 array."""
    return torch.as_tensor(values).detach().cpu().double().numpy()


def few_ticks(ax: Axes) -> None:
    """At most three intervals between ticks."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(3))
    ax.yaxis.set_major_locator(MaxNLocator(3))


def open_frame(ax: Axes, *, left: bool = True) -> None:
    """Take away the frame's sides that carry nothing."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines["left"].set_visible(left)
