"""Affine maps: whitening, triangular, LU-factored and orthogonal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowvi.transforms._algebra import log_diagonal, matvec, reflect, solve, triangular
from flowvi.transforms._parameters import RawParameters
from flowvi.transforms.base import FlowTransform
from flowvi.transforms.permutation import check_permutation

__all__ = ["Householder", "LULinear", "TriangularAffine", "Whitening"]


class Whitening(FlowTransform):
    r"""Fixed affine map :math:`y = \ell + L x` with buffers, not parameters.

    It carries a known location and covariance :math:`L L^T`, so that the maps before it work in
    whitened coordinates. It starts as the identity.

    Args:
        input_dim: number of dimensions, at least 1.

    Shape:
        x: ``(*batch, input_dim)``; ladj: ``(*batch,)``, in nats.

    Example:
        >>> whitening = Whitening(2)
        >>> whitening.set_(torch.tensor([1.0, 0.0]), torch.tensor([[2.0, 0.0], [1.0, 3.0]]))
        >>> whitening(torch.ones(2))
        tensor([3., 4.])
    """

    has_score_recursion = True

    def __init__(self, input_dim: int) -> None:
        super().__init__(input_dim)
        self.register_buffer("loc", torch.zeros(input_dim))
        self.register_buffer("scale_tril", torch.eye(input_dim))

    @torch.no_grad()
    def set_(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Copy a location and a lower Cholesky factor into the buffers.

        Args:
            loc: location ``(input_dim,)``.
            scale_tril: lower-triangular factor ``(input_dim, input_dim)``, positive diagonal.

        Raises:
            ValueError: if a shape is wrong, an entry is not finite, the factor is not lower
                triangular, or its diagonal is not positive.
        """
        for name, value, shape in (
            ("loc", loc, tuple(self.loc.shape)),
            ("scale_tril", scale_tril, tuple(self.scale_tril.shape)),
        ):
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"`{name}` must have shape {shape}; got shape {tuple(value.shape)}."
                )
            # On the meta device there are no numbers to check.
            if not value.is_meta and not value.isfinite().all():
                bad = int((~value.isfinite()).sum())
                raise ValueError(f"`{name}` must be finite; got {bad} entries that are not.")
        if not scale_tril.is_meta:
            _check_factor(scale_tril)
        self.loc.copy_(loc)
        self.scale_tril.copy_(scale_tril)

    def _ladj(self, like: Tensor) -> Tensor:
        return log_diagonal(self.scale_tril.diagonal().log(), like)

    def _call_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.loc + matvec(self.scale_tril, x), self._ladj(x)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return solve(self.scale_tril, y - self.loc, upper=False), -self._ladj(y)

    def _call_ladj_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, ladj = self._call_and_ladj(x, context)
        return y, ladj, solve(self.scale_tril.mT, score.detach(), upper=True)


def _check_factor(scale_tril: Tensor) -> None:
    if scale_tril.triu(1).any():
        raise ValueError(
            "`scale_tril` must be lower triangular; got an upper entry of size "
            f"{float(scale_tril.triu(1).abs().max()):.3g}."
        )
    smallest = float(scale_tril.diagonal().min())
    if not smallest > 0:
        raise ValueError(
            f"`scale_tril` must have a positive diagonal; got an entry of {smallest:.3g}."
        )


class TriangularAffine(FlowTransform):
    r"""Trainable affine map :math:`y = \ell + e^{s} \odot N x`, :math:`N` unit lower triangular.

    The scale multiplies whole rows, so a small scale does not make the inverse ill-conditioned.
    It is the identity at the start. With a context, a network of it shifts all three.

    Args:
        input_dim: number of dimensions, at least 1.
        context_dim: length of the context vector; 0 learns one location and scale.
        hidden_dims: widths of the context network's hidden layers; empty makes it linear.

    Shape:
        x: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; ladj: ``(*batch,)``, nats.

    Example:
        >>> y, ladj = TriangularAffine(3).call_and_ladj(torch.ones(5, 3))
        >>> y.shape, ladj.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    has_score_recursion = True

    def __init__(
        self, input_dim: int, context_dim: int = 0, *, hidden_dims: Sequence[int] = ()
    ) -> None:
        super().__init__(input_dim, context_dim)
        start = {
            "loc": torch.zeros(input_dim),
            "log_scale": torch.zeros(input_dim),
            "lower": torch.zeros(input_dim, input_dim),
        }
        if input_dim == 1:
            del start["lower"]
        self.raw = RawParameters(start, context_dim, hidden_dims)

    def _parts(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Location, log-scale and the unit triangular factor."""
        loc, log_scale, *lower = self.raw(context)
        return loc, log_scale, _unit(lower, log_scale, upper=False)

    def _call_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        loc, log_scale, factor = self._parts(context)
        y = loc + log_scale.exp() * matvec(factor, x)
        return y, log_diagonal(log_scale, y)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        loc, log_scale, factor = self._parts(context)
        x = solve(factor, (y - loc) * (-log_scale).exp(), upper=False)
        return x, -log_diagonal(log_scale, x)

    def _call_ladj_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        loc, log_scale, factor = self._parts(context)
        y = loc + log_scale.exp() * matvec(factor, x)
        pushed = solve(factor.detach().mT, score.detach(), upper=True)
        return y, log_diagonal(log_scale, y), pushed * (-log_scale.detach()).exp()


def _unit(strict: list[Tensor], log_scale: Tensor, *, upper: bool) -> Tensor:
    """Unit triangular factor; one dimension has no strict triangle."""
    square = strict[0] if strict else torch.zeros_like(log_scale).unsqueeze(-1)
    return triangular(square, torch.ones_like(log_scale), upper=upper)


class LULinear(FlowTransform):
    r"""Affine map :math:`y = \ell + P L e^{s} U x` with an LU-factored matrix.

    :math:`P` is a fixed permutation, :math:`L` unit lower and :math:`U` unit upper triangular,
    with a positive diagonal :math:`e^s` between them. Value and inverse cost two triangular
    products or solves. It starts as the permutation :math:`P`, the identity by default.

    Args:
        input_dim: number of dimensions, at least 1.
        context_dim: length of the context vector; 0 learns one matrix.
        permutation: the fixed reordering, as ``y[i] = (L e^s U x)[permutation[i]]``;
            the identity if left out.
        hidden_dims: widths of the context network's hidden layers; empty makes it linear.

    Shape:
        x: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; ladj: ``(*batch,)``, nats.

    Raises:
        ValueError: if ``permutation`` is not a reordering of ``0 .. input_dim - 1``.

    References:
        Kingma and Dhariwal (2018), Glow, arXiv:1807.03039, section 3.2;
        Oliva et al. (2018), Transformation autoregressive networks, arXiv:1801.09819.
    """

    has_score_recursion = True

    def __init__(
        self,
        input_dim: int,
        context_dim: int = 0,
        *,
        permutation: Sequence[int] | None = None,
        hidden_dims: Sequence[int] = (),
    ) -> None:
        super().__init__(input_dim, context_dim)
        order = range(input_dim) if permutation is None else permutation
        order = check_permutation(order, "permutation")
        if len(order) != input_dim:
            raise ValueError(
                f"`permutation` must have length {input_dim} (input_dim); got {len(order)}."
            )
        self.register_buffer("order", order)
        self.register_buffer("inverse_order", order.argsort())
        start = {
            "loc": torch.zeros(input_dim),
            "log_scale": torch.zeros(input_dim),
            "factors": torch.zeros(input_dim, input_dim),
        }
        if input_dim == 1:
            del start["factors"]
        self.raw = RawParameters(start, context_dim, hidden_dims)

    @classmethod
    @torch.no_grad()
    def rotation(cls, input_dim: int) -> LULinear:
        """A map that starts as a random orthogonal matrix, from torch's generator.

        References:
            Kingma and Dhariwal (2018), Glow, arXiv:1807.03039, section 3.2.
        """
        size = (input_dim, input_dim)
        orthogonal = torch.linalg.qr(torch.randn(size, dtype=torch.float64, device="cpu")).Q
        pivots, lower, upper = torch.linalg.lu(orthogonal)
        linear = cls(input_dim, permutation=pivots.argmax(1).tolist())
        diagonal = upper.diagonal()
        linear.raw.log_scale.copy_(diagonal.abs().log())
        if input_dim > 1:
            # With D the signs of U's diagonal, D L D and D U have positive diagonals; their
            # product is orthogonal as well, since it differs by the signs of whole rows.
            signs = diagonal.sign()
            lower = signs[:, None] * lower * signs
            upper = upper / diagonal[:, None]
            linear.raw.factors.copy_(lower.tril(-1) + upper.triu(1))
        return linear

    def _parts(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Location, log-scale, L and U; one square tensor holds both strict triangles."""
        loc, log_scale, *strict = self.raw(context)
        lower, upper = (_unit(strict, log_scale, upper=side) for side in (False, True))
        return loc, log_scale, lower, upper

    def _call_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        loc, log_scale, lower, upper = self._parts(context)
        mixed = matvec(lower, log_scale.exp() * matvec(upper, x))
        y = loc + mixed[..., self.order]
        return y, log_diagonal(log_scale, y)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        loc, log_scale, lower, upper = self._parts(context)
        mixed = (y - loc)[..., self.inverse_order]
        scaled = solve(lower, mixed, upper=False) * (-log_scale).exp()
        x = solve(upper, scaled, upper=True)
        return x, -log_diagonal(log_scale, x)

    def _call_ladj_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, ladj = self._call_and_ladj(x, context)
        with torch.no_grad():
            _, log_scale, lower, upper = self._parts(context)
            half = solve(upper.mT, score, upper=False) * (-log_scale).exp()
            pushed = solve(lower.mT, half, upper=True)[..., self.order]
        return y, ladj, pushed


class Householder(FlowTransform):
    r"""Orthogonal map: a product of reflections :math:`x - 2 v (v^T x) / (v^T v)`.

    It keeps volume and length and costs ``num_reflections * input_dim``. Vectors start in equal
    pairs, so an even number of reflections starts as the identity, an odd one as a reflection.

    Args:
        input_dim: number of dimensions, at least 1.
        num_reflections: number of reflections, at least 1; ``input_dim`` of them reach every
            orthogonal matrix of their determinant.
        context_dim: length of the context vector; 0 learns one rotation.
        hidden_dims: widths of the context network's hidden layers; empty makes it linear.

    Shape:
        x: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; ladj: ``(*batch,)``, zeros.

    Raises:
        ValueError: if ``num_reflections`` is below 1.

    References:
        Tomczak and Welling (2016), Improving variational auto-encoders using Householder flow,
        arXiv:1611.09630.
    """

    has_score_recursion = True

    def __init__(
        self,
        input_dim: int,
        num_reflections: int = 2,
        context_dim: int = 0,
        *,
        hidden_dims: Sequence[int] = (),
    ) -> None:
        super().__init__(input_dim, context_dim)
        vectors = paired_vectors(num_reflections, input_dim)
        self.raw = RawParameters({"vectors": vectors}, context_dim, hidden_dims)

    def _call_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        (vectors,) = self.raw(context)
        y = reflect(vectors, x)
        return y, y.new_zeros(y.shape[:-1])

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        (vectors,) = self.raw(context)
        x = reflect(vectors, y, reverse=True)
        return x, x.new_zeros(x.shape[:-1])

    def _call_ladj_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        (vectors,) = self.raw(context)
        y = reflect(vectors, x)
        return y, y.new_zeros(y.shape[:-1]), reflect(vectors.detach(), score.detach())


def paired_vectors(num_reflections: int, input_dim: int) -> Tensor:
    """Random reflection vectors in equal pairs, which cancel.

    Raises:
        ValueError: if ``num_reflections`` is below 1.
    """
    if not isinstance(num_reflections, int) or num_reflections < 1:
        raise ValueError(
            f"`num_reflections` must be an integer of at least 1; got {num_reflections!r}."
        )
    pairs = torch.randn((num_reflections + 1) // 2, input_dim)
    return pairs.repeat_interleave(2, dim=0)[:num_reflections]
