"""Fully connected conditioner."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MLP", "forward_with_pullback"]


class MLP(nn.Module):
    """Fully connected network whose context enters the first layer through its own linear map.

    The context's share is computed on the context's own batch and then broadcast, so a context
    shared by many particles costs one product, not one for each particle.

    Args:
        input_dim: length of the input, at least 1.
        hidden_dims: widths of the hidden layers; empty for a linear map.
        output_dim: length of the output, at least 1.
        context_dim: length of the context vector; 0 for none.
        activation: makes the nonlinearity between layers.
        zero_last: start the last layer at zero, so that the output starts at zero.
        by_columns: store the output column by column (same values, other strides), for users that
            work on one output at a time.

    Shape:
        x: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``, broadcast against the
        batch of ``x``; output: ``(*batch, output_dim)``.

    Raises:
        ValueError: if a size is below 1 (``context_dim``: below 0).

    Example:
        >>> MLP(3, (16, 16), 5, context_dim=2)(torch.zeros(7, 4, 3), torch.zeros(4, 2)).shape
        torch.Size([7, 4, 5])
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int],
        output_dim: int,
        context_dim: int = 0,
        *,
        activation: Callable[[], nn.Module] = nn.ReLU,
        zero_last: bool = True,
        by_columns: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(input_dim, hidden_dims, output_dim, context_dim)
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.context_dim = context_dim
        sizes = (input_dim, *hidden_dims, output_dim)
        self.layers = nn.ModuleList(
            nn.Linear(n_in, n_out) for n_in, n_out in zip(sizes, sizes[1:], strict=False)
        )
        self.activation = activation()
        self.by_columns = by_columns
        if context_dim:
            self.context_layer = nn.Linear(context_dim, sizes[1], bias=False)
        if zero_last:
            start_at_zero(self)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self._forward_with_hidden(x, context)[0]

    def forward_with_pullback(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Output, and the map of a gradient for it to the gradient for ``x``, without a graph.

        For tanh and ReLU the derivative is read off the hidden values, which costs a third of a
        call of autograd; other activations go through autograd.
        """
        slope = _SLOPES.get(type(self.activation))
        if slope is None:
            return _forward_with_autograd(self, x, context)
        h, hidden = self._forward_with_hidden(x, context)

        @torch.no_grad()
        def pull(grad: Tensor) -> Tensor:
            for layer, value in zip(self.layers[:0:-1], hidden[::-1], strict=True):
                grad = (grad @ layer.weight) * slope(value)
            return grad @ self.layers[0].weight

        return h, pull

    def forward_with_tangent(
        self, x: Tensor, tangent: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output and its derivative along a tangent of ``x``, at a fixed context, with a graph.

        Same as forward mode, and several times faster for small batches, where that one spends
        its time on bookkeeping.
        """
        first, *others = self.layers
        h, dh = F.linear(x, first.weight, first.bias), F.linear(tangent, first.weight)
        if self.context_dim:
            h = h + self.context_layer(context)
        for layer in others:
            h, slope = value_and_slope(self.activation, h)
            h, dh = F.linear(h, layer.weight, layer.bias), F.linear(dh * slope, layer.weight)
        return h, dh

    def _forward_with_hidden(
        self, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        first, *others = self.layers
        h = F.linear(x, first.weight, first.bias)
        if self.context_dim:
            h = h + self.context_layer(context)
        hidden = []
        for layer in others:
            h = activate(self.activation, h)
            hidden.append(h)
            by_columns = self.by_columns and layer is others[-1]
            linear = linear_by_columns if by_columns else F.linear
            h = linear(h, layer.weight, layer.bias)
        return h, hidden


def forward_with_pullback(
    network: nn.Module, x: Tensor, context: Tensor | None = None
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """:meth:`MLP.forward_with_pullback` for any network, through autograd where it has none."""
    own = getattr(network, "forward_with_pullback", None)
    return _forward_with_autograd(network, x, context) if own is None else own(x, context)


def _forward_with_autograd(
    network: nn.Module, x: Tensor, context: Tensor | None
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        h = network(x, context)
    return h, lambda grad: torch.autograd.grad(h, x, grad, retain_graph=True)[0]


def activate(activation: nn.Module, h: Tensor) -> Tensor:
    """Apply an activation to a tensor that nothing else needs; ReLU then works in place."""
    return torch.relu_(h) if type(activation) is nn.ReLU else activation(h)


def linear_by_columns(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear map whose output is stored column by column."""
    out = torch.addmm(bias[:, None], weight, x.reshape(-1, x.shape[-1]).t())
    return out.reshape(len(weight), *x.shape[:-1]).movedim(0, -1)


def value_and_slope(activation: nn.Module, z: Tensor) -> tuple[Tensor, Tensor]:
    """An elementwise activation and its derivative, with a graph."""
    if type(activation) is nn.Tanh:
        value = torch.tanh(z)
        return value, torch.addcmul(z.new_ones(()), value, value, value=-1)
    if type(activation) is nn.Sigmoid:
        value = torch.sigmoid(z)
        return value, torch.addcmul(value, value, value, value=-1)
    if type(activation) is nn.Identity:
        return z, torch.ones_like(z)
    if type(activation) is nn.Softplus:
        return activation(z), torch.sigmoid(activation.beta * z)
    return torch.func.jvp(activation, (z,), (torch.ones_like(z),))


# Derivative of an activation as a function of its value.
_SLOPES = {
    nn.Tanh: lambda value: torch.addcmul(value.new_ones(()), value, value, value=-1),
    nn.ReLU: lambda value: (value > 0).to(value.dtype),
}


def slope_of(activation: Callable[[Tensor], Tensor], taken: Tensor, made: Tensor) -> Tensor:
    """Derivative of an elementwise activation, without a graph.

    Args:
        activation: the activation.
        taken: what it was applied to; not looked at for a tanh or a ReLU.
        made: what it gave.
    """
    slope = _SLOPES.get(type(activation))
    if slope is not None:
        return slope(made.detach())
    with torch.enable_grad():
        leaf = taken.detach().requires_grad_()
        return torch.autograd.grad(activation(leaf).sum(), leaf)[0]


@torch.no_grad()
def start_at_zero(network: nn.Module) -> None:
    """Set the last layer to zero, and the context layer where that one is the last."""
    last = network.layers[-1]
    last.weight.zero_()
    last.bias.zero_()
    if network.context_dim and len(network.layers) == 1:
        network.context_layer.weight.zero_()


def check_sizes(
    input_dim: int, hidden_dims: Sequence[int], output_dim: int, context_dim: int
) -> None:
    """Refuse sizes that no network can have."""
    if min(input_dim, output_dim) < 1:
        name, value = min(("input_dim", input_dim), ("output_dim", output_dim), key=lambda s: s[1])
        raise ValueError(f"`{name}` must be at least 1; got {value}.")
    if any(width < 1 for width in hidden_dims):
        raise ValueError(f"`hidden_dims` must all be at least 1; got {tuple(hidden_dims)}.")
    if context_dim < 0:
        raise ValueError(f"`context_dim` must be a non-negative integer; got {context_dim}.")
