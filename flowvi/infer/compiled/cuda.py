"""A step captured in a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowvi.infer.compiled.backends import Backend, Loop
from flowvi.infer.compiled.step import StepGraph

__all__ = ["CudaGraph"]


class CudaGraph(Backend):
    """Captures a step once and replays it; nothing in it waits for the host.

    Draws, step count, learning rates and losses stay on the device. New data is copied to where
    the captured step reads it.

    Args:
        fused: let inductor fuse the operations before they are captured; they are captured one
            by one otherwise, which is ready at once.
    """

    def __init__(self, *, fused: bool = True) -> None:
        self.fused = fused

    def prepare(self, step: StepGraph) -> Loop:
        device = step.inputs[0].device
        if device.type != "cuda":
            raise ValueError(f"`backend` must be Native for parameters on the CPU; got {device}.")
        function: Callable = step.graph
        if self.fused:
            from torch import _inductor

            for node in step.graph.graph.nodes:
                node.meta.clear()
            function = _inductor.compile(step.graph, step.inputs)
        return Captured(function, step.num_data)


class Captured(Loop):
    """A function of tensors that works in place, captured with its inputs where they lie.

    Args:
        function: the step.
        num_data: inputs at the end that are data; others must be the same tensors in every call,
            or it is captured anew.
    """

    def __init__(self, function: Callable, num_data: int) -> None:
        self._function = function
        self._num_data = num_data
        self._static: list[Tensor] = []
        # Which data is in place; the tensors are kept, so that no other gets their identity.
        self._seen: list[tuple[int, int]] = []
        self._data: list[Tensor] = []
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def run(self, inputs: Sequence[Tensor], num_steps: int) -> None:
        kept = len(inputs) - self._num_data
        state, data = inputs[:kept], inputs[kept:]
        if self._graph is None or any(map(_differs, self._static[:kept], state)):
            self._capture(state, data)
        for i, (place, new) in enumerate(zip(self._static[kept:], data, strict=True)):
            if self._seen[i] != (id(new), new._version):
                place.copy_(new)
                self._seen[i] = (id(new), new._version)
        self._data = list(data)
        for _ in range(num_steps):
            self._graph.replay()

    def _capture(self, state: Sequence[Tensor], data: Sequence[Tensor]) -> None:
        self._static = [t.detach() for t in state] + [t.detach().clone() for t in data]
        self._seen = [(id(t), t._version) for t in data]
        before = [tensor.clone() for tensor in self._static]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._function(*self._static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._function(*self._static)
        self._graph = graph
        for tensor, value in zip(self._static, before, strict=True):
            tensor.copy_(value)


def _differs(kept: Tensor, given: Tensor) -> bool:
    return kept.data_ptr() != given.data_ptr()
