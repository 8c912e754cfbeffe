"""Shapes of batches and events."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import constraints

__all__ = ["common_shape", "event_shape_of", "flatten_batch", "real_events", "require_vectors"]


def common_shape(*shapes: torch.Size) -> torch.Size:
    """What shapes broadcast to, in plain Python.

    The first call of ``torch.broadcast_shapes`` imports torch's symbolic shapes, a third of a
    second.

    Raises:
        RuntimeError: if they do not broadcast.
    """
    common: tuple[int, ...] = ()
    for shape in map(tuple, shapes):
        if not common:
            common = shape
        elif shape and shape != common:
            common = _broadcast(common, shape)
    return torch.Size(common)


def _broadcast(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    length = max(len(first), len(second))
    first, second = ((1,) * (length - len(shape)) + shape for shape in (first, second))
    if any(m not in (1, n) and n != 1 for m, n in zip(first, second, strict=True)):
        raise RuntimeError(f"Shapes {first} and {second} do not broadcast.")
    return tuple(n if m == 1 else m for m, n in zip(first, second, strict=True))


def event_shape_of(input_dim: int | Sequence[int]) -> torch.Size:
    """Event shape from a number of dimensions or a shape.

    Raises:
        ValueError: if a size is not an integer of at least 1.
    """
    is_shape = isinstance(input_dim, Sequence)
    shape = tuple(input_dim) if is_shape else (input_dim,)
    if not shape or any(not isinstance(n, int) or n < 1 for n in shape):
        rule = "hold integers of at least 1" if is_shape else "be an integer of at least 1"
        raise ValueError(f"`input_dim` must {rule}; got {input_dim!r}.")
    return torch.Size(shape)


def real_events(event_dim: int) -> constraints.Constraint:
    """Real values of that many event dimensions."""
    if event_dim == 1:
        return constraints.real_vector
    return constraints.independent(constraints.real, event_dim)


def require_vectors(name: str, event_shape: torch.Size) -> None:
    """Refuse a map or a flow of images where vectors are needed."""
    if len(event_shape) != 1:
        raise ValueError(f"`{name}` must be of vectors; got event shape {tuple(event_shape)}.")


def flatten_batch(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None, torch.Size]:
    """``x`` and the context with one batch dimension, and the batch shape they share."""
    if context is None:
        return x.reshape(-1, x.shape[-1]), None, x.shape[:-1]
    batch = common_shape(x.shape[:-1], context.shape[:-1])
    x, context = (t.expand(*batch, -1).reshape(-1, t.shape[-1]) for t in (x, context))
    return x, context, batch
