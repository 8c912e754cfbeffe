"""What every vector field of a continuous flow is, and a field from any function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FunctionField", "VectorField"]


class VectorField(nn.Module):
    r"""Velocity :math:`dx/dt = v(t, x \mid context)` at times from 0 (base) to 1 (target).

    ``field(t, x, context)`` evaluates it anywhere. A solve evaluates one field many times, so a
    subclass says what is needed once: :meth:`prepare` (once per solve), :meth:`embed` (once for
    all times of a fixed-step solve) and :meth:`velocity` (once per evaluation). Only
    :meth:`velocity` must be written; without the others it gets plain time and context. Fields
    that know their divergence in closed form set ``has_divergence`` and write
    :meth:`velocity_and_divergence`.

    Args:
        input_dim: number of dimensions of ``x``, at least 1.
        context_dim: length of the context vector; 0 for none.

    Shape:
        t: a number, a scalar or ``(*batch,)``; x: ``(*batch, input_dim)``; context:
        ``(*batch, context_dim)``, broadcast against the batch of ``x``; velocity:
        ``(*batch, input_dim)``; divergence: ``(*batch,)``.

    Raises:
        ValueError: if a size is wrong, or a time given as a number is outside [0, 1].

    Example:
        >>> class Decay(VectorField):
        ...     has_divergence = True
        ...     def velocity(self, time, x, prepared):
        ...         return -x
        ...     def velocity_and_divergence(self, time, x, prepared):
        ...         return -x, x.new_full(x.shape[:-1], -x.shape[-1])
        >>> Decay(2).value_and_divergence(0.5, torch.ones(3, 2))[1]
        tensor([-2., -2., -2.])
    """

    has_divergence = False

    def __init__(self, input_dim: int, context_dim: int = 0) -> None:
        super().__init__()
        if not isinstance(input_dim, int) or input_dim < 1:
            raise ValueError(f"`input_dim` must be an integer of at least 1; got {input_dim!r}.")
        if not isinstance(context_dim, int) or context_dim < 0:
            raise ValueError(f"`context_dim` must be a non-negative integer; got {context_dim!r}.")
        self.input_dim = input_dim
        self.context_dim = context_dim

    # What a new field writes.

    def prepare(self, context: Tensor | None) -> Any:
        """All that depends on parameters and context only; the context itself if not written."""
        return context

    def embed(self, t: Tensor) -> Tensor:
        """What time contributes, for times ``(*times)`` a tensor ``(*times, ...)``.

        ``t`` itself if not written.
        """
        return t

    def velocity(self, time: Tensor, x: Tensor, prepared: Any) -> Tensor:
        """The velocity, given embedded time and what :meth:`prepare` gave."""
        raise NotImplementedError(f"{type(self).__name__} has no velocity. Write it.")

    def velocity_and_divergence(
        self, time: Tensor, x: Tensor, prepared: Any
    ) -> tuple[Tensor, Tensor]:
        """The velocity and its divergence, the trace of its Jacobian in ``x``."""
        raise NotImplementedError(
            f"{type(self).__name__} has no divergence in closed form. Use ExactDivergence or "
            "Hutchinson."
        )

    # The public protocol.

    def forward(self, t: float | Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        time = self.embed(self._time(t, x))
        return self.velocity(time, x, self.prepare(context))

    def value_and_divergence(
        self, t: float | Tensor, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Velocity and divergence in closed form.

        Raises:
            NotImplementedError: if the field has no closed form.
        """
        time = self.embed(self._time(t, x))
        return self.velocity_and_divergence(time, x, self.prepare(context))

    def _time(self, t: float | Tensor, x: Tensor) -> Tensor:
        if torch.is_tensor(t):
            return t
        if not 0 <= t <= 1:
            raise ValueError(f"`t` must be a time from 0 (base) to 1 (target); got {t}.")
        return torch.full((), t, dtype=x.dtype, device=x.device)


class FunctionField(VectorField):
    """A field from a function or module ``function(t, x)``, with a context ``(t, x, context)``.

    Args:
        input_dim: number of dimensions, at least 1.
        function: gives the velocity, shape ``(*batch, input_dim)``; ``t`` is a scalar tensor.
        context_dim: length of the context vector; 0 for none.

    Raises:
        TypeError: if ``function`` cannot be called.

    Example:
        >>> FunctionField(2, lambda t, x: -x)(0.0, torch.ones(2))
        tensor([-1., -1.])
    """

    def __init__(
        self, input_dim: int, function: Callable[..., Tensor], context_dim: int = 0
    ) -> None:
        super().__init__(input_dim, context_dim)
        if not callable(function):
            raise TypeError(f"`function` must be callable; got {type(function).__name__}.")
        self.function = function

    def velocity(self, time: Tensor, x: Tensor, prepared: Tensor | None) -> Tensor:
        if self.context_dim:
            return self.function(time, x, prepared)
        return self.function(time, x)
