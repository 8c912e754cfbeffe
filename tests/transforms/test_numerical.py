"""Numerical inverses: values, implicit derivatives, and what happens without a solution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flowvi.transforms import (
    Compose,
    Coupling,
    FlowTransform,
    HouseholderSylvester,
    LULinear,
    NumericalInverse,
    OrthogonalSylvester,
    Planar,
    Radial,
    RationalQuadratic,
    TriangularSylvester,
)
from flowvi.transforms._solvers import increasing_root


class Cubic(FlowTransform):
    """A user's map without an inverse: an increasing cubic after a rotation."""

    has_inverse = False

    def __init__(self, context_dim: int = 0) -> None:
        super().__init__(2, context_dim)
        self.angle = nn.Parameter(torch.tensor(0.7))
        self.bend = nn.Parameter(torch.tensor([0.3, 0.1]))

    def _call_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        c, s = torch.cos(self.angle), torch.sin(self.angle)
        x = torch.stack([c * x[..., 0] - s * x[..., 1], s * x[..., 0] + c * x[..., 1]], -1)
        bend = self.bend.exp() if context is None else (self.bend + context).exp()
        return x + bend * x**3, torch.log1p(3 * bend * x**2).sum(-1)


class Fold(FlowTransform):
    """Not invertible: nothing maps below 0."""

    def __init__(self) -> None:
        super().__init__(1)

    def _call_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return x**2, torch.log(2 * x.abs()).sum(-1)


NUMERICAL = {
    "planar": lambda c: Planar(2, c),
    "orthogonal": lambda c: OrthogonalSylvester(2, 1, c),
    "householder": lambda c: HouseholderSylvester(2, 2, c),
    "triangular": lambda c: TriangularSylvester(2, c),
    "user map": lambda c: NumericalInverse(Cubic(c)),
    "composed": lambda c: NumericalInverse(Compose([Planar(2, c), LULinear(2)])),
}
IMPLICIT = pytest.mark.parametrize("name", NUMERICAL)


def drawn(name: str, context_dim: int) -> FlowTransform:
    transform = NUMERICAL[name](context_dim)
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.normal_()
    return transform


def as_function(transform: FlowTransform, with_context: bool) -> tuple[object, list[Tensor]]:
    """The inverse as a function of y, the parameters and, if any, the context."""
    names, values = zip(*transform.named_parameters(), strict=True)

    class Inverted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = transform

        def forward(self, *args: Tensor) -> tuple[Tensor, Tensor]:
            return self.inner.inverse_and_ladj(*args)

    module = Inverted()

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        count = 2 if with_context else 1
        replaced = {f"inner.{n}": t for n, t in zip(names, tensors[count:], strict=True)}
        return torch.func.functional_call(module, replaced, tensors[:count])

    return function, [v.detach().clone().requires_grad_() for v in values]


@IMPLICIT
@pytest.mark.parametrize("context_dim", [0, 2])
def test_implicit_gradients(name: str, context_dim: int) -> None:
    transform = drawn(name, context_dim)
    function, parameters = as_function(transform, with_context=context_dim > 0)
    y = torch.randn(3, 2, requires_grad=True)
    inputs = [y, torch.randn(3, 2, requires_grad=True)] if context_dim else [y]
    assert torch.autograd.gradcheck(function, (*inputs, *parameters), eps=1e-6, atol=1e-6)


@IMPLICIT
def test_gradient_of_a_data_likelihood_against_differences(name: str) -> None:
    transform = drawn(name, 0)
    y = torch.randn(20, 2)

    def loss() -> Tensor:
        x, ladj = transform.inverse_and_ladj(y)
        return (ladj - 0.5 * x.square().sum(-1)).mean()

    transform.zero_grad()
    loss().backward()
    for parameter in transform.parameters():
        direction = torch.randn_like(parameter)
        expected = (parameter.grad * direction).sum()
        with torch.no_grad():
            parameter.add_(1e-5 * direction)
            above = loss()
            parameter.sub_(2e-5 * direction)
            below = loss()
            parameter.add_(1e-5 * direction)
        torch.testing.assert_close((above - below) / 2e-5, expected, rtol=1e-5, atol=1e-6)


def test_agrees_with_inverses_known_otherwise() -> None:
    for known in (Radial(3), Coupling(3, RationalQuadratic(4), hidden_dims=(8,)), Planar(3)):
        with torch.no_grad():
            for parameter in known.parameters():
                parameter.normal_(std=0.5)
        y = torch.randn(50, 3)
        torch.testing.assert_close(
            NumericalInverse(known).inverse_and_ladj(y),
            known.inverse_and_ladj(y),
            rtol=0,
            atol=1e-8,
        )


def test_each_row_converges_by_itself() -> None:
    transform = NumericalInverse(Cubic())
    y = torch.randn(4, 2) * torch.tensor([[1e-8], [1.0], [1e3], [1e6]])
    x, ladj = transform.inverse_and_ladj(y)
    torch.testing.assert_close(transform(x), y, rtol=1e-10, atol=0)
    for i in range(4):
        torch.testing.assert_close(transform.inverse_and_ladj(y[i]), (x[i], ladj[i]))


@pytest.mark.parametrize("slope", [-0.999999, -0.5, 1.0, 1e6])
def test_bracketed_root_at_extreme_slopes(slope: float) -> None:
    target = torch.cat([torch.linspace(-3, 3, 301), torch.tensor([0.0, 1e-12, 1e4])])

    def excess(v: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(v)
        return v + slope * h - target, 1 + slope * (1 - h * h)

    root = increasing_root(excess, target - abs(slope), target + abs(slope))
    residual = root + slope * torch.tanh(root) - target
    assert residual.abs().max() < 1e-10 * (1 + abs(slope))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_solution_is_an_error_that_names_the_map(dtype: torch.dtype) -> None:
    y = torch.tensor([[4.0], [-1.0], [9.0]], dtype=dtype)
    message = "numerical inverse of Fold did not converge for 1 of 3 values"
    with pytest.raises(RuntimeError, match=message):
        NumericalInverse(Fold()).inverse_and_ladj(y)


@IMPLICIT
def test_nan_shows_in_its_own_row_only(name: str) -> None:
    y = torch.randn(3, 2)
    y[1] = torch.nan
    x, ladj = drawn(name, 0).inverse_and_ladj(y)
    assert x.isfinite().all(-1).tolist() == [True, False, True]
    assert ladj.isfinite().tolist() == [True, False, True]


@IMPLICIT
def test_an_empty_batch_stays_empty(name: str) -> None:
    x, ladj = drawn(name, 0).inverse_and_ladj(torch.empty(0, 2))
    assert x.shape == (0, 2)
    assert ladj.shape == (0,)


@pytest.mark.parametrize("name", ["planar", "triangular"])
def test_inverse_under_vmap(name: str) -> None:
    transform, y = drawn(name, 0), torch.randn(4, 2)
    jacobian = torch.func.vmap(torch.func.jacrev(transform.inv))(y)
    expected = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(transform.inverse_and_ladj(y)[1], expected)


def test_only_flow_transforms_are_wrapped() -> None:
    with pytest.raises(TypeError, match="`transform` must be a FlowTransform; got Linear"):
        NumericalInverse(nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match="Cubic has no inverse.* NumericalInverse"):
        Cubic().inverse_and_ladj(torch.zeros(2))
    with pytest.raises(NotImplementedError, match="Cubic has no inverse.* NumericalInverse"):
        _ = Cubic().inv
