"""What runs a traced step many times."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from flowvi.infer.compiled.step import StepGraph

__all__ = ["Backend", "Interpreter", "Loop"]


class Loop(ABC):
    """A step that is ready to run.

    Args:
        note: what a user should know about how it runs; empty if nothing.
    """

    note = ""

    @abstractmethod
    def run(self, inputs: Sequence[Tensor], num_steps: int) -> None:
        """Take steps, in place.

        Args:
            inputs: buffers, tables of draws, live tensors and data, as in the graph.
            num_steps: number of steps.
        """


class Backend(ABC):
    """Makes loops of step graphs."""

    @abstractmethod
    def prepare(self, step: StepGraph) -> Loop:
        """Compile a step, or find it compiled."""


class Interpreter(Backend):
    """Runs the traced operations one after the other, without a compiler.

    About as fast as hand-written torch, and slower than :class:`Native`, but ready at once.
    """

    def prepare(self, step: StepGraph) -> Loop:
        return _Interpreted(step)


class _Interpreted(Loop):
    def __init__(self, step: StepGraph) -> None:
        self._graph = step.graph

    @torch.no_grad()
    def run(self, inputs: Sequence[Tensor], num_steps: int) -> None:
        for _ in range(num_steps):
            self._graph(*inputs)
