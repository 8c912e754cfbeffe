from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowvi.transforms import (
    Additive,
    Affine,
    Chain,
    Coupling,
    ElementwiseMap,
    ElementwiseTransform,
    RationalQuadratic,
)

MAPS: dict[str, ElementwiseMap] = {
    "additive": Additive(),
    "affine": Affine(),
    "affine, tight": Affine(bound=0.5),
    "spline": RationalQuadratic(),
    "spline, two bins": RationalQuadratic(num_bins=2, bound=2.0),
    "chain": Chain(RationalQuadratic(4), Affine()),
}
every = pytest.mark.parametrize("name", MAPS)


def raw_params(elementwise: ElementwiseMap, *batch: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*batch, elementwise.num_params)


@every
def test_zero_parameters_give_the_identity(name: str) -> None:
    elementwise = MAPS[name]
    x = torch.linspace(-8, 8, 101)[:, None]
    y, ladj = elementwise.call_and_ladj(x, torch.zeros(1, elementwise.num_params))
    torch.testing.assert_close(y, x, rtol=0, atol=1e-14)
    torch.testing.assert_close(ladj.expand_as(x), torch.zeros_like(x), rtol=0, atol=1e-14)


@every
def test_ladj_is_the_log_derivative(name: str) -> None:
    elementwise = MAPS[name]
    x = (3 * torch.randn(500, 3)).requires_grad_()
    y, ladj = elementwise.call_and_ladj(x, raw_params(elementwise, 500, 3))
    slope = torch.autograd.grad(y.sum(), x)[0]
    torch.testing.assert_close(ladj.expand_as(slope).exp(), slope, rtol=1e-10, atol=0)


@every
@pytest.mark.parametrize("scale", [2.0, 100.0])
def test_round_trip(name: str, scale: float) -> None:
    elementwise = MAPS[name]
    x, params = 3 * torch.randn(2000, 3), raw_params(elementwise, 2000, 3, scale=scale)
    y, ladj = elementwise.call_and_ladj(x, params)
    again, back = elementwise.inverse_and_ladj(y, params)
    torch.testing.assert_close(again, x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(back, -ladj, rtol=0, atol=1e-8)
    torch.testing.assert_close(elementwise.inverse(y, params), again, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", [n for n in MAPS if n != "chain"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_float32_round_trip(name: str, scale: float) -> None:
    elementwise = MAPS[name]
    x = torch.randn(20_000, 1).float()
    params = raw_params(elementwise, 20_000, 1, scale=scale).float()
    y, _ = elementwise.call_and_ladj(x, params)
    again, _ = elementwise.inverse_and_ladj(y, params)
    torch.testing.assert_close(again, x, rtol=0, atol=1e-4)


@every
@pytest.mark.parametrize("size", [5.0, 50.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_tails_have_finite_gradients(name: str, size: float, dtype: torch.dtype) -> None:
    elementwise = MAPS[name]
    x = torch.tensor([[-size], [size]], dtype=dtype)
    params = raw_params(elementwise, 2, 1).to(dtype)
    for direction in (elementwise.call_and_ladj, elementwise.inverse_and_ladj):
        leaves = x.clone().requires_grad_(), params.clone().requires_grad_()
        value, ladj = direction(*leaves)
        (value.sum() + ladj.sum()).backward()
        assert value.isfinite().all()
        assert all(leaf.grad.isfinite().all() for leaf in leaves)


@every
def test_gradients_of_both_directions(name: str) -> None:
    elementwise = MAPS[name]
    # Within the box, and clear of the knots, where second derivatives jump.
    x = torch.linspace(-1.63, 1.71, 2)[:, None].requires_grad_()
    params = raw_params(elementwise, 2, 1, scale=0.7).requires_grad_()
    for direction in (elementwise.call_and_ladj, elementwise.inverse_and_ladj):
        assert torch.autograd.gradcheck(lambda *a, f=direction: f(*a), (x, params), fast_mode=True)


@every
def test_layouts_broadcast(name: str) -> None:
    elementwise = MAPS[name]
    x, params = torch.randn(5, 4, 3), raw_params(elementwise, 4, 3)
    expected = elementwise.call_and_ladj(x, params.expand(5, 4, 3, -1))
    for given in (params, params.movedim(-1, 0).contiguous().movedim(0, -1)):
        y, ladj = elementwise.call_and_ladj(x, given)
        torch.testing.assert_close(y, expected[0], rtol=0, atol=1e-14)
        torch.testing.assert_close(ladj.expand_as(y), expected[1].expand_as(y))
    one = elementwise.call_and_ladj(x[0, 0], params)[0]
    torch.testing.assert_close(one, elementwise.call_and_ladj(x[0, 0].expand(4, 3), params)[0])


@every
def test_score_of_one_number(name: str) -> None:
    elementwise = MAPS[name]
    x, params, score = torch.randn(9, 2), raw_params(elementwise, 9, 2), torch.randn(9, 2)
    y, ladj, pushed, pulled = elementwise.call_with_score(x, params, score)
    leaf, theta = x.clone().requires_grad_(), params.clone().requires_grad_()
    value, log_slope = elementwise.call_and_ladj(leaf, theta)
    slope = torch.autograd.grad(value.sum(), leaf, create_graph=True)[0]
    curve = torch.zeros_like(x)
    if slope.requires_grad:
        curve = torch.autograd.grad(
            slope.sum(), leaf, retain_graph=True, allow_unused=True, materialize_grads=True
        )[0]
    slope = slope.detach()
    expected = (score - curve / slope) / slope
    loss = (expected * value).sum() + log_slope.expand_as(value).sum()
    torch.testing.assert_close(y, value.detach())
    torch.testing.assert_close(pushed, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pulled, torch.autograd.grad(loss, theta)[0], rtol=1e-9, atol=1e-9)


def test_affine_log_scale_stays_within_its_bound() -> None:
    ladj = Affine(bound=4.0).call_and_ladj(
        torch.zeros(2, 1), torch.tensor([[[0, 1e6]], [[0, -1e6]]])
    )
    assert ladj[1].flatten().tolist() == [4.0, -4.0]


def test_spline_equals_the_published_formula() -> None:
    """One bin at a time, from knots typed in as plain numbers."""
    elementwise = RationalQuadratic(num_bins=2, bound=1.0)
    width, height, slope = 0.7, -0.4, 0.3
    share = [0.15 + 0.7 * torch.tensor([0.5 * raw, 0.0]).softmax(0)[0] for raw in (width, height)]
    knots_x, knots_y = [-1.0, 2 * share[0] - 1, 1.0], [-1.0, 2 * share[1] - 1, 1.0]
    means = [(knots_y[k + 1] - knots_y[k]) / (knots_x[k + 1] - knots_x[k]) for k in (0, 1)]
    middle = torch.tensor(slope).tanh().exp() * 2 / (1 / means[0] + 1 / means[1])
    slopes = [1.0, middle, 1.0]
    params = torch.tensor([[width, 0.0, height, 0.0, slope]])
    for k in (0, 1):
        xi = torch.tensor(0.3)
        x = knots_x[k] + xi * (knots_x[k + 1] - knots_x[k])
        top = means[k] * xi**2 + slopes[k] * xi * (1 - xi)
        bottom = means[k] + (slopes[k] + slopes[k + 1] - 2 * means[k]) * xi * (1 - xi)
        expected = knots_y[k] + (knots_y[k + 1] - knots_y[k]) * top / bottom
        got = elementwise.call_and_ladj(x.reshape(1), params)[0]
        torch.testing.assert_close(got, expected.reshape(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_spline_is_increasing_and_continuously_differentiable(scale: float) -> None:
    elementwise = RationalQuadratic()
    params = raw_params(elementwise, 10, scale=scale)
    x = torch.linspace(-6, 6, 60_001)[:, None]
    y, ladj = elementwise.call_and_ladj(x, params)
    assert (y.diff(dim=0) > 0).all()
    # Slope within the stated guards, and without jumps at knots or at the box.
    assert ladj.exp().min() > 2e-3
    assert ladj.exp().diff(dim=0).abs().max() < 0.2
    edge = torch.tensor([[-5.0], [5.0]])
    for nudge in (-1e-9, 0.0, 1e-9):
        value, slope = elementwise.call_and_ladj(edge + nudge, params)
        torch.testing.assert_close(value, (edge + nudge).expand_as(value), rtol=0, atol=1e-8)
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-6)


def test_elementwise_context_changes_the_map() -> None:
    transform = ElementwiseTransform(2, Affine(), context_dim=3, hidden_dims=(8,))
    for parameter in transform.parameters():
        torch.nn.init.normal_(parameter)
    y = transform(torch.ones(4, 2), torch.randn(4, 3))
    assert len(y.unique(dim=0)) == 4


def test_messages() -> None:
    with pytest.raises(ValueError, match="`num_bins` must be at least 2; got 1."):
        RationalQuadratic(num_bins=1)
    with pytest.raises(ValueError, match="`bound` must be positive; got 0.0."):
        RationalQuadratic(bound=0.0)
    with pytest.raises(ValueError, match="`bound` must be positive; got -1."):
        Affine(bound=-1)
    with pytest.raises(
        ValueError, match="`maps` must hold at least one elementwise map; got none"
    ):
        Chain()
    for make in (ElementwiseTransform, Coupling):
        with pytest.raises(
            TypeError, match=r"`elementwise` must be an ElementwiseMap.*got ABCMeta."
        ):
            make(3, Affine)
