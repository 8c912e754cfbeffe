"""Maps of images made from other maps: at every pixel, at half the size, on some channels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from flowvi.transforms.base import Direction, FlowTransform, require_vectors

__all__ = ["OnChannels", "Pixelwise", "Squeezed"]


class _Around(FlowTransform):
    """A map around another one, which sees the values in another arrangement."""

    def __init__(self, transform: FlowTransform, event_shape: tuple[int, ...]) -> None:
        super().__init__(event_shape, transform.context_dim)
        self.transform = transform

    @property
    def has_inverse(self) -> bool:
        return self.transform.has_inverse

    @property
    def exact_inverse(self) -> bool:
        return self.transform.exact_inverse

    @property
    def has_score_recursion(self) -> bool:
        return self.transform.has_score_recursion

    @property
    def cheap(self) -> Direction:
        return self.transform.cheap

    def _enter(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _leave(self, inner: Tensor, x: Tensor) -> Tensor:
        """The opposite of :meth:`_enter`; ``x`` is what went in, for parts that pass by."""
        raise NotImplementedError

    def _context(self, context: Tensor | None) -> Tensor | None:
        return context

    def _total(self, ladj: Tensor) -> Tensor:
        return ladj

    def _call_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        y, ladj = self.transform._call_and_ladj(self._enter(x), self._context(context))
        return self._leave(y, x), self._total(ladj)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x, ladj = self.transform._inverse_and_ladj(self._enter(y), self._context(context))
        return self._leave(x, y), self._total(ladj)

    def _call_ladj_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, ladj, pushed = self.transform._call_ladj_and_score(
            self._enter(x), self._enter(score), self._context(context)
        )
        return self._leave(y, x), self._total(ladj), self._leave(pushed, score.detach())


class Pixelwise(_Around):
    """A map of vectors, applied to the channels of every pixel alike.

    With :class:`LULinear` it is the invertible 1 x 1 convolution, with :class:`ActNorm` the
    activation normalisation of images, one location and scale for each channel.

    Args:
        transform: map of vectors with one dimension for each channel.
        height: height of the images, at least 1.
        width: width of the images, at least 1.

    Shape:
        x: ``(*batch, channels, height, width)``; context: ``(*batch, context_dim)``, the same for
        all pixels; ladj: ``(*batch,)``, in nats.

    Raises:
        ValueError: if ``transform`` is no map of vectors, or a size is below 1.

    References:
        Kingma and Dhariwal (2018), Glow, arXiv:1807.03039, sections 3.1 and 3.2.

    Example:
        >>> from flowvi.transforms import LULinear
        >>> y, ladj = Pixelwise(LULinear(3), 4, 4).call_and_ladj(torch.zeros(5, 3, 4, 4))
        >>> y.shape, ladj.shape
        (torch.Size([5, 3, 4, 4]), torch.Size([5]))
    """

    def __init__(self, transform: FlowTransform, height: int, width: int) -> None:
        require_vectors("transform", transform.event_shape)
        super().__init__(transform, (transform.input_dim, height, width))

    def _enter(self, x: Tensor) -> Tensor:
        return x.movedim(-3, -1)

    def _leave(self, inner: Tensor, x: Tensor) -> Tensor:
        return inner.movedim(-1, -3)

    def _context(self, context: Tensor | None) -> Tensor | None:
        return None if context is None else context[..., None, None, :]

    def _total(self, ladj: Tensor) -> Tensor:
        return ladj.sum((-2, -1))


class Squeezed(_Around):
    """A map of images at half the height and width, where four pixels are four channels.

    Args:
        transform: map of images with event shape ``(4 channels, height / 2, width / 2)``.

    Shape:
        x: ``(*batch, channels, height, width)``; ladj: ``(*batch,)``, in nats.

    Raises:
        ValueError: if ``transform`` is no map of images whose channels four divides.

    References:
        Dinh, Sohl-Dickstein and Bengio (2017), RealNVP, arXiv:1605.08803, section 3.6.

    Example:
        >>> from flowvi.transforms import Coupling
        >>> Squeezed(Coupling((4, 2, 2)))(torch.zeros(5, 1, 4, 4)).shape
        torch.Size([5, 1, 4, 4])
    """

    def __init__(self, transform: FlowTransform) -> None:
        channels, height, width = _image_shape(transform)
        if channels % 4:
            raise ValueError(
                f"`transform` must have a number of channels that 4 divides; got {channels}."
            )
        super().__init__(transform, (channels // 4, 2 * height, 2 * width))

    def _enter(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, 2)

    def _leave(self, inner: Tensor, x: Tensor) -> Tensor:
        return F.pixel_shuffle(inner, 2)


class OnChannels(_Around):
    """A map of the first channels of images; the others stay as they are.

    In a multi-scale flow the other channels are factored out. A coupling after it, which moves
    those and keeps the first ones, gives them a Gaussian law whose parameters depend on the rest.

    Args:
        transform: map of images with fewer channels.
        num_channels: channels of the images, above those of ``transform``.

    Shape:
        x: ``(*batch, num_channels, height, width)``; ladj: ``(*batch,)``, in nats.

    Raises:
        ValueError: if ``transform`` is no map of images, or leaves no channel over.

    References:
        Dinh, Sohl-Dickstein and Bengio (2017), RealNVP, arXiv:1605.08803, section 3.6.

    Example:
        >>> from flowvi.transforms import Coupling
        >>> y = OnChannels(Coupling((2, 4, 4)), 3)(torch.ones(5, 3, 4, 4))
        >>> y.shape
        torch.Size([5, 3, 4, 4])
    """

    def __init__(self, transform: FlowTransform, num_channels: int) -> None:
        channels, height, width = _image_shape(transform)
        if not isinstance(num_channels, int) or num_channels <= channels:
            raise ValueError(
                f"`num_channels` must be an integer above {channels} (channels of `transform`); "
                f"got {num_channels!r}."
            )
        super().__init__(transform, (num_channels, height, width))
        self._num_moved = channels

    def _enter(self, x: Tensor) -> Tensor:
        return x[..., : self._num_moved, :, :]

    def _leave(self, inner: Tensor, x: Tensor) -> Tensor:
        rest = x[..., self._num_moved :, :, :]
        return torch.cat([inner, rest.expand(*inner.shape[:-3], *rest.shape[-3:])], -3)


def _image_shape(transform: FlowTransform) -> tuple[int, int, int]:
    shape = tuple(transform.event_shape)
    if len(shape) != 3:
        raise ValueError(
            "`transform` must be a map of images (channels, height, width); got one of event "
            f"shape {shape}."
        )
    return shape
