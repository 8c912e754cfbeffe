"""Small parts of scoring that the path distributions share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["require_finite", "with_value_gradient_only"]


def with_value_gradient_only(
    log_prob: Callable[[Tensor], Tensor], value: Tensor, event_dim: int
) -> Tensor:
    """Log-density whose gradient runs through the value alone, whatever else it rests on.

    It costs a backward pass here, and works for functions whose parameters cannot be listed.

    Args:
        log_prob: maps the value to ``(*batch,)``, row by row.
        value: ``(*batch, *event)``.
        event_dim: number of dims of the event.
    """
    if not torch.is_grad_enabled():
        return log_prob(value)
    leaf = value.detach().requires_grad_()
    result = log_prob(leaf)
    if not result.requires_grad:
        # A point mass does not depend on the value at all.
        return result
    (grad,) = torch.autograd.grad(result.sum(), leaf)
    moved = grad * (value - value.detach())
    return result.detach() + moved.sum(tuple(range(-event_dim, 0)))


def require_finite(values: Tensor, name: str, what: str) -> None:
    """Refuse values that are not finite; the caller decides whether to look at all.

    Args:
        values: what to look at; on the meta device there is nothing to see.
        name: argument that made them.
        what: what they are, in words.
    """
    if not values.is_meta and not bool(values.isfinite().all()):
        bad = int((~values.isfinite()).sum())
        raise ValueError(
            f"`{name}` must give finite {what}; got {bad} of {values.numel()} not finite. "
            "Check the parameters, the step size and the times at which it is called."
        )
