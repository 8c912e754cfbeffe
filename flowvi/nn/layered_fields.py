"""Networks as vector fields: plain, with gates of time, with gates of the state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowvi.nn._layered import LayeredField
from flowvi.nn.mlp import value_and_slope

__all__ = ["ConcatSquashField", "GatedField", "MLPField"]


class MLPField(LayeredField):
    r"""Fully connected network of state, time and context.

    .. math:: h_1 = \sigma(W_1 x + A \phi(t) + B c + b_1), \qquad
        h_l = \sigma(W_l h_{l-1} + b_l), \qquad v = W_{L+1} h_L + b_{L+1}

    with :math:`\phi` the features of :class:`FourierTime`. The divergence goes through the
    weights: one matrix product for up to two hidden layers, whatever ``input_dim``; more layers,
    or ``low_rank``, take ``input_dim`` tangents through the weights.

    Args:
        input_dim: number of dimensions, at least 1.
        hidden_dims: widths of the hidden layers; empty for an affine field.
        context_dim: length of the context vector ``c``; 0 for none.
        activation: makes the nonlinearity; smooth, or the divergence has jumps.
        num_frequencies: number of frequencies of the time features.
        low_rank: rank of updates that a network of the context adds to every weight, in place of
            the plain ``B c``; 0 for none.
        hyper_dims: widths of that network's hidden layers.
        zero_last: start with zero velocity.

    Shape:
        as :class:`VectorField`.

    References:
        Chen, Rubanova, Bettencourt and Duvenaud (2018), Neural ordinary differential equations,
        arXiv:1806.07366; the low-rank updates are those of Grathwohl et al. (2019), FFJORD,
        arXiv:1810.01367, section 4.2.

    Example:
        >>> MLPField(3, (16, 16), context_dim=2)(0.5, torch.zeros(7, 3), torch.zeros(2)).shape
        torch.Size([7, 3])
    """

    def modulation_sizes(self, outputs: Sequence[int]) -> list[int]:
        return [outputs[0], *(0 for _ in outputs[1:])]

    def unit(self, z: Tensor, modulation: Tensor) -> Tensor:
        return self.activation(z + modulation if modulation.shape[-1] else z)

    def unit_and_slopes(self, z: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        z = z + modulation if modulation.shape[-1] else z
        return value_and_slope(self.activation, z)


class ConcatSquashField(LayeredField):
    r"""Network whose hidden layers are scaled and shifted by time and context.

    .. math:: h_l = \sigma\big((W_l h_{l-1} + b_l) \circ s(g_l) + d_l\big), \qquad
        v = W_{L+1} h_L + b_{L+1} + d_{L+1}

    with the logistic function s and :math:`(g_l, d_l)` linear in the features of time and in the
    context. Unlike in the reference the output is shifted but not scaled, which keeps the
    divergence as cheap as that of :class:`MLPField`.

    Args:
        input_dim: number of dimensions, at least 1.
        hidden_dims: widths of the hidden layers; empty for an affine field.
        context_dim: length of the context vector; 0 for none.
        activation: makes the nonlinearity; smooth, or the divergence has jumps.
        num_frequencies: number of frequencies of the time features.
        low_rank: as in :class:`MLPField`.
        hyper_dims: widths of that network's hidden layers.
        zero_last: start with zero velocity.

    References:
        Grathwohl et al. (2019), FFJORD, arXiv:1810.01367, appendix B.1.

    Example:
        >>> ConcatSquashField(3, (16, 16))(0.5, torch.zeros(7, 3)).shape
        torch.Size([7, 3])
    """

    def modulation_sizes(self, outputs: Sequence[int]) -> list[int]:
        return [*(2 * rows for rows in outputs[:-1]), outputs[-1]]

    def unit(self, z: Tensor, modulation: Tensor) -> Tensor:
        gate, shift = modulation.chunk(2, -1)
        return self.activation(torch.addcmul(shift, z, gate.sigmoid()))

    def unit_and_slopes(self, z: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        gate, shift = modulation.chunk(2, -1)
        gate = gate.sigmoid()
        value, slope = value_and_slope(self.activation, torch.addcmul(shift, z, gate))
        return value, slope * gate


class GatedField(LayeredField):
    r"""Network whose hidden units are gated by a second linear map of the same inputs.

    .. math:: h_l = \sigma(a_l) \circ s(g_l), \qquad
        (a_l, g_l) = W_l h_{l-1} + b_l + A_l \phi(t) + B_l c, \qquad v = W_{L+1} h_L + b_{L+1}

    with the logistic function s. The divergence costs four times the matrix product of
    :class:`MLPField`. With identities as activation and gate, one hidden layer is every quadratic
    field of rank up to its width, funnels among them, whose scale is a product of coordinates.
    Quadratic fields do not level off as the logistic function does, and can carry a far state
    beyond all bounds in finite time: a guide of the funnel trained so got better tails than with
    logistic gates, and a few draws in 100,000 at 1e12 and beyond.

    Args:
        input_dim: number of dimensions, at least 1.
        hidden_dims: widths of the hidden layers; empty for an affine field.
        context_dim: length of the context vector; 0 for none.
        activation: makes the nonlinearity; smooth, or the divergence has jumps.
        gate: makes s.
        num_frequencies: number of frequencies of the time features.
        low_rank: as in :class:`MLPField`.
        hyper_dims: widths of that network's hidden layers.
        zero_last: start with zero velocity.

    References:
        Grathwohl et al. (2019), FFJORD, arXiv:1810.01367, appendix B.1, gated layers; van den
        Oord et al. (2016), Conditional image generation with PixelCNN decoders,
        arXiv:1606.05328, equation 2, for the unit; Shazeer (2020), GLU variants improve
        transformer, arXiv:2002.05202, equation 5, for other gates.

    Example:
        >>> GatedField(3, (16, 16))(0.5, torch.zeros(7, 3)).shape
        torch.Size([7, 3])
    """

    rows_per_unit = 2

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int = 0,
        *,
        gate: Callable[[], nn.Module] = nn.Sigmoid,
        **options: Any,
    ) -> None:
        super().__init__(input_dim, hidden_dims, context_dim, **options)
        self.gate = gate()

    def modulation_sizes(self, outputs: Sequence[int]) -> list[int]:
        return list(outputs)

    def unit(self, z: Tensor, modulation: Tensor) -> Tensor:
        value, gate = (z + modulation).chunk(2, -1)
        return self.activation(value) * self.gate(gate)

    def unit_and_slopes(self, z: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        value, gate = (z + modulation).chunk(2, -1)
        value, slope = value_and_slope(self.activation, value)
        gate, gate_slope = value_and_slope(self.gate, gate)
        return value * gate, torch.cat([slope * gate, value * gate_slope], -1)
