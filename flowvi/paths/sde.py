"""A diffusion process by its drift and its diagonal diffusion, ready for solvers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowvi.paths.diffusion import Diffusion, TimeDiffusion, as_diffusion

__all__ = ["SDE", "Drift"]


class Drift(nn.Module):
    """Drift whose dependence on time is worked out for all steps of a solve at once.

    A plain function ``f(x, t)`` does where that dependence is cheap. A subclass writes
    :meth:`given`, and :meth:`embed` for what time (and any context bound to it) contributes.

    Shape:
        x: ``(*batch, dim)``; t: ``(*batch, 1)`` or ``(1,)``; drift: ``(*batch, dim)``.

    Example:
        >>> class Decay(Drift):
        ...     def embed(self, t):
        ...         return torch.exp(-t)
        ...     def given(self, x, time):
        ...         return -x * time
        >>> Decay()(torch.ones(2), torch.zeros(1))
        tensor([-1., -1.])
    """

    def embed(self, t: Tensor) -> Tensor:
        """What times ``(*times, *batch or ones, 1)`` contribute; the times if not written.

        Leading dims stay, the last may change; ones may grow to the batch.
        """
        return t

    def given(self, x: Tensor, time: Tensor) -> Tensor:
        """Drift at states, given the embedded times."""
        raise NotImplementedError(f"{type(self).__name__} has no drift. Write `given`.")

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.given(x, self.embed(t))


class _Function(Drift):
    """A plain function as a drift."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def given(self, x: Tensor, time: Tensor) -> Tensor:
        return self.function(x, time)


class SDE(nn.Module):
    r"""Process :math:`dx = f(x, t)\,dt + b(x, t)\,dW` with diagonal b, or an ODE where b = 0.

    Args:
        drift: f; a function ``f(x, t)`` or a :class:`Drift`.
        diffusion: b; a positive number, a tensor, a function of times, or a :class:`Diffusion`;
            ``None`` for an ordinary differential equation.

    Shape:
        x: ``(*batch, dim)``; t: ``(*batch, 1)`` or ``(1,)``; both coefficients: ``(*batch, dim)``.

    Raises:
        TypeError: if the drift cannot be called.

    Example:
        >>> brownian = SDE(lambda x, t: 0 * x, 1.0)
        >>> brownian.drift(torch.ones(2), torch.zeros(1))
        tensor([0., 0.])
    """

    def __init__(
        self,
        drift: Callable[[Tensor, Tensor], Tensor],
        diffusion: float | Tensor | Callable | Diffusion | None,
    ) -> None:
        super().__init__()
        if not callable(drift):
            raise TypeError(f"`drift` must be callable; got {type(drift).__name__}.")
        self.drift = drift if isinstance(drift, Drift) else _Function(drift)
        self.diffusion = None if diffusion is None else as_diffusion(diffusion)

    @property
    def is_deterministic(self) -> bool:
        """Whether there is no noise, so that paths follow from their start."""
        return self.diffusion is None

    def with_drift(self, drift: Callable[[Tensor, Tensor], Tensor]) -> SDE:
        """The process of another drift that shares this one's diffusion object."""
        return SDE(drift, self.diffusion)

    # The two halves of the diffusion: what times give at once, what states give step by step.

    def embed_diffusion(self, t: Tensor) -> Tensor:
        """The diffusion itself where it depends on time alone, else the times."""
        if isinstance(self.diffusion, TimeDiffusion):
            return self.diffusion.at(t)
        return t

    def diffusion_given(self, x: Tensor, time: Tensor) -> Tensor:
        """Diffusion at states, given the embedded times; broadcasts to the states."""
        if isinstance(self.diffusion, TimeDiffusion):
            return time
        return self.diffusion(x, time)

    # Whole paths.

    def drift_along(self, x: Tensor, t: Tensor, *, num_pieces: int = 1) -> Tensor:
        """Drift at every state of given paths, piece by piece.

        Args:
            x: states, ``(num_times, *batch, dim)``.
            t: their times, ``(num_times, *batch or ones, 1)``.
            num_pieces: pieces to evaluate one after the other. More than one: what a piece
                computes on the way is not kept but made again in the backward pass.
        """
        if num_pieces == 1:
            return self.drift(x, t)
        size = -(-len(x) // num_pieces)
        pieces = zip(x.split(size), t.split(size), strict=True)
        return torch.cat([checkpoint(self.drift, *p, use_reentrant=False) for p in pieces])
