"""A whole step as one graph: draws by row, loss, gradients, update, all in place."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from flowvi.infer.compiled.noise import Draw, NoiseTable, hoist_draws
from flowvi.infer.compiled.rewrites import simplify
from flowvi.infer.compiled.tracing import Traced, record
from flowvi.infer.compiled.updates import Update

__all__ = ["Buffers", "Layout", "StepGraph", "build_step"]


@dataclass(frozen=True)
class Layout:
    """Where each parameter lies in a flat vector.

    Args:
        shapes: shapes of the parameters in order.
    """

    shapes: tuple[torch.Size, ...]

    @property
    def numel(self) -> int:
        """Length of the vector."""
        return sum(shape.numel() for shape in self.shapes)

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat vector in the parameters' shapes."""
        parts = flat.split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


class Buffers:
    """What a step reads and changes in place, apart from draws, live tensors and data.

    Args:
        layout: where parameters lie.
        like: tensor with their dtype and device.
        num_moments: vectors that the update keeps.
        num_rows: most steps between two looks from outside.
        num_reports: numbers that the objective reports.
    """

    def __init__(
        self, layout: Layout, like: Tensor, num_moments: int, num_rows: int, num_reports: int
    ) -> None:
        self.layout = layout
        self.param = like.new_zeros(layout.numel)
        self.moments = [like.new_zeros(layout.numel) for _ in range(num_moments)]
        # Updates of each parameter so far; they agree.
        self.counts = like.new_zeros(len(layout.shapes), dtype=torch.float32)
        # Row of the tables, skipped steps, whether the last one was skipped.
        self.counters = like.new_zeros(3, dtype=torch.int64)
        self.rates = like.new_zeros(num_rows, dtype=torch.float64)
        # What is in `rates` from the left, as far as it is known.
        self.known_rates: list[float] = []
        self.values = like.new_zeros(num_rows, 1 + num_reports)
        # Where the parameters lie in memory.
        self.views = [view.data_ptr() for view in layout.split(self.param)]

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in the order of the graph's inputs."""
        state = [self.param, *self.moments]
        return [*state, self.counts, self.counters, self.rates, self.values]


@dataclass(frozen=True)
class StepGraph:
    """A step as a graph without outputs.

    Its inputs are the buffers, the noise tables, live tensors and data, in this order.

    Args:
        graph: the graph.
        traced: the traced program.
        draws: its draws that come from tables.
        inputs: example inputs, copies that may be changed.
        num_data: inputs at the end that are data.
    """

    graph: fx.GraphModule
    traced: Traced
    draws: tuple[Draw, ...]
    inputs: list[Tensor]
    num_data: int


def build_step(
    traced: Traced, update: Update, buffers: Buffers, data: Sequence[Tensor], num_rows: int
) -> StepGraph:
    """Put draws, loss, gradients and update into one graph.

    Args:
        traced: loss and gradients.
        update: the optimiser.
        buffers: shapes of the state.
        data: tensors among the data.
        num_rows: rows of the tables of draws.
    """
    body = fx.GraphModule(traced.graph, copy.deepcopy(traced.graph.graph))
    draws = hoist_draws(body)
    simplify(body)
    noise = NoiseTable(draws, num_rows)
    num_moments, num_tables = len(buffers.moments), len(noise.tables)

    def step(param: Tensor, *rest: Tensor) -> tuple:
        moments, (counts, counters, rates, values, *rest) = _split(rest, num_moments)
        tables, others = _split(rest, num_tables)
        row = counters[:1]
        params = buffers.layout.split(param)
        outputs = body(*noise.rows(tables, row), *params, *others)
        grads = outputs[len(outputs) - len(params) :]
        numbers = torch.stack(outputs[: len(outputs) - len(params)])
        grad = torch.cat([g.reshape(-1) for g in grads])
        state = [param, *moments]
        new_param, new_moments = update(param, moments, grad, counts[:1].double() + 1, rates[row])
        new = [new_param, *new_moments]
        good = torch.ones_like(row, dtype=torch.bool)
        if update.guarded:
            good = numbers[:1].isfinite() & grad.abs().sum().isfinite()
            new = [torch.where(good, a, b) for a, b in zip(new, state, strict=True)]
        for old, value in zip(state, new, strict=True):
            old.copy_(value)
        counts.add_(good)
        values.index_copy_(0, row, numbers[None].to(values.dtype))
        bad = (~good).long()
        counters.copy_(torch.cat([row + 1, counters[1:2] + bad, bad]))
        return ()

    originals = [*buffers.tensors, *noise.tables, *traced.live, *data]
    inputs = [tensor.detach().clone() for tensor in originals]
    with torch.no_grad():
        graph = record(step, inputs)
    return StepGraph(graph, traced, draws, inputs, len(data))


def _split(tensors: Sequence[Tensor], number: int) -> tuple[list[Tensor], list[Tensor]]:
    return list(tensors[:number]), list(tensors[number:])
