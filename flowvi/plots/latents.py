"""Pictures of latents: what a plane of them decodes to, and where images lie in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowvi.plots._figure import COLORS, GREY, array_of, axes_for, open_frame
from flowvi.plots.images import image_grid

if TYPE_CHECKING:
    from flowvi.plots._figure import Axes

__all__ = ["latent_manifold", "latent_points"]

# Ten colours that differ for most eyes: the house's six, and four darker ones.
_TEN = (*COLORS, "#882255", "#332288", "#117733", "#999933")


def latent_manifold(
    decode: Callable[[Tensor], Tensor],
    ax: Axes | None = None,
    *,
    num_columns: int = 15,
    low: float = 0.0,
    high: float | None = None,
) -> Axes:
    """Images on a grid of two latents, evenly spaced in the probability of a standard normal.

    Args:
        decode: maps latents ``(N, 2)`` to images ``(N, C, H, W)``.
        ax: Axes to draw on; new if left out.
        num_columns: images in a row and in a column, at least 2.
        low: value of black.
        high: value of white; the largest value if left out.

    Raises:
        ValueError: if ``num_columns`` is below 2.

    References:
        Kingma and Welling (2014), Auto-encoding variational Bayes, arXiv:1312.6114, figure 4.

    Example:
        >>> ax = latent_manifold(lambda z: z.sum(-1).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4),
        ...                      num_columns=3)
        >>> ax.get_xlabel()
        'first latent'
    """
    if num_columns < 2:
        raise ValueError(f"`num_columns` must be at least 2; got {num_columns}.")
    p = (torch.arange(num_columns) + 0.5) / num_columns
    places = torch.special.ndtri(p)
    # Rows from the top, where the second latent is largest.
    grid = torch.cartesian_prod(places.flip(0), places).flip(-1)
    with torch.no_grad():
        images = decode(grid)
    ax = image_grid(images, ax, num_columns=num_columns, low=low, high=high)
    ax.set_axis_on()
    ax.set(xticks=[], yticks=[], xlabel="first latent", ylabel="second latent")
    ax.spines[:].set_visible(False)
    return ax


def latent_points(z: Tensor, ax: Axes | None = None, *, labels: Tensor | None = None) -> Axes:
    """Points in a plane of two latents, in the colours of their labels.

    Args:
        z: latents ``(N, 2)``: means of posteriors, for instance.
        ax: Axes to draw on; new if left out.
        labels: whole numbers ``(N,)``, at most ten different ones; grey points if left out.

    Raises:
        ValueError: if a shape is wrong.

    Example:
        >>> ax = latent_points(torch.randn(20, 2), labels=torch.arange(20) % 3)
        >>> len(ax.collections)
        3
    """
    if z.dim() != 2 or z.shape[1] != 2:
        raise ValueError(f"`z` must have shape (N, 2); got {tuple(z.shape)}.")
    if labels is not None and labels.shape != z.shape[:1]:
        raise ValueError(f"`labels` must have shape ({len(z)},); got {tuple(labels.shape)}.")
    ax = axes_for(ax, size=(4.5, 4.5))
    points = array_of(z)
    if labels is None:
        ax.scatter(*points.T, s=6, color=GREY, linewidths=0)
    else:
        for index, label in enumerate(sorted(set(labels.tolist()))):
            shown = points[(labels == label).cpu().numpy()]
            color = _TEN[index % len(_TEN)]
            ax.scatter(*shown.T, s=8, color=color, linewidths=0, label=str(label))
        ax.legend(
            frameon=False,
            fontsize="small",
            markerscale=2,
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
        )
    ax.set(xlabel="first latent", ylabel="second latent", aspect="equal")
    open_frame(ax)
    return ax
