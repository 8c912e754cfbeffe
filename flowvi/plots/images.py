"""Pictures of images: samples, reconstructions, interpolations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from flowvi.plots._figure import array_of, axes_for

if TYPE_CHECKING:
    from flowvi.plots._figure import Axes

__all__ = ["image_grid"]


def image_grid(
    images: Tensor,
    ax: Axes | None = None,
    *,
    num_columns: int | None = None,
    low: float = 0.0,
    high: float | None = None,
) -> Axes:
    """Images side by side, row after row, with a thin gap between them.

    Args:
        images: images ``(N, C, H, W)`` with 1 or 3 channels.
        ax: Axes to draw on; new if left out.
        num_columns: images in a row; about as many as rows if left out.
        low: value of black.
        high: value of white; the largest value if left out.

    Raises:
        ValueError: if the images have another shape, or ``num_columns`` is below 1.

    Example:
        >>> import torch
        >>> ax = image_grid(torch.rand(6, 1, 8, 8), num_columns=3)
        >>> ax.images[0].get_array().shape
        (17, 26, 3)
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(
            "`images` must have shape (N, C, H, W) with 1 or 3 channels; "
            f"got {tuple(images.shape)}."
        )
    count, _, height, width = images.shape
    columns = math.ceil(math.sqrt(count)) if num_columns is None else num_columns
    if columns < 1:
        raise ValueError(f"`num_columns` must be at least 1; got {num_columns}.")
    rows = math.ceil(count / columns)
    values = array_of(images).transpose(0, 2, 3, 1)
    top = values.max() if high is None else high
    values = np.clip((values - low) / max(top - low, np.finfo(float).tiny), 0, 1)
    sheet = np.ones((rows * (height + 1) - 1, columns * (width + 1) - 1, 3))
    for number, image in enumerate(values):
        y, x = (number // columns) * (height + 1), (number % columns) * (width + 1)
        sheet[y : y + height, x : x + width] = image
    ax = axes_for(ax, size=(0.6 * columns, 0.6 * rows * height / width))
    ax.imshow(sheet, interpolation="nearest")
    ax.set_axis_off()
    return ax
