"""Traced gradients are those of the eager program, and programs that are no graph are refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from registry import GUIDES, OBJECTIVES
from step_programs import DATA
from torch import Tensor, nn

from flowvi.flows import cnf, realnvp
from flowvi.guides import AmortizedFlow, AutoFlow
from flowvi.infer import CompiledSVI
from flowvi.infer.compiled import Interpreter, NotCompilable
from flowvi.infer.compiled.tracing import Program, modules_of, trace_program, used_parameters
from flowvi.objectives import ELBO, STL
from flowvi.transforms import RK4

narrow = partial(realnvp, num_layers=2, hidden_dims=(4,))


def model(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, scale), obs=y)


def local(y: Tensor, batch: int | None = None) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=batch) as index:
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y[index])


def unsplit(y: Tensor) -> None:
    """Observes its argument as it is, which the sleep phase needs."""
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def assert_same_gradients(
    model: Callable, guide: Callable, objective: Callable, *args: object
) -> None:
    """Loss and gradients of the graph against autograd through the program, same seed."""
    program = Program(model, guide, objective, args)
    params = [param for _, param in used_parameters(program)]
    with torch.no_grad():
        for param in params:
            param.add_(0.1 * torch.randn_like(param))
    traced = trace_program(program, params)
    live = [tensor.clone() for tensor in traced.live]
    torch.manual_seed(5)
    outputs = traced.graph(*traced.params, *traced.live, *program.tensors())
    changed = [tensor.clone() for tensor in traced.live]
    for tensor, value in zip(traced.live, live, strict=True):
        tensor.detach().copy_(value)
    torch.manual_seed(5)
    loss = program.loss()
    grads = torch.autograd.grad(loss, traced.params)
    torch.testing.assert_close(outputs[0], loss.detach(), rtol=1e-9, atol=0)
    for found, expected in zip(outputs[1 + len(traced.reports) :], grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
    # Buffers and counters that the program changes in place change alike.
    for found, expected in zip(changed, traced.live, strict=True):
        torch.testing.assert_close(found, expected)


FEW = {"dreg", "elbo", "stl, clipped", "beta, schedule", "vimco", "wake"}


def amount(name: str) -> object:
    return pytest.param(name, marks=() if name in FEW else pytest.mark.slow)


@pytest.mark.parametrize("name", [amount(name) for name in sorted(OBJECTIVES)])
def test_gradients_of_objectives(name: str):
    program, guide, recipe = model, None, narrow
    if name == "regularized":
        recipe = partial(cnf, hidden_dims=(4,), solver=RK4(2))
    if name == "wake and sleep":
        program = unsplit
        encoder = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 4))
        guide = AmortizedFlow(unsplit, encoder, narrow)
    guide = (guide or AutoFlow(program, recipe)).initialize(DATA)
    assert_same_gradients(program, guide, OBJECTIVES[name].make(4), DATA)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "plates" else pytest.mark.slow) for n in GUIDES]
)
def test_gradients_of_guides(name: str):
    guide = GUIDES[name].make(local).initialize(DATA)
    assert_same_gradients(local, guide, ELBO(4), DATA)


@pytest.mark.parametrize("objective", [Trace_ELBO, TraceMeanField_ELBO])
def test_gradients_of_stock_objectives(objective: type):
    guide = AutoNormal(model)
    assert_same_gradients(model, guide, objective(), DATA)


@pytest.mark.parametrize("objective", [Trace_ELBO, STL])
def test_gradients_of_a_full_rank_guide(objective: type):
    """Its density comes from the noise of the draw, but path gradients are taken in full."""
    guide = AutoMultivariateNormal(model)
    guide(DATA)
    assert_same_gradients(model, guide, objective(), DATA)
    program = Program(model, guide, objective(), (DATA,))
    traced = trace_program(program, [param for _, param in used_parameters(program)])
    solves = traced.graph.graph.find_nodes(
        op="call_function", target=torch.ops.aten.linalg_solve_triangular.default
    )
    assert bool(solves) == (objective is STL)


@pytest.mark.slow
def test_gradients_of_a_stock_guide_with_vectorised_particles():
    objective = Trace_ELBO(3, vectorize_particles=True, max_plate_nesting=1)
    assert_same_gradients(model, AutoLowRankMultivariateNormal(model, rank=1), objective, DATA)


def test_gradients_with_a_subsample():
    guide = AutoNormal(local, create_plates=lambda y, b: pyro.plate("data", 5, subsample_size=b))
    assert_same_gradients(local, guide, Trace_ELBO(), DATA, 2)


def test_gradients_with_a_mask_and_a_score_function():
    def masked(y: Tensor, keep: Tensor) -> None:
        with pyro.plate("data", len(y)):
            label = pyro.sample("label", dist.Bernoulli(0.3))
            with poutine.mask(mask=keep):
                pyro.sample("y", dist.Normal(2 * label - 1, 1.0), obs=y)

    def guide(y: Tensor, keep: Tensor) -> None:
        logits = pyro.param("logits", torch.zeros(len(y)))
        with pyro.plate("data", len(y)):
            pyro.sample("label", dist.Bernoulli(logits=logits))

    assert_same_gradients(masked, guide, ELBO(3), DATA, DATA > 0)


def test_gradients_with_draws_that_depend_on_parameters():
    def guide(y: Tensor) -> None:
        rate = pyro.param("rate", torch.tensor(2.0), constraint=dist.constraints.positive)
        pyro.sample("mean", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.5))
        pyro.sample("scale", dist.Gamma(3.0, rate))

    assert_same_gradients(model, guide, Trace_ELBO(), DATA)


def test_gradients_with_batch_norm_and_dropout():
    net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2))

    def prior(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("net", net)
        loc, log_scale = net(x[:, None]).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    before = net[1].running_mean.clone()
    program = Program(prior, guide, Trace_ELBO(), (DATA,))
    modules = {type(module) for module in modules_of(program)}
    assert {nn.BatchNorm1d, nn.Dropout} <= modules
    torch.testing.assert_close(net[1].running_mean, before, rtol=0, atol=0)
    assert_same_gradients(prior, guide, Trace_ELBO(), DATA)


# Programs that one graph does not stand for.


def normal_guide(y: Tensor) -> None:
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 1.0))


def branching(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z if z > 0 else 2 * z, 1.0).expand([5]).to_event(1), obs=y)


def selecting(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    chosen = y[y > 0]
    pyro.sample("y", dist.Normal(z, 1.0).expand(chosen.shape).to_event(1), obs=chosen)


def with_numpy(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(float(np.random.normal()), 1.0))
    pyro.sample("y", dist.Normal(z, 1.0).expand([5]).to_event(1), obs=y)


def with_random(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(random.random(), 1.0))
    pyro.sample("y", dist.Normal(z, 1.0).expand([5]).to_event(1), obs=y)


def reading(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample(
        "y", dist.Normal(z, float(y.detach().numpy().std())).expand([5]).to_event(1), obs=y
    )


def listing(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, max(y.tolist())).expand([5]).to_event(1), obs=y)


def reading_a_parameter(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.3)).item(), 1.0))
    pyro.sample("y", dist.Normal(z, 1.0).expand([5]).to_event(1), obs=y)


REFUSED = {
    branching: r"must not depend on the value of a tensor in Python; got bool\(\)",
    selecting: "must have shapes that do not depend on values; got aten.index.Tensor",
    with_numpy: "must draw its random numbers from torch; got draws from numpy",
    with_random: "must draw its random numbers from torch; got draws from random",
    reading: r"got numpy\(\) of a tensor",
    listing: r"got tolist\(\) of a tensor",
    reading_a_parameter: r"got item\(\) of a tensor",
}


@pytest.mark.parametrize("program", REFUSED, ids=lambda p: p.__name__)
def test_programs_that_are_no_graph_are_refused(program: Callable):
    svi = CompiledSVI(
        program, normal_guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), backend=Interpreter()
    )
    with pytest.raises(NotCompilable, match=REFUSED[program]):
        svi.step(DATA)
    # Nothing was trained, and the random state is where it was but for numpy's own draws.
    assert pyro.param("loc").item() == 0.3


@pytest.mark.parametrize("check", [0, 2])
def test_a_count_in_python_is_found(check: int):
    calls = []

    def counting(y: Tensor) -> None:
        calls.append(None)
        z = pyro.sample("z", dist.Normal(0.1 * len(calls), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0).expand([5]).to_event(1), obs=y)

    svi = CompiledSVI(
        counting, normal_guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(),
        backend=Interpreter(), check=check,
    )  # fmt: skip
    message = "loss differs from the eager one" if check else "two runs of the program had"
    with pytest.raises(NotCompilable, match=message):
        svi.step(DATA)


@pytest.mark.parametrize("objective", [TraceGraph_ELBO, RenyiELBO])
def test_objectives_without_a_differentiable_loss_are_refused(objective: type):
    svi = CompiledSVI(
        model, AutoNormal(model), pyro.optim.Adam({"lr": 0.1}), objective(), backend=Interpreter()
    )
    with pytest.raises(NotCompilable, match=f"{objective.__name__} has no differentiable_loss"):
        svi.step(DATA)


def test_a_kept_view_of_a_parameter_is_refused():
    kept = pyro.param("loc", torch.tensor(0.3)).detach()

    def hidden(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(kept, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0).expand([5]).to_event(1), obs=y)

    program = Program(hidden, normal_guide, Trace_ELBO(), (DATA,))
    params = [param for _, param in used_parameters(program)]
    with pytest.raises(NotCompilable, match="must not reach a parameter through `.data`"):
        trace_program(program, params)


def test_a_value_that_was_read_makes_the_graph_stale():
    width = torch.tensor(2.0)

    def wide(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, float(width)))
        pyro.sample("y", dist.Normal(z, 1.0).expand([5]).to_event(1), obs=y)

    program = Program(wide, normal_guide, Trace_ELBO(), (DATA,))
    traced = trace_program(program, [param for _, param in used_parameters(program)])
    assert not traced.stale
    width.fill_(3.0)
    assert traced.stale


def test_path_gradients_on_a_trained_guide_trace_twice_alike():
    guide = AutoFlow(model, narrow).initialize(DATA)
    program = Program(model, guide, STL(4, antithetic=True), (DATA,))
    params = [param for _, param in used_parameters(program)]
    traced = trace_program(program, params, twice=True)
    assert len(traced.params) == len(params)
