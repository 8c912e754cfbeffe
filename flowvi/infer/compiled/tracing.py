"""One run of the ordinary Pyro program as a graph: loss and gradients from parameters and data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO as PyroELBO
from torch import Tensor, fx, nn
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from flowvi.infer.checkpoint import get_rng_state, set_rng_state
from flowvi.infer.compiled.densities import densities_from_noise
from flowvi.infer.compiled.hazards import (
    NotCompilable,
    Watch,
    check_graph,
    memory_of,
    same_python_randomness,
)
from flowvi.infer.compiled.rewrites import changed_in_place

__all__ = ["Program", "Traced", "modules_of", "record", "trace_program", "used_parameters"]


@dataclass(frozen=True)
class Program:
    """Model, guide, objective and data of a step.

    Args:
        model: Pyro model.
        guide: Pyro guide.
        objective: a ``pyro.infer.ELBO``, or a function of model, guide and data.
        args: positional data.
        kwargs: keyword data.
    """

    model: Callable
    guide: Callable
    objective: Callable
    args: tuple = ()
    kwargs: Mapping = field(default_factory=dict)

    def loss(self) -> Tensor:
        """Loss of one run of the ordinary program, with its graph."""
        loss = getattr(self.objective, "differentiable_loss", None)
        if loss is None and isinstance(self.objective, PyroELBO):
            raise NotCompilable(
                f"{type(self.objective).__name__} has no differentiable_loss, so its step cannot "
                "be traced. Use an objective of flowvi.objectives, Trace_ELBO or "
                "TraceMeanField_ELBO."
            )
        loss = self.objective if loss is None else loss
        with pyro.validation_enabled(False), _without_syncs(self.objective):
            return loss(self.model, self.guide, *self.args, **self.kwargs)

    @property
    def report(self) -> dict[str, Tensor]:
        """What the objective reported of the last call."""
        return getattr(self.objective, "report", {})

    def tensors(self) -> list[Tensor]:
        """Tensors among the data, in a fixed order."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Program:
        """The same program on other data of the same structure."""
        leaves, spec = pytree.tree_flatten((self.args, dict(self.kwargs)))
        rest = iter(tensors)
        leaves = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return Program(self.model, self.guide, self.objective, args, kwargs)


@dataclass(frozen=True)
class Traced:
    """A traced program.

    The graph is a function of ``(*params, *live, *data)`` and gives ``(loss, *reports, *grads)``.

    Args:
        graph: the graph; its remaining attributes are constants.
        params: the parameters that get a gradient.
        live: tensors from outside that are no data (buffers, closed-over tensors), as they are.
        changed: those of them that a step changes in place.
        reports: names of what the objective reports.
        read: tensors whose values are part of the graph, with their versions.
    """

    graph: fx.GraphModule
    params: tuple[Tensor, ...]
    live: tuple[Tensor, ...]
    changed: tuple[Tensor, ...]
    reports: tuple[str, ...]
    read: tuple[tuple[Tensor, int], ...]

    @property
    def stale(self) -> bool:
        """Whether a value that the graph has taken over has changed since."""
        return any(tensor._version != version for tensor, version in self.read)


def used_parameters(program: Program) -> list[tuple[str, Tensor]]:
    """Names and unconstrained tensors of every ``pyro.param`` that a step asks for, each once.

    The random state and buffers are as before afterwards; parameters that did not exist do.
    """
    with keep_random_state(), Watch() as watch, poutine.trace(param_only=True) as capture:
        with torch.no_grad():
            program.loss()
    watch.restore()
    found = {}
    for name, site in capture.trace.nodes.items():
        value = site["value"]
        value = value.unconstrained() if hasattr(value, "unconstrained") else value
        if value.requires_grad:
            found.setdefault(id(value), (name, value))
    return list(found.values())


def modules_of(program: Program) -> list[nn.Module]:
    """Modules that a step calls; their training flags are settings of the program."""
    found: dict[int, nn.Module] = {}
    hook = register_module_forward_pre_hook(lambda m, inputs: found.setdefault(id(m), m) and None)
    try:
        with keep_random_state(), Watch() as watch, torch.no_grad():
            program.loss()
    finally:
        hook.remove()
    watch.restore()
    return list(found.values())


def trace_program(program: Program, params: Sequence[Tensor], *, twice: bool = False) -> Traced:
    """Trace a step's loss and gradients.

    Args:
        program: what to trace.
        params: the trained tensors, each once.
        twice: trace again and compare.

    Raises:
        NotCompilable: with the reason, if one graph does not stand for every step.
    """
    first = _trace_once(program, params)
    if not twice:
        return first
    second = _trace_once(program, params)
    different = first.graph.code != second.graph.code or len(first.live) != len(second.live)
    pairs = [*zip(first.live, second.live, strict=False), *_constants(first, second)]
    if different or not all(a is b or _equal(a, b) for a, b in pairs):
        raise NotCompilable(
            "A compiled step must be the same in every run; two runs of the program had "
            "different operations or constants. Look for numpy or Python randomness, counters, "
            "and caches."
        )
    return first


def _trace_once(program: Program, params: Sequence[Tensor]) -> Traced:
    if not params:
        raise NotCompilable("A compiled step must train at least one parameter; got none.")
    watch, used, names = Watch(params), [], []

    def loss_and_grads(*tensors: Tensor) -> list[Tensor]:
        with watch:
            loss = program.with_tensors(tensors).loss()
            names[:] = program.report
            grads = torch.autograd.grad(loss, list(params), allow_unused=True)
        used[:] = [p for p, g in zip(params, grads, strict=True) if g is not None]
        reported = [program.report[name].detach().to(loss.dtype) for name in names]
        return [loss.detach(), *reported, *(g for g in grads if g is not None)]

    with keep_random_state(), same_python_randomness(), torch.enable_grad():
        try:
            with densities_from_noise():
                graph = record(loss_and_grads, program.tensors())
        except NotCompilable:
            raise
        except Exception as error:
            raise NotCompilable(
                "The program runs, but it cannot be traced: "
                f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            ) from error
        finally:
            watch.restore()
    if not used:
        raise NotCompilable("A compiled step must train at least one parameter; got none.")
    check_graph(graph)
    graph.graph.eliminate_dead_code(is_impure_node=_changes_something)
    live = _lift(graph, used)
    touched = {node.name for node in changed_in_place(graph)}
    changed = tuple(tensor for i, tensor in enumerate(live) if f"live_{i}" in touched)
    return Traced(graph, tuple(used), live, changed, tuple(names), tuple(watch.read))


def record(function: Callable, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """Graph of a function's tensor operations; it is run once.

    One fake mode notes all shapes, where make_fx would build one for every operation.
    """
    context = TracingContext(FakeTensorMode(allow_fallback_kernels=True))
    with tracing(context):
        return make_fx(function, record_module_stack=False)(*inputs)


def _changes_something(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _lift(graph: fx.GraphModule, params: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Turn every outside tensor of a graph into an input; gives those that are no parameters."""
    first = next(iter(graph.graph.nodes))
    with graph.graph.inserting_before(first):
        inputs = {id(p): _input(graph, f"param_{i}", p) for i, p in enumerate(params)}
        live: list[Tensor] = []
        storages = {memory_of(p) for p in params}
        for node in graph.graph.find_nodes(op="get_attr"):
            tensor = getattr(graph, node.target)
            if id(tensor) not in inputs:
                if _is_constant(node):
                    continue
                if memory_of(tensor) in storages:
                    raise NotCompilable(
                        "A compiled step must not reach a parameter through `.data` or a kept "
                        "view of it. Use detach()."
                    )
                inputs[id(tensor)] = _input(graph, f"live_{len(live)}", tensor)
                live.append(tensor)
            node.replace_all_uses_with(inputs[id(tensor)])
            graph.graph.erase_node(node)
    graph.recompile()
    return tuple(live)


def _input(graph: fx.GraphModule, name: str, tensor: Tensor) -> fx.Node:
    node = graph.graph.placeholder(name)
    node.meta["val"] = tensor.detach()
    return node


def _is_constant(node: fx.Node) -> bool:
    """Whether a tensor was made from Python numbers inside the program."""
    return all(user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users)


def _constants(*traced: Traced) -> Iterator[tuple[Tensor, ...]]:
    nodes = (t.graph.graph.find_nodes(op="get_attr") for t in traced)
    for same in zip(*nodes, strict=False):
        yield tuple(getattr(t.graph, n.target) for t, n in zip(traced, same, strict=True))


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Put the random state back at the end."""
    state = get_rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


@contextmanager
def _without_syncs(objective: object) -> Iterator[None]:
    """Let Pyro's own objectives keep their loss on the device while a step is traced."""
    replaced = {"torch_item": _detached, "warn_if_nan": _unchanged, "warn_if_inf": _unchanged}
    with ExitStack() as stack:
        for cls in type(objective).__mro__:
            module = sys.modules.get(cls.__module__)
            if not cls.__module__.startswith("pyro."):
                continue
            for name, new in replaced.items():
                if hasattr(module, name):
                    stack.callback(setattr, module, name, getattr(module, name))
                    setattr(module, name, new)
        yield


def _detached(value: Tensor | float) -> Tensor | float:
    return value.detach() if isinstance(value, Tensor) else value


def _unchanged(value: Tensor, *args: object, **kwargs: object) -> Tensor:
    return value
