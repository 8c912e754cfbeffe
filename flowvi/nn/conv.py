"""Convolutions with gates, and networks that keep batch dimensions of any number."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["GatedConv2d", "GatedConvTranspose2d", "batched"]


def batched(network: Callable[[Tensor], Tensor], x: Tensor, event_dim: int = 3) -> Tensor:
    """Apply a network that takes one batch dimension to an input with any number of them.

    Args:
        network: maps ``(B, *event)`` to ``(B, *other)``.
        x: input ``(*batch, *event)``.
        event_dim: number of event dimensions of ``x``.
    """
    batch = x.shape[: x.dim() - event_dim]
    if len(batch) == 1:
        return network(x)
    made = network(x.reshape(-1, *x.shape[x.dim() - event_dim :]))
    return made.reshape(*batch, *made.shape[1:])


class _Gated(nn.Module):
    """What both gated convolutions share: one convolution makes values and gates."""

    def __init__(self, conv: nn.Module, activation: Callable[[], nn.Module] | None) -> None:
        super().__init__()
        self.conv = conv
        self.activation = nn.Identity() if activation is None else activation()

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.conv(x).chunk(2, -3)
        return self.activation(value) * gate.sigmoid()


class GatedConv2d(_Gated):
    r"""Convolution whose output is gated by a second one.

    .. math:: y = \phi(W * x + b) \circ s(V * x + c)

    with the logistic function s.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: side of the kernel.
        stride: step of the kernel.
        padding: zeros on each side.
        activation: makes :math:`\phi`; the identity if left out.

    Shape:
        x: ``(B, in_channels, H, W)``; y: ``(B, out_channels, H', W')``.

    References:
        van den Oord et al. (2016), Conditional image generation with PixelCNN decoders,
        arXiv:1606.05328, equation 2; as in van den Berg et al. (2018), Sylvester normalizing
        flows, arXiv:1803.05649, appendix.

    Example:
        >>> import torch
        >>> GatedConv2d(1, 4, 5, stride=2, padding=2)(torch.zeros(2, 1, 28, 20)).shape
        torch.Size([2, 4, 14, 10])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int = 0,
        activation: Callable[[], nn.Module] | None = None,
    ) -> None:
        conv = nn.Conv2d(in_channels, 2 * out_channels, kernel_size, stride, padding)
        super().__init__(conv, activation)


class GatedConvTranspose2d(_Gated):
    r"""Transposed convolution whose output is gated by a second one; see :class:`GatedConv2d`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: side of the kernel.
        stride: factor by which the picture grows.
        padding: rows taken away on each side.
        output_padding: rows added on one side, so that a stride gives its exact multiple.
        activation: makes the nonlinearity of the values; the identity if left out.

    Shape:
        x: ``(B, in_channels, H, W)``; y: ``(B, out_channels, H', W')``.

    Example:
        >>> import torch
        >>> up = GatedConvTranspose2d(4, 2, 5, stride=2, padding=2, output_padding=1)
        >>> up(torch.zeros(2, 4, 14, 10)).shape
        torch.Size([2, 2, 28, 20])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int = 0,
        output_padding: int | tuple[int, int] = 0,
        activation: Callable[[], nn.Module] | None = None,
    ) -> None:
        conv = nn.ConvTranspose2d(
            in_channels, 2 * out_channels, kernel_size, stride, padding, output_padding
        )
        super().__init__(conv, activation)
