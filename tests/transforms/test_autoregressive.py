from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from flowvi.transforms import Additive, Affine, Autoregressive, Chain, RationalQuadratic

# input_dim, elementwise, context_dim, hidden_dims, order, activation. More than eight variables
# take several blocks; widths below input_dim leave variables without hidden units of their own.
CASES = {
    "affine": (3, Affine(), 0, (8, 8), None, nn.ReLU),
    "affine, blocks": (19, Affine(), 0, (24, 40), None, nn.Tanh),
    "affine, narrow": (12, Affine(), 0, (5, 7), None, nn.Tanh),
    "affine, linear": (10, Affine(), 0, (), None, nn.Tanh),
    "affine, linear, context": (10, Affine(), 2, (), (9, 1, 2, 5, 4, 3, 6, 7, 8, 0), nn.Tanh),
    "affine, context": (9, Affine(), 3, (16, 5, 9), None, nn.SiLU),
    "affine, order": (5, Affine(), 2, (12,), (3, 1, 4, 0, 2), nn.Tanh),
    "additive": (10, Additive(), 0, (16, 16), None, nn.Tanh),
    "spline": (9, RationalQuadratic(4), 2, (16, 16), None, nn.Tanh),
    "chain": (4, Chain(RationalQuadratic(3), Affine()), 0, (8,), (1, 0, 3, 2), nn.Tanh),
}
every = pytest.mark.parametrize("name", CASES)


def build(name: str, std: float = 0.4) -> Autoregressive:
    input_dim, elementwise, context_dim, hidden, order, activation = CASES[name]
    transform = Autoregressive(
        input_dim,
        elementwise,
        order=order,
        context_dim=context_dim,
        hidden_dims=hidden,
        activation=activation,
    )
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.normal_(std=std)
    return transform


def naive_inverse(
    transform: Autoregressive, y: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One variable after the other, a full pass of the network for each."""
    x = torch.zeros_like(y)
    for i in transform.network.order:
        params = transform.network(x, context)
        value, _ = transform.elementwise.inverse_and_ladj(y[..., [i]], params[..., [i], :])
        x = torch.cat([x[..., :i], value, x[..., i + 1 :]], -1)
    _, ladj = transform.elementwise.call_and_ladj(x, transform.network(x, context))
    return x, -ladj.sum(-1)


def inputs(name: str, *batch: int) -> tuple[Tensor, Tensor | None]:
    input_dim, _, context_dim, *_ = CASES[name]
    y = torch.randn(*batch, input_dim, requires_grad=True)
    return y, torch.randn(*batch, context_dim, requires_grad=True) if context_dim else None


@every
def test_inverse_and_its_gradients_equal_the_naive_loop(name: str) -> None:
    transform = build(name)
    y, context = inputs(name, 2, 3)
    leaves = [y, *transform.parameters(), *([] if context is None else [context])]
    weights = torch.randn_like(y), torch.randn(2, 3)
    results = []
    for x, ladj in (transform.inverse_and_ladj(y, context), naive_inverse(transform, y, context)):
        loss = (weights[0] * x).sum() + (weights[1] * ladj).sum()
        results.append((x, ladj, *torch.autograd.grad(loss, leaves)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


@every
def test_passes_equal_steps(name: str) -> None:
    transform = build(name)
    y, context = inputs(name, 4)
    for got, expected in zip(
        transform._inverse_by_passes(y, context),
        transform._inverse_by_steps(y, context),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["affine, order", "affine, linear, context", "chain"])
def test_gradcheck(name: str) -> None:
    transform = build(name, std=0.3)
    y, context = inputs(name, 2)
    names, values = zip(*transform.named_parameters(), strict=True)

    def inverse(y: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        given, parameters = rest[: len(rest) - len(names)], rest[len(rest) - len(names) :]
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(transform, state, (y, *given))

    class Inverting(Autoregressive):
        def forward(self, *args: Tensor) -> tuple[Tensor, Tensor]:
            return self.inverse_and_ladj(*args)

        __call__ = nn.Module.__call__

    transform.__class__ = Inverting
    leaves = [v.detach().clone().requires_grad_() for v in values]
    given = () if context is None else (context,)
    assert torch.autograd.gradcheck(inverse, (y, *given, *leaves), fast_mode=True)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    transform = build("affine, context").requires_grad_(False)
    y, context = inputs("affine, context", 4)
    x, ladj = transform.inverse_and_ladj(y, context.detach())
    (x.sum() + ladj.sum()).backward()
    expected = naive_inverse(transform, y, context.detach())
    grad = torch.autograd.grad(expected[0].sum() + expected[1].sum(), y)[0]
    torch.testing.assert_close(y.grad, grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("context_batch", [(), (3,), (2, 1)])
def test_inverse_broadcasts_the_context(context_batch: tuple[int, ...]) -> None:
    transform = build("affine, context")
    y, context = torch.randn(2, 3, 9), torch.randn(*context_batch, 3)
    x, ladj = transform.inverse_and_ladj(y, context)
    full = transform.inverse_and_ladj(y, context.expand(2, 3, 3))
    torch.testing.assert_close(x, full[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(ladj, full[1], rtol=0, atol=1e-12)
    wide = transform.inverse_and_ladj(y[0, 0], context.expand(2, 3, 3))
    assert wide[0].shape == (2, 3, 9)


@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3)])
def test_inverse_shapes(batch: tuple[int, ...]) -> None:
    transform = build("affine, blocks")
    x, ladj = transform.inverse_and_ladj(torch.randn(*batch, 19))
    assert x.shape == (*batch, 19)
    assert ladj.shape == batch
    assert x.is_contiguous()


def test_second_derivative_is_refused_not_wrong() -> None:
    transform = build("affine")
    y, _ = inputs("affine", 2)
    x, ladj = transform.inverse_and_ladj(y)
    grad = torch.autograd.grad(x.sum() + ladj.sum(), y, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_functorch_hessian_of_the_slow_direction() -> None:
    transform = build("affine, order").requires_grad_(False)
    context = torch.randn(2)

    def log_density(y: Tensor) -> Tensor:
        x, ladj = transform.inverse_and_ladj(y, context)
        return ladj - 0.5 * x.square().sum()

    y = torch.randn(5)
    hessian = torch.func.jacrev(torch.func.jacrev(log_density))(y)
    step = 1e-5 * torch.eye(5)
    slopes = [
        torch.func.grad(log_density)(y + s) - torch.func.grad(log_density)(y - s) for s in step
    ]
    torch.testing.assert_close(hessian, torch.stack(slopes) / 2e-5, rtol=1e-5, atol=1e-5)


def test_bad_values_stay_in_their_row() -> None:
    transform = build("affine, blocks")
    y = torch.randn(4, 19)
    bad = y.clone()
    bad[1, 3] = float("nan")
    x, ladj = transform.inverse_and_ladj(bad)
    expected = transform.inverse_and_ladj(y)
    keep = torch.tensor([0, 2, 3])
    torch.testing.assert_close(x[keep], expected[0][keep])
    torch.testing.assert_close(ladj[keep], expected[1][keep])
    assert ladj[1].isnan()


def test_deepcopy_and_dtype() -> None:
    transform = copy.deepcopy(build("spline")).float()
    y, context = torch.randn(5, 9).float(), torch.randn(5, 2).float()
    x, ladj = transform.inverse_and_ladj(y, context)
    assert x.dtype == ladj.dtype == torch.float32
    torch.testing.assert_close(transform(x, context), y, rtol=0, atol=1e-3)
