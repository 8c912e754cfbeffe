"""Sylvester maps: planar maps with several hyperplanes at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flowvi.transforms._algebra import MOST, matvec, reflect, reflection_matrix, solve, triangular
from flowvi.transforms._parameters import RawParameters
from flowvi.transforms.base import Direction, FlowTransform
from flowvi.transforms.linear import paired_vectors
from flowvi.transforms.planar import solve_tanh

__all__ = ["HouseholderSylvester", "OrthogonalSylvester", "TriangularSylvester"]


class _Sylvester(FlowTransform):
    r"""What the three Sylvester maps share.

    .. math:: y = x + Q R \tanh(S Q^T x + b), \qquad
        \log|\det J| = \sum_i \log(1 + \tanh'(\cdot)_i R_{ii} S_{ii})

    with orthonormal columns in :math:`Q` and upper triangular :math:`R, S` whose diagonals stay
    inside (-1, 1), so that :math:`R_{ii} S_{ii} > -1`. In the coordinates :math:`Q^T x` the map
    is triangular: the inverse solves one increasing equation per coordinate, last one first.

    A subclass adds the parameters of Q and writes the two products with it.
    """

    exact_inverse = False
    has_score_recursion = True
    cheap = Direction.FORWARD

    def __init__(
        self,
        input_dim: int,
        bottleneck_dim: int,
        context_dim: int,
        hidden_dims: Sequence[int],
        basis: Mapping[str, Tensor],
    ) -> None:
        super().__init__(input_dim, context_dim)
        size = bottleneck_dim
        start = {
            "outer": 0.01 * torch.randn(size, size),
            "inner": torch.eye(size) + 0.01 * torch.randn(size, size),
            "bias": torch.zeros(size),
            **basis,
        }
        self.raw = RawParameters(start, context_dim, hidden_dims)

    def _basis(self, *raw: Tensor) -> Tensor | None:
        """What the two products need, from the raw parameters of Q."""
        raise NotImplementedError

    def _to_basis(self, basis: Tensor | None, x: Tensor) -> Tensor:
        """The product with the transpose of Q."""
        raise NotImplementedError

    def _from_basis(self, basis: Tensor | None, v: Tensor) -> Tensor:
        """The product with Q."""
        raise NotImplementedError

    def _parts(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """R, S, b, the product of the diagonals, and the basis."""
        outer, inner, bias, *rest = self.raw(context)
        r = MOST * torch.tanh(outer.diagonal(dim1=-2, dim2=-1))
        s = torch.tanh(inner.diagonal(dim1=-2, dim2=-1))
        upper_r = triangular(outer, r, upper=True)
        upper_s = triangular(inner, s, upper=True)
        return upper_r, upper_s, bias, r * s, self._basis(*rest)

    def _call_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        r, s, bias, product, basis = self._parts(context)
        h = torch.tanh(matvec(s, self._to_basis(basis, x)) + bias)
        y = x + self._from_basis(basis, matvec(r, h))
        return y, torch.log1p(product * (1 - h * h)).sum(-1)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        r, s, bias, product, basis = self._parts(context)
        v = _solve_triangular_tanh(r, s, bias, self._to_basis(basis, y), type(self).__name__)
        h = torch.tanh(matvec(s, v) + bias)
        x = y - self._from_basis(basis, matvec(r, h))
        return x, -torch.log1p(product * (1 - h * h)).sum(-1)

    def _call_ladj_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        r, s, bias, product, basis = self._parts(context)
        h = torch.tanh(matvec(s, self._to_basis(basis, x)) + bias)
        slope = product * (1 - h * h)
        y, ladj = x + self._from_basis(basis, matvec(r, h)), torch.log1p(slope).sum(-1)
        with torch.no_grad():
            bent = matvec(s.mT, 2 * h * slope / (1 + slope))
            score = score.detach() + self._from_basis(basis, bent)
            inside = self._to_basis(basis, score)
            # J^T = I + Q A Q^T with A = S^T diag(h') R^T, so only the part inside Q changes.
            jacobian = (s.mT * (1 - h * h).unsqueeze(-2)) @ r.mT
            jacobian = jacobian + torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
            solved = solve(jacobian.expand(*h.shape, h.shape[-1]), inside, upper=False)
            pushed = score + self._from_basis(basis, solved - inside)
        return y, ladj, pushed


def _solve_triangular_tanh(
    r: Tensor, s: Tensor, bias: Tensor, target: Tensor, name: str
) -> Tensor:
    """Solution of ``v + R tanh(S v + b) = target``, back to front, differentiable in all."""
    found: list[Tensor] = []
    bent: list[Tensor] = []
    for i in reversed(range(target.shape[-1])):
        offset, goal = bias[..., i], target[..., i]
        for k, (v, h) in enumerate(zip(found, bent, strict=True), start=i + 1):
            offset = offset + s[..., i, k] * v
            goal = goal - r[..., i, k] * h
        root = solve_tanh(r[..., i, i], s[..., i, i], offset, goal, name)
        found.insert(0, root)
        bent.insert(0, torch.tanh(s[..., i, i] * root + offset))
    return torch.stack(found, dim=-1)


class OrthogonalSylvester(_Sylvester):
    r"""Sylvester map with a learned set of ``bottleneck_dim`` orthonormal directions.

    .. math:: y = x + Q R \tanh(S Q^T x + b)

    :math:`Q` is the orthonormal factor of a free ``(input_dim, bottleneck_dim)`` matrix, exact
    instead of iterated; it is remade in every call, at ``input_dim * bottleneck_dim**2``
    products. The inverse is numerical with exact first derivatives. In one dimension
    :math:`Q` is a constant, 1 or -1, and its parameter has no gradient.

    Args:
        input_dim: number of dimensions, at least 1.
        bottleneck_dim: number of directions, 1 to ``input_dim``.
        context_dim: length of the context vector; 0 learns one map.
        hidden_dims: widths of the context network's hidden layers; empty makes it linear.

    Shape:
        x: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; ladj: ``(*batch,)``, nats.

    Raises:
        ValueError: if ``bottleneck_dim`` is outside 1 to ``input_dim``.
        RuntimeError: by the inverse, if it did not converge.

    References:
        van den Berg, Hasenclever, Tomczak and Welling (2018), Sylvester normalizing flows,
        arXiv:1803.05649, section 3, the orthogonal variant.
    """

    def __init__(
        self,
        input_dim: int,
        bottleneck_dim: int,
        context_dim: int = 0,
        *,
        hidden_dims: Sequence[int] = (),
    ) -> None:
        if not isinstance(bottleneck_dim, int) or not 1 <= bottleneck_dim <= input_dim:
            raise ValueError(
                f"`bottleneck_dim` must be an integer from 1 to {input_dim} (input_dim); "
                f"got {bottleneck_dim!r}."
            )
        basis = {"basis": torch.randn(input_dim, bottleneck_dim)}
        super().__init__(input_dim, bottleneck_dim, context_dim, hidden_dims, basis)

    def _basis(self, *raw: Tensor) -> Tensor:
        q, r = torch.linalg.qr(raw[0])
        # A positive diagonal makes the factor unique, so it moves smoothly with the parameter.
        signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
        return q * signs.unsqueeze(-2)

    def _to_basis(self, basis: Tensor, x: Tensor) -> Tensor:
        return matvec(basis.mT, x)

    def _from_basis(self, basis: Tensor, v: Tensor) -> Tensor:
        return matvec(basis, v)


class HouseholderSylvester(_Sylvester):
    r"""Sylvester map in all dimensions, rotated by a product of Householder reflections.

    .. math:: y = x + Q R \tanh(S Q^T x + b), \qquad Q = H_1 \cdots H_k

    The inverse is numerical with exact first derivatives. In one dimension a reflection is a
    constant, and its parameter has no gradient.

    Args:
        input_dim: number of dimensions, at least 1.
        num_reflections: number of reflections, at least 1.
        context_dim: length of the context vector; 0 learns one map.
        hidden_dims: widths of the context network's hidden layers; empty makes it linear.

    Shape:
        x: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; ladj: ``(*batch,)``, nats.

    Raises:
        ValueError: if ``num_reflections`` is below 1.
        RuntimeError: by the inverse, if it did not converge.

    References:
        van den Berg, Hasenclever, Tomczak and Welling (2018), Sylvester normalizing flows,
        arXiv:1803.05649, section 3, the Householder variant.
    """

    def __init__(
        self,
        input_dim: int,
        num_reflections: int = 2,
        context_dim: int = 0,
        *,
        hidden_dims: Sequence[int] = (),
    ) -> None:
        basis = {"vectors": paired_vectors(num_reflections, input_dim)}
        super().__init__(input_dim, input_dim, context_dim, hidden_dims, basis)

    def _basis(self, *raw: Tensor) -> Tensor:
        # A matrix if all rows share it, since both products use it; else the vectors.
        return raw[0] if self.context_dim else reflection_matrix(raw[0])

    def _to_basis(self, basis: Tensor, x: Tensor) -> Tensor:
        if self.context_dim:
            return reflect(basis, x, reverse=True)
        return matvec(basis.mT, x)

    def _from_basis(self, basis: Tensor, v: Tensor) -> Tensor:
        if self.context_dim:
            return reflect(basis, v)
        return matvec(basis, v)


class TriangularSylvester(_Sylvester):
    r"""Sylvester map in all dimensions without rotation, or in reversed order.

    .. math:: y = x + Q R \tanh(S Q^T x + b), \qquad Q = I \text{ or the reversal}

    Alternate ``reverse`` from layer to layer. Its Jacobian is upper triangular, or lower with
    ``reverse``. The inverse is numerical with exact first derivatives.

    Args:
        input_dim: number of dimensions, at least 1.
        context_dim: length of the context vector; 0 learns one map.
        reverse: whether the dimensions are taken in reversed order.
        hidden_dims: widths of the context network's hidden layers; empty makes it linear.

    Shape:
        x: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; ladj: ``(*batch,)``, nats.

    Raises:
        RuntimeError: by the inverse, if it did not converge.

    References:
        van den Berg, Hasenclever, Tomczak and Welling (2018), Sylvester normalizing flows,
        arXiv:1803.05649, section 3, the triangular variant.
    """

    def __init__(
        self,
        input_dim: int,
        context_dim: int = 0,
        *,
        reverse: bool = False,
        hidden_dims: Sequence[int] = (),
    ) -> None:
        super().__init__(input_dim, input_dim, context_dim, hidden_dims, {})
        self.reverse = reverse

    def _basis(self, *raw: Tensor) -> None:
        return None

    def _to_basis(self, basis: None, x: Tensor) -> Tensor:
        return x.flip(-1) if self.reverse else x

    def _from_basis(self, basis: None, v: Tensor) -> Tensor:
        return v.flip(-1) if self.reverse else v
