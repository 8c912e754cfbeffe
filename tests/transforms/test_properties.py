"""Properties of the mathematics of every transform; STYLE section 1.4 numbers them.

Each runs for every case of the registry, mostly with the parameters a map starts with and with
parameters drawn from N(0, 1). Properties 9 to 11 are in test_module_properties.py.
"""

from __future__ import annotations

import re

import pyro.distributions as dist
import pytest
import torch
from building import CONDITIONAL, NAMES, SkewBase, both_states, build, context_of, every
from registry import TRANSFORMS, Case
from torch import Tensor

from flowvi.distributions import Flow, FlowDistribution
from flowvi.transforms import Direction, FlowTransform

# 1. Shapes and dtypes.


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_shapes_and_dtype(name: str, dtype: torch.dtype) -> None:
    case, transform = build(name, drawn=False)
    transform.to(dtype)
    for batch in [(), (5,), (2, 3)]:
        x = torch.randn(*batch, *case.event_shape, dtype=dtype)
        context = context_of(case, *batch)
        context = None if context is None else context.to(dtype)
        for method in (transform.call_and_ladj, transform.inverse_and_ladj):
            value, ladj = method(x, context)
            assert value.shape == x.shape
            assert ladj.shape == batch
            assert value.dtype == ladj.dtype == dtype


@pytest.mark.parametrize("name", CONDITIONAL)
@both_states
def test_context_broadcasts(name: str, drawn: bool) -> None:
    case, transform = build(name, drawn)
    for x_batch, c_batch in [((), (5,)), ((5,), ()), ((4, 1), (3,)), ((4, 3), (3,))]:
        x, context = torch.randn(*x_batch, *case.event_shape), context_of(case, *c_batch)
        batch = torch.broadcast_shapes(x_batch, c_batch)
        wide = x.expand(*batch, *case.event_shape), context.expand(*batch, -1)
        for method in (transform.call_and_ladj, transform.inverse_and_ladj):
            for got, expected in zip(method(x, context), method(*wide), strict=True):
                assert got.shape == expected.shape
                torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


# 2. The log-determinant, against autograd.


def jacobian_of(transform: FlowTransform, x: Tensor, context: Tensor | None) -> Tensor:
    """Matrices of derivatives, with the event dimensions in one row."""
    args = (x,) if context is None else (x, context)
    found = torch.func.vmap(torch.func.jacrev(transform))(*args)
    return found.reshape(len(x), x[0].numel(), x[0].numel())


@every
@both_states
def test_ladj_equals_jacobian(name: str, drawn: bool) -> None:
    for _ in range(3):
        case, transform = build(name, drawn)
        x, context = torch.randn(6, *case.event_shape), context_of(case, 6)
        if transform.cheap is Direction.INVERSE:
            transform = transform.inv
        ladj = transform.call_and_ladj(x, context)[1]
        expected = torch.linalg.slogdet(jacobian_of(transform, x, context)).logabsdet
        torch.testing.assert_close(ladj, expected, rtol=0, atol=1e-8)


# 3. Round trips.


@every
@both_states
def test_round_trip(name: str, drawn: bool) -> None:
    for _ in range(3):
        case, transform = build(name, drawn)
        start, context = torch.randn(20, *case.event_shape), context_of(case, 20)
        for go, back in [
            (transform.call_and_ladj, transform.inverse_and_ladj),
            (transform.inverse_and_ladj, transform.call_and_ladj),
        ]:
            value, ladj = go(start, context)
            again, back_ladj = back(value, context)
            torch.testing.assert_close(again, start, rtol=0, atol=1e-6)
            torch.testing.assert_close(back_ladj, -ladj, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in NAMES if TRANSFORMS[n].float32])
def test_float32_round_trip_with_large_weights(name: str) -> None:
    case, transform = build(name, drawn=False)
    with torch.no_grad():
        for parameter in transform.parameters():
            # What starts at zero gets the spread of an ordinary linear layer instead.
            if parameter.any():
                parameter.mul_(3)
            else:
                parameter.uniform_(-1, 1).mul_(parameter.shape[-1] ** -0.5)
    transform.float()
    x = torch.randn(500, *case.event_shape).float()
    context = None if case.context_dim == 0 else context_of(case, 500).float()
    with torch.no_grad():
        y, _ = transform.call_and_ladj(x, context)
        again, _ = transform.inverse_and_ladj(y, context)
    torch.testing.assert_close(again, x, rtol=0, atol=1e-4)


# 4. The protocols of torch and Pyro.


@every
@both_states
def test_protocols_agree(name: str, drawn: bool) -> None:
    case, transform = build(name, drawn)
    x, context = torch.randn(5, *case.event_shape), context_of(case, 5)
    y, ladj = transform.call_and_ladj(x, context)
    torch.testing.assert_close(transform(x, context), y, rtol=0, atol=0)
    torch.testing.assert_close(transform.log_abs_det_jacobian(x, y, context), ladj, rtol=0, atol=0)
    flow = Flow(transform, SkewBase(case.event_shape))
    plain = transform if context is None else transform.condition(context)
    stock = dist.TransformedDistribution(flow.base(), [plain])
    expected = stock.log_prob(y.detach())
    torch.testing.assert_close(flow(context).log_prob(y.detach()), expected, rtol=0, atol=1e-8)


# 5. The density integrates to one.


@pytest.mark.parametrize("name", [n for n in NAMES if TRANSFORMS[n].event_shape == (1,)])
@both_states
@torch.no_grad()
def test_density_integrates_to_one_in_1d(name: str, drawn: bool) -> None:
    case, transform = build(name, drawn)
    base = torch.linspace(-9, 9, 20001).unsqueeze(-1)
    context = None if case.context_dim == 0 else context_of(case).expand(len(base), -1)
    # Images of a fine base grid are an uneven grid that is fine where the density is large.
    y = transform.call_and_ladj(base, context)[0]
    density = FlowDistribution(dist.Normal(torch.zeros(1), 1.0).to_event(1), transform, context)
    total = torch.trapezoid(density.log_prob(y.clone()).exp(), y.squeeze(-1)).abs()
    assert abs(total - 1) < 1e-3


@pytest.mark.parametrize("name", [n for n in NAMES if TRANSFORMS[n].event_shape == (2,)])
@both_states
@torch.no_grad()
def test_density_integrates_to_one_in_2d(name: str, drawn: bool) -> None:
    case, transform = build(name, drawn, scale=0.3)
    context = context_of(case)
    flow = Flow(transform)(context)
    draws = flow.sample((2000,))
    middle, spread = draws.mean(0), draws.std(0)
    axes = [torch.linspace(-7, 7, 401) * s + m for m, s in zip(middle, spread, strict=True)]
    grid = torch.cartesian_prod(*axes)
    cell = (axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0])
    assert abs(flow.log_prob(grid).exp().sum() * cell - 1) < 1e-3


# 6. Every parameter learns from both directions.


def missing_gradients(case: Case, transform: FlowTransform, loss: Tensor) -> list[str]:
    transform.zero_grad()
    loss.backward()
    missing = []
    for name, parameter in transform.named_parameters():
        given = parameter.grad is not None and bool(parameter.grad.any())
        assert not given or parameter.grad.isfinite().all(), name
        if not given and name not in case.no_gradient:
            missing.append(name)
    return missing


@pytest.mark.parametrize("name", [n for n in NAMES if list(TRANSFORMS[n].make().parameters())])
def test_every_parameter_learns(name: str) -> None:
    case, transform = build(name, drawn=True)
    flow = Flow(transform, SkewBase(case.event_shape))
    context = context_of(case, 8)
    y = flow(context).rsample(() if case.context_dim else (8,))
    assert not missing_gradients(case, transform, (torch.randn_like(y) * y).sum())
    data = y.detach() + 0.01
    assert not missing_gradients(case, transform, flow(context).log_prob(data).sum())


# 7. Zero patterns.


@pytest.mark.parametrize("name", [n for n in NAMES if TRANSFORMS[n].jacobian])
def test_zero_pattern(name: str) -> None:
    case = TRANSFORMS[name]
    found = torch.zeros(case.input_dim, case.input_dim, dtype=torch.bool)
    for _ in range(10):
        transform = build(name, drawn=True)[1]
        for row in torch.randn(3, *case.event_shape):
            jacobian = torch.autograd.functional.jacobian(transform, row)
            found |= jacobian.reshape(found.shape) != 0
    assert torch.equal(found, torch.tensor([[c == "1" for c in row] for row in case.jacobian]))


# 8. Context.


@pytest.mark.parametrize("name", CONDITIONAL)
@both_states
def test_context_batch_equals_rows(name: str, drawn: bool) -> None:
    case, transform = build(name, drawn)
    x, context = torch.randn(5, *case.event_shape), context_of(case, 5)
    for method in (transform.call_and_ladj, transform.inverse_and_ladj):
        rows = [method(x[i], context[i]) for i in range(5)]
        values, ladjs = (torch.stack(part) for part in zip(*rows, strict=True))
        torch.testing.assert_close(method(x, context), (values, ladjs), rtol=1e-7, atol=1e-9)


@every
def test_wrong_shapes_are_refused(name: str) -> None:
    case, transform = build(name, drawn=False)
    *others, last = case.event_shape
    wanted = f"shape {case.event_shape}" if others else f"size {last} (input_dim)"
    for method, arg in [(transform.call_and_ladj, "x"), (transform.inverse_and_ladj, "y")]:
        with pytest.raises(ValueError, match=re.escape(f"`{arg}` must end with {wanted}; got")):
            method(torch.zeros(3, *others, last + 1), context_of(case, 3))
        if not case.context_dim:
            continue
        with pytest.raises(ValueError, match=r"`context` must be given and end with size 2"):
            method(torch.zeros(3, *case.event_shape))
        with pytest.raises(ValueError, match=r"`context` must end with size 2 \(context_dim\)"):
            method(torch.zeros(3, *case.event_shape), torch.zeros(3, 5))
        with pytest.raises(ValueError, match=r"`context` must have a batch shape that broadcasts"):
            method(torch.zeros(3, *case.event_shape), torch.zeros(4, 2))


# 12. Far tails.


@every
@both_states
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("size", [50.0, 1e4])
def test_far_values_and_gradients_are_finite(
    name: str, drawn: bool, dtype: torch.dtype, size: float
) -> None:
    case, transform = build(name, drawn)
    transform.to(dtype)
    corners = torch.cartesian_prod(*[torch.tensor([-size, 0.0, size])] * case.input_dim)
    start = corners.reshape(-1, *case.event_shape).to(dtype)
    context = None if case.context_dim == 0 else context_of(case, len(start)).to(dtype)
    for method in (transform.call_and_ladj, transform.inverse_and_ladj):
        x = start.clone().requires_grad_()
        value, ladj = method(x, context)
        transform.zero_grad()
        (value.sum() + ladj.sum()).backward()
        found = [value, ladj, x.grad, *(p.grad for p in transform.parameters())]
        assert all(t.isfinite().all() for t in found if t is not None)


# The score recursion.


@pytest.mark.parametrize("name", [n for n in NAMES if TRANSFORMS[n].make().has_score_recursion])
@both_states
def test_score_recursion_equals_gradient_through_inverse(name: str, drawn: bool) -> None:
    case, transform = build(name, drawn)
    base, context = SkewBase(case.event_shape)(), context_of(case, 6)
    x = torch.randn(6, *case.event_shape, requires_grad=True)
    score = torch.autograd.grad(base.log_prob(x).sum(), x)[0]
    y, ladj, pushed = transform.call_ladj_and_score(x, score, context)
    torch.testing.assert_close((y, ladj), transform.call_and_ladj(x, context), rtol=0, atol=1e-12)
    assert not pushed.requires_grad
    leaf = y.detach().requires_grad_()
    log_q = FlowDistribution(base, transform, context).log_prob(leaf)
    expected = torch.autograd.grad(log_q.sum(), leaf)[0]
    torch.testing.assert_close(pushed, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", [n for n in NAMES if TRANSFORMS[n].make().has_score_recursion])
@both_states
def test_score_recursion_keeps_the_gradients_of_value_and_ladj(name: str, drawn: bool) -> None:
    case, transform = build(name, drawn)
    x = torch.randn(6, *case.event_shape, requires_grad=True)
    context = context_of(case, 6)
    leaves = [x, *transform.parameters()]
    if context is not None:
        leaves.append(context.requires_grad_())
    weights = torch.randn(6, *case.event_shape), torch.randn(6)
    for which in ((1, 0), (0, 1), (1, 1)):
        found = []
        for y, ladj, *_ in (
            transform.call_ladj_and_score(x, -x, context),
            transform.call_and_ladj(x, context),
        ):
            total = which[0] * (weights[0] * y).sum() + which[1] * (weights[1] * ladj).sum()
            if not total.requires_grad:
                return
            grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
            found.append(torch.cat([g.flatten() for g in grads]))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
