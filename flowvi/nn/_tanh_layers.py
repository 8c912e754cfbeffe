r"""Networks of tanh units as vector fields, differentiated by hand.

The derivative of a tanh is read off its value, :math:`s = 1 - h^2`, so what a backward pass needs
is the hidden values alone. With the divergence :math:`s_2^T M s_1` of two hidden layers, and
gradients :math:`g_v` for the velocity and :math:`g_d` for the divergence,

.. math:: g_{h_2} = W_3^T g_v - 2\, g_d\, h_2 \circ M s_1, \qquad
    g_{h_1} = W_2^T (s_2 \circ g_{h_2}) - 2\, g_d\, h_1 \circ M^T s_2

and the gradient for the state is :math:`W_1^T (s_1 \circ g_{h_1})`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from flowvi.nn._layered import Prepared
from flowvi.nn.fields import VectorField
from flowvi.nn.layered_fields import MLPField

__all__ = ["Kept", "TanhLayers", "divergence_rate", "evaluate", "pull_back", "tanh_layers"]


class TanhLayers(NamedTuple):
    """Tensors of a network with one or two hidden layers of tanh units.

    The first layer's bias is not among them: it is added to what time and context give.

    Args:
        core: the constant of the trace, ``(width,)`` or ``(second width, first width)``.
        weights: of all layers.
        biases: of all layers but the first.
    """

    core: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]

    @classmethod
    def of(cls, flat: tuple[Tensor, ...]) -> TanhLayers:
        """The same from its tensors in a row."""
        end = 1 + len(flat) // 2
        return cls(flat[0], tuple(flat[1:end]), tuple(flat[end:]))

    def flat(self) -> tuple[Tensor, ...]:
        """All tensors in a row."""
        return (self.core, *self.weights, *self.biases)


class Kept(NamedTuple):
    """What one evaluation keeps.

    Args:
        inputs: what every layer was given: the state and the hidden values.
        pushed: slopes of the first hidden layer times the core, where there are two of them and
            the divergence was computed.
    """

    inputs: tuple[Tensor, ...]
    pushed: Tensor | None = None


def tanh_layers(field: VectorField, prepared: Prepared) -> TanhLayers | None:
    """The layers of a field that is such a network; None for all others.

    What would change a layer's result (a hook, another class) leaves it to autograd.
    """
    if type(field) is not MLPField or type(field.activation) is not nn.Tanh:
        return None
    if prepared.core is None or not field.hidden_dims or not all(map(_is_plain, field.layers)):
        return None
    first, *others = field.layers
    weights = (first.weight, *(layer.weight for layer in others))
    return TanhLayers(prepared.core, weights, tuple(layer.bias for layer in others))


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks


def evaluate(
    layers: TanhLayers, shift: Tensor, x: Tensor, *, divergence: bool
) -> tuple[Tensor, Tensor | None, Kept]:
    """Velocity, divergence if asked for, and what :func:`pull_back` needs.

    Args:
        layers: the network.
        shift: what time, context and the first bias add in the first layer,
            ``(first width,)`` or ``(batch, first width)``.
        x: states ``(batch, input_dim)``.
        divergence: whether to compute it.
    """
    hidden = [torch.tanh(x @ layers.weights[0].t() + shift)]
    for weight, bias in zip(layers.weights[1:-1], layers.biases[:-1], strict=True):
        hidden.append(torch.tanh(hidden[-1] @ weight.t() + bias))
    velocity = hidden[-1] @ layers.weights[-1].t() + layers.biases[-1]
    if not divergence:
        return velocity, None, Kept((x, *hidden))
    if len(hidden) == 1:
        return velocity, (_slope(hidden[0]) * layers.core).sum(-1), Kept((x, *hidden))
    pushed = _slope(hidden[0]) @ layers.core.t()
    return velocity, (pushed * _slope(hidden[1])).sum(-1), Kept((x, *hidden), pushed)


def divergence_rate(
    layers: TanhLayers, shift: Tensor, shift_rate: Tensor, x: Tensor, velocity: Tensor
) -> Tensor:
    r"""Time derivative of the divergence along the path, by operations with gradients.

    With :math:`\dot h = s \circ \dot z` and :math:`\dot s = -2 h \circ \dot h` in every layer.

    Args:
        layers: the network.
        shift: what time, context and the first bias add in the first layer, broadcast against
            ``(*batch, first width)``.
        shift_rate: time derivative of ``shift``.
        x: states ``(*batch, input_dim)``.
        velocity: at ``x``, of the same shape.
    """
    slopes, slope_rates = [], []
    z = x @ layers.weights[0].t() + shift
    rate = velocity @ layers.weights[0].t() + shift_rate
    for weight, bias in zip((*layers.weights[1:-1], None), layers.biases, strict=True):
        h = torch.tanh(z)
        slopes.append(_slope(h))
        rate = slopes[-1] * rate
        slope_rates.append(-2 * h * rate)
        if weight is not None:
            z, rate = h @ weight.t() + bias, rate @ weight.t()
    if len(slopes) == 1:
        return slope_rates[0] @ layers.core
    lower, lower_rate = (one[0] @ layers.core.t() for one in (slopes, slope_rates))
    return (slope_rates[1] * lower + slopes[1] * lower_rate).sum(-1)


def pull_back(
    layers: TanhLayers,
    kept: Kept,
    of_velocity: Tensor,
    of_divergence: Tensor | None,
    *,
    with_layers: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Gradients for the state, for ``shift`` row by row, and for the layers if asked for.

    Args:
        layers: the network.
        kept: what :func:`evaluate` gave.
        of_velocity: gradient for the velocity ``(batch, input_dim)``.
        of_divergence: gradient for the divergence ``(batch,)``; None if it was not computed.
        with_layers: whether to give the gradients for the layers, as :meth:`TanhLayers.flat`.
    """
    (x, *hidden), pushed = kept
    slopes = [_slope(h) for h in hidden]
    bends, of_core = _pull_back_trace(layers.core, slopes, pushed, of_divergence)
    rows = [of_velocity]
    for weight, h, slope, bend in zip(
        layers.weights[:0:-1], hidden[::-1], slopes[::-1], bends[::-1], strict=True
    ):
        above = rows[-1] @ weight
        rows.append((above if bend is None else above - 2 * h * bend) * slope)
    rows.reverse()
    of_x = rows[0] @ layers.weights[0]
    if not with_layers:
        return of_x, rows[0], ()
    of_weights = [row.t() @ lower for row, lower in zip(rows, (x, *hidden), strict=True)]
    return of_x, rows[0], (of_core, *of_weights, *(row.sum(0) for row in rows[1:]))


def _pull_back_trace(
    core: Tensor, slopes: list[Tensor], pushed: Tensor | None, grad: Tensor | None
) -> tuple[list[Tensor | None], Tensor]:
    """Gradients of the divergence for the slopes and for the core."""
    if grad is None:
        return [None for _ in slopes], torch.zeros_like(core)
    rows = grad.unsqueeze(-1)
    if len(slopes) == 1:
        return [rows * core], (rows * slopes[0]).sum(0)
    upper = rows * slopes[1]
    return [upper @ core, rows * pushed], upper.t() @ slopes[0]


def _slope(value: Tensor) -> Tensor:
    """Derivative of a tanh that gave ``value``."""
    return 1 - value * value
