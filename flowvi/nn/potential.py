"""A vector field that is the negative gradient of a potential."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowvi.nn.fields import VectorField
from flowvi.nn.time_embedding import FourierTime

__all__ = ["PotentialField"]


class _Layers(NamedTuple):
    """One pass: what each residual layer and the quadratic form see, and the network's output."""

    inner: list[Tensor]
    units: Tensor
    quadratic: Tensor


class PotentialField(VectorField):
    r"""Field :math:`v = -\nabla_x \Phi(t, x \mid c)` of a learned potential.

    .. math:: \Phi = w^T N(t, x, c) + \tfrac12 \sum_r q_r (a_r^T x + \beta_r(t, c))^2 + b^T x

    with a residual network N whose nonlinearity is :math:`\sigma(z) = \log(2\cosh z)`, so the
    field's is tanh. Optimal transport for the squared distance moves along such fields. The
    divergence is the exact trace of the Hessian: two reductions for one layer; each further one
    takes ``input_dim`` tangents through its weight. The weights q of the quadratic form may have
    any sign, where the reference keeps them positive, so that the flow may widen and narrow.

    Args:
        input_dim: number of dimensions, at least 1.
        hidden_dim: width of the network, at least 1.
        context_dim: length of the context vector ``c``; 0 for none.
        num_layers: number of layers of the network, at least 1; all but the first are residual.
        rank: number of squares, at least 1; the smaller of 10 and ``input_dim`` if left out.
        num_frequencies: number of frequencies of the time features.

    Shape:
        as :class:`VectorField`; potential: ``(*batch,)``.

    Raises:
        ValueError: if a size is below 1.

    References:
        Onken, Wu Fung, Li and Ruthotto (2021), OT-Flow: fast and accurate continuous normalizing
        flows via optimal transport, arXiv:2006.00104, equations 8 to 14.

    Example:
        >>> PotentialField(3)(0.5, torch.zeros(7, 3)).shape
        torch.Size([7, 3])
    """

    has_divergence = True

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int = 32,
        context_dim: int = 0,
        *,
        num_layers: int = 2,
        rank: int | None = None,
        num_frequencies: int = 3,
    ) -> None:
        super().__init__(input_dim, context_dim)
        rank = min(10, input_dim) if rank is None else rank
        for name, size in (("hidden_dim", hidden_dim), ("num_layers", num_layers), ("rank", rank)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1; got {size!r}.")
        self._sizes = [hidden_dim, rank]
        self.first = nn.Linear(input_dim, hidden_dim, bias=False)
        self.residual = nn.ModuleList(
            nn.Linear(hidden_dim, hidden_dim) for _ in range(num_layers - 1)
        )
        self.time = FourierTime(num_frequencies)
        self.time_layer = nn.Linear(self.time.output_dim, sum(self._sizes))
        if context_dim:
            self.context_layer = nn.Linear(context_dim, sum(self._sizes), bias=False)
        self.axes = nn.Parameter(torch.randn(rank, input_dim) / math.sqrt(input_dim))
        self.readout = nn.Parameter(torch.zeros(hidden_dim))
        self.curvature = nn.Parameter(torch.zeros(rank))
        self.slope = nn.Parameter(torch.zeros(input_dim))

    def potential(self, t: float | Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The potential, shape ``(*batch,)``."""
        layers = self._layers(self.embed(self._time(t, x)), x, self.prepare(context))
        squares = layers.quadratic.square() @ self.curvature
        return layers.units @ self.readout + squares / 2 + x @ self.slope

    def prepare(self, context: Tensor | None) -> Tensor | None:
        return self.context_layer(context) if self.context_dim else None

    def embed(self, t: Tensor) -> Tensor:
        return self.time_layer(self.time(t))

    def velocity(self, time: Tensor, x: Tensor, prepared: Tensor | None) -> Tensor:
        layers = self._layers(time, x, prepared)
        gradients = self._gradients([z.tanh() for z in layers.inner])
        return self._descent(gradients[0], layers.quadratic)

    def velocity_and_divergence(
        self, time: Tensor, x: Tensor, prepared: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        layers = self._layers(time, x, prepared)
        slopes = [z.tanh() for z in layers.inner]
        gradients = self._gradients(slopes)
        # A layer bends by the second derivative of its nonlinearity, weighted by what the layers
        # above make of it.
        bends = [
            torch.addcmul(above, above, slope * slope, value=-1)
            for slope, above in zip(slopes, gradients[1:], strict=True)
        ]
        trace = bends[0] @ self.first.weight.square().sum(1)
        trace = trace + self.curvature @ self.axes.square().sum(1)
        tangents = slopes[0].unsqueeze(-2) * self.first.weight.t()
        for layer, slope, bend in zip(self.residual, slopes[1:], bends[1:], strict=True):
            moved = tangents @ layer.weight.t()
            trace = trace + self._share * (bend * moved.square().sum(-2)).sum(-1)
            tangents = torch.add(tangents, slope.unsqueeze(-2) * moved, alpha=self._share)
        return self._descent(gradients[0], layers.quadratic), -trace

    @property
    def _share(self) -> float:
        """Step of the residual layers."""
        return 1 / max(1, len(self.residual))

    def _layers(self, time: Tensor, x: Tensor, prepared: Tensor | None) -> _Layers:
        shifts = time if prepared is None else time + prepared
        first, quadratic = shifts.split(self._sizes, -1)
        inner = [self.first(x) + first]
        units = _log_cosh(inner[0])
        for layer in self.residual:
            inner.append(layer(units))
            units = torch.add(units, _log_cosh(inner[-1]), alpha=self._share)
        return _Layers(inner, units, x @ self.axes.t() + quadratic)

    def _gradients(self, slopes: list[Tensor]) -> list[Tensor]:
        """Gradient of the network's output for the state, and for the units of each layer."""
        gradients = [self.readout.expand_as(slopes[-1])]
        for layer, slope in zip(reversed(self.residual), reversed(slopes[1:]), strict=True):
            back = (slope * gradients[0]) @ layer.weight
            gradients.insert(0, torch.add(gradients[0], back, alpha=self._share))
        gradients.insert(0, (slopes[0] * gradients[0]) @ self.first.weight)
        return gradients

    def _descent(self, gradient: Tensor, quadratic: Tensor) -> Tensor:
        return -(gradient + (quadratic * self.curvature) @ self.axes + self.slope)


def _log_cosh(z: Tensor) -> Tensor:
    """The function log(2 cosh z), whose derivative is tanh."""
    return z - F.logsigmoid(2 * z)
