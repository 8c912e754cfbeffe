from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flowvi.distributions import Flow
from flowvi.transforms import (
    Additive,
    Affine,
    Autoregressive,
    Chain,
    Coupling,
    ElementwiseMap,
    ElementwiseTransform,
    FlowTransform,
    RationalQuadratic,
    compose,
)

ELEMENTWISE = {
    "additive": Additive(),
    "affine": Affine(),
    "spline": RationalQuadratic(4),
    "chain": Chain(RationalQuadratic(3), Affine()),
}
every_map = pytest.mark.parametrize("elementwise", ELEMENTWISE.values(), ids=ELEMENTWISE)


def randomise(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def score_through_inverse(
    transform: FlowTransform, y: Tensor, context: Tensor | None = None
) -> Tensor:
    """Gradient in y of log N(x; 0, I) + ladj, by autograd through the inverse.

    Under torch.func an autoregressive inverse is a plain loop of full passes, which shares no
    code with the adjoint solve that the recursion uses.
    """

    def log_density(y: Tensor) -> Tensor:
        x, ladj = transform.inverse_and_ladj(y, context)
        return ladj.sum() - 0.5 * x.square().sum()

    return torch.func.grad(log_density)(y.detach())


@every_map
@pytest.mark.parametrize("mask", [None, (True, False, True, False), (True, False, False, False)])
def test_formula(elementwise: ElementwiseMap, mask: tuple | None) -> None:
    transform = randomise(Coupling(4, elementwise, mask=mask, hidden_dims=(8,)))
    moved = torch.tensor(mask or (False, False, True, True))
    x = torch.randn(7, 4)
    y, ladj = transform.call_and_ladj(x)
    assert torch.equal(y[:, ~moved], x[:, ~moved])
    raw = transform.network(x[:, ~moved]).reshape(7, elementwise.num_params, -1).mT
    expected, log_slope = elementwise.call_and_ladj(x[:, moved], raw)
    torch.testing.assert_close(y[:, moved], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(ladj, log_slope.sum(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [Coupling, Autoregressive, ElementwiseTransform])
@every_map
def test_starts_at_the_identity(kind: type[FlowTransform], elementwise: ElementwiseMap) -> None:
    x, context = torch.randn(5, 3), torch.randn(5, 2)
    y, ladj = kind(3, elementwise, context_dim=2).call_and_ladj(x, context)
    torch.testing.assert_close(y, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(ladj, torch.zeros(5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [Coupling, Autoregressive, ElementwiseTransform])
@every_map
@pytest.mark.parametrize("context_dim", [0, 2])
def test_score_recursion(
    kind: type[FlowTransform], elementwise: ElementwiseMap, context_dim: int
) -> None:
    transform = kind(4, elementwise, context_dim=context_dim, hidden_dims=(8,))
    randomise(transform)
    x = torch.randn(50, 4)
    context = torch.randn(50, 2) if context_dim else None
    y, ladj, score = transform.call_ladj_and_score(x, -x, context)
    torch.testing.assert_close(y, transform(x, context), rtol=0, atol=1e-12)
    expected = score_through_inverse(transform, y, context)
    error = (score - expected).abs() / expected.abs().clamp_min(1.0)
    # Float64 rounding grows with the slope of the inverse; the worst of 50 draws is held to 1e-7.
    assert error.median() < 1e-10
    assert error.max() < 1e-7
    assert not score.requires_grad
    with torch.no_grad():
        quiet = transform.call_ladj_and_score(x, -x, context)
    assert not any(t.requires_grad for t in quiet)
    for got, expected in zip(quiet, (y, ladj, score), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [Coupling, Autoregressive])
def test_score_recursion_keeps_the_graph_of_the_value(kind: type[FlowTransform]) -> None:
    flow = compose(*(randomise(kind(3, Affine(), hidden_dims=(6,))) for _ in range(2)))
    x = torch.randn(8, 3)
    plain = torch.autograd.grad(flow(x).square().sum(), list(flow.parameters()))
    y, _, _ = flow.call_ladj_and_score(x, -x)
    shared = torch.autograd.grad(y.square().sum(), list(flow.parameters()))
    for got, expected in zip(shared, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [Coupling, Autoregressive])
def test_path_derivative_equals_scoring_with_stopped_parameters(kind: type[FlowTransform]) -> None:
    transform = compose(*(randomise(kind(3, Affine(), hidden_dims=(6,))) for _ in range(2)))
    flow = Flow(transform)

    def gradients(stopped: bool) -> list[Tensor]:
        torch.manual_seed(1)
        if stopped:
            z = flow().rsample((16,))
            log_q = flow().log_prob_stopped(z)
        else:
            z, log_q = flow().path_derivative().rsample_and_log_prob((16,))
        return torch.autograd.grad((log_q + z.square().sum(-1)).sum(), list(flow.parameters()))

    for got, expected in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [Coupling, Autoregressive])
@pytest.mark.parametrize("elementwise", [Additive(), Affine()], ids=["additive", "affine"])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_one_dimension_is_not_affine(
    kind: type[FlowTransform], elementwise: ElementwiseMap, context_dim: int
) -> None:
    transform = randomise(kind(1, elementwise, context_dim=context_dim))
    x = torch.linspace(-3, 3, 61)[:, None]
    y = transform(x, torch.zeros(context_dim) if context_dim else None)
    bend = y.diff(n=2, dim=0).abs().max()
    assert bend > 1e-4


@pytest.mark.parametrize("kind", [Coupling, Autoregressive])
@pytest.mark.parametrize("direction", ["call_and_ladj", "inverse_and_ladj"])
@every_map
def test_far_tails_have_finite_gradients(
    kind: type[FlowTransform], direction: str, elementwise: ElementwiseMap
) -> None:
    transform = kind(3, elementwise, hidden_dims=(8,))
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.normal_(std=0.3)
    for size in (50.0, 1e4):
        x = (size * torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]])).requires_grad_()
        value, ladj = getattr(transform, direction)(x)
        (value.sum() + ladj.sum()).backward()
        assert value.isfinite().all()
        assert x.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in transform.parameters())


def test_messages() -> None:
    with pytest.raises(ValueError, match=r"`mask` must have length 3 \(input_dim\); got 2."):
        Coupling(3, mask=(True, False))
    with pytest.raises(ValueError, match=r"`mask` must move some dimensions and keep some; got"):
        Coupling(3, mask=(True, True, True))
    with pytest.raises(TypeError, match=r"`elementwise` must be an ElementwiseMap"):
        Autoregressive(3, "affine")
