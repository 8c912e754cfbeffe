from __future__ import annotations

import pyro.distributions.transforms as stock
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from flowvi.distributions import Flow
from flowvi.transforms import (
    FlowTransform,
    Householder,
    LULinear,
    Permutation,
    TriangularAffine,
    Whitening,
)


def drawn(transform: FlowTransform) -> FlowTransform:
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.normal_()
    return transform


def matrix_of(transform: FlowTransform) -> Tensor:
    return torch.autograd.functional.jacobian(transform, torch.zeros(transform.input_dim))


def factor(input_dim: int) -> Tensor:
    lower = torch.randn(input_dim, input_dim).tril(-1)
    return lower + torch.diag(0.5 + torch.rand(input_dim))


def test_whitening_is_the_gaussian_it_was_given() -> None:
    loc, scale_tril = torch.randn(4), factor(4)
    whitening = Whitening(4)
    whitening.set_(loc, scale_tril)
    z = torch.randn(10, 4)
    expected = MultivariateNormal(loc, scale_tril=scale_tril).log_prob(z)
    torch.testing.assert_close(Flow(whitening)().log_prob(z), expected)
    assert not list(whitening.parameters())
    assert set(whitening.state_dict()) == {"loc", "scale_tril"}


def test_whitening_set_after_a_draw_is_seen() -> None:
    whitening = Whitening(2)
    q = Flow(whitening)()
    z = q.rsample((3,))
    whitening.set_(torch.ones(2), 2 * torch.eye(2))
    expected = MultivariateNormal(torch.ones(2), scale_tril=2 * torch.eye(2)).log_prob(z)
    torch.testing.assert_close(q.log_prob(z), expected)


def test_whitening_casts_to_its_own_dtype() -> None:
    whitening = Whitening(2).float()
    whitening.set_(torch.zeros(2), torch.eye(2))
    assert whitening.loc.dtype == torch.float32


@pytest.mark.parametrize(
    ("loc", "scale_tril", "message"),
    [
        (torch.zeros(3), torch.eye(2), r"`loc` must have shape \(2,\); got shape \(3,\)"),
        (torch.zeros(2), torch.eye(3), r"`scale_tril` must have shape \(2, 2\); got shape"),
        (torch.tensor([0.0, torch.nan]), torch.eye(2), "`loc` must be finite; got 1 entries"),
        (torch.zeros(2), torch.inf * torch.ones(2, 2), "`scale_tril` must be finite; got 4"),
        (torch.zeros(2), torch.ones(2, 2), "`scale_tril` must be lower triangular; got an upper"),
        (torch.zeros(2), torch.diag(torch.tensor([1.0, -2])), "positive diagonal; got .* of -2"),
    ],
)
def test_whitening_refuses(loc: Tensor, scale_tril: Tensor, message: str) -> None:
    whitening = Whitening(2)
    with pytest.raises(ValueError, match=message):
        whitening.set_(loc, scale_tril)
    assert torch.equal(whitening.scale_tril, torch.eye(2))


def test_triangular_affine_is_a_gaussian() -> None:
    transform = drawn(TriangularAffine(4))
    q = MultivariateNormal(transform(torch.zeros(4)), scale_tril=matrix_of(transform))
    z = torch.randn(10, 4)
    torch.testing.assert_close(Flow(transform)().log_prob(z), q.log_prob(z))


def test_triangular_affine_reaches_any_gaussian() -> None:
    scale_tril = factor(3)
    transform = TriangularAffine(3)
    with torch.no_grad():
        scale = scale_tril.diagonal()
        transform.raw.log_scale.copy_(scale.log())
        transform.raw.lower.copy_(scale_tril / scale.unsqueeze(-1))
    torch.testing.assert_close(matrix_of(transform), scale_tril)


def test_lu_matrix_has_the_minors_of_its_scales() -> None:
    permutation = (2, 0, 3, 1)
    transform = drawn(LULinear(4, permutation=permutation))
    matrix = matrix_of(transform)
    # Undoing the permutation leaves a matrix whose leading minors are the products of the scales.
    plain = torch.empty_like(matrix)
    plain[list(permutation)] = matrix
    minors = torch.stack([torch.linalg.det(plain[:k, :k]) for k in range(1, 5)])
    torch.testing.assert_close(minors, transform.raw.log_scale.cumsum(0).exp())


@pytest.mark.parametrize("count", [1, 2, 4])
def test_householder_is_orthogonal_and_equals_stock(count: int) -> None:
    transform = drawn(Householder(4, count))
    matrix = matrix_of(transform)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(4))
    torch.testing.assert_close(torch.linalg.det(matrix), torch.tensor((-1.0) ** count))
    other = stock.Householder(4, count)
    other.u_unnormed.data = transform.raw.vectors.data
    x = torch.randn(5, 4)
    torch.testing.assert_close(transform(x), other._call(x))


def test_a_zero_reflection_vector_is_the_identity() -> None:
    transform = Householder(3, 1)
    transform.raw.vectors.data.zero_()
    x = torch.randn(5, 3, requires_grad=True)
    y = transform(x)
    y.sum().backward()
    assert torch.equal(y, x)
    assert transform.raw.vectors.grad.isfinite().all()


@pytest.mark.parametrize(
    "transform",
    [Whitening(3), TriangularAffine(3), TriangularAffine(1), LULinear(3), Householder(3, 4)],
    ids=lambda t: type(t).__name__,
)
def test_starts_at_the_identity(transform: FlowTransform) -> None:
    x = torch.randn(5, transform.input_dim)
    torch.testing.assert_close(transform.double()(x), x, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Whitening(0), "`input_dim` must be an integer of at least 1; got 0"),
        (lambda: TriangularAffine(2, -1), "`context_dim` must be a non-negative integer; got -1"),
        (lambda: Householder(3, 0), "`num_reflections` must be an integer of at least 1; got 0"),
        (lambda: LULinear(3, permutation=(1, 0)), r"`permutation` must have length 3 .*; got 2"),
        (
            lambda: LULinear(2, permutation=(1, 1)),
            r"`permutation` must be a reordering .*\[1, 1\]",
        ),
        (lambda: Permutation([0, 2]), r"`indices` must be a reordering of 0 to n - 1 .*\[0, 2\]"),
        (lambda: Permutation([]), r"`indices` must be a reordering"),
        (lambda: Permutation([0] * 40), "and more"),
    ],
)
def test_bad_arguments_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_permutations() -> None:
    x = torch.arange(5.0)
    assert Permutation.reverse(5)(x).tolist() == [4, 3, 2, 1, 0]
    state = torch.get_rng_state()
    first, second = Permutation.random(50, seed=1), Permutation.random(50, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.order, second.order)
    assert not torch.equal(first.order, Permutation.random(50, seed=2).order)


def test_a_loaded_permutation_inverts_itself() -> None:
    loaded = Permutation.random(6, seed=1)
    loaded.load_state_dict(Permutation.random(6, seed=2).state_dict())
    x = torch.randn(6)
    assert torch.equal(loaded.inv(loaded(x)), x)


@pytest.mark.parametrize("input_dim", [1, 2, 5, 8])
def test_random_rotation_is_orthogonal(input_dim: int) -> None:
    linear = LULinear.rotation(input_dim)
    matrix = torch.func.jacrev(linear)(torch.zeros(input_dim))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(input_dim))
    if input_dim > 2:
        assert (matrix.abs() > 1e-3).all()
        assert not torch.equal(matrix, torch.func.jacrev(LULinear.rotation(input_dim))(matrix[0]))
    torch.manual_seed(1)
    first = LULinear.rotation(input_dim).state_dict()
    torch.manual_seed(1)
    again = LULinear.rotation(input_dim).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
