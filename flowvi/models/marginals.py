"""Networks of the marginals of a posterior process: mean and scale of the state at any time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flowvi.nn.mlp import MLP
from flowvi.paths._derivative import time_derivative
from flowvi.paths.base import with_time

__all__ = ["MLPMarginals", "Marginals", "RhythmicMarginals"]


class Marginals(nn.Module, ABC):
    """Base of the networks of mean and scale; a new one writes ``raw``.

    Time must enter smoothly: the drift of the process is made of the derivatives.

    Args:
        context_dim: length of the context.
        dim: number of dimensions of the state.

    Shape:
        context: ``(*some_batch, context_dim)``; t: ``(*batch, 1)``; mean, scale and their
        derivatives: ``(*batch, dim)``.
    """

    def __init__(self, context_dim: int, dim: int) -> None:
        super().__init__()
        self.context_dim = context_dim
        self.dim = dim

    @abstractmethod
    def raw(self, context: Tensor, t: Tensor) -> Tensor:
        """Means, then what :func:`scale_of` makes the scales of, ``(*batch, 2 * dim)``."""

    def raw_with_rate(
        self, context: Tensor, context_rate: Tensor | None, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``raw`` and its derivative in time, by forward mode; written out it is faster.

        Args:
            context: the context at the times.
            context_rate: its own derivative in time, or None where it is the same at all times.
            t: times.
        """
        if context_rate is None:
            return time_derivative(lambda t: self.raw(context, t), t)
        context, context_rate, t = (x.contiguous() for x in (context, context_rate, t))
        return torch.func.jvp(self.raw, (context, t), (context_rate, torch.ones_like(t)))

    def forward(self, context: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale."""
        mean, raw = self.raw(context, t).chunk(2, -1)
        return mean, scale_of(raw)

    def with_rate(
        self, context: Tensor, context_rate: Tensor | None, t: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Mean and scale, and their derivatives in time; arguments as for ``raw_with_rate``."""
        value, rate = self.raw_with_rate(context, context_rate, t)
        (mean, raw), (d_mean, d_raw) = value.chunk(2, -1), rate.chunk(2, -1)
        return (mean, scale_of(raw)), (d_mean, torch.sigmoid(raw + _SHIFT) * d_raw)

    @torch.no_grad()
    def _start_at(self, scale: float, last: nn.Linear) -> None:
        """Have scales begin at about one value, whatever context and time."""
        if not _LEAST < scale < math.inf:
            raise ValueError(f"`scale` must be above {_LEAST:g} and finite; got {scale!r}.")
        last.bias[self.dim :] += math.log(math.expm1(scale - _LEAST)) - _SHIFT


class MLPMarginals(Marginals):
    """Fully connected network of context and time.

    Args:
        context_dim: length of the context.
        dim: number of dimensions of the state.
        hidden_dims: hidden widths.
        scale: about what scales begin with.
        activation: makes the nonlinearity; smooth.

    Raises:
        ValueError: if ``scale`` is not above 0.0001.

    Example:
        >>> mean, scale = MLPMarginals(3, 2)(torch.zeros(5, 3), torch.zeros(7, 5, 1))
        >>> mean.shape, scale.shape
        (torch.Size([7, 5, 2]), torch.Size([7, 5, 2]))
    """

    def __init__(
        self,
        context_dim: int,
        dim: int,
        hidden_dims: Sequence[int] = (64, 64),
        *,
        scale: float = 1.0,
        activation: Callable[[], nn.Module] = nn.Softplus,
    ) -> None:
        super().__init__(context_dim, dim)
        self.network = MLP(
            context_dim + 1, hidden_dims, 2 * dim, activation=activation, zero_last=False
        )
        self._start_at(scale, self.network.layers[-1])

    def raw(self, context: Tensor, t: Tensor) -> Tensor:
        return self.network(with_time(context, t))

    def raw_with_rate(
        self, context: Tensor, context_rate: Tensor | None, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        rate = context.new_zeros(self.context_dim) if context_rate is None else context_rate
        tangent = with_time(rate, torch.ones_like(t))
        return self.network.forward_with_tangent(with_time(context, t), tangent)


class RhythmicMarginals(Marginals):
    r"""Network in which time enters as the phase of a rhythm, which the context sets.

    .. math:: \theta = \phi(c) + \omega(c)\,t, \qquad (\mu, \sigma) = \mathrm{MLP}\big(c,
        \cos \theta, \sin \theta, \dots, \cos K\theta, \sin K\theta\big), \qquad
        \omega(c) = \frac{2 \pi}{\text{period}}\, e^{\tanh a(c) / 2}

    For series that repeat themselves, such as steps of a walk. A network of time itself has to
    find every turn of a long series anew, and in training stays at the mean of the series for
    long; here all turns share one shape. Marginals of other series are beyond it: it knows no
    time that does not come again.

    Args:
        context_dim: length of the context.
        dim: number of dimensions of the state.
        period: length of a turn to begin with, in the unit of the times; the context can make it
            up to 1.6 times longer or shorter.
        hidden_dims: hidden widths.
        num_harmonics: K, at least 1.
        scale: about what scales begin with; small, so that the rhythm is not lost in noise.
        activation: makes the nonlinearity; smooth.

    Raises:
        ValueError: if ``period`` is not positive, ``num_harmonics`` below 1 or ``scale`` not above
            0.0001.

    Example:
        >>> marginals = RhythmicMarginals(3, 2, period=1.5)
        >>> context, t = torch.randn(5, 3), torch.zeros(5, 1)
        >>> now, later = (marginals(context, t + s)[0] for s in (0, marginals.turn(context)))
        >>> torch.allclose(now, later, atol=1e-5)
        True
    """

    def __init__(
        self,
        context_dim: int,
        dim: int,
        period: float,
        hidden_dims: Sequence[int] = (30,),
        *,
        num_harmonics: int = 3,
        scale: float = 0.1,
        activation: Callable[[], nn.Module] = nn.Softplus,
    ) -> None:
        super().__init__(context_dim, dim)
        if not 0 < period < math.inf:
            raise ValueError(f"`period` must be positive and finite; got {period!r}.")
        if not isinstance(num_harmonics, int) or num_harmonics < 1:
            raise ValueError(
                f"`num_harmonics` must be an integer of at least 1; got {num_harmonics!r}."
            )
        self.period = float(period)
        self.num_harmonics = num_harmonics
        self.phase = nn.Linear(context_dim, 2)
        self.pace = nn.Linear(context_dim, 1)
        # All turns have the period at first: how fast each is shows only over several of them.
        nn.init.zeros_(self.pace.weight)
        nn.init.zeros_(self.pace.bias)
        self.network = MLP(
            2 * num_harmonics,
            hidden_dims,
            2 * dim,
            context_dim,
            activation=activation,
            zero_last=False,
        )
        self._start_at(scale, self.network.layers[-1])

    def turn(self, context: Tensor) -> Tensor:
        """Length of a turn given the context, ``(*some_batch, 1)``."""
        return self.period * torch.exp(-torch.tanh(self.pace(context)) / 2)

    def raw(self, context: Tensor, t: Tensor) -> Tensor:
        return self.network(torch.cat(self._rhythm(context, t), -1), context)

    def raw_with_rate(
        self, context: Tensor, context_rate: Tensor | None, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        if context_rate is not None:
            return super().raw_with_rate(context, context_rate, t)
        waves = self._rhythm(context, t)
        speed = 2 * math.pi / self.turn(context)
        rates = []
        for k, (cos, sin) in enumerate(zip(waves[::2], waves[1::2], strict=True), 1):
            rates += [-k * speed * sin, k * speed * cos]
        return self.network.forward_with_tangent(
            torch.cat(waves, -1), torch.cat(rates, -1), context
        )

    def _rhythm(self, context: Tensor, t: Tensor) -> list[Tensor]:
        """Cosine and sine of the phase and of its multiples, in turns, ``(*batch, 1)`` each."""
        # The phase as a direction in the plane, which a network can turn right round.
        u, v = nn.functional.normalize(self.phase(context), dim=-1).split(1, -1)
        angle = 2 * math.pi * t / self.turn(context)
        cos, sin = angle.cos(), angle.sin()
        waves = [u * cos - v * sin, v * cos + u * sin]
        for _ in range(self.num_harmonics - 1):
            (c, s), (a, b) = waves[:2], waves[-2:]
            waves += [a * c - b * s, b * c + a * s]
        return waves


# A raw scale of 0 is a scale of about 1; no scale is smaller than the least.
_SHIFT, _LEAST = 0.5413, 1e-4


def scale_of(raw: Tensor) -> Tensor:
    """A positive scale, 1 at zero, bounded away from zero."""
    return nn.functional.softplus(raw + _SHIFT) + _LEAST
