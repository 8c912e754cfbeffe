"""Derivatives in time by forward mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["time_derivative"]


def time_derivative(fn: Callable[[Tensor], Any], t: Tensor) -> tuple[Any, Any]:
    """Values of ``fn(t)`` and their derivative for each element's own time, in one pass.

    Args:
        fn: maps times to a tensor or a tuple of tensors, element by element or row by row.
        t: times, any shape.
    """
    # Forward mode writes into tangents, which an expanded tensor does not allow.
    t = t.contiguous()
    return torch.func.jvp(fn, (t,), (torch.ones_like(t),))
