"""Encoders and decoders of images, fully connected and convolutional."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from flowvi.models.likelihoods import check_event_shape
from flowvi.nn.conv import GatedConv2d, GatedConvTranspose2d, batched
from flowvi.nn.mlp import MLP

__all__ = ["ConvDecoder", "ConvEncoder", "MLPDecoder", "MLPEncoder"]


class MLPEncoder(nn.Module):
    """Fully connected network from an image to features; its last layer is activated too.

    Args:
        event_shape: shape of an image.
        hidden_dims: widths of the layers, at least one; the last is the number of features.
        activation: makes the nonlinearity.

    Attributes:
        output_dim: number of features.

    Shape:
        x: ``(*batch, *event_shape)``; features: ``(*batch, output_dim)``.

    Example:
        >>> import torch
        >>> MLPEncoder((1, 8, 8), (32, 16))(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 16])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        hidden_dims: Sequence[int] = (256, 256),
        *,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        if not hidden_dims:
            raise ValueError("`hidden_dims` must hold at least one width; got ().")
        self.event_shape = check_event_shape(event_shape)
        *hidden, self.output_dim = hidden_dims
        size = math.prod(self.event_shape)
        self.network = MLP(size, hidden, self.output_dim, activation=activation, zero_last=False)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.network(x.flatten(-len(self.event_shape))))


class MLPDecoder(nn.Module):
    """Fully connected network from latents to the numbers of a likelihood.

    Args:
        latent_dim: length of the latent vector, that of a context included.
        hidden_dims: widths of the hidden layers; empty for a linear map.
        output_shape: shape of what the likelihood takes, ``likelihood.output_shape``.
        activation: makes the nonlinearity.

    Shape:
        z: ``(*batch, latent_dim)``; result: ``(*batch, *output_shape)``.

    Example:
        >>> import torch
        >>> MLPDecoder(2, (16,), (1, 1, 8, 8))(torch.zeros(5, 2)).shape
        torch.Size([5, 1, 1, 8, 8])
    """

    def __init__(
        self,
        latent_dim: int,
        hidden_dims: Sequence[int],
        output_shape: Sequence[int],
        *,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.input_dim = latent_dim
        self.output_shape = check_event_shape(output_shape)
        size = math.prod(self.output_shape)
        self.network = MLP(latent_dim, hidden_dims, size, activation=activation, zero_last=False)

    def forward(self, z: Tensor) -> Tensor:
        return self.network(z).unflatten(-1, self.output_shape)


class ConvEncoder(nn.Module):
    """Gated convolutions, two of which halve the picture, and a gated layer over what is left.

    Args:
        event_shape: shape of an image ``(C, H, W)``.
        channels: channels of the two stages.
        output_dim: number of features.

    Shape:
        x: ``(*batch, C, H, W)``; features: ``(*batch, output_dim)``.

    References:
        van den Berg et al. (2018), Sylvester normalizing flows, arXiv:1803.05649, appendix, with
        five layers there as well.

    Example:
        >>> import torch
        >>> ConvEncoder((1, 28, 20), (4, 8), 16)(torch.zeros(5, 1, 28, 20)).shape
        torch.Size([5, 16])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        channels: tuple[int, int] = (32, 64),
        output_dim: int = 256,
    ) -> None:
        super().__init__()
        self.event_shape = _check_image(event_shape)
        self.output_dim = output_dim
        low, high = channels
        colours, height, width = self.event_shape
        self.network = nn.Sequential(
            GatedConv2d(colours, low, 5, padding=2),
            GatedConv2d(low, low, 5, stride=2, padding=2),
            GatedConv2d(low, high, 5, padding=2),
            GatedConv2d(high, high, 5, stride=2, padding=2),
            GatedConv2d(high, output_dim, (_halved(height), _halved(width))),
            nn.Flatten(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return batched(self.network, x)


class ConvDecoder(nn.Module):
    """Gated transposed convolutions from latents to the numbers of a likelihood.

    The mirror image of :class:`ConvEncoder`; a last linear map makes the numbers of each pixel
    from its ``channels[0]`` features.

    Args:
        latent_dim: length of the latent vector, that of a context included.
        channels: channels of the two stages, the one at full size first.
        output_shape: ``likelihood.output_shape``, ``(num_params, C, H, W)``.

    Shape:
        z: ``(*batch, latent_dim)``; result: ``(*batch, num_params, C, H, W)``.

    References:
        van den Berg et al. (2018), Sylvester normalizing flows, arXiv:1803.05649, appendix.

    Example:
        >>> import torch
        >>> ConvDecoder(8, (4, 8), (256, 1, 28, 20))(torch.zeros(5, 8)).shape
        torch.Size([5, 256, 1, 28, 20])
    """

    def __init__(
        self,
        latent_dim: int,
        channels: tuple[int, int],
        output_shape: Sequence[int],
    ) -> None:
        super().__init__()
        self.input_dim = latent_dim
        self.output_shape = check_event_shape(output_shape)
        num_params, *image = self.output_shape
        colours, height, width = _check_image(image)
        low, high = channels
        sizes = [(s, _halved_once(s), _halved(s)) for s in (height, width)]
        grow_first, grow_last = (tuple(1 - full[k] % 2 for full in sizes) for k in (1, 0))
        self.network = nn.Sequential(
            nn.Unflatten(-1, (latent_dim, 1, 1)),
            GatedConvTranspose2d(latent_dim, high, tuple(s[2] for s in sizes)),
            GatedConvTranspose2d(high, high, 5, stride=2, padding=2, output_padding=grow_first),
            GatedConvTranspose2d(high, low, 5, padding=2),
            GatedConvTranspose2d(low, low, 5, stride=2, padding=2, output_padding=grow_last),
            GatedConv2d(low, low, 5, padding=2),
        )
        self.last = nn.Linear(low, colours * num_params)

    def forward(self, z: Tensor) -> Tensor:
        num_params, colours = self.output_shape[:2]
        # The numbers of a pixel side by side, which is how a law of many levels reads them.
        params = self.last(batched(self.network, z, 1).movedim(-3, -1))
        return params.unflatten(-1, (colours, num_params)).movedim((-1, -2), (-4, -3))


def _halved_once(size: int) -> int:
    """Size after a convolution of side 5, stride 2 and padding 2."""
    return (size + 1) // 2


def _halved(size: int) -> int:
    return _halved_once(_halved_once(size))


def _check_image(event_shape: Sequence[int]) -> tuple[int, ...]:
    shape = check_event_shape(event_shape)
    if len(shape) != 3:
        raise ValueError(f"`event_shape` must be (C, H, W); got {shape}.")
    return shape
