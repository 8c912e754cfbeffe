"""Fixed reorderings of the dimensions."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from flowvi.transforms.base import FlowTransform

__all__ = ["Permutation", "check_permutation"]


def check_permutation(indices: Iterable[int], name: str = "indices") -> Tensor:
    """The reordering as an integer tensor.

    Raises:
        ValueError: if it is not a reordering of ``0 .. n - 1`` with ``n`` at least 1.
    """
    listed = [int(i) for i in indices]
    if not listed or sorted(listed) != list(range(len(listed))):
        raise ValueError(
            f"`{name}` must be a reordering of 0 to n - 1 with n at least 1; got "
            f"{listed if len(listed) <= 16 else f'{listed[:16]} and more'}."
        )
    return torch.tensor(listed, dtype=torch.long)


class Permutation(FlowTransform):
    """Reorders the dimensions: ``y[i] = x[indices[i]]``.

    Args:
        indices: a reordering of ``0 .. input_dim - 1``; it is saved with the module.

    Shape:
        x: ``(*batch, input_dim)``; ladj: ``(*batch,)``, zeros.

    Raises:
        ValueError: if ``indices`` is not a reordering.

    Example:
        >>> Permutation([2, 0, 1])(torch.tensor([10.0, 20.0, 30.0]))
        tensor([30., 10., 20.])
    """

    has_score_recursion = True

    def __init__(self, indices: Iterable[int]) -> None:
        order = check_permutation(indices)
        super().__init__(len(order))
        self.register_buffer("order", order)
        self.register_buffer("inverse_order", order.argsort())

    @classmethod
    def reverse(cls, input_dim: int) -> Permutation:
        """The reordering that puts the last dimension first."""
        return cls(range(input_dim - 1, -1, -1))

    @classmethod
    def random(cls, input_dim: int, seed: int = 0) -> Permutation:
        """A random reordering that depends on ``seed`` only, not on torch's global generator."""
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.randperm(input_dim, generator=generator).tolist())

    def _call_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return x[..., self.order], x.new_zeros(x.shape[:-1])

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return y[..., self.inverse_order], y.new_zeros(y.shape[:-1])

    def _call_ladj_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, ladj = self._call_and_ladj(x, context)
        return y, ladj, score.detach()[..., self.order]
