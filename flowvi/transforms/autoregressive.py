"""Autoregressive transform, generic over the elementwise map."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flowvi.nn import MADE
from flowvi.nn.mlp import slope_of
from flowvi.transforms._adjoint import block_rows, pull_back, solve_transposed
from flowvi.transforms._incremental import Inversion
from flowvi.transforms.base import Direction, FlowTransform, flatten_batch
from flowvi.transforms.coupling import single
from flowvi.transforms.elementwise import Affine, ElementwiseMap, check_elementwise

__all__ = ["Autoregressive"]


class Autoregressive(FlowTransform):
    r"""Autoregressive map: each dimension moves by a function of those before it.

    .. math:: y_i = f(x_i;\ \theta_i(x_1, \dots, x_{i - 1}, context))

    Forward is one pass of a masked network (inverse autoregressive flow); its inverse is the
    masked autoregressive flow, which scores in one pass: MAF is ``Autoregressive(...).inv``.
    The slow direction takes ``input_dim`` sequential steps, but each computes only the hidden
    units that have just become known: about the arithmetic of one pass, backward too.
    Starts at the identity. With ``input_dim = 1`` the parameters are free (or a function of the
    context), and an affine map is preceded by a rational-quadratic spline, so it is never
    silently affine.

    Args:
        input_dim: number of dimensions, at least 1.
        elementwise: the map ``f`` of one number; affine if left out.
        order: permutation of ``range(input_dim)``, first dimension first; natural if left out.
        context_dim: length of the context vector; 0 for none.
        hidden_dims: widths of the network's hidden layers.
        activation: makes the network's nonlinearity, which must be elementwise.

    Shape:
        x: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; ladj: ``(*batch,)``, nats.

    References:
        Kingma et al. (2016), Inverse autoregressive flow, arXiv:1606.04934, section 3.
        Papamakarios, Pavlakou and Murray (2017), Masked autoregressive flow, arXiv:1705.07057.

    Example:
        >>> maf = Autoregressive(4, Affine()).inv
        >>> maf.cheap
        <Direction.INVERSE: 3>
    """

    cheap = Direction.FORWARD
    has_score_recursion = True

    def __init__(
        self,
        input_dim: int,
        elementwise: ElementwiseMap | None = None,
        *,
        order: Sequence[int] | None = None,
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
        self.network = MADE(
            input_dim,
            hidden_dims,
            elementwise.num_params,
            context_dim,
            order=order,
            activation=activation,
            by_columns=elementwise.prefers_columns,
        )
        self._starts = self.network.starts
        self._num_levels = len(self._starts) - 1
        for level, (rows, filled) in enumerate(block_rows(self._starts)):
            self.register_buffer(f"_block_rows_{level}", rows, persistent=False)
            self.register_buffer(f"_block_mask_{level}", filled, persistent=False)

    def _call_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.input_dim == 1:
            return self.only._call_and_ladj(x, context)
        y, ladj = self.elementwise.call_and_ladj(x, self.network(x, context))
        return y, ladj.sum(-1)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.input_dim == 1:
            return self.only._inverse_and_ladj(y, context)
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return self._inverse_by_passes(y, context)
        return self._inverse_by_steps(y, context)

    def _call_ladj_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.input_dim == 1:
            return self.only._call_ladj_and_score(x, score, context)
        params, hidden = self.network.forward_with_hidden(x, context)
        y, ladj, slopes = self.elementwise.call_with_derivatives(x, params)
        pushed = self._solve_transposed(score, ladj, slopes, hidden)
        return y, ladj.sum(-1), pushed

    @torch.no_grad()
    def _solve_transposed(
        self,
        score: Tensor,
        ladj: Tensor,
        derivatives: tuple[Tensor, Tensor, Tensor],
        hidden: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """The pushed score J^{-T} (score - grad ladj) at a point already passed forward."""
        network = self.network
        ladj_x, ladj_theta, slope_theta = derivatives
        batch = ladj.shape[:-1]
        score, slope_x = (
            network.sort(t.expand(*batch, -1).reshape(-1, self.input_dim).t(), 0).contiguous()
            for t in (score - ladj_x, ladj.exp())
        )
        ladj_theta, slope_theta = (
            network.sort(t.flatten(0, -3).permute(1, 2, 0), 0).contiguous()
            for t in (ladj_theta, slope_theta)
        )
        layers = network.sorted_layers(None)
        activation_slopes = [
            slope_of(network.activation, *(t.expand(*batch, -1).flatten(0, -2).t() for t in h))
            for h in hidden
        ]
        pulled, _ = pull_back(ladj_theta.flatten(0, 1), layers, activation_slopes)
        pushed, _ = solve_transposed(
            score - pulled,
            layers,
            self._starts,
            self._blocks,
            activation_slopes,
            (slope_x, slope_theta),
        )
        return network.unsort(pushed, 0).t().reshape(*batch, self.input_dim)

    @property
    def _blocks(self) -> list[tuple[Tensor, Tensor]]:
        own = self._buffers
        return [
            (own[f"_block_rows_{level}"], own[f"_block_mask_{level}"])
            for level in range(self._num_levels)
        ]

    def _inverse_by_steps(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Inverse that computes each hidden unit once, when it becomes known."""
        network = self.network
        y, context, batch = flatten_batch(y, context)
        layers = network.sorted_layers(context)
        spec = (self._starts, self._blocks, network.activation, self.elementwise)
        columns = network.sort(y.t(), 0).contiguous()
        x, theta = Inversion.apply(spec, columns, *itertools.chain.from_iterable(layers))
        params = theta.unflatten(0, (self.input_dim, -1)).permute(2, 0, 1)
        ladj = self.elementwise.call_and_ladj(x.t(), params)[1].sum(-1)
        x = network.unsort(x, 0).t().contiguous()
        return x.reshape(*batch, self.input_dim), -ladj.reshape(batch)

    def _inverse_by_passes(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Inverse by ``input_dim`` full passes: each makes one more dimension right.

        It is plain torch code, so it also serves where a custom backward cannot: under
        ``torch.func`` transforms and ``torch.compile``.
        """
        x = y
        for _ in range(self.input_dim):
            x, ladj = self.elementwise.inverse_and_ladj(y, self.network(x, context))
        return x, ladj.sum(-1)
