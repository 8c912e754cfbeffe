"""What the recipes share: checked sizes, and the layers made from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from flowvi.distributions import Flow
from flowvi.transforms import (
    Autoregressive,
    Coupling,
    ElementwiseMap,
    FlowTransform,
    TriangularAffine,
    compose,
)

__all__ = ["Sizes"]

MASK_SEED = 20


class Sizes:
    """Checked arguments that all recipes share, and the layers made from them."""

    def __init__(
        self, input_dim: int, context_dim: int, num_layers: int, hidden_dims: Sequence[int]
    ) -> None:
        for name, value, least in (
            ("input_dim", input_dim, 1),
            ("context_dim", context_dim, 0),
            ("num_layers", num_layers, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(
                    f"`{name}` must be an integer of at least {least}; got {value!r}."
                )
        if isinstance(hidden_dims, int) or any(
            not isinstance(width, int) or width < 1 for width in hidden_dims
        ):
            raise ValueError(
                f"`hidden_dims` must be a sequence of positive integers; got {hidden_dims!r}."
            )
        self.input_dim = input_dim
        self.context_dim = context_dim
        self.num_layers = num_layers
        self.hidden_dims = tuple(hidden_dims)

    def couplings(
        self, elementwise: ElementwiseMap, activation: Callable[[], nn.Module]
    ) -> list[FlowTransform]:
        return [
            Coupling(
                self.input_dim,
                elementwise,
                mask=mask,
                context_dim=self.context_dim,
                hidden_dims=self.hidden_dims,
                activation=activation,
            )
            for mask in self._masks()
        ]

    def autoregressions(
        self, elementwise: ElementwiseMap | None, activation: Callable[[], nn.Module]
    ) -> list[FlowTransform]:
        natural = range(self.input_dim)
        return [
            Autoregressive(
                self.input_dim,
                elementwise,
                order=natural[::-1] if layer % 2 else natural,
                context_dim=self.context_dim,
                hidden_dims=self.hidden_dims,
                activation=activation,
            )
            for layer in range(self.num_layers)
        ]

    def finish(self, body: Sequence[FlowTransform]) -> Flow:
        """The body followed by the affine layer that carries location and scale."""
        hidden = self.hidden_dims if self.context_dim else ()
        head = TriangularAffine(self.input_dim, self.context_dim, hidden_dims=hidden)
        return Flow(compose(*body, head))

    def _masks(self) -> list[torch.Tensor]:
        """Random halves, each followed by its complement."""
        generator = torch.Generator().manual_seed(MASK_SEED)
        masks: list[torch.Tensor] = []
        for layer in range(self.num_layers):
            if layer % 2:
                masks.append(~masks[-1])
            else:
                order = torch.randperm(self.input_dim, generator=generator, device="cpu")
                masks.append(order >= self.input_dim // 2)
        return masks
