"""Compiled solves: plumbing without a compiler, and slow tests with one."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from building import redraw

from flowvi.distributions import Flow
from flowvi.nn import GatedField, MLPField
from flowvi.transforms import (
    RK4,
    Continuous,
    DormandPrince,
    ExactDivergence,
    Hutchinson,
    Solver,
)


class Pair:
    """One flow twice, with a compiled solver and without."""

    def __init__(self, solver: Solver, dtype: torch.dtype = torch.float64) -> None:
        self.field = redraw(GatedField(2, (3,), 2), 0.4).to(dtype)
        self.flows = [
            Continuous(self.field, solver=s) for s in (solver, replace(solver, compiled=False))
        ]
        self.dtype = dtype

    def assert_same(self, batch: int, tolerance: float) -> None:
        """Values and gradients of both directions, for parameters, context and start."""
        x = torch.randn(batch, 2, dtype=self.dtype, requires_grad=True)
        context = torch.randn(batch, 2, dtype=self.dtype, requires_grad=True)
        leaves = [p for p in (x, context, *self.field.parameters()) if p.requires_grad]
        found = []
        for flow in self.flows:
            parts = []
            for method in (flow.call_and_ladj, flow.inverse_and_ladj):
                y, ladj = method(x, context)
                grads = torch.autograd.grad(y.sin().mean() + ladj.square().mean(), leaves)
                parts += [y, ladj, *grads]
            found.append(parts)
        torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_steps", [1, 7, 10])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_solves_in_compiled_pieces(num_steps, checkpointed, pretended):
    pair = Pair(RK4(num_steps, checkpointed, compiled=True))
    pair.assert_same(5, 1e-12)
    # Pieces of equal length, so that one graph does for all.
    assert len(pretended) == 1


def test_flows_of_one_structure_share_what_is_compiled(pretended):
    flows = [
        Continuous(redraw(MLPField(2, (w,))), solver=RK4(4, compiled=True)) for w in (3, 3, 4)
    ]
    for flow in flows:
        flow(torch.zeros(1, 2))
        copy.deepcopy(flow)(torch.zeros(1, 2))
    assert len(pretended) == 2


def test_what_is_not_compiled(pretended):
    flow = Continuous(redraw(MLPField(2, (3,))), solver=RK4(4, compiled=True))
    x = torch.randn(3, 2)
    flow.call_with_integrals(x, [lambda stage: stage.divergence])
    flow.call_ladj_and_score(x, -x)
    torch.func.vmap(flow)(x)
    copy.deepcopy(flow).to("meta")(x.to("meta"))
    assert pretended == []
    assert "compiled=True" in repr(flow.solver)
    assert not flow.solver.refined().compiled


@pytest.mark.slow
def test_compiled_solver_of_any_batch_with_frozen_and_constant_parameters():
    torch._dynamo.reset()
    stats = torch._dynamo.utils.counters["stats"]
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-6)):
        pair = Pair(RK4(2, compiled=True), dtype)
        pair.assert_same(6, tolerance)
        pair.assert_same(4, tolerance)
        before = stats["unique_graphs"]
        for batch in (5, 9, 30):
            pair.assert_same(batch, tolerance)
        assert stats["unique_graphs"] == before
    pair = Pair(RK4(2, compiled=True))
    next(pair.field.parameters()).requires_grad_(False)
    pair.assert_same(4, 1e-10)
    context, value = torch.randn(4, 2), torch.randn(4, 2, requires_grad=True)
    laws = [Flow(flow)(context) for flow in pair.flows]
    found = [torch.autograd.grad(q.log_prob_stopped(value).sum(), value) for q in laws]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        found = [q.log_prob(value) for q in laws]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", [ExactDivergence(), Hutchinson()], ids=repr)
def test_compiled_solver_with_other_divergences_and_checkpoints(divergence):
    pair = Pair(DormandPrince(2, checkpointed=True, compiled=True))
    for flow in pair.flows:
        flow.divergence = divergence
    torch.manual_seed(3)
    x, context = torch.randn(4, 2), torch.randn(4, 2)
    found = []
    for flow in pair.flows:
        torch.manual_seed(4)
        y, ladj = flow.call_and_ladj(x, context)
        grads = torch.autograd.grad(y.sum() + ladj.square().sum(), list(flow.field.parameters()))
        found.append([y, ladj, *grads])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [RK4(4), DormandPrince(2, checkpointed=True)], ids=repr)
def test_compiled_solves_have_the_same_values_and_gradients(solver):
    field = redraw(MLPField(3, (8, 8)))
    transform = Continuous(field, solver=solver)
    torch._dynamo.reset()
    compiled = torch.compile(transform.call_and_ladj, fullgraph=True)
    x = torch.randn(6, 3)
    for _ in range(2):
        found = []
        for solve in (transform.call_and_ladj, compiled):
            y, ladj = solve(x)
            loss = (y * x).sum() + ladj.square().sum()
            found.append([y, ladj, *torch.autograd.grad(loss, list(field.parameters()))])
        torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
        x = torch.randn(6, 3)
