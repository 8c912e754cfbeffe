"""Raw parameters of a map, free or shifted by a network of the context."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from flowvi.nn import MLP

__all__ = ["RawParameters"]


class RawParameters(nn.Module):
    """Named unconstrained tensors, each a parameter plus, with a context, a network's output.

    The network's last layer starts at zero, so at the start every context gives ``start``.

    Args:
        start: initial value of each tensor; the names become parameter names.
        context_dim: length of the context vector; 0 leaves the network out.
        hidden_dims: widths of the network's hidden layers; empty makes it linear.

    Shape:
        context: ``(*batch, context_dim)``; each output: ``(*batch, *start[name].shape)``, without
        ``*batch`` if there is no context.
    """

    def __init__(
        self, start: Mapping[str, Tensor], context_dim: int = 0, hidden_dims: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self._shapes = {name: tuple(value.shape) for name, value in start.items()}
        for name, value in start.items():
            self.register_parameter(name, nn.Parameter(value.clone()))
        self.network = None
        if context_dim:
            size = sum(math.prod(shape) for shape in self._shapes.values())
            self.network = MLP(context_dim, hidden_dims, size)

    def forward(self, context: Tensor | None = None) -> list[Tensor]:
        values = [getattr(self, name) for name in self._shapes]
        if self.network is None:
            return values
        shifts = self.network(context).split([v.numel() for v in values], dim=-1)
        return [
            v + shift.unflatten(-1, v.shape) if v.dim() else v + shift.squeeze(-1)
            for v, shift in zip(values, shifts, strict=True)
        ]
