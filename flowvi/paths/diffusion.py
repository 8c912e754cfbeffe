"""Diffusion coefficients b, diagonal, of time or of state and time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor, nn

__all__ = ["Diffusion", "StateDiffusion", "TimeDiffusion", "as_diffusion"]


class Diffusion(nn.Module, ABC):
    r"""Diagonal coefficient b of :math:`dx = f\,dt + b\,dW`.

    Shape:
        x: ``(*batch, dim)``; t: ``(*batch, 1)``; b: anything that broadcasts to ``(*batch, dim)``.
    """

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """B at (x, t)."""

    @abstractmethod
    def divergence(self, x: Tensor, t: Tensor) -> Tensor | float:
        r"""Row divergence of the diagonal matrix :math:`b^2 / 2`, i.e. of each own coordinate."""


class TimeDiffusion(Diffusion):
    """Diffusion that depends on time alone.

    Args:
        b: a positive number, a tensor or parameter ``(dim,)``, or a function of times
            ``(*batch, 1)``.

    Raises:
        ValueError: if a number is not positive.

    Example:
        >>> TimeDiffusion(0.5)(torch.zeros(3, 2), torch.zeros(3, 1)).shape
        torch.Size([3, 1])
    """

    def __init__(self, b: float | Tensor | Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        if isinstance(b, Real) and not 0 < b < float("inf"):
            raise ValueError(f"`diffusion` must be positive and finite; got {b!r}.")
        if torch.is_tensor(b) and not isinstance(b, nn.Parameter):
            self.register_buffer("b", b)
        else:
            self.b = b

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.at(t)

    def at(self, t: Tensor) -> Tensor:
        """B at times ``(*batch, 1)``; no state is needed."""
        if torch.is_tensor(self.b):
            return self.b.expand(*t.shape[:-1], -1) if self.b.dim() else self.b.expand_as(t)
        return torch.full_like(t, self.b) if isinstance(self.b, Real) else self.b(t)

    def divergence(self, x: Tensor, t: Tensor) -> float:
        return 0.0


class StateDiffusion(Diffusion):
    r"""Diagonal diffusion that depends on the state.

    Args:
        b: function of states ``(*batch, dim)`` and times ``(*batch, 1)`` with values
            ``(*batch, dim)``.
        elementwise: whether :math:`b_i` depends on :math:`x_i` alone; its divergence then costs
            one pass in place of ``dim``.

    Example:
        >>> b = StateDiffusion(lambda x, t: 0.1 * x, elementwise=True)
        >>> b.divergence(torch.ones(2), torch.zeros(1))
        tensor([0.0100, 0.0100])
    """

    def __init__(
        self, b: Callable[[Tensor, Tensor], Tensor], *, elementwise: bool = False
    ) -> None:
        super().__init__()
        self.b = b
        self.elementwise = elementwise

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.b(x, t)

    def divergence(self, x: Tensor, t: Tensor) -> Tensor:
        def half_square(x: Tensor) -> Tensor:
            return self.b(x, t).square() / 2

        def along(direction: Tensor) -> Tensor:
            tangent = direction.expand_as(x).contiguous()
            return torch.func.jvp(half_square, (x.contiguous(),), (tangent,))[1]

        if self.elementwise:
            return along(torch.ones_like(x))
        basis = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        return torch.func.vmap(along)(basis).diagonal(dim1=0, dim2=-1)


def as_diffusion(diffusion: float | Tensor | Callable | Diffusion) -> Diffusion:
    """A :class:`Diffusion` from a number, a tensor or a function of time.

    Raises:
        TypeError: if it is none of these.
    """
    if isinstance(diffusion, Diffusion):
        return diffusion
    if isinstance(diffusion, Real) or torch.is_tensor(diffusion) or callable(diffusion):
        return TimeDiffusion(diffusion)
    raise TypeError(
        "`diffusion` must be a positive number, a tensor, a function of time or a Diffusion; "
        f"got {type(diffusion).__name__}."
    )
