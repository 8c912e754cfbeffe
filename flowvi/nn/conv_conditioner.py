"""Convolutional conditioner of images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from flowvi.nn.conv import batched

__all__ = ["ConvConditioner"]


class ConvConditioner(nn.Module):
    """Convolutional network that keeps height and width; a context enters its first layer.

    The first and the last kernel are 3 x 3, those between are 1 x 1. A context vector becomes
    ``context_maps`` feature maps through a linear layer. A context that is an image, flattened,
    says so by ``context_shape``; a larger one is squeezed to the network's height and width. The
    context's share is computed on the context's own batch and then broadcast.

    Args:
        input_shape: channels, height and width of the input.
        hidden_channels: channels of the hidden layers; empty for one convolution.
        out_channels: channels of the output, at least 1.
        context_dim: length of the context; 0 for none.
        context_shape: channels, height and width of a context that is a flattened image.
        context_maps: feature maps made of a context vector, at least 1.
        activation: makes the nonlinearity between layers.
        zero_last: start the last layer at zero, so that the output starts at zero.

    Shape:
        x: ``(*batch, *input_shape)``; context: ``(*batch, context_dim)``, broadcast against the
        batch of ``x``; output: ``(*batch, out_channels, height, width)``.

    Raises:
        ValueError: if a size is below 1, or ``context_shape`` does not fit.

    References:
        Kingma and Dhariwal (2018), Glow, arXiv:1807.03039, section 3.3 (the kernels).

    Example:
        >>> import torch
        >>> net = ConvConditioner((2, 4, 4), (8, 8), 6, context_dim=10)
        >>> net(torch.zeros(5, 3, 2, 4, 4), torch.zeros(3, 10)).shape
        torch.Size([5, 3, 6, 4, 4])
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        hidden_channels: Sequence[int],
        out_channels: int,
        context_dim: int = 0,
        *,
        context_shape: Sequence[int] | None = None,
        context_maps: int = 4,
        activation: Callable[[], nn.Module] = nn.ReLU,
        zero_last: bool = True,
    ) -> None:
        super().__init__()
        channels = (input_shape[0], *hidden_channels, out_channels)
        if min(*input_shape, *channels, context_maps) < 1:
            raise ValueError(
                "`input_shape`, `hidden_channels`, `out_channels` and `context_maps` must be at "
                f"least 1; got {tuple(input_shape)}, {tuple(hidden_channels)}, {out_channels} and "
                f"{context_maps}."
            )
        num_layers = len(channels) - 1
        self.layers = nn.ModuleList(
            _conv(size, 3 if i in (0, num_layers - 1) else 1)
            for i, size in enumerate(itertools.pairwise(channels))
        )
        self.activation = activation()
        self.context_maps = None
        if context_dim:
            self.context_maps = _context_maps(
                tuple(input_shape[1:]), context_dim, context_shape, context_maps
            )
            maps = self.context_maps.num_maps
            self.context_layer = _conv((maps, channels[1]), 3, bias=False)
        if zero_last:
            last = [self.layers[-1]]
            if context_dim and num_layers == 1:
                last.append(self.context_layer)
            for parameter in itertools.chain(*(layer.parameters() for layer in last)):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        first, *others = self.layers
        h = batched(first, x)
        if self.context_maps is not None:
            h = h + batched(self.context_layer, self.context_maps(context))
        for layer in others:
            h = batched(layer, self.activation(h))
        return h


class _LinearMaps(nn.Module):
    """Feature maps from a vector."""

    def __init__(self, size: tuple[int, int], context_dim: int, num_maps: int) -> None:
        super().__init__()
        self.num_maps = num_maps
        self.shape = (num_maps, *size)
        self.linear = nn.Linear(context_dim, math.prod(self.shape))

    def forward(self, context: Tensor) -> Tensor:
        return self.linear(context).unflatten(-1, self.shape)


class _SqueezedMaps(nn.Module):
    """Feature maps from a flattened image, squeezed ``factor`` times."""

    def __init__(self, context_shape: tuple[int, ...], factor: int) -> None:
        super().__init__()
        self.shape = context_shape
        self.factor = factor
        self.num_maps = context_shape[0] * factor**2

    def forward(self, context: Tensor) -> Tensor:
        return F.pixel_unshuffle(context.unflatten(-1, self.shape), self.factor)


def _context_maps(
    size: tuple[int, int],
    context_dim: int,
    context_shape: Sequence[int] | None,
    num_maps: int,
) -> nn.Module:
    if context_shape is None:
        return _LinearMaps(size, context_dim, num_maps)
    context_shape = tuple(context_shape)
    if len(context_shape) != 3 or math.prod(context_shape) != context_dim:
        raise ValueError(
            f"`context_shape` must have 3 sizes with product {context_dim} (context_dim); "
            f"got {context_shape}."
        )
    factor = context_shape[1] // size[0]
    if factor < 1 or context_shape[1:] != (factor * size[0], factor * size[1]):
        raise ValueError(
            "`context_shape` must have a height and width that are the same multiple of "
            f"{size}; got {context_shape}."
        )
    return _SqueezedMaps(context_shape, factor)


def _conv(channels: tuple[int, int], kernel_size: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(*channels, kernel_size, padding=kernel_size // 2, bias=bias)
