"""Coupling transform, generic over the elementwise map, the division and the conditioner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from flowvi.nn import MLP
from flowvi.nn.conv_conditioner import ConvConditioner
from flowvi.nn.mlp import forward_with_pullback
from flowvi.transforms._affine_coupling import AffineCouplingPass, is_supported
from flowvi.transforms._partition import Partition, partition
from flowvi.transforms.base import FlowTransform, common_shape
from flowvi.transforms.elementwise import (
    Affine,
    Chain,
    ElementwiseMap,
    ElementwiseTransform,
    check_elementwise,
)
from flowvi.transforms.splines import RationalQuadratic

__all__ = ["Coupling", "checkerboard"]


Network = Callable[[int | tuple[int, ...], int, int], nn.Module]


class Coupling(FlowTransform):
    r"""Coupling: some dimensions stay, and a network of them moves the others.

    .. math:: y_{kept} = x_{kept}, \qquad y_{moved} = f(x_{moved};\ network(x_{kept}, context))

    One pass in both directions. Starts at the identity. Images are divided by channels or by
    pixels, and their network is convolutional.
    With ``input_dim = 1`` nothing is kept: the parameters are free (or a function of the context),
    and an affine map is preceded by a rational-quadratic spline, so it is never silently affine.

    Args:
        input_dim: number of dimensions, at least 1; or ``(channels, height, width)`` of images.
        elementwise: the map ``f`` of one number; affine if left out.
        mask: which dimensions move, ``input_dim`` booleans, or one for each channel of an image;
            the second half if left out. A boolean tensor of three dimensions says which pixels
            of an image move, see :func:`checkerboard`.
        context_dim: length of the context vector; 0 for none.
        hidden_dims: widths of the network's hidden layers, channels for images.
        activation: makes the network's nonlinearity.
        network: makes the network from the size of what is kept (number of dimensions; channels,
            height and width), the number of outputs (output channels) and ``context_dim``; a
            :class:`flowvi.nn.MLP`, or a :class:`flowvi.nn.ConvConditioner`, if left out. The
            coupling starts at the identity if its output starts at zero.

    Shape:
        x: ``(*batch, *event_shape)``; context: ``(*batch, context_dim)``; ladj: ``(*batch,)``,
        nats.

    Raises:
        ValueError: if ``input_dim`` is no size of vectors or images, or ``mask`` has the wrong
            length or shape, or moves all dimensions or none.

    References:
        Dinh, Sohl-Dickstein and Bengio (2017), RealNVP, arXiv:1605.08803, sections 3.2 and 3.4.
        Vaitl, Nicoli, Nakajima and Kessel (2022), arXiv:2207.08219, section 4 (score recursion).

    Example:
        >>> y, ladj = Coupling(4, RationalQuadratic()).call_and_ladj(torch.zeros(5, 4))
        >>> y.shape, ladj.shape
        (torch.Size([5, 4]), torch.Size([5]))
        >>> Coupling((1, 8, 8), mask=checkerboard(8, 8))(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 1, 8, 8])
    """

    def __init__(
        self,
        input_dim: int | Sequence[int],
        elementwise: ElementwiseMap | None = None,
        *,
        mask: Sequence[bool] | Tensor | None = None,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.ReLU,
        network: Network | None = None,
    ) -> None:
        super().__init__(input_dim, context_dim)
        if len(self.event_shape) not in (1, 3):
            raise ValueError(
                "`input_dim` must be a number of dimensions or (channels, height, width); "
                f"got {tuple(self.event_shape)}."
            )
        elementwise = Affine() if elementwise is None else elementwise
        check_elementwise(elementwise)
        self.elementwise = elementwise
        if self.event_shape == (1,):
            self.only = single(elementwise, context_dim, hidden_dims, activation)
            return
        self.partition = partition(tuple(self.event_shape), mask)
        if network is None:
            network = _default_network(self.partition, elementwise, hidden_dims, activation)
        num_outputs = elementwise.num_params * self.partition.num_moved
        self.network = network(self.partition.input_size, num_outputs, context_dim)

    @property
    def has_score_recursion(self) -> bool:
        return self.event_shape == (1,) or self.partition.has_score_recursion

    def _call_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.event_shape == (1,):
            return self.only._call_and_ladj(x, context)
        kept, moved = self.partition.split(x)
        moved, ladj = self.elementwise.call_and_ladj(moved, self._params(kept, context))
        return self.partition.join(kept, moved), self.partition.total(ladj)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.event_shape == (1,):
            return self.only._inverse_and_ladj(y, context)
        kept, moved = self.partition.split(y)
        moved, ladj = self.elementwise.inverse_and_ladj(moved, self._params(kept, context))
        return self.partition.join(kept, moved), self.partition.total(ladj)

    def _call_ladj_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.event_shape == (1,):
            return self.only._call_ladj_and_score(x, score, context)
        if type(self.network) is MLP and is_supported(self.elementwise, self.network.activation):
            return self._affine_pass(x, score, context)
        keep_graph = torch.is_grad_enabled()
        kept, moved = self.partition.split(x)
        score_kept, score_moved = self.partition.split(score.detach())
        raw, pull = forward_with_pullback(self.network, kept, context)
        params = self.partition.arrange(raw, self.elementwise.num_params)
        y, ladj, score_moved, grad = self.elementwise.call_with_score(moved, params, score_moved)
        # J is block triangular with the diagonal block exp(ladj): solve for the moved part,
        # then substitute; the network's share comes back through its own pullback.
        pulled = pull(self.partition.scatter(grad))
        out = self.partition.join(kept, y)
        pushed = self.partition.join(score_kept - pulled, score_moved)
        ladj = self.partition.total(ladj)
        return (out, ladj, pushed) if keep_graph else (out.detach(), ladj.detach(), pushed)

    def _affine_pass(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        network = self.network
        flat = [t for layer in network.layers for t in (layer.weight, layer.bias)]
        batch, score = x.shape[:-1], score.detach()
        if context is not None:
            shift = network.context_layer(context)
            batch = common_shape(batch, shift.shape[:-1])
            flat[1] = (flat[1] + shift).expand(*batch, -1).reshape(-1, shift.shape[-1])
        if x.dim() != 2 or x.shape[:-1] != batch:
            x, score = (t.expand(*batch, -1).reshape(-1, self.input_dim) for t in (x, score))
        spec = (self.partition.split, self.partition.join, self.elementwise, network.activation)
        out, ladj, pushed = AffineCouplingPass.apply(spec, x, score, *flat)
        if len(batch) != 1:
            ladj = ladj.reshape(batch)
            out, pushed = (t.reshape(*batch, self.input_dim) for t in (out, pushed))
        return out, ladj, pushed

    def _params(self, kept: Tensor, context: Tensor | None) -> Tensor:
        return self.partition.arrange(self.network(kept, context), self.elementwise.num_params)


def checkerboard(height: int, width: int) -> Tensor:
    """Mask ``(1, height, width)`` of every other pixel, the first one kept; ``~`` turns it round.

    References:
        Dinh, Sohl-Dickstein and Bengio (2017), RealNVP, arXiv:1605.08803, section 3.4.

    Example:
        >>> checkerboard(2, 3).int()
        tensor([[[0, 1, 0],
                 [1, 0, 1]]], dtype=torch.int32)
    """
    rows, columns = torch.arange(height), torch.arange(width)
    return ((rows[:, None] + columns) % 2 == 1).unsqueeze(0)


def single(
    elementwise: ElementwiseMap,
    context_dim: int,
    hidden_dims: Sequence[int],
    activation: Callable[[], nn.Module],
) -> ElementwiseTransform:
    """What a coupling or autoregressive map is in one dimension, never just affine."""
    if elementwise.is_affine:
        elementwise = Chain(RationalQuadratic(), elementwise)
    return ElementwiseTransform(
        1, elementwise, context_dim, hidden_dims=hidden_dims, activation=activation
    )


def _default_network(
    parts: Partition,
    elementwise: ElementwiseMap,
    hidden_dims: Sequence[int],
    activation: Callable[[], nn.Module],
) -> Network:
    if parts.axis == -1:
        mlp = partial(MLP, activation=activation, by_columns=elementwise.prefers_columns)
        return lambda size, *others: mlp(size, hidden_dims, *others)
    conv = partial(ConvConditioner, activation=activation)
    return lambda size, *others: conv(size, hidden_dims, *others)
