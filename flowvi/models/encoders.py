"""Encoders of observed series: one context for each observation, or one for all times."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flowvi.nn.mlp import MLP

__all__ = ["ConvolutionalEncoder", "FirstFramesEncoder", "RecurrentEncoder", "SeriesEncoder"]


class SeriesEncoder(nn.Module, ABC):
    """Base of the encoders; a new one writes ``forward``.

    Attributes:
        context_dim: length of a context.
        is_static: whether there is one context for all times.

    Shape:
        data: ``(*batch, T, data_dim)``; times: ``(T,)`` or ``(*batch, T)``; mask: ``(*batch, T)``,
        boolean, or None; context: ``(*batch, T, context_dim)``, or ``(*batch, context_dim)`` of a
        static encoder.
    """

    context_dim: int
    is_static: bool = False

    @abstractmethod
    def forward(self, data: Tensor, times: Tensor, mask: Tensor | None = None) -> Tensor:
        """The contexts; values at times that the mask leaves out must not matter."""


class RecurrentEncoder(SeriesEncoder):
    """Gated recurrent network run backwards: each context has seen its time and all after it.

    Args:
        data_dim: length of an observation.
        context_dim: length of a context.
        hidden_dim: units of the recurrent network.

    References:
        Li, Wong, Chen and Duvenaud (2020), arXiv:2001.01328, section 7.3.

    Example:
        >>> encoder = RecurrentEncoder(data_dim=2, context_dim=3)
        >>> encoder(torch.zeros(5, 7, 2), torch.linspace(0, 1, 7)).shape
        torch.Size([5, 7, 3])
    """

    def __init__(self, data_dim: int, context_dim: int, hidden_dim: int = 64) -> None:
        super().__init__()
        self.context_dim = context_dim
        self.network = nn.GRU(data_dim + 2, hidden_dim, batch_first=True)
        self.output = nn.Linear(hidden_dim, context_dim)

    def forward(self, data: Tensor, times: Tensor, mask: Tensor | None = None) -> Tensor:
        rows = with_gaps(data, times, mask)
        if mask is None:
            backwards = rows.flip(-2)
        else:
            order = _reversal(mask)
            backwards = torch.take_along_dim(rows, order, -2)
        hidden, _ = self.network(backwards)
        hidden = hidden.flip(-2) if mask is None else torch.take_along_dim(hidden, order, -2)
        return self.output(hidden)


class ConvolutionalEncoder(SeriesEncoder):
    """Convolutions along time, dilated more from layer to layer; a context sees both ways.

    Args:
        data_dim: length of an observation.
        context_dim: length of a context.
        hidden_dim: channels of the hidden layers.
        num_layers: hidden layers; layer l has taps 2^l apart.
        kernel_size: taps, an odd number.

    References:
        van den Oord et al. (2016), WaveNet, arXiv:1609.03499, section 2.1, for the dilation.

    Example:
        >>> encoder = ConvolutionalEncoder(data_dim=2, context_dim=3)
        >>> encoder(torch.zeros(5, 7, 2), torch.linspace(0, 1, 7)).shape
        torch.Size([5, 7, 3])
    """

    def __init__(
        self,
        data_dim: int,
        context_dim: int,
        hidden_dim: int = 32,
        num_layers: int = 3,
        kernel_size: int = 3,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` must be odd and positive; got {kernel_size}.")
        self.context_dim = context_dim
        self.layers = nn.ModuleList(
            nn.Conv1d(
                hidden_dim if depth else data_dim + 2,
                hidden_dim,
                kernel_size,
                padding="same",
                dilation=2**depth,
            )
            for depth in range(num_layers)
        )
        self.output = nn.Linear(hidden_dim, context_dim)

    def forward(self, data: Tensor, times: Tensor, mask: Tensor | None = None) -> Tensor:
        rows = with_gaps(data, times, mask)
        hidden = rows.reshape(-1, *rows.shape[-2:]).transpose(-1, -2)
        there = None if mask is None else mask.reshape(-1, 1, mask.shape[-1]).to(rows.dtype)
        for layer in self.layers:
            hidden = nn.functional.softplus(layer(hidden))
            # What lies outside a series is zero in every layer, as beyond its ends.
            hidden = hidden if there is None else hidden * there
        context = self.output(hidden.transpose(-1, -2))
        return context.reshape(*rows.shape[:-1], self.context_dim)


class FirstFramesEncoder(SeriesEncoder):
    """One context from the first few observations, so that the rest is forecast.

    Args:
        data_dim: length of an observation.
        context_dim: length of the context.
        num_frames: observations that are looked at; they must all be there.
        hidden_dims: widths of the hidden layers.
        activation: makes the nonlinearity.

    References:
        Li, Wong, Chen and Duvenaud (2020), arXiv:2001.01328, section 7.4.

    Example:
        >>> encoder = FirstFramesEncoder(data_dim=2, context_dim=3, num_frames=4)
        >>> encoder(torch.zeros(5, 7, 2), torch.linspace(0, 1, 7)).shape
        torch.Size([5, 3])
    """

    is_static = True

    def __init__(
        self,
        data_dim: int,
        context_dim: int,
        num_frames: int,
        hidden_dims: Sequence[int] = (30,),
        activation: Callable[[], nn.Module] = nn.Softplus,
    ) -> None:
        super().__init__()
        self.context_dim = context_dim
        self.num_frames = num_frames
        self.network = MLP(
            data_dim * num_frames, hidden_dims, context_dim, activation=activation, zero_last=False
        )

    def forward(self, data: Tensor, times: Tensor, mask: Tensor | None = None) -> Tensor:
        if data.shape[-2] < self.num_frames:
            raise ValueError(
                f"`data` must hold at least {self.num_frames} observations (num_frames); got "
                f"{data.shape[-2]}."
            )
        frames = data[..., : self.num_frames, :]
        if mask is not None:
            frames = torch.where(mask[..., : self.num_frames, None], frames, 0.0)
        return self.network(frames.flatten(-2))


def with_gaps(data: Tensor, times: Tensor, mask: Tensor | None) -> Tensor:
    """Observations with the time since the one before and whether they are there.

    Shape:
        result: ``(*batch, T, data_dim + 2)``.
    """
    gap = torch.cat([torch.zeros_like(times[..., :1]), times.diff(dim=-1)], -1).to(data)
    gap = gap.expand(data.shape[:-1]).unsqueeze(-1)
    if mask is None:
        return torch.cat([data, gap, torch.ones_like(gap)], -1)
    there = mask.expand(data.shape[:-1]).unsqueeze(-1)
    rows = torch.cat([data, gap, torch.ones_like(gap)], -1)
    # A value that is not there may be NaN, which a product with zero would keep.
    return torch.where(there, rows, torch.zeros_like(rows))


def _reversal(mask: Tensor) -> Tensor:
    """Order that runs each series backwards from its last observation; it is its own inverse."""
    place = torch.arange(mask.shape[-1], device=mask.device)
    last = torch.where(mask, place, -1).amax(-1, keepdim=True)
    return torch.where(place <= last, last - place, place).unsqueeze(-1)
