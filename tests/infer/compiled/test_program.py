"""What is compared before a step is trusted, and what its graph must not do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from step_programs import DATA, guide, model
from torch import Tensor, fx

from flowvi.flows import nsf
from flowvi.guides import AutoFlow
from flowvi.infer import CompiledSVI, GlobalOptim
from flowvi.infer.compiled import Interpreter, NotCompilable
from flowvi.infer.compiled.step import StepGraph
from flowvi.objectives import IWAE, STL


def adam() -> pyro.optim.PyroOptim:
    return pyro.optim.Adam({"lr": 0.05})


def is_traced() -> bool:
    return torch._C._len_torch_dispatch_stack() > 0


@pytest.mark.parametrize("error", [ValueError, IndexError])
def test_data_that_cannot_be_shifted_are_compared_as_they_are(error: type[Exception]):
    def picky(y: Tensor) -> None:
        model(y)
        if not is_traced() and not torch.equal(y, DATA):
            raise error("Other data.")

    svi = CompiledSVI(picky, guide, adam(), Trace_ELBO(), backend=Interpreter(), check=2)
    svi.step(DATA)
    reason = f"{error.__name__}: Other data."
    expected = f"Of 2 comparisons of gradients, 2 without shifted data: {reason}"
    assert expected in svi.notes[-1]
    plain = CompiledSVI(model, guide, adam(), Trace_ELBO(), backend=Interpreter(), check=2)
    plain.step(DATA)
    assert "comparisons" not in plain.notes[-1]


def test_a_step_that_was_never_compared_is_not_trusted():
    def failing(y: Tensor) -> None:
        model(y)
        if not is_traced():
            raise ValueError("Out of numbers.")

    svi = CompiledSVI(failing, guide, adam(), Trace_ELBO(), backend=Interpreter(), check=2)
    with pytest.raises(NotCompilable, match="each of 2 eager steps raised ValueError: Out of num"):
        svi.step(DATA)


class Kept(Interpreter):
    """Keeps the graph that it is given."""

    def prepare(self, step: StepGraph) -> object:
        self.graph = step.graph
        return super().prepare(step)


def local(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=3) as index:
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y[index])


def coins(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        side = pyro.sample("side", dist.Bernoulli(0.4))
        pyro.sample("y", dist.Normal(side, 1.0), obs=y)


def guessed(y: Tensor) -> None:
    logits = pyro.param("logits", torch.zeros(len(y)))
    with pyro.plate("data", len(y)):
        pyro.sample("side", dist.Bernoulli(logits=logits))


STEPS: dict[str, tuple[Callable, Callable, Callable, Callable]] = {
    "by hand, Adam": (model, lambda m: guide, Trace_ELBO, adam),
    "minibatches": (local, AutoNormal, TraceMeanField_ELBO, adam),
    "discrete": (coins, lambda m: guessed, Trace_ELBO, lambda: pyro.optim.SGD({"lr": 0.1})),
    "many particles": (model, AutoNormal, lambda: IWAE(5), lambda: GlobalOptim(0.05, clip_norm=1)),
    "path gradients of splines": (
        model,
        lambda m: AutoFlow(m, partial(nsf, num_layers=1, hidden_dims=(4,), num_bins=2)),
        lambda: STL(4),
        lambda: GlobalOptim(0.05),
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_nothing_in_a_step_waits_for_the_host(name: str):
    program, make_guide, objective, optim = STEPS[name]
    made, backend = make_guide(program), Kept()
    if isinstance(made, torch.nn.Module):
        made(DATA)
    CompiledSVI(program, made, optim(), objective(), backend=backend, check=0).step(DATA)
    assert hosts_of(backend.graph) == []


def hosts_of(graph: fx.GraphModule) -> list[str]:
    """Operations that need a number on the host, or another device than that of the step."""
    waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    found = []
    for node in graph.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        # Integer indices have as many results as there are indices.
        by_index = node.target is torch.ops.aten.index.Tensor
        if waits & set(node.target.tags) and not by_index:
            found.append(str(node.target))
        if node.kwargs.get("device") not in (None, torch.device("cpu")):
            found.append(f"{node.target} to {node.kwargs['device']}")
        if "assert" in str(node.target) or "pin_memory" in str(node.target):
            found.append(str(node.target))
    return found


def test_a_wait_for_the_host_is_seen():
    def reading(x: Tensor) -> Tensor:
        return x * x.nonzero().sum()

    graph = torch.fx.experimental.proxy_tensor.make_fx(reading)(torch.ones(3))
    assert hosts_of(graph) == ["aten.nonzero.default"]
