r"""Fields made of layers, with the trace of their Jacobian taken through the weights.

With hidden layers whose units have slopes c, the Jacobian is a product of weights W and slopes:

.. math:: J = W_3 \operatorname{diag}(c_2) W_2 \operatorname{diag}(c_1) W_1

for two hidden layers. Its trace is :math:`c_2^T M c_1` with the constant matrix
:math:`M = W_2 \circ (W_1 W_3)^T`: one matrix product per evaluation, whatever the number of
dimensions. One hidden layer needs a vector only, none a number. More layers, or weights that
depend on the context, take the tangents of all axes through the weights, ``input_dim`` rows for
each row of the state.

A unit may be fed by several rows of its layer's weight (a gate and a value); then c has one slope
for each row, and M repeats its columns and rows accordingly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowvi.nn.fields import VectorField
from flowvi.nn.mlp import MLP, check_sizes
from flowvi.nn.time_embedding import FourierTime

__all__ = ["LayeredField"]


class Prepared(NamedTuple):
    """What one solve computes once.

    Args:
        shift: what the context adds to the embedded time, or None.
        updates: per-row low-rank factors (U, V) of every layer's weight, empty for none.
        core: the constant of the trace, or None where tangents are needed.
    """

    shift: Tensor | None
    updates: tuple[tuple[Tensor, Tensor], ...]
    core: Tensor | None


class LayeredField(VectorField):
    """A network of the state whose layers time and context modulate.

    Subclasses write :meth:`modulation_sizes` (how many numbers modulate each layer),
    :meth:`unit` and :meth:`unit_and_slopes` (a hidden layer's nonlinearity), and may write
    :meth:`output` (the last layer's modulation).
    """

    has_divergence = True
    rows_per_unit = 1

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int = 0,
        *,
        activation: Callable[[], nn.Module] = nn.Tanh,
        num_frequencies: int = 3,
        low_rank: int = 0,
        hyper_dims: Sequence[int] = (32,),
        zero_last: bool = True,
    ) -> None:
        super().__init__(input_dim, context_dim)
        check_sizes(input_dim, hidden_dims, input_dim, context_dim)
        if low_rank < 0 or (low_rank and not context_dim):
            raise ValueError(
                f"`low_rank` must be 0, or positive with a context; got {low_rank} with "
                f"context_dim {context_dim}."
            )
        self.hidden_dims = tuple(hidden_dims)
        self.low_rank = low_rank
        self.activation = activation()
        inputs = (input_dim, *self.hidden_dims)
        outputs = (*(self.rows_per_unit * width for width in self.hidden_dims), input_dim)
        self.layers = nn.ModuleList(
            nn.Linear(*sizes) for sizes in zip(inputs, outputs, strict=True)
        )
        self.time = FourierTime(num_frequencies)
        self._sizes = self.modulation_sizes(outputs)
        self.time_layer = nn.Linear(self.time.output_dim, sum(self._sizes))
        if low_rank:
            # A random right factor and a left factor that starts at zero: no saddle at the start.
            self.right = nn.ParameterList(
                torch.randn(width, low_rank) / width**0.5 for width in inputs
            )
            self._factors = [
                n * low_rank for sizes in zip(outputs, inputs, strict=True) for n in sizes
            ]
            self.hyper = MLP(
                context_dim, hyper_dims, sum(self._sizes) + sum(self._factors), activation=nn.Tanh
            )
        elif context_dim:
            self.context_layer = nn.Linear(context_dim, sum(self._sizes), bias=False)
        if zero_last:
            self._start_at_zero()

    # What a subclass writes.

    def modulation_sizes(self, outputs: Sequence[int]) -> list[int]:
        """How many numbers modulate each layer, for layers with ``outputs`` rows."""
        raise NotImplementedError

    def unit(self, z: Tensor, modulation: Tensor) -> Tensor:
        """Hidden units from their layer's output."""
        raise NotImplementedError

    def unit_and_slopes(self, z: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden units, and the derivative of each with respect to the rows that feed it."""
        raise NotImplementedError

    def output(self, z: Tensor, modulation: Tensor) -> Tensor:
        """The velocity from the last layer's output; its derivative in ``z`` must be 1."""
        return z + modulation if self._sizes[-1] else z

    # The field.

    def embed(self, t: Tensor) -> Tensor:
        return self.time_layer(self.time(t))

    def prepare(self, context: Tensor | None) -> Prepared:
        if self.context_dim == 0:
            return Prepared(None, (), self._core())
        if not self.low_rank:
            return Prepared(self.context_layer(context), (), self._core())
        shift, factors = self.hyper(context).split([sum(self._sizes), sum(self._factors)], -1)
        pieces = factors.split(self._factors, -1)
        updates = tuple(
            (left.unflatten(-1, (-1, self.low_rank)), base + right.unflatten(-1, base.shape))
            for left, right, base in zip(pieces[::2], pieces[1::2], self.right, strict=True)
        )
        return Prepared(shift, updates, None)

    def velocity(self, time: Tensor, x: Tensor, prepared: Prepared) -> Tensor:
        h, modulations = x, self._modulations(time, prepared)
        for i, modulation in enumerate(modulations[:-1]):
            h = self.unit(self._linear(i, h, prepared), modulation)
        return self.output(self._linear(-1, h, prepared), modulations[-1])

    def velocity_and_divergence(
        self, time: Tensor, x: Tensor, prepared: Prepared
    ) -> tuple[Tensor, Tensor]:
        h, modulations, slopes = x, self._modulations(time, prepared), []
        for i, modulation in enumerate(modulations[:-1]):
            h, slope = self.unit_and_slopes(self._linear(i, h, prepared), modulation)
            slopes.append(slope)
        velocity = self.output(self._linear(-1, h, prepared), modulations[-1])
        if prepared.core is None:
            return velocity, self._trace_of_tangents(slopes, prepared, x)
        return velocity, _bilinear(prepared.core, slopes, x)

    def _modulations(self, time: Tensor, prepared: Prepared) -> Sequence[Tensor]:
        both = time if prepared.shift is None else time + prepared.shift
        return both.split(self._sizes, -1)

    def _linear(self, i: int, h: Tensor, prepared: Prepared) -> Tensor:
        z = self.layers[i](h)
        if not prepared.updates:
            return z
        left, right = prepared.updates[i]
        return z + (left @ (h.unsqueeze(-2) @ right).transpose(-1, -2)).squeeze(-1)

    # The trace.

    def _core(self) -> Tensor | None:
        weights = [layer.weight for layer in self.layers]
        if len(weights) == 1:
            return weights[0].diagonal().sum()
        if len(weights) > 3:
            return None
        k = self.rows_per_unit
        first, last = weights[0], weights[-1].repeat(1, k)
        if len(weights) == 2:
            return (first * last.t()).sum(1)
        return weights[1].repeat(1, k) * (first @ last).t()

    def _trace_of_tangents(
        self, slopes: Sequence[Tensor], prepared: Prepared, x: Tensor
    ) -> Tensor:
        tangents = torch.eye(self.input_dim, dtype=x.dtype, device=x.device)
        for i, slope in enumerate(slopes):
            moved = slope.unsqueeze(-2) * self._push(i, tangents, prepared)
            tangents = moved.unflatten(-1, (self.rows_per_unit, -1)).sum(-2)
        last = self._push(-1, tangents, prepared)
        return last.diagonal(dim1=-2, dim2=-1).sum(-1).expand(x.shape[:-1])

    def _push(self, i: int, tangents: Tensor, prepared: Prepared) -> Tensor:
        """Tangents ``(*batch, input_dim, width)`` through a layer's weight."""
        moved = tangents @ self.layers[i].weight.t()
        if not prepared.updates:
            return moved
        left, right = prepared.updates[i]
        return moved + (tangents @ right) @ left.transpose(-1, -2)

    @torch.no_grad()
    def _start_at_zero(self) -> None:
        """Set the last layer and all that shifts it to zero, so that the velocity is zero."""
        self.layers[-1].weight.zero_()
        self.layers[-1].bias.zero_()
        for layer in (self.time_layer, getattr(self, "context_layer", None)):
            if layer is not None and self._sizes[-1]:
                layer.weight[-self._sizes[-1] :].zero_()
                if layer.bias is not None:
                    layer.bias[-self._sizes[-1] :].zero_()


def _bilinear(core: Tensor, slopes: Sequence[Tensor], x: Tensor) -> Tensor:
    if not slopes:
        return core.expand(x.shape[:-1])
    if len(slopes) == 1:
        return slopes[0] @ core
    return (F.linear(slopes[0], core) * slopes[1]).sum(-1)
