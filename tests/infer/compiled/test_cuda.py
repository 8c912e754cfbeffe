"""Steps on a GPU: captured once, replayed, without a word to the host."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor

from flowvi.infer import CompiledSVI, FlowSVI, GlobalOptim, Schedule
from flowvi.infer.compiled import CudaGraph, Interpreter
from flowvi.infer.compiled.cuda import Captured
from flowvi.infer.compiled.optimizers import state_of
from flowvi.infer.compiled.step import Buffers, Layout, build_step
from flowvi.infer.compiled.tracing import Program, trace_program, used_parameters
from flowvi.objectives import ELBO

DATA = torch.tensor([1.3, -0.4, 2.1, 0.2, 0.9], dtype=torch.float64)


def model(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 1.0))
    scale = pyro.sample("scale", dist.LogNormal(y.new_zeros(()), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, scale), obs=y)


def test_a_step_runs_on_meta():
    """No operation of the whole step reads a value or mixes devices."""

    def guide(y: Tensor) -> None:
        loc = pyro.param("loc", y.new_tensor([0.3, -0.2]))
        scale = pyro.param("sd", y.new_tensor([0.5, 0.8]), constraint=dist.constraints.positive)
        pyro.sample("mean", dist.Normal(loc[0], scale[0]))
        pyro.sample("scale", dist.LogNormal(loc[1], scale[1]))

    data = DATA.to("meta")
    program = Program(model, guide, ELBO(4, max_plate_nesting=1), (data,))
    named = used_parameters(program)
    traced = trace_program(program, [param for _, param in named])
    optim = GlobalOptim(0.05, clip_norm=1.0, schedule=Schedule(10))
    state = state_of(optim, named)
    buffers = Buffers(Layout(tuple(p.shape for _, p in named)), named[0][1].detach(), 2, 8, 0)
    step = build_step(traced, state.update, buffers, [data], 8)
    assert all(tensor.is_meta for tensor in step.inputs)
    assert step.graph(*step.inputs) == ()
    scalars = {"_local_scalar_dense", "item", "nonzero", "equal"}
    assert not scalars & {str(node.target).split(".")[1:2][0] for node in operations(step.graph)}


def operations(graph: torch.fx.GraphModule) -> Iterator[torch.fx.Node]:
    return (n for n in graph.graph.nodes if isinstance(n.target, torch._ops.OpOverload))


class FakeGraph:
    """Stands for a CUDA graph on a machine without a GPU: replays the function."""

    replays = 0

    def replay(self) -> None:
        FakeGraph.replays += 1
        self.function()


def test_captured_steps_take_new_data_and_keep_their_state(monkeypatch: pytest.MonkeyPatch):
    total, data = torch.zeros(2), torch.ones(2)

    def add(total: Tensor, data: Tensor) -> None:
        total.add_(data)

    @contextmanager
    def nothing(*args: object) -> Iterator[None]:
        yield

    @contextmanager
    def capture(graph: FakeGraph) -> Iterator[None]:
        graph.function = lambda: add(*loop._static)
        yield

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "stream", nothing)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    loop = Captured(add, num_data=1)
    loop.run([total, data], 3)
    assert total.tolist() == [3, 3]
    loop.run([total, 10 * data], 2)
    assert total.tolist() == [23, 23]
    data.fill_(5.0)
    loop.run([total, data], 1)
    assert total.tolist() == [28, 28]
    other = torch.zeros(2)
    loop.run([other, data], 1)
    assert (other.tolist(), total.tolist()) == ([5, 5], [28, 28])
    assert FakeGraph.replays == 7


def test_a_cuda_graph_needs_a_gpu():
    guide = AutoMultivariateNormal(model)
    optim = pyro.optim.Adam({"lr": 0.1})
    svi = CompiledSVI(model, guide, optim, ELBO(), backend=CudaGraph(), check=0)
    with pytest.raises(ValueError, match="`backend` must be Native for parameters on the CPU"):
        svi.step(DATA)


@pytest.mark.slow
def test_benchmark_without_a_gpu():
    script = Path(__file__).parents[3] / "benchmarks" / "gpu.py"
    if not torch.cuda.is_available():
        refused = subprocess.run([sys.executable, script], capture_output=True, text=True)
        assert refused.returncode == 2
        assert "a CUDA device must be present; got none." in refused.stderr
    command = [sys.executable, script, "--dry-run"]
    subprocess.run(command, capture_output=True, text=True, check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
def test_captured_steps_are_the_eager_ones(fused: bool):
    data = DATA.cuda()

    def trained(make: type, **options: object) -> list[float]:
        pyro.clear_param_store()
        torch.manual_seed(0)
        guide = AutoMultivariateNormal(model)
        guide(data)
        svi = make(model, guide, GlobalOptim(0.05), ELBO(4, max_plate_nesting=1), **options)
        torch.manual_seed(1)
        return [svi.step(data) for _ in range(20)]

    eager = trained(FlowSVI)
    interpreted = trained(CompiledSVI, backend=Interpreter())
    captured = trained(CompiledSVI, backend=CudaGraph(fused=fused))
    assert interpreted == pytest.approx(eager, rel=1e-6)
    assert captured == pytest.approx(eager, rel=1e-6)
