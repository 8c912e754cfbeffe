"""Networks of drift, plain or tied to a context that changes in time, and of diffusion."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flowvi.nn.mlp import check_sizes
from flowvi.paths.diffusion import StateDiffusion
from flowvi.paths.sde import Drift

__all__ = ["DiffusionMLP", "DriftMLP"]


# Of the features that grow before an observation, per unit of time.
_RATES = (4.0, 32.0)


class DriftMLP(Drift):
    r"""Fully connected drift whose shares of time and context enter the first layer.

    .. math:: f(x, t, c) = \mathrm{MLP}\big(W x + a\,t + C\,c(t) + b\big)

    The shares of time and context are worked out for all steps of a solve at once, so a step is
    the products of the state's own path through the network and nothing else.

    Args:
        dim: number of dimensions of the state.
        hidden_dims: widths of the hidden layers, at least one.
        context_dim: length of the context; 0 for none. Use :meth:`bind` to give it.
        activation: makes the nonlinearity; smooth for a smooth drift.
        time_dependent: whether time enters; without it the drift is that of a homogeneous process.

    Shape:
        x: ``(*batch, dim)``; t: ``(*batch, 1)`` or ``(1,)``; drift: ``(*batch, dim)``.

    Raises:
        ValueError: if a size is below 1 (``context_dim``: below 0) or there is no hidden layer.

    Example:
        >>> DriftMLP(3, (16, 16))(torch.zeros(7, 3), torch.zeros(1)).shape
        torch.Size([7, 3])
    """

    def __init__(
        self,
        dim: int,
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int = 0,
        *,
        activation: Callable[[], nn.Module] = nn.Softplus,
        time_dependent: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(dim, hidden_dims, dim, context_dim)
        if not hidden_dims:
            raise ValueError("`hidden_dims` must hold at least one width; got ().")
        self.dim = dim
        self.context_dim = context_dim
        self.time_dependent = time_dependent
        sizes = (dim, *hidden_dims, dim)
        first, *others = (nn.Linear(*pair) for pair in zip(sizes, sizes[1:], strict=False))
        # Stored input by output: products with a thin matrix run several times faster so.
        self.first = nn.Parameter(first.weight.detach().t().contiguous())
        self.bias = nn.Parameter(first.bias.detach())
        self.layers = nn.ModuleList(others)
        self.activation = activation()
        if time_dependent:
            num_features = 2 + len(_RATES) if context_dim else 1
            self.time_layer = nn.Linear(num_features, sizes[1], bias=False)
        if context_dim:
            self.context_layer = nn.Linear(context_dim, sizes[1], bias=False)

    def bind(self, context: Tensor, at: Tensor | None = None) -> Drift:
        """The drift given a context.

        Args:
            context: ``(*batch, context_dim)``, one for all times; with ``at`` one for each of
                them, ``(*batch, num, context_dim)``. From one of these times up to the next, the
                context of the next is used, and that of the last after it.
            at: times of the contexts, ``(num,)`` or ``(*batch, num)``.
        """
        size = self.context_dim
        if size == 0 or context.shape[-1:] != (size,):
            raise ValueError(
                f"`context` must end with size {size} (context_dim); got shape "
                f"{tuple(context.shape)}."
            )
        return _BoundDrift(self, self.context_layer(context), at)

    def embed(self, t: Tensor) -> Tensor:
        if self.context_dim:
            raise ValueError(
                "`context` must be given to this drift, which has a context_dim. Call bind."
            )
        if self.time_dependent:
            return self.bias + self.time_layer(t)
        return self.bias.expand(*t.shape[:-1], -1)

    def given(self, x: Tensor, time: Tensor) -> Tensor:
        if not (self.time_dependent or self.context_dim):
            time = self.bias
        if x.dim() == 2 and time.dim() <= 2:
            h = torch.addmm(time, x, self.first)
        elif time.dim() == 1:
            h = torch.addmm(time, x.reshape(-1, self.dim), self.first)
            h = h.reshape(*x.shape[:-1], -1)
        else:
            h = x @ self.first + time
        for layer in self.layers:
            h = layer(self.activation(h))
        return h


class DiffusionMLP(StateDiffusion):
    r"""Diagonal diffusion with a small network of its own for each coordinate.

    .. math:: b_i(x_i) = s\,\sigma\big(v_i \cdot \tanh(w_i x_i + a_i) + c_i\big) + 10^{-3}

    Bounded on both sides, so that a divergence that it divides by stays finite.

    Args:
        dim: number of dimensions of the state.
        hidden_dim: hidden units of each network.
        scale: s, the upper bound; the diffusion starts at about half of it.

    Shape:
        x: ``(*batch, dim)``; diffusion: ``(*batch, dim)``.

    Raises:
        ValueError: if a size is below 1 or ``scale`` is not positive.

    References:
        Li, Wong, Chen and Duvenaud (2020), arXiv:2001.01328, section 7.3.

    Example:
        >>> DiffusionMLP(3, 8)(torch.zeros(7, 3), torch.zeros(1)).shape
        torch.Size([7, 3])
    """

    def __init__(self, dim: int, hidden_dim: int = 30, *, scale: float = 1.0) -> None:
        check_sizes(dim, (hidden_dim,), dim, 0)
        if not scale > 0:
            raise ValueError(f"`scale` must be positive; got {scale!r}.")
        super().__init__(_Coordinatewise(dim, hidden_dim, scale), elementwise=True)

    def divergence(self, x: Tensor, t: Tensor) -> Tensor:
        value, slope = self.b.with_slope(x)
        return value * slope


class _Coordinatewise(nn.Module):
    """A network with one hidden layer for each coordinate, between 0 and a bound."""

    def __init__(self, dim: int, hidden_dim: int, scale: float) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(dim, hidden_dim))
        self.bias = nn.Parameter(torch.randn(dim, hidden_dim))
        self.last = nn.Parameter(torch.randn(dim, hidden_dim) / hidden_dim)
        self.offset = nn.Parameter(torch.zeros(dim))
        self.scale = scale

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.scale * torch.sigmoid(self._raw(self._hidden(x))) + 1e-3

    def with_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Value, and its derivative in the coordinate."""
        hidden = self._hidden(x)
        part = torch.sigmoid(self._raw(hidden))
        inner = ((1 - hidden.square()) * (self.last * self.first)).sum(-1)
        return self.scale * part + 1e-3, self.scale * part * (1 - part) * inner

    def _hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(x.unsqueeze(-1) * self.first + self.bias)

    def _raw(self, hidden: Tensor) -> Tensor:
        return (hidden * self.last).sum(-1) + self.offset


class _BoundDrift(Drift):
    """A drift network with the context's share of its first layer."""

    def __init__(self, network: DriftMLP, shift: Tensor, at: Tensor | None) -> None:
        super().__init__()
        self.network = network
        self.shift = shift
        self.at = at

    def embed(self, t: Tensor) -> Tensor:
        network = self.network
        bias = network.bias
        if self.at is None:
            shift, until = self.shift, torch.zeros_like(t)
        else:
            index, until = next_of(self.at, t)
            shift = pick(self.shift, index)
        if network.time_dependent:
            return shift + (bias + network.time_layer(time_features(t, until)))
        both = torch.broadcast_shapes(shift.shape[:-1], t.shape[:-1])
        return (shift + bias).expand(*both, -1)

    def given(self, x: Tensor, time: Tensor) -> Tensor:
        return self.network.given(x, time)


def time_features(t: Tensor, until: Tensor) -> Tensor:
    """Time, time left to the next observation, and functions that grow sharply just before it.

    The drift of a process tied to an observation grows like one over the time that is left.

    Shape:
        t, until: ``(*batch, 1)``; result: ``(*batch, 4)``.
    """
    sharp = [1 / (1 + rate * until) for rate in _RATES]
    return torch.cat([t.expand_as(until), until, *sharp], -1)


def next_of(at: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first time after t (the last one if there is none), and how far it is.

    Args:
        at: increasing times, ``(num,)`` or ``(*batch, num)``.
        t: times, ``(*times, *batch or ones, 1)``.

    Shape:
        index: ``(*times, *batch or ones)``; distance: ``(*times, *batch or ones, 1)``, at least 0.
    """
    with torch.no_grad():
        at = at.to(t).contiguous()
        if at.dim() == 1:
            index = torch.searchsorted(at, t.squeeze(-1).contiguous(), right=True)
            index = index.clamp(max=len(at) - 1)
            after = at[index].unsqueeze(-1)
        else:
            index = (at <= t).sum(-1).clamp(max=at.shape[-1] - 1)
            spread = at.expand(*index.shape, -1)
            after = torch.take_along_dim(spread, index.unsqueeze(-1), -1)
    return index, (after - t).clamp(min=0)


def pick(rows: Tensor, index: Tensor) -> Tensor:
    """Rows ``(*batch, num, size)`` at an index ``(*times, *batch or ones)`` of each item.

    Shape:
        result: ``(*times, *batch, size)``.
    """
    batch = rows.shape[:-2]
    lead = index.shape[: index.dim() - len(batch)]
    if lead and index.numel() == index.shape[0]:
        # One index for all items: whole slices are copied, and summed in the backward pass.
        chosen = rows.movedim(-2, 0).index_select(0, index.reshape(-1))
    else:
        # Within each item, so that the backward pass fills no more than the rows there are.
        places = index.expand(*lead, *batch).reshape(-1, *batch).movedim(0, -1)
        chosen = torch.take_along_dim(rows, places.unsqueeze(-1), -2).movedim(-2, 0)
    return chosen.reshape(*lead, *chosen.shape[1:])
