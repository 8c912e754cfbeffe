"""Recipes of multi-scale flows of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from flowvi.distributions import Flow
from flowvi.flows._sizes import Sizes
from flowvi.nn import ConvConditioner
from flowvi.transforms import (
    ActNorm,
    Affine,
    Coupling,
    ElementwiseMap,
    ElementwiseTransform,
    FlowTransform,
    LULinear,
    OnChannels,
    Pixelwise,
    Squeezed,
    checkerboard,
    compose,
)
from flowvi.transforms.base import event_shape_of

__all__ = ["glow_image", "realnvp_image"]

Shape = tuple[int, int, int]


def glow_image(
    shape: Sequence[int],
    context_dim: int = 0,
    *,
    num_levels: int = 2,
    num_layers: int = 4,
    hidden_dims: Sequence[int] = (64, 64),
    elementwise: ElementwiseMap | None = None,
    context_shape: Sequence[int] | None = None,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> Flow:
    """Glow: multi-scale flow of images, with learned 1 x 1 convolutions between couplings.

    A level squeezes the image to half its height and width, takes ``num_layers`` steps (activation
    normalisation, invertible 1 x 1 convolution, coupling with a convolutional network), and
    factors out half of the channels, whose Gaussian law depends on the other half; that goes on
    to the next level. The last level has a Gaussian law of its own. Both directions are one pass.

    Begin with ``initialize_norms(flow.transform, batch, context)``. Draw sharper images, closer
    to the mode, from ``flow.tempered(0.7)``. Pixels with hard bounds may go through a logit first:
    ``flow.then(ToInterval(shape, 0.0, 256.0, margin=0.05))``.

    Args:
        shape: channels, height and width; ``2 ** num_levels`` must divide the last two.
        context_dim: length of the context vector; 0 for none. It enters all couplings, and the
            Gaussian laws.
        num_levels: number of levels, at least 1.
        num_layers: number of steps of each level, at least 1.
        hidden_dims: channels of the hidden layers of each coupling's network.
        elementwise: the map of one number in the couplings; affine if left out.
        context_shape: channels, height and width of a context that is a flattened image; its
            size must be ``context_dim``. The last level's Gaussian law then ignores it.
        activation: makes the networks' nonlinearity.

    Raises:
        ValueError: if a size is wrong, or ``2 ** num_levels`` does not divide height and width.

    References:
        Kingma and Dhariwal (2018), Glow: generative flow with invertible 1x1 convolutions,
        arXiv:1807.03039, section 3 and figure 2; Dinh, Sohl-Dickstein and Bengio (2017),
        RealNVP, arXiv:1605.08803, section 3.6 (factoring out).

    Example:
        >>> import torch
        >>> flow = glow_image((1, 8, 8), context_dim=10, hidden_dims=(16, 16))
        >>> flow(torch.zeros(5, 10)).sample().shape
        torch.Size([5, 1, 8, 8])
    """
    parts = _Parts(shape, context_dim, num_layers, hidden_dims, context_shape, activation)
    parts.check_levels(num_levels, 2**num_levels if isinstance(num_levels, int) else 1)
    elementwise = Affine() if elementwise is None else elementwise

    def level(shape: Shape, left: int) -> FlowTransform:
        channels, height, width = squeezed = _squeeze(shape)
        steps: list[FlowTransform] = []
        for _ in range(num_layers):
            pixels = compose(LULinear.rotation(channels), ActNorm(channels))
            steps += [parts.coupling(squeezed, elementwise), Pixelwise(pixels, height, width)]
        if left == 1:
            return Squeezed(compose(parts.gaussian(squeezed), *steps))
        inner = OnChannels(level((channels // 2, height, width), left - 1), channels)
        # The law of the channels factored out: an affine function of noise, given the others.
        law = parts.coupling(squeezed, Affine(), hidden_dims=())
        return Squeezed(compose(inner, law, *steps))

    return Flow(level(parts.shape, num_levels))


def realnvp_image(
    shape: Sequence[int],
    context_dim: int = 0,
    *,
    num_levels: int = 2,
    num_layers: int = 3,
    hidden_dims: Sequence[int] = (64, 64),
    elementwise: ElementwiseMap | None = None,
    context_shape: Sequence[int] | None = None,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> Flow:
    """RealNVP for images: couplings by checkerboard, then by channel, at several scales.

    A level has ``num_layers`` couplings by checkerboard, squeezes the image, has as many by
    channel, and factors out half of the channels, with a standard normal law. The last level has
    one more coupling by checkerboard and nothing else. Activation normalisation stands where
    the paper has batch normalisation. Both directions are one pass.

    Args:
        shape: channels, height and width; ``2 ** (num_levels - 1)`` must divide the last two.
        context_dim: length of the context vector, which enters all couplings; 0 for none.
        num_levels: number of levels, at least 1.
        num_layers: number of couplings of each kind at each level, at least 1.
        hidden_dims: channels of the hidden layers of each coupling's network.
        elementwise: the map of one number in the couplings; affine if left out.
        context_shape: channels, height and width of a context that is a flattened image; its
            size must be ``context_dim``.
        activation: makes the networks' nonlinearity.

    Raises:
        ValueError: if a size is wrong, or ``2 ** (num_levels - 1)`` does not divide height and
            width.

    References:
        Dinh, Sohl-Dickstein and Bengio (2017), Density estimation using Real NVP,
        arXiv:1605.08803, sections 3.4 to 3.7.

    Example:
        >>> flow = realnvp_image((1, 8, 8), hidden_dims=(16, 16))
        >>> flow().sample((5,)).shape
        torch.Size([5, 1, 8, 8])
    """
    parts = _Parts(shape, context_dim, num_layers, hidden_dims, context_shape, activation)
    divisor = 2 ** (num_levels - 1) if isinstance(num_levels, int) else 1
    parts.check_levels(num_levels, divisor)
    if divisor**2 == math.prod(parts.shape[1:]):
        raise ValueError(
            "`shape` must have a height and width that leave more than one pixel at the last "
            f"level of {num_levels}; got {parts.shape}."
        )
    elementwise = Affine() if elementwise is None else elementwise

    def steps(shape: Shape, masks: list[Tensor | list[bool]]) -> list[FlowTransform]:
        layers: list[FlowTransform] = []
        for mask in masks:
            layers.append(parts.coupling(shape, elementwise, mask=mask))
            layers.append(Pixelwise(ActNorm(shape[0]), *shape[1:]))
        return layers

    def level(shape: Shape, left: int) -> FlowTransform:
        board = checkerboard(*shape[1:])
        by_pixel = steps(shape, _alternate(board, ~board, num_layers + (left == 1)))
        if left == 1:
            return compose(*by_pixel)
        channels, height, width = squeezed = _squeeze(shape)
        half = channels // 2
        first, second = [True] * half + [False] * half, [False] * half + [True] * half
        by_channel = steps(squeezed, _alternate(second, first, num_layers))
        inner = OnChannels(level((half, height, width), left - 1), channels)
        return compose(Squeezed(compose(inner, *by_channel)), *by_pixel)

    return Flow(level(parts.shape, num_levels))


class _Parts(Sizes):
    """Checked arguments that the recipes share, and the layers made from them."""

    def __init__(
        self,
        shape: Sequence[int],
        context_dim: int,
        num_layers: int,
        hidden_dims: Sequence[int],
        context_shape: Sequence[int] | None,
        activation: Callable[[], nn.Module],
    ) -> None:
        self.shape: Shape = tuple(event_shape_of(tuple(shape)))
        if len(self.shape) != 3:
            raise ValueError(f"`shape` must be (channels, height, width); got {self.shape}.")
        super().__init__(math.prod(self.shape), context_dim, num_layers, hidden_dims)
        self.context_shape = context_shape
        self.conv = partial(ConvConditioner, context_shape=context_shape, activation=activation)

    def check_levels(self, num_levels: int, divisor: int) -> None:
        if not isinstance(num_levels, int) or num_levels < 1:
            raise ValueError(f"`num_levels` must be an integer of at least 1; got {num_levels!r}.")
        if any(size % divisor for size in self.shape[1:]):
            raise ValueError(
                f"`shape` must have a height and width that {divisor} divides, for {num_levels} "
                f"levels; got {self.shape}. Use fewer levels, or pad the images."
            )

    def coupling(
        self,
        shape: Shape,
        elementwise: ElementwiseMap,
        *,
        mask: Tensor | list[bool] | None = None,
        hidden_dims: Sequence[int] | None = None,
    ) -> FlowTransform:
        widths = self.hidden_dims if hidden_dims is None else hidden_dims
        return Coupling(
            shape,
            elementwise,
            mask=mask,
            context_dim=self.context_dim,
            network=lambda size, *others: self.conv(size, widths, *others),
        )

    def gaussian(self, shape: Shape) -> FlowTransform:
        """A learned location and scale of every entry, which depend on a context vector."""
        context_dim = self.context_dim if self.context_shape is None else 0
        return ElementwiseTransform(shape, Affine(), context_dim, hidden_dims=())


def _squeeze(shape: Shape) -> Shape:
    channels, height, width = shape
    return 4 * channels, height // 2, width // 2


def _alternate(first: object, second: object, number: int) -> list:
    return [first if k % 2 == 0 else second for k in range(number)]
