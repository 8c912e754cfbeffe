"""Coupling transform, generic over the elementwise map."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flowvi.nn import MLP
from flowvi.transforms._affine_coupling import AffineCouplingPass, is_supported
from flowvi.transforms.base import FlowTransform, common_shape
from flowvi.transforms.elementwise import (
    Affine,
    Chain,
    ElementwiseMap,
    ElementwiseTransform,
    check_elementwise,
)
from flowvi.transforms.splines import RationalQuadratic

__all__ = ["Coupling"]


class Coupling(FlowTransform):
    r"""Coupling: some dimensions stay, and a network of them moves the others.

    .. math:: y_{kept} = x_{kept}, \qquad y_{moved} = f(x_{moved};\ network(x_{kept}, context))

    One pass in both directions. Starts at the identity.
    With ``input_dim = 1`` nothing is kept: the parameters are free (or a function of the context),
    and an affine map is preceded by a rational-quadratic spline, so it is never silently affine.

    Args:
        input_dim: number of dimensions, at least 1.
        elementwise: the map ``f`` of one number; affine if left out.
        mask: which dimensions move, ``input_dim`` booleans; the second half if left out.
        context_dim: length of the context vector; 0 for none.
        hidden_dims: widths of the network's hidden layers.
        activation: makes the network's nonlinearity.

    Shape:
        x: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; ladj: ``(*batch,)``, nats.

    Raises:
        ValueError: if ``mask`` has the wrong length, or moves all dimensions or none.

    References:
        Dinh, Sohl-Dickstein and Bengio (2017), RealNVP, arXiv:1605.08803, section 3.2.
        Vaitl, Nicoli, Nakajima and Kessel (2022), arXiv:2207.08219, section 4 (score recursion).

    Example:
        >>> y, ladj = Coupling(4, RationalQuadratic()).call_and_ladj(torch.zeros(5, 4))
        >>> y.shape, ladj.shape
        (torch.Size([5, 4]), torch.Size([5]))
    """

    has_score_recursion = True

    def __init__(
        self,
        input_dim: int,
        elementwise: ElementwiseMap | None = None,
        *,
        mask: Sequence[bool] | Tensor | None = None,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__(input_dim, context_dim)
        elementwise = Affine() if elementwise is None else elementwise
        check_elementwise(elementwise)
        self.elementwise = elementwise
        if input_dim == 1:
            self.only = single(elementwise, context_dim, hidden_dims, activation)
            return
        moved, kept = _split_mask(input_dim, mask)
        self.network = MLP(
            len(kept),
            hidden_dims,
            elementwise.num_params * len(moved),
            context_dim,
            activation=activation,
            by_columns=elementwise.prefers_columns,
        )
        joined = torch.argsort(torch.tensor(kept + moved))
        self._num_kept = len(kept)
        # Where the kept dimensions come first, parts are taken and put together without gathering.
        self._is_split = kept + moved == list(range(input_dim))
        self.register_buffer("_kept", torch.tensor(kept), persistent=False)
        self.register_buffer("_moved", torch.tensor(moved), persistent=False)
        self.register_buffer("_joined", joined, persistent=False)

    def _call_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.input_dim == 1:
            return self.only._call_and_ladj(x, context)
        kept, moved = self._split(x)
        moved, ladj = self.elementwise.call_and_ladj(moved, self._params(kept, context))
        return self._join(kept, moved), ladj.sum(-1)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.input_dim == 1:
            return self.only._inverse_and_ladj(y, context)
        kept, moved = self._split(y)
        moved, ladj = self.elementwise.inverse_and_ladj(moved, self._params(kept, context))
        return self._join(kept, moved), ladj.sum(-1)

    def _call_ladj_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.input_dim == 1:
            return self.only._call_ladj_and_score(x, score, context)
        if is_supported(self.elementwise, self.network.activation):
            return self._affine_pass(x, score, context)
        keep_graph = torch.is_grad_enabled()
        kept, moved = self._split(x)
        score_kept, score_moved = self._split(score.detach())
        raw, pull = self.network.forward_with_pullback(kept, context)
        y, ladj, score_moved, grad = self.elementwise.call_with_score(
            moved, self._arrange(raw), score_moved
        )
        # J is block triangular with the diagonal block exp(ladj): solve for the moved part,
        # then substitute; the network's share comes back through its own pullback.
        pulled = pull(grad.transpose(-1, -2).flatten(-2))
        out = self._join(kept, y)
        pushed = self._join(score_kept - pulled, score_moved)
        ladj = ladj.sum(-1)
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
        spec = (self._split, self._join, self.elementwise, network.activation)
        out, ladj, pushed = AffineCouplingPass.apply(spec, x, score, *flat)
        if len(batch) != 1:
            ladj = ladj.reshape(batch)
            out, pushed = (t.reshape(*batch, self.input_dim) for t in (out, pushed))
        return out, ladj, pushed

    def _params(self, kept: Tensor, context: Tensor | None) -> Tensor:
        return self._arrange(self.network(kept, context))

    def _arrange(self, raw: Tensor) -> Tensor:
        return raw.unflatten(-1, (self.elementwise.num_params, -1)).transpose(-1, -2)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self._is_split:
            return x[..., : self._num_kept], x[..., self._num_kept :]
        return x.index_select(-1, self._kept), x.index_select(-1, self._moved)

    def _join(self, kept: Tensor, moved: Tensor) -> Tensor:
        if kept.shape[:-1] != moved.shape[:-1]:
            kept = kept.expand(*moved.shape[:-1], -1)
        both = torch.cat([kept, moved], -1)
        return both if self._is_split else both.index_select(-1, self._joined)


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


def _split_mask(
    input_dim: int, mask: Sequence[bool] | Tensor | None
) -> tuple[list[int], list[int]]:
    """Indices that move and indices that stay."""
    if mask is None:
        mask = [i >= input_dim // 2 for i in range(input_dim)]
    mask = [bool(m) for m in mask]
    if len(mask) != input_dim:
        raise ValueError(f"`mask` must have length {input_dim} (input_dim); got {len(mask)}.")
    moved = [i for i, m in enumerate(mask) if m]
    kept = [i for i, m in enumerate(mask) if not m]
    if not moved or not kept:
        raise ValueError(f"`mask` must move some dimensions and keep some; got {mask}.")
    return moved, kept
