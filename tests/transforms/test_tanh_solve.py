"""Compiled steps along tanh networks, with their backward pass by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from building import redraw
from torch import Tensor, nn

from flowvi.nn import ConcatSquashField, GatedField, MLPField, VectorField
from flowvi.nn._tanh_layers import tanh_layers
from flowvi.transforms import (
    RK4,
    Continuous,
    DormandPrince,
    Euler,
    ExactDivergence,
    FixedStep,
    Midpoint,
)
from flowvi.transforms._by_hand import plain_gradients

SOLVERS = [Euler(3), Midpoint(2), RK4(3), RK4(5, checkpointed=True), DormandPrince(2)]


def by_hand(field: VectorField, solver: FixedStep) -> Continuous:
    return Continuous(field, solver=replace(solver, compiled=True))


def values_and_gradients(flow: Continuous, *given: Tensor | None) -> list[Tensor]:
    """Of both directions, for all that can need gradients."""
    leaves = [t for t in (*given, *flow.parameters()) if t is not None and t.requires_grad]
    found = []
    for method in (flow.call_and_ladj, flow.inverse_and_ladj):
        y, ladj = method(*given)
        grads = torch.autograd.grad(y.sin().mean() + ladj.square().mean(), leaves)
        found += [y, ladj, *grads]
    return found


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("hidden_dims", [(5,), (5, 4)], ids=str)
@pytest.mark.parametrize("context_dim", [0, 2])
def test_equals_autograd_through_the_eager_solve(solver, hidden_dims, context_dim, pretended):
    field = redraw(MLPField(3, hidden_dims, context_dim), 0.5)
    x = torch.randn(2, 4, 3, requires_grad=True)
    context = torch.randn(4, 2, requires_grad=True) if context_dim else None
    flows = by_hand(field, solver), Continuous(field, solver=solver)
    found = [values_and_gradients(flow, x, context) for flow in flows]
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)
    assert {f.__name__ for f in pretended} == {"_forward_step", "_backward_step"}


@pytest.mark.parametrize("solver", [RK4(1), DormandPrince(1)], ids=repr)
def test_gradients_equal_finite_differences(solver, pretended):
    flow = by_hand(redraw(MLPField(2, (2, 2), 1), 0.7), solver)
    x, context = torch.randn(2, 2), torch.randn(1)
    names, values = zip(*flow.named_parameters(), strict=True)
    inputs = [t.detach().clone().requires_grad_() for t in (x, context, *values)]

    def solve(x: Tensor, context: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(flow, given, (x, context)), torch.func.functional_call(
            _Ladj(flow), {f"flow.{name}": p for name, p in given.items()}, (x, context)
        )

    assert torch.autograd.gradcheck(solve, inputs)


class _Ladj(nn.Module):
    def __init__(self, flow: Continuous) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, *given: Tensor) -> Tensor:
        return self.flow.call_and_ladj(*given)[1]


def test_second_derivatives_and_many_gradients_go_through_plain_operations(pretended):
    field = redraw(MLPField(2, (3, 3)), 0.6)
    x = torch.randn(3, 2, requires_grad=True)
    leaves = [x, *(p for p in field.parameters())]
    found = []
    for flow in (by_hand(field, RK4(2)), Continuous(field, solver=RK4(2))):
        y, ladj = flow.call_and_ladj(x)
        grads = torch.autograd.grad(y.sin().sum() + ladj.exp().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        jacobian = torch.autograd.functional.jacobian(flow, x.detach(), vectorize=True)
        found.append([*grads, *second, jacobian])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_sources_made_from_each_other_get_their_own_gradients():
    a = torch.tensor(2.0, requires_grad=True)
    b = a * a
    found = plain_gradients(
        lambda a, b, none: (a * b,), (a, b, None), (True, True, False), (torch.tensor(1.0),)
    )
    assert [g if g is None else g.item() for g in found] == [4.0, 2.0, None]


def test_frozen_parts_get_no_gradients(pretended):
    field = redraw(MLPField(2, (3, 3)), 0.6)
    flows = by_hand(field, RK4(2)), Continuous(field, solver=RK4(2))
    x = torch.randn(3, 2, requires_grad=True)
    field.layers[1].weight.requires_grad_(False)
    found = [values_and_gradients(flow, x) for flow in flows]
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)
    # Only parameters, as in maximum likelihood; then only the start, as in a path gradient.
    found = [values_and_gradients(flow, x.detach()) for flow in flows]
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)
    field.requires_grad_(False)
    found = [values_and_gradients(flow, x) for flow in flows]
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)
    pretended.clear()
    with torch.no_grad():
        flows[0](x)
    flows[0](x.detach())
    assert [f.__name__ for f in pretended] == ["_forward_only"]


def test_a_parameter_changed_before_the_backward_pass_is_noticed(pretended):
    flow = by_hand(redraw(MLPField(2, (3,))), RK4(2))
    y = flow(torch.randn(3, 2))
    with torch.no_grad():
        flow.field.layers[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def hooked() -> MLPField:
    field = MLPField(2, (3,))
    field.layers[0].register_forward_hook(lambda module, given, made: 2 * made)
    return field


@pytest.mark.parametrize(
    "make",
    [
        lambda: MLPField(2, (3,), activation=nn.Softplus),
        lambda: MLPField(2, ()),
        lambda: MLPField(2, (3, 3, 3)),
        lambda: MLPField(2, (3,), 1, low_rank=1),
        lambda: ConcatSquashField(2, (3,)),
        lambda: GatedField(2, (3,)),
        hooked,
    ],
    ids=["softplus", "affine", "three layers", "low rank", "squash", "gated", "hook"],
)
def test_other_fields_are_left_to_autograd(make):
    field = make()
    assert tanh_layers(field, field.prepare(torch.zeros(1) if field.context_dim else None)) is None


def test_other_divergences_and_autocast_are_left_to_autograd(pretended):
    x, field = torch.randn(3, 2), redraw(MLPField(2, (3,)))
    Continuous(field, ExactDivergence(), RK4(1, compiled=True))(x)
    with torch.autocast("cpu", torch.bfloat16):
        by_hand(field, RK4(1))(x)
    assert {f.__name__ for f in pretended} == {"_run_steps"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)], ids=str
)
def test_compiled_for_any_batch_layout_and_frozen_parts(dtype, tolerance):
    torch._dynamo.reset()
    stats = torch._dynamo.utils.counters["stats"]
    field = redraw(MLPField(3, (8, 8), 2), 0.5).to(dtype)
    flows = by_hand(field, Midpoint(2)), Continuous(field, solver=Midpoint(2))

    def compare(*sizes: int) -> None:
        x = torch.randn(*sizes, 3, dtype=dtype, requires_grad=True)
        context = torch.randn(sizes[-1], 2, dtype=dtype)
        found = [values_and_gradients(flow, x, context) for flow in flows]
        with torch.no_grad():
            found = [
                f + [*flow.call_and_ladj(x, context)] for f, flow in zip(found, flows, strict=True)
            ]
        torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)

    compare(6)
    compare(4)
    before = stats["unique_graphs"]
    for sizes in ((5,), (2, 7), (30,)):
        compare(*sizes)
    assert stats["unique_graphs"] == before
    # Weights in another layout, and a frozen network: other kinds, each compiled for itself.
    field.layers[1].weight.data = field.layers[1].weight.data.t().contiguous().t()
    compare(6)
    field.requires_grad_(False)
    compare(6)
