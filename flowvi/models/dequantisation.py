"""Laws of a real image given its whole levels, for flows of images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from pyro.distributions import Uniform
from torch import Tensor, nn

from flowvi.distributions import FlowDistribution
from flowvi.distributions.pixels import check_levels
from flowvi.models.likelihoods import check_event_shape
from flowvi.nn import ConvConditioner
from flowvi.transforms import (
    Affine,
    Coupling,
    ElementwiseMap,
    FlowTransform,
    ToInterval,
    checkerboard,
    compose,
)

__all__ = ["Dequantizer", "UniformDequantizer", "VariationalDequantizer"]


class Dequantizer(nn.Module, ABC):
    """Base of the laws q(v | x) of a real image v with ``x <= v < x + 1`` at every pixel.

    A subclass writes ``_noise``, the law of ``v - x``.

    Args:
        event_shape: shape of an image.

    Shape:
        x: ``(*batch, *event_shape)``; the law has batch shape ``batch``.
    """

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.event_shape = check_event_shape(event_shape)

    def forward(self, x: Tensor) -> FlowDistribution:
        """Law of the real image."""
        low = x.new_zeros(self.event_shape)
        base = _Unit(low, low + 1, validate_args=False).to_event(len(self.event_shape))
        maps, context = self._noise(x)
        transform = compose(*maps, _Above(x, self.event_shape))
        batch_shape = x.shape[: x.dim() - len(self.event_shape)]
        return FlowDistribution(base, transform, context, batch_shape=batch_shape)

    @abstractmethod
    def _noise(self, x: Tensor) -> tuple[Sequence[FlowTransform], Tensor | None]:
        """Maps of the unit cube that make the noise from uniform noise, and their context."""


class UniformDequantizer(Dequantizer):
    """Uniform noise: v is anywhere in the pixel's unit interval.

    Args:
        event_shape: shape of an image.

    References:
        Theis, van den Oord and Bethge (2016), A note on the evaluation of generative models,
        arXiv:1511.01844, section 3.1.

    Example:
        >>> law = UniformDequantizer((1, 2, 2))(torch.full((5, 1, 2, 2), 3.0))
        >>> v = law.sample()
        >>> bool((v.floor() == 3).all()), law.log_prob(v).tolist()
        (True, [0.0, 0.0, 0.0, 0.0, 0.0])
    """

    def _noise(self, x: Tensor) -> tuple[Sequence[FlowTransform], Tensor | None]:
        return (), None


class VariationalDequantizer(Dequantizer):
    """Learned noise: a flow on the unit cube, conditional on the image.

    A network makes feature maps of the image; couplings by checkerboard read them and move the
    logits of uniform noise. It starts as uniform noise.

    Args:
        event_shape: channels, height and width.
        num_levels: number of levels of a pixel, at least 2.
        num_layers: number of couplings, at least 2.
        hidden_dims: channels of the hidden layers of all networks.
        num_features: feature maps made of the image.
        elementwise: the map of one number; affine if left out.
        activation: makes the networks' nonlinearity.

    Raises:
        ValueError: if the shape is not that of images, or a size is too small.

    References:
        Ho, Chen, Srinivas, Duan and Abbeel (2019), Flow++, arXiv:1902.00275, section 3.1.

    Example:
        >>> dequantizer = VariationalDequantizer((1, 4, 4), num_levels=17, hidden_dims=(8,))
        >>> dequantizer(torch.zeros(5, 1, 4, 4)).sample().shape
        torch.Size([5, 1, 4, 4])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        num_levels: int = 256,
        *,
        num_layers: int = 4,
        hidden_dims: Sequence[int] = (32, 32),
        num_features: int = 8,
        elementwise: ElementwiseMap | None = None,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__(event_shape)
        if len(self.event_shape) != 3:
            raise ValueError(
                f"`event_shape` must be (channels, height, width); got {self.event_shape}."
            )
        if not isinstance(num_layers, int) or num_layers < 2:
            raise ValueError(f"`num_layers` must be an integer of at least 2; got {num_layers!r}.")
        self.num_levels = check_levels(num_levels)
        _, height, width = self.event_shape
        maps = (num_features, height, width)
        self.features = ConvConditioner(
            self.event_shape, hidden_dims, num_features, activation=activation, zero_last=False
        )

        def network(size: Sequence[int], num_outputs: int, context_dim: int) -> nn.Module:
            return ConvConditioner(
                size,
                hidden_dims,
                num_outputs,
                context_dim,
                context_shape=maps,
                activation=activation,
            )

        board = checkerboard(height, width)
        couplings = [
            Coupling(
                self.event_shape,
                Affine() if elementwise is None else elementwise,
                mask=~board if layer % 2 else board,
                context_dim=num_features * height * width,
                network=network,
            )
            for layer in range(num_layers)
        ]
        unit = ToInterval(self.event_shape)
        self.transform = compose(unit.inv, *couplings, unit)

    def _noise(self, x: Tensor) -> tuple[Sequence[FlowTransform], Tensor | None]:
        features = self.features(2 * x / (self.num_levels - 1) - 1)
        return (self.transform,), features.flatten(-3)


class _Unit(Uniform):
    """Uniform law of the unit interval; what rounding puts on its end counts as inside."""

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.zeros_like(value)


class _Above(FlowTransform):
    """Adds whole levels to what lies in the unit interval, and stays below the next level."""

    def __init__(self, x: Tensor, event_shape: tuple[int, ...]) -> None:
        super().__init__(event_shape)
        self.register_buffer("levels", x, persistent=False)

    def _call_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        above = self.levels + 1
        # In single precision 255 plus almost 1 rounds to 256.
        y = torch.minimum(self.levels + x, torch.nextafter(above, self.levels))
        return y, y.new_zeros(self._batch_shape(y))

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x = y - self.levels
        return x, x.new_zeros(self._batch_shape(x))
