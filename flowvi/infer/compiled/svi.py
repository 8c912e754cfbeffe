"""SVI whose steps are one compiled graph each."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Iterator

import pyro
import pyro.infer
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from flowvi.infer._inputs import check_numbers
from flowvi.infer.compiled.backends import Backend
from flowvi.infer.compiled.cuda import CudaGraph
from flowvi.infer.compiled.hazards import NotCompilable
from flowvi.infer.compiled.native import Native
from flowvi.infer.compiled.optimizers import OptimizerState, state_of
from flowvi.infer.compiled.program import CompiledProgram, check_gradients, check_steps
from flowvi.infer.compiled.step import Buffers, Layout
from flowvi.infer.compiled.tracing import Program, modules_of, trace_program, used_parameters
from flowvi.infer.optim import GlobalOptim
from flowvi.infer.svi import FlowSVI, SingleProcess
from flowvi.nn._store import is_shown_buffer
from flowvi.objectives import Objective

__all__ = ["CompiledSVI"]

# Bytes of tables of draws.
_LARGEST_TABLE = 1 << 26


class CompiledSVI(SingleProcess, pyro.infer.SVI):
    r"""``pyro.infer.SVI`` that compiles model, guide, objective and optimiser into one graph.

    The ordinary Pyro program is run once and recorded; no Python is left in a step. What was
    recorded is compared with the eager program before it is trusted. Adam, AdamW, SGD, RMSprop
    without momentum, ``pyro.optim.ClippedAdam`` and :class:`flowvi.infer.GlobalOptim` are part of
    the graph; any other optimiser is called after each step. Optimiser and parameters stay the
    user's: eager steps, checkpoints and ``get_state`` see every compiled step, and the other way
    round.

    The first call with data of new shapes compiles, which takes tens of seconds; a later process
    finds the result on disk (:class:`Native`). Data must be arguments: tensors that the model
    closes over are followed if they are changed in place, but not if they are replaced.

    :meth:`step` draws the same random numbers as the eager step. :meth:`run` draws those of many
    steps at once, from the same generator in another order.

    Args:
        model: Pyro model.
        guide: Pyro guide.
        optim: a ``pyro.optim`` optimiser, or :class:`flowvi.infer.GlobalOptim`.
        loss: an objective of :mod:`flowvi.objectives`, ``Trace_ELBO`` or ``TraceMeanField_ELBO``.
        backend: what runs the graph; :class:`Native` on the CPU and :class:`CudaGraph` on a GPU
            if left out.
        check: number of seeds on which gradients, and of steps on which updates, are compared
            with the eager ones; 0 compares nothing.
        fallback: take eager steps, with a warning that says why, where a program cannot be
            compiled; it is an error otherwise.
        max_programs: number of different shapes, settings and parameters to compile for.

    Raises:
        NotCompilable: at a first step, with the reason: a branch or a number in Python that
            depends on a tensor's value, selection by a boolean mask, numpy randomness, an
            objective without ``differentiable_loss``.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from flowvi.infer.compiled import Interpreter
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> optim, loss = pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO()
        >>> svi = CompiledSVI(model, AutoNormal(model), optim, loss, backend=Interpreter())
        >>> losses = svi.run(5, torch.tensor(1.0))
        >>> losses.shape
        torch.Size([5])
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: pyro.optim.PyroOptim,
        loss: pyro.infer.ELBO | Callable,
        *,
        backend: Backend | None = None,
        check: int = 3,
        fallback: bool = False,
        max_programs: int = 8,
    ) -> None:
        super().__init__(model, guide, optim, loss)
        if backend is not None and not isinstance(backend, Backend):
            raise TypeError(f"`backend` must be a Backend; got {type(backend).__name__}.")
        if not isinstance(check, int) or check < 0:
            raise ValueError(f"`check` must be an integer of at least 0; got {check!r}.")
        check_numbers({"max_programs": max_programs}, {})
        self.objective = loss
        self.backend = backend
        self.check = check
        self.fallback = fallback
        self.max_programs = max_programs
        self.notes: list[str] = []
        self._programs: dict[Hashable, CompiledProgram | None] = {}
        self._buffers: dict[Hashable, Buffers] = {}
        self._kept: list[object] = []
        self._modules: list[nn.Module] | None = None
        own = isinstance(optim, GlobalOptim) and isinstance(loss, Objective)
        self._flow_svi = FlowSVI(model, guide, optim, loss) if own else None

    def step(self, *args: object, **kwargs: object) -> float:
        """One step; gives the loss (nats) as a float."""
        program = self._program(args, kwargs)
        if program is None or program.traced.reports:
            return self.step_async(*args, **kwargs).item()
        program.take(_tensors(args, kwargs), 1)
        return program.last_loss.item()

    def step_async(self, *args: object, **kwargs: object) -> Tensor:
        """One step; gives the loss (nats) as a tensor on the device."""
        program = self._program(args, kwargs)
        if program is None:
            return torch.as_tensor(self._eager_step(args, kwargs))
        return self._report(program, program.take(_tensors(args, kwargs), 1))[0]

    def run(self, num_steps: int, *args: object, **kwargs: object) -> Tensor:
        """Many steps on the same data, without returning to Python between them.

        Subsampled plates draw their items anew in each step.

        Args:
            num_steps: number of steps, at least 1.
            *args: data of model and guide.
            **kwargs: keyword data of model and guide.

        Shape:
            result: ``(num_steps,)``, losses in nats.
        """
        check_numbers({"num_steps": num_steps}, {})
        losses, done = [], 0
        while done < num_steps:
            program = self._program(args, kwargs)
            if program is None:
                losses.append(torch.as_tensor(self._eager_step(args, kwargs)).reshape(1))
                done += 1
                continue
            chunk = min(program.num_rows, num_steps - done)
            losses.append(self._report(program, program.take(_tensors(args, kwargs), chunk)))
            done += chunk
        return torch.cat(losses)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Unconstrained trainable parameters, each once."""
        if self._flow_svi is not None:
            yield from self._flow_svi.named_parameters()
        else:
            held = pyro.get_param_store().named_parameters()
            yield from ((name, param) for name, param in held if not is_shown_buffer(param))

    def _report(self, program: CompiledProgram, values: Tensor) -> Tensor:
        values = values.clone()
        if program.traced.reports:
            numbers = values[-1, 1:].unbind()
            self.objective.report = dict(zip(program.traced.reports, numbers, strict=True))
        return values[:, 0]

    def _eager_step(self, args: tuple, kwargs: dict) -> Tensor | float:
        if self._flow_svi is not None:
            return self._flow_svi.step_async(*args, **kwargs)
        return super().step(*args, **kwargs)

    def _program(self, args: tuple, kwargs: dict) -> CompiledProgram | None:
        key = self._key(args, kwargs)
        program = self._programs.get(key, self)
        if program is None or (program is not self and program.is_current):
            return program
        try:
            if program is not self and not program.traced.stale:
                program.rebind()
                return program
            program = self._compile(args, kwargs)
        except NotCompilable as error:
            if not self.fallback:
                raise
            self.notes.append(f"Steps are eager: {error}")
            warnings.warn(self.notes[-1], stacklevel=4)
            program = None
        self._programs[self._key(args, kwargs)] = program
        return program

    def _key(self, args: tuple, kwargs: dict) -> Hashable:
        if kwargs or not all(isinstance(arg, Tensor) for arg in args):
            leaves, spec = pytree.tree_flatten((args, kwargs))
        else:
            # The usual case, for which building a tree would take as long as a step.
            leaves, spec = args, len(args)
        modules = tuple([module.training for module in self._modules or ()])
        parameters = tuple([id(p) for _, p in pyro.get_param_store().named_parameters()])
        return (spec, tuple([_describe(leaf) for leaf in leaves]), modules, parameters)

    def _compile(self, args: tuple, kwargs: dict) -> CompiledProgram:
        if sum(p is not None for p in self._programs.values()) >= self.max_programs:
            raise NotCompilable(
                f"`max_programs` must be as many as there are shapes of data and settings; got "
                f"{self.max_programs}. Pad batches to one shape, or raise it."
            )
        began = time.perf_counter()
        program = Program(self.model, self.guide, self.objective, args, kwargs)
        captured = used_parameters(program)
        if self._modules is None:
            self._modules = modules_of(program)
        named = list(self._trained(captured))
        # Without a comparison with eager runs, a second trace has to tell what is frozen.
        traced = trace_program(program, [param for _, param in named], twice=not self.check)
        remark = check_gradients(program, traced, self.check) if self.check else ""
        names = {id(param): name for name, param in named}
        named = [(names[id(param)], param) for param in traced.params]
        state = state_of(self.optim, named)
        data = program.tensors()
        num_rows = _num_rows(traced, state)
        buffers = self._buffers_for(state, traced.params, num_rows, len(traced.reports))
        state.bind(buffers)
        backend = self.backend or default_backend(buffers.param.device)
        compiled = CompiledProgram(traced, state, buffers, backend, data, num_rows)
        if self.check:
            check_steps(compiled, program, lambda: self._eager_step(args, kwargs), self.check)
        seconds = time.perf_counter() - began
        self.notes.append(
            f"Steps are one graph of {compiled.num_operations} operations, made in "
            f"{seconds:.1f} s. {remark} {compiled.loop.note}".replace("  ", " ").strip()
        )
        # Keys hold identities of what is no tensor, so it must not be freed.
        leaves = pytree.tree_leaves((args, kwargs))
        self._kept += [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        return compiled

    def _trained(self, captured: list[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """What the eager step would train, each once."""
        seen: set[int] = set()
        own = () if self._flow_svi is None else self._flow_svi.named_parameters()
        for name, param in (*own, *captured):
            if id(param) not in seen and param.requires_grad:
                seen.add(id(param))
                yield name, param

    def _buffers_for(
        self, state: OptimizerState, params: tuple[Tensor, ...], rows: int, reports: int
    ) -> Buffers:
        first = params[0]
        if any(p.dtype != first.dtype or p.device != first.device for p in params):
            found = sorted({f"{p.dtype} on {p.device}" for p in params})
            raise NotCompilable(
                f"A compiled step needs parameters of one dtype and device; got {found}."
            )
        key = (tuple(map(id, params)), tuple(p.shape for p in params), first.dtype, rows, reports)
        if key not in self._buffers:
            layout = Layout(tuple(p.shape for p in params))
            moments = state.update.num_moments
            self._buffers[key] = Buffers(layout, first.detach(), moments, rows, reports)
        return self._buffers[key]


def default_backend(device: torch.device) -> Backend:
    """What runs steps on a device if nothing else is asked for."""
    return Native() if device.type == "cpu" else CudaGraph()


def _num_rows(traced: object, state: OptimizerState) -> int:
    if state.steps_in_python:
        return 1
    drawn = sum(
        node.meta["val"].numel()
        for node in traced.graph.graph.nodes
        if node.op == "call_function"
        and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        and isinstance(node.meta.get("val"), Tensor)
    )
    return max(1, min(256, _LARGEST_TABLE // (8 * drawn + 1)))


def _describe(leaf: object) -> Hashable:
    if isinstance(leaf, Tensor):
        return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
    if leaf is None or isinstance(leaf, (bool, int, float, str)):
        return (type(leaf), leaf)
    return (type(leaf), id(leaf))


def _tensors(args: tuple, kwargs: dict) -> list[Tensor]:
    leaves = pytree.tree_leaves((args, kwargs)) if kwargs else args
    if any(not isinstance(leaf, Tensor) for leaf in leaves):
        leaves = pytree.tree_leaves((args, kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
