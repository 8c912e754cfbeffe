"""Checks of what a user gives a guide: recipes, locations and scales."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from flowvi.distributions import Flow
from flowvi.transforms.base import require_vectors

__all__ = ["check_whitening", "make_flow"]


def check_whitening(loc: Tensor, scale_tril: Tensor, dim: int) -> None:
    """A location and a scale must have the shapes ``(dim,)`` and ``(dim, dim)``."""
    for name, value, shape in (("loc", loc, (dim,)), ("scale_tril", scale_tril, (dim, dim))):
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"`{name}` must have shape {shape}; got {got}.")


def make_flow(
    recipe: Callable[..., Flow] | Flow, input_dim: int, context_dim: int | None = None
) -> Flow:
    """The flow a recipe makes, checked for its sizes.

    Args:
        recipe: a flow, or a function of ``input_dim`` (and ``context_dim``, if that is given).
        input_dim: number of latent dimensions.
        context_dim: length of the context; None for an unconditional flow.
    """
    flow = recipe
    if not isinstance(recipe, Flow):
        flow = recipe(input_dim) if context_dim is None else recipe(input_dim, context_dim)
    if not isinstance(flow, Flow):
        raise TypeError(f"`recipe` must make a Flow; got {type(flow).__name__}.")
    require_vectors("recipe", flow.transform.event_shape)
    for name, got, wanted in (
        ("input_dim", flow.input_dim, input_dim),
        ("context_dim", flow.context_dim, context_dim or 0),
    ):
        if got != wanted:
            raise ValueError(f"`recipe` must make a flow with {name} {wanted}; got {got}.")
    return flow
