"""How a coupling divides its input: what stays, and what moves."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["IndexPartition", "Partition", "PixelPartition", "partition"]


class Partition(nn.Module, abc.ABC):
    """Division of vectors, or of images ``(channels, height, width)``.

    A conditioner takes what :meth:`split` keeps, of size ``input_size``, and gives raw parameters
    one after another along the first event dimension, for ``num_moved`` entries of it.
    """

    input_size: int | tuple[int, ...]
    num_moved: int
    has_score_recursion = False

    def __init__(self, event_dim: int) -> None:
        super().__init__()
        self.axis = -event_dim

    @abc.abstractmethod
    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is kept, for the conditioner, and what moves."""

    @abc.abstractmethod
    def join(self, kept: Tensor, moved: Tensor) -> Tensor:
        """Put together what :meth:`split` gave; ``moved`` may have more batch dimensions."""

    def arrange(self, raw: Tensor, num_params: int) -> Tensor:
        """Raw parameters from a conditioner's output, parameters last."""
        return raw.unflatten(self.axis, (num_params, -1)).movedim(self.axis - 1, -1)

    def scatter(self, params: Tensor) -> Tensor:
        """The inverse of :meth:`arrange`."""
        return params.movedim(-1, self.axis - 1).flatten(self.axis - 1, self.axis)

    def total(self, ladj: Tensor) -> Tensor:
        """Sum of elementwise log-derivatives over the event."""
        return ladj.sum(-1) if self.axis == -1 else ladj.flatten(self.axis).sum(-1)


class IndexPartition(Partition):
    """Some dimensions of a vector move, or some channels of an image.

    Args:
        event_shape: ``(input_dim,)`` or ``(channels, height, width)``.
        mask: which of the first event dimension move.
    """

    has_score_recursion = True

    def __init__(self, event_shape: tuple[int, ...], mask: Sequence[bool]) -> None:
        super().__init__(len(event_shape))
        moved = [i for i, m in enumerate(mask) if m]
        kept = [i for i, m in enumerate(mask) if not m]
        self.num_kept, self.num_moved = len(kept), len(moved)
        self.input_size = (len(kept), *event_shape[1:]) if len(event_shape) > 1 else len(kept)
        # Where the kept dimensions come first, parts are taken and put together without gathering.
        self.is_split = kept + moved == list(range(len(mask)))
        joined = torch.argsort(torch.tensor(kept + moved))
        self.register_buffer("kept", torch.tensor(kept), persistent=False)
        self.register_buffer("moved", torch.tensor(moved), persistent=False)
        self.register_buffer("joined", joined, persistent=False)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.is_split:
            return x.split((self.num_kept, self.num_moved), self.axis)
        return x.index_select(self.axis, self.kept), x.index_select(self.axis, self.moved)

    def join(self, kept: Tensor, moved: Tensor) -> Tensor:
        batch = moved.shape[: self.axis]
        if kept.shape[: self.axis] != batch:
            kept = kept.expand(*batch, *kept.shape[self.axis :])
        both = torch.cat([kept, moved], self.axis)
        return both if self.is_split else both.index_select(self.axis, self.joined)


class PixelPartition(Partition):
    """Some pixels of an image move; the conditioner sees zeros in their place.

    Args:
        event_shape: ``(channels, height, width)``.
        mask: which entries move, of a shape that broadcasts to it.
    """

    def __init__(self, event_shape: tuple[int, ...], mask: Tensor) -> None:
        super().__init__(len(event_shape))
        self.input_size, self.num_moved = tuple(event_shape), event_shape[0]
        self.register_buffer("mask", mask, persistent=False)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.masked_fill(self.mask, 0.0), x

    def join(self, kept: Tensor, moved: Tensor) -> Tensor:
        return torch.where(self.mask, moved, kept)

    def total(self, ladj: Tensor) -> Tensor:
        return super().total(ladj.masked_fill(~self.mask, 0.0))


def partition(event_shape: tuple[int, ...], mask: Sequence[bool] | Tensor | None) -> Partition:
    """Division of an event shape by a mask of what moves; the second half if left out.

    Raises:
        ValueError: if the mask does not fit the shape, or moves all or nothing.
    """
    size = event_shape[0]
    if isinstance(mask, Tensor) and mask.dim() == len(event_shape) > 1:
        _check_pixels(event_shape, mask)
        return PixelPartition(event_shape, mask.to(torch.bool))
    if mask is None:
        mask = [i >= size // 2 for i in range(size)]
    mask = [bool(m) for m in mask]
    if len(mask) != size:
        name = "input_dim" if len(event_shape) == 1 else "channels"
        raise ValueError(f"`mask` must have length {size} ({name}); got {len(mask)}.")
    if all(mask) or not any(mask):
        way_out = "" if len(event_shape) == 1 else " One channel is divided by a checkerboard."
        raise ValueError(f"`mask` must move some dimensions and keep some; got {mask}.{way_out}")
    return IndexPartition(event_shape, mask)


def _check_pixels(event_shape: tuple[int, ...], mask: Tensor) -> None:
    if any(n not in (1, m) for n, m in zip(mask.shape, event_shape, strict=True)):
        raise ValueError(
            f"`mask` must have a shape that broadcasts to {tuple(event_shape)}; "
            f"got {tuple(mask.shape)}."
        )
    moved = int(mask.sum())
    if moved in (0, mask.numel()):
        raise ValueError(
            f"`mask` must move some pixels and keep some; got {moved} of {mask.numel()}."
        )
