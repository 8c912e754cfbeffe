"""Minibatches drawn at the cost of a minibatch, not of the data set."""

from __future__ import annotations

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = ["StratifiedMinibatches", "stratified_indices"]


class StratifiedMinibatches(Messenger):
    """Draw the indices of all subsampled plates by :func:`stratified_indices`.

    Pyro permutes all N indices of a plate in every step, which for millions of rows takes longer
    than the step itself. Inside this handler time and memory depend on the minibatch only, and
    rows come in an order in which a memory-mapped file is read from one end to the other. It goes
    around stock ``SVI`` as well as :func:`flowvi.infer.fit`; models need no change.

    Example:
        >>> import pyro
        >>> def model():
        ...     with pyro.plate("rows", 10_000_000, subsample_size=4) as index:
        ...         return index
        >>> with StratifiedMinibatches():
        ...     index = model()
        >>> index.shape
        torch.Size([4])
    """

    def _pyro_sample(self, msg: dict) -> None:
        if not site_is_subsample(msg) or msg["value"] is not None:
            return
        size, number = msg["fn"].size, msg["fn"].subsample_size
        if number is not None and 0 < number < size:
            msg["value"] = stratified_indices(size, number, device=msg["fn"].device)


def stratified_indices(
    size: int, num_indices: int, *, device: torch.device | str | None = None
) -> Tensor:
    r"""Different indices below ``size``, one from each of ``num_indices`` equal strata.

    The strata are laid out on a circle with a random start, so that every index is drawn with
    probability exactly ``num_indices / size`` whatever divides what, and sums over a minibatch
    times N/B are unbiased. Neighbours are drawn together less often than by chance, which lowers
    the variance where rows that are close are alike.

    Args:
        size: number of items N.
        num_indices: number B of indices, from 1 to ``size``.
        device: where to draw.

    Shape:
        result: ``(num_indices,)``, int64, increasing but for one jump.

    Raises:
        ValueError: if ``num_indices`` is not in range.

    References:
        Cochran (1977), Sampling techniques, sections 5.2 and 8.1.
    """
    if not 1 <= num_indices <= size:
        raise ValueError(f"`num_indices` must be from 1 to {size} (size); got {num_indices}.")
    borders = torch.arange(num_indices + 1, device=device) * size // num_indices
    widths = borders.diff()
    # A float64 holds every index exactly; rounding up to the next stratum is prevented.
    within = (torch.rand(num_indices, device=device, dtype=torch.float64) * widths).long()
    within = torch.minimum(within, widths - 1)
    start = torch.randint(size, (), device=device)
    return (borders[:-1] + within + start) % size
