"""Steps compiled to a library: the same numbers, kept on disk, and what happens without tools."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from step_programs import DATA, guide, model
from torch import Tensor, fx

from flowvi.infer import CompiledSVI, GlobalOptim
from flowvi.infer.compiled import Interpreter, Native, NotCompilable, native
from flowvi.infer.compiled.noise import NoiseTable, hoist_draws
from flowvi.infer.compiled.rewrites import simplify
from flowvi.infer.compiled.tracing import record
from flowvi.objectives import ELBO


def test_without_a_compiler_steps_are_slower_and_say_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(native, "_compiler", lambda: None)
    optim = pyro.optim.Adam({"lr": 0.05})
    svi = CompiledSVI(model, guide, optim, Trace_ELBO(), backend=Native(tmp_path), check=0)
    with pytest.warns(UserWarning, match=r"No C\+\+ compiler was found.* Install g\+\+"):
        svi.step(DATA)
    assert "operation by operation" in svi.notes[0]
    assert svi.run(3, DATA).isfinite().all()


def test_a_failing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fail(*args: object) -> None:
        raise RuntimeError("out of registers")

    monkeypatch.setattr(native, "_compile", fail)
    optim = pyro.optim.Adam({"lr": 0.05})
    svi = CompiledSVI(model, guide, optim, Trace_ELBO(), backend=Native(tmp_path), check=0)
    with pytest.raises(NotCompilable, match="RuntimeError: out of registers. Use backend=Inter"):
        svi.step(DATA)
    # A folder holds what was compiled once for all steps, but no step.
    assert not list(tmp_path.glob("*/model.so"))


def test_importing_and_eager_steps_leave_the_compiler_alone():
    code = (
        "import sys, torch, pyro, flowvi.infer\n"
        "from flowvi.infer import FlowSVI, GlobalOptim\n"
        "from flowvi.objectives import ELBO\n"
        "def model(): pyro.sample('z', pyro.distributions.Normal(0.0, 1.0))\n"
        "guide = pyro.infer.autoguide.AutoNormal(model)\n"
        "FlowSVI(model, guide, GlobalOptim(0.1), ELBO()).step()\n"
        "print([m for m in sys.modules if m in ('torch._dynamo', 'torch._inductor')])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stderr


def graph_of(function: object, *inputs: Tensor) -> fx.GraphModule:
    return record(function, inputs)


def test_draws_are_taken_out_and_drawn_as_the_program_does():
    def function(x: Tensor) -> list[Tensor]:
        noise = torch.randn(3) + torch.empty(20).normal_(1.0, 2.0).sum()
        order = torch.randperm(10)[:4]
        both, levels = torch.rand(3) + torch.rand_like(x), torch.randint(5, (6,))
        rest = torch.bernoulli(x.sigmoid())
        return [noise * x, both, order, rest, levels, torch.rand(3)]

    x = torch.ones(3)
    graph = graph_of(function, x)
    torch.manual_seed(2)
    expected = function(x)
    draws = hoist_draws(graph)
    # The Bernoulli's probabilities are no constants, so it draws in the graph, and so does what
    # comes after it.
    assert [draw.shape for draw in draws] == [(3,), (20,), (4,), (3,), (3,), (6,)]
    table = NoiseTable(draws, 8)
    torch.manual_seed(2)
    table.draw_one()
    row = torch.zeros(1, dtype=torch.int64)
    found = graph(*table.rows(table.tables, row), x)
    torch.testing.assert_close(found, expected)
    table.draw_many(8)
    for values in table.tables:
        assert len(values.unique(dim=0)) > 1
    assert found[3].unique().numel() <= 2


def test_draws_of_a_mixture_come_in_order():
    """The component and the normal depend on tensors, what follows does not."""

    def model(y: Tensor) -> None:
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def guide(y: Tensor) -> None:
        shift = pyro.param("shift", torch.zeros(2))
        weights = dist.Categorical(logits=torch.zeros(3))
        parts = dist.Normal(torch.arange(6.0).view(3, 2), 0.6).to_event(1)
        start = dist.MixtureSameFamily(weights, parts).sample()
        pyro.sample("x", dist.Normal(shift + start + torch.rand(2), 1.0).to_event(1))

    optim = pyro.optim.Adam({"lr": 0.05})
    svi = CompiledSVI(model, guide, optim, Trace_ELBO(), backend=Interpreter())
    # Refused where a compiled step does not draw what an eager one draws from the same seed.
    svi.step(DATA)
    assert svi.run(20, DATA).isfinite().all()


def test_simplified_graphs_give_the_same():
    torch.manual_seed(0)
    matrix, vector, batch = torch.randn(4, 3), torch.randn(3), torch.randn(2, 3, 4)

    def function(matrix: Tensor, vector: Tensor, batch: Tensor) -> list[Tensor]:
        scale = torch.tensor(2.0).log() + torch.ones(3).cumsum(0)
        copied = torch.zeros(3)
        copied[1:] += vector[1:]
        same = (vector.expand(4, 3) == vector.expand(4, 3)).to(vector.dtype).log()
        return [
            torch.mv(matrix, vector) @ torch.ones(4),
            torch.mm(matrix.t(), matrix) * scale,
            torch.bmm(batch, batch.transpose(1, 2)) + torch.outer(vector, vector),
            torch.addmm(vector, matrix, torch.eye(3)),
            copied + same,
        ]

    inputs = (matrix, vector, batch)
    graph = graph_of(function, *inputs)
    before = graph(*inputs)
    simplify(graph)
    for found, expected in zip(graph(*inputs), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    targets = {str(node.target) for node in graph.graph.nodes}
    assert not targets & {"aten.mm.default", "aten.mv.default", "aten.bmm.default"}
    assert not targets & {"aten.eq.Tensor", "aten.log.default", "aten.cumsum.default"}
    assert "aten.add_.Tensor" in targets


# The compiler itself: a minute each.


def trained(svi: SVI, num_steps: int = 50) -> dict[str, Tensor]:
    torch.manual_seed(1)
    for _ in range(num_steps):
        svi.step(DATA)
    return {n: p.detach().clone() for n, p in pyro.get_param_store().named_parameters()}


@pytest.mark.slow
def test_native_steps_are_the_eager_ones_and_are_kept(tmp_path: Path):
    expected = trained(SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO()))
    for made in (1, 1):
        pyro.clear_param_store()
        optim = pyro.optim.Adam({"lr": 0.05})
        svi = CompiledSVI(model, guide, optim, Trace_ELBO(), backend=Native(tmp_path))
        for name, value in trained(svi).items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-9)
        assert len(list(tmp_path.glob("*/model.so"))) == made
        losses = svi.run(600, DATA)
        assert losses.shape == (600,)
        assert losses.isfinite().all()


@pytest.mark.slow
def test_native_steps_with_draws_that_depend_on_parameters(tmp_path: Path):
    def gamma(y: Tensor) -> None:
        rate = pyro.param("rate", torch.tensor(2.0), constraint=dist.constraints.positive)
        pyro.sample("mean", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.5))
        pyro.sample("scale", dist.Gamma(3.0, rate))

    expected = trained(SVI(model, gamma, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO()), 10)
    pyro.clear_param_store()
    optim = pyro.optim.Adam({"lr": 0.05})
    svi = CompiledSVI(model, gamma, optim, Trace_ELBO(), backend=Native(tmp_path))
    svi.step(DATA)
    assert set(expected) == {n for n, _ in pyro.get_param_store().named_parameters()}
    assert svi.run(300, DATA)[-50:].mean() < 12


@pytest.mark.slow
def test_native_triangular_solves(tmp_path: Path):
    def full(y: Tensor) -> None:
        factor = pyro.param(
            "factor", 0.5 * torch.eye(2) + 0.1, constraint=dist.constraints.lower_cholesky
        )
        z = torch.cat([pyro.sample("mean", dist.Normal(0.0, 1.0).expand([1]).to_event(1))] * 2)
        solved = torch.linalg.solve_triangular(factor, z[:, None], upper=False)
        wide = torch.linalg.solve_triangular(factor.mT, factor + 1, upper=True)
        pyro.factor("term", -solved.square().sum() - wide.square().sum(), has_rsample=True)

    def prior(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        pyro.sample("y", dist.Normal(mean, 1.0).expand([5]).to_event(1), obs=y)

    optim, objective = GlobalOptim(0.01), ELBO(max_plate_nesting=0)
    svi = CompiledSVI(prior, full, optim, objective, backend=Native(tmp_path), check=2)
    assert torch.tensor(svi.step(DATA)).isfinite()
