"""Masked autoregressive conditioner."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowvi.nn.mlp import activate, check_sizes, linear_by_columns, start_at_zero

__all__ = ["MADE"]


class MADE(nn.Module):
    r"""Masked network: the parameters of variable ``i`` depend only on variables before it.

    With ``order`` the variables' order, parameters :math:`\theta_{order[k]}` are a function of
    :math:`x_{order[0]}, \dots, x_{order[k - 1]}` and of the context. The hidden units of a layer
    are sorted by degree (unit of degree ``m`` sees the first ``m`` variables), so the units that
    become known with one more variable are neighbours: an inverse can compute just those.

    Args:
        input_dim: number of variables ``D``, at least 1. With one variable the parameters depend
            on the context only, or are free.
        hidden_dims: widths of the hidden layers; empty for a linear map.
        param_dim: number of parameters of each variable, ``P``.
        context_dim: length of the context vector; 0 for none.
        order: a permutation of ``range(D)``, first variable first; natural order if left out.
        activation: makes the elementwise nonlinearity between layers.
        zero_last: start the last layer at zero, so that the output starts at zero.
        by_columns: store the output column by column, as in :class:`MLP`.

    Shape:
        x: ``(*batch, D)``; context: ``(*batch, context_dim)``, broadcast against the batch of
        ``x``; output: ``(*batch, D, P)``.

    Raises:
        ValueError: if a size is below 1, or ``order`` is not a permutation.

    References:
        Germain, Gregor, Murray and Larochelle (2015), MADE: masked autoencoder for distribution
        estimation, arXiv:1502.03509, equations 12 and 13.

    Example:
        >>> MADE(3, (16, 16), 2)(torch.zeros(7, 3)).shape
        torch.Size([7, 3, 2])
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int],
        param_dim: int,
        context_dim: int = 0,
        *,
        order: Sequence[int] | None = None,
        activation: Callable[[], nn.Module] = nn.ReLU,
        zero_last: bool = True,
        by_columns: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(input_dim, hidden_dims, param_dim, context_dim)
        order = list(range(input_dim)) if order is None else [int(i) for i in order]
        if sorted(order) != list(range(input_dim)):
            raise ValueError(f"`order` must be a permutation of range({input_dim}); got {order}.")
        self.input_dim = input_dim
        self.param_dim = param_dim
        self.context_dim = context_dim
        self.order = tuple(order)
        self.degrees = tuple(
            _hidden_degrees(width, input_dim, context_dim > 0) for width in hidden_dims
        )
        self.activation = activation()
        self.by_columns = by_columns
        self._is_ordered = order == list(range(input_dim))
        self.register_buffer("_order", torch.tensor(order), persistent=False)
        self.layers = nn.ModuleList(_MaskedLinear(mask) for mask in self._masks())
        if context_dim:
            self.context_layer = nn.Linear(context_dim, self.layers[0].out_features, bias=False)
        if zero_last:
            start_at_zero(self)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.forward_with_hidden(x, context)[0]

    def forward_with_hidden(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The output, and every hidden layer before and after its activation.

        A ReLU works in place, so there the two are the same.
        """
        h = self.layers[0](x)
        if self.context_dim:
            h = h + self.context_layer(context)
        hidden = []
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers[1:], 1):
            taken, h = h, activate(self.activation, h)
            hidden.append((taken, h))
            if self.by_columns and i == last:
                h = linear_by_columns(h, layer.masked_weight(), layer.bias)
            else:
                h = layer(h)
        return h.unflatten(-1, (self.param_dim, self.input_dim)).transpose(-1, -2), hidden

    @property
    def starts(self) -> tuple[tuple[int, ...], ...]:
        """First row of each variable in each level: variables, hidden layers, output.

        Row ``starts[l][i]`` is the first one of level ``l`` that needs variable ``i - 1`` to be
        known (level 0: that is variable ``i``). Each level has ``input_dim + 1`` entries.
        """
        variables = range(self.input_dim + 1)
        hidden = [tuple(bisect.bisect_left(d, i) for i in variables) for d in self.degrees]
        return (tuple(variables), *hidden, tuple(self.param_dim * i for i in variables))

    def sorted_layers(self, context: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """Masked weight and bias column of each layer, with variables in the network's order.

        The rows of the last layer are variable by variable. A context ``(N, context_dim)`` is
        added to the first bias, which then has ``N`` columns.
        """
        layers = [(layer.masked_weight(), layer.bias[:, None]) for layer in self.layers]
        weight, bias = layers[0]
        if context is not None:
            bias = bias + self.context_layer(context).t()
        layers[0] = (self.sort(weight, 1), bias)
        weight, bias = layers[-1]
        layers[-1] = (self._by_variable(weight), self._by_variable(bias))
        return layers

    def sort(self, x: Tensor, dim: int) -> Tensor:
        """Put the variables along ``dim`` into the network's order."""
        return x if self._is_ordered else x.index_select(dim, self._order)

    def unsort(self, x: Tensor, dim: int) -> Tensor:
        """Undo :meth:`sort`."""
        return x if self._is_ordered else x.index_select(dim, self._order.argsort())

    def _masks(self) -> list[Tensor]:
        """Which weights of each layer may differ from zero."""
        rank = self._order.argsort()
        # A unit of degree m sees degrees up to m; variable of rank r has degree r + 1 as an input
        # and, as an output, sees hidden units of degree up to r.
        hidden = [torch.tensor(d, device=rank.device) for d in self.degrees]
        sides = [rank + 1, *hidden, rank.repeat(self.param_dim)]
        return [
            seen[None, :] <= degree[:, None]
            for seen, degree in zip(sides, sides[1:], strict=False)
        ]

    def _by_variable(self, rows: Tensor) -> Tensor:
        rows = rows.unflatten(0, (self.param_dim, self.input_dim))
        return self.sort(rows, 1).transpose(0, 1).flatten(0, 1)


class _MaskedLinear(nn.Linear):
    """Linear map with some weights held at zero by a mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)

    def masked_weight(self) -> Tensor:
        return self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.masked_weight(), self.bias)


def _hidden_degrees(width: int, input_dim: int, has_context: bool) -> tuple[int, ...]:
    """Sorted degrees, spread evenly; degree 0 (context only) is of use only with a context."""
    lowest = 0 if has_context or input_dim == 1 else 1
    count = input_dim - lowest
    return tuple(sorted(lowest + unit % count for unit in range(width)))
