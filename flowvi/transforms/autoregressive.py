"""Autoregressive transform, generic over the elementwise map."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from flowvi.nn import MADE
from flowvi.transforms.base import Direction, FlowTransform
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
        )

    def _call_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.input_dim == 1:
            return self.only._call_and_ladj(x, context)
        y, ladj = self.elementwise.call_and_ladj(x, self.network(x, context))
        return y, ladj.sum(-1)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.input_dim == 1:
            return self.only._inverse_and_ladj(y, context)
        return self._inverse_by_passes(y, context)

    def _inverse_by_passes(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Inverse by ``input_dim`` full passes: each makes one more dimension right."""
        x = y
        for _ in range(self.input_dim):
            x, ladj = self.elementwise.inverse_and_ladj(y, self.network(x, context))
        return x, ladj.sum(-1)
