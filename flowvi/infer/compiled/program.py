"""A compiled program: bound to parameters and optimiser, checked against the eager steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowvi.infer.compiled.backends import Backend, Loop
from flowvi.infer.compiled.hazards import NotCompilable
from flowvi.infer.compiled.noise import NoiseTable
from flowvi.infer.compiled.optimizers import OptimizerState
from flowvi.infer.compiled.step import Buffers, StepGraph, build_step
from flowvi.infer.compiled.tracing import Program, Traced, keep_random_state

__all__ = ["CompiledProgram", "check_gradients", "check_steps"]

# Largest difference between compiled and eager numbers, in units of the largest number.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}
_LARGEST_COPY = 10**7


class CompiledProgram:
    """A traced program that is ready to take steps.

    Args:
        traced: loss and gradients; its graph becomes part of the step's.
        state: the optimiser's state.
        buffers: what the step changes.
        backend: what runs the step.
        data: tensors among the data.
        num_rows: most steps per call.
    """

    def __init__(
        self,
        traced: Traced,
        state: OptimizerState,
        buffers: Buffers,
        backend: Backend,
        data: Sequence[Tensor],
        num_rows: int,
    ) -> None:
        self.state, self.buffers, self.traced = state, buffers, traced
        step: StepGraph = build_step(traced, state.update, buffers, data, num_rows)
        self.noise = NoiseTable(step.draws, num_rows)
        self.num_rows = num_rows
        self.num_operations = sum(n.op == "call_function" for n in step.graph.graph.nodes)
        self.loop: Loop = backend.prepare(step)
        self._row = buffers.counters[:1]
        self._fixed = [*buffers.tensors, *self.noise.tables, *traced.live]
        self.last_loss = buffers.values[0, 0]

    def rebind(self) -> None:
        """Move parameters and the optimiser's state back into the buffers."""
        self.state.bind(self.buffers)
        self.buffers.known_rates = []

    @property
    def is_current(self) -> bool:
        """Whether parameters, optimiser and what was read are as they were."""
        traced = self.traced
        return self.state.is_bound(self.buffers) and not (traced.read and traced.stale)

    def take(self, data: Sequence[Tensor], num_steps: int) -> Tensor:
        """Take steps; gives loss and reports of each, in a buffer that the next call reuses.

        Shape:
            result: ``(num_steps, 1 + reports)``.
        """
        values = self.evaluate(data, num_steps)
        if self.state.steps_in_python:
            grads = self.buffers.layout.split(self.buffers.moments[0])
            for param, grad in zip(self.state.params, grads, strict=True):
                param.grad = grad
            with torch.enable_grad():
                self.state.advance(num_steps)
        else:
            self.state.advance(num_steps)
        return values

    def evaluate(self, data: Sequence[Tensor], num_steps: int) -> Tensor:
        """The part of the steps that is in the graph, as :meth:`take`."""
        rates = self.state.rates(num_steps)
        self._row.zero_()
        if num_steps == 1:
            self.noise.draw_one()
        else:
            self.noise.draw_many(num_steps)
        if rates != self.buffers.known_rates[:num_steps]:
            self.buffers.rates[:num_steps] = torch.tensor(rates, dtype=torch.float64)
            self.buffers.known_rates = rates
        self.loop.run([*self._fixed, *data], num_steps)
        return self.buffers.values[:num_steps]


def check_gradients(program: Program, traced: Traced, num_checks: int) -> str:
    """Compare a traced graph with the eager program at shifted parameters and data.

    Shifted data may be outside the model's domain. Then only the parameters are shifted, or, if
    that raises too, nothing. Random state, parameters and buffers are put back.

    Returns:
        What a user should know about comparisons that were not made as planned, or nothing.

    Raises:
        NotCompilable: naming what differs, or what kept every comparison from being made.
    """
    tensors = [*traced.params, *traced.changed]
    kept, params = _copies(tensors), list(traced.params)
    reduced, failed, reason = 0, 0, ""
    with keep_random_state():
        try:
            for trial in range(num_checks):
                data = [_movable(tensor) for tensor in program.tensors()]
                originals = program.tensors()
                attempts = ((data, [*params, *data]), (originals, params), (originals, []))
                for number, (given, shifted) in enumerate(attempts):
                    _load(tensors, kept)
                    _shift(shifted, trial)
                    error = _compare_once(program.with_tensors(given), traced, trial)
                    reason = reason or error
                    if not error:
                        reduced += number > 0
                        break
                else:
                    failed += 1
        finally:
            _load(tensors, kept)
    return _about_comparisons(num_checks, reduced, failed, reason)


def _about_comparisons(num_checks: int, reduced: int, failed: int, reason: str) -> str:
    if failed == num_checks:
        raise NotCompilable(
            "A compiled step must be compared with an eager one before it is trusted; each of "
            f"{num_checks} eager steps raised {reason}. Mend the program, or trust it (check=0)."
        )
    parts = [f"{reduced} without shifted data"] if reduced else []
    parts += [f"{failed} not at all"] if failed else []
    if not parts:
        return ""
    return f"Of {num_checks} comparisons of gradients, {' and '.join(parts)}: {reason}."


def _movable(tensor: Tensor) -> Tensor:
    """A copy that may be changed, unless it would take much memory."""
    return tensor.detach().clone() if tensor.numel() <= _LARGEST_COPY else tensor


def _compare_once(program: Program, traced: Traced, seed: int) -> str:
    """Nothing, or why the eager program gives no numbers to compare with."""
    changed = _copies(traced.changed)
    torch.manual_seed(seed)
    try:
        loss = program.loss()
        grads = torch.autograd.grad(loss, traced.params)
    except (ValueError, RuntimeError, ArithmeticError, LookupError) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}".rstrip(".: ")
    expected = {"loss": loss.detach(), **_numbered(grads)}
    _load(traced.changed, changed)
    torch.manual_seed(seed)
    inputs = [t.detach() for t in (*traced.params, *traced.live, *program.tensors())]
    outputs = traced.graph(*inputs)
    found = {"loss": outputs[0], **_numbered(outputs[1 + len(traced.reports) :])}
    for name, value in expected.items():
        if not _close(found[name], value):
            raise NotCompilable(
                f"A compiled step must do what the eager step does; its {name} differs from the "
                "eager one where parameters and data are shifted. The program depends on "
                "something that is no tensor operation (a value read in Python, a counter, numpy)."
            )
    return ""


def _numbered(grads: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"gradient {i}": grad.detach() for i, grad in enumerate(grads)}


@torch.no_grad()
def _shift(tensors: Sequence[Tensor], trial: int) -> None:
    generator = torch.Generator().manual_seed(trial)
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() <= _LARGEST_COPY:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
            tensor.detach().mul_(1 + 0.01 * noise.to(tensor))


def check_steps(
    compiled: CompiledProgram,
    program: Program,
    eager_step: Callable[[], object],
    num_checks: int,
) -> None:
    """Compare compiled steps with eager steps of the user's optimiser, each from the same state.

    Everything is put back.

    Raises:
        NotCompilable: naming what differs.
    """
    buffers, state = compiled.buffers, compiled.state
    inside = [buffers.param, *buffers.moments, buffers.counts, buffers.counters]
    inside += list(compiled.traced.changed)
    start, restore = _copies(inside), state.snapshot()
    with keep_random_state():
        try:
            for trial in range(num_checks):
                before, back = _copies(inside), state.snapshot()
                torch.manual_seed(trial)
                _eager(compiled, program, eager_step)
                after = _copies(inside)
                back()
                _load(inside, before)
                torch.manual_seed(trial)
                compiled.evaluate(program.tensors(), 1)
                _compare_states(compiled, before, after, _copies(inside))
                _load(inside, after)
        finally:
            restore()
            _load(inside, start)


def _eager(compiled: CompiledProgram, program: Program, step: Callable[[], object]) -> None:
    """An eager step, or its gradient alone where the compiled one gives no more."""
    if not compiled.state.steps_in_python:
        step()
        return
    grads = torch.autograd.grad(program.loss(), compiled.state.params)
    compiled.buffers.moments[0].copy_(torch.cat([grad.reshape(-1) for grad in grads]))


def _compare_states(
    compiled: CompiledProgram, before: list[Tensor], after: list[Tensor], found: list[Tensor]
) -> None:
    number = 1 + len(compiled.buffers.moments)
    for position in range(1, number):
        if not _close(found[position], after[position]):
            raise NotCompilable(
                "A compiled step must do what the eager step does; the optimiser's state differs."
            )
    # An element whose gradient is rounding alone moves by the learning rate in either direction.
    moved = (after[0] - before[0]).abs().max()
    weak = torch.zeros_like(after[0], dtype=torch.bool)
    if number > 1:
        first = after[1].abs()
        weak = first < 1e-4 * first.max()
    off = (found[0] - after[0]).abs().masked_fill(weak, 0.0)
    slack = 1e-5 * after[0].abs().max()
    if not bool((off <= 0.02 * moved + slack).all() | after[0].isnan().any()):
        raise NotCompilable(
            "A compiled step must do what the eager step does; the new parameters differ by "
            f"{float(off.max()):.2g} where they moved by {float(moved):.2g}."
        )


def _close(found: Tensor, expected: Tensor) -> bool:
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return False
    scale = expected.masked_fill(~finite, 0.0).abs().max()
    error = (found - expected).masked_fill(~finite, 0.0).abs().max()
    return bool(error <= _TOLERANCE.get(expected.dtype, 1e-3) * scale + 1e-30)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def _load(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.detach().copy_(value)
