"""What one graph cannot stand for, and how it is noticed while a program is traced."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.experimental import proxy_tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["NotCompilable", "Watch", "check_graph", "memory_of", "same_python_randomness"]

_READS = {
    Tensor.numpy: "numpy()",
    Tensor.tolist: "tolist()",
    Tensor.__array__: "numpy()",
    Tensor.item: "item()",
    Tensor.__bool__: "bool()",
    Tensor.__float__: "float()",
    Tensor.__int__: "int()",
    Tensor.__index__: "int()",
}


class NotCompilable(NotImplementedError):
    """A program whose steps are not all one graph of tensor operations."""


class Watch(TorchFunctionMode):
    """See which tensors a program reads by value or changes in place while it is traced.

    Reading a value that the trace follows (a draw, data, a parameter) is refused. A tensor from
    outside that needs no gradient may be read; it is kept in ``read`` with its version, so that a
    later change can be noticed. What is changed in place is put back by :meth:`restore`.

    Args:
        params: the trained tensors.
    """

    def __init__(self, params: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.read: list[tuple[Tensor, int]] = []
        self._params = {id(p) for p in params}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: set[int] = set()
        self._below = _Dispatch(self)

    def __enter__(self) -> Watch:
        super().__enter__()
        self._below.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._below.__exit__(*error)
        super().__exit__(*error)

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: Mapping | None = None
    ) -> object:
        if func in _READS:
            self._look(args[0], _READS[func])
        return func(*args, **(kwargs or {}))

    def _look(self, tensor: Tensor, how: str) -> None:
        mode = proxy_tensor.get_proxy_mode()
        if mode is None:
            return
        followed = proxy_tensor.get_proxy_slot(tensor, mode.tracer, None)
        if followed is not None and followed.constant is not None:
            return
        if followed is not None or tensor.requires_grad or id(tensor) in self._params:
            raise NotCompilable(
                "A compiled step must not depend on the value of a tensor in Python; got "
                f"{how} of a tensor of shape {tuple(tensor.shape)} that changes from step to "
                "step. Use tensor operations such as torch.where, or pass a number."
            )
        self.read.append((tensor, tensor._version))

    def _remember(self, tensor: Tensor) -> None:
        """Keep a copy of a tensor from outside that is about to be changed in place."""
        if id(tensor) not in self._before and memory_of(tensor) not in self._made:
            self._before[id(tensor)] = (tensor, tensor.detach().clone())

    @torch.no_grad()
    def restore(self) -> None:
        """Undo every change in place."""
        for tensor, value in self._before.values():
            tensor.detach().copy_(value)


class _Dispatch(TorchDispatchMode):
    """The part of :class:`Watch` that sees operations."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: Mapping | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func is torch.ops.aten.native_batch_norm.default and args[5] and args[3] is not None:
            # The same operation, whose signature says that it updates the running moments.
            func = torch.ops.aten._native_batch_norm_legit.default
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if torch.Tag.data_dependent_output in func.tags:
            for tensor in given:
                self._watch._look(tensor, str(func.overloadpacket.__name__))
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.is_write and isinstance(value, Tensor):
                    self._watch._remember(value)
        result = func(*args, **kwargs)
        old = {memory_of(tensor) for tensor in given}
        new = {memory_of(t) for t in pytree.tree_leaves(result) if isinstance(t, Tensor)}
        self._watch._made |= new - old
        return result


def memory_of(tensor: Tensor) -> int:
    """Number of the storage behind a tensor, on any device."""
    return tensor.untyped_storage()._cdata


def check_graph(graph: fx.GraphModule) -> None:
    """Refuse operations whose result has a shape that depends on values.

    Raises:
        NotCompilable: naming the operation.
    """
    for node in graph.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        tags = node.target.tags
        if torch.Tag.dynamic_output_shape not in tags or _indexes_by_integers(node):
            continue
        raise NotCompilable(
            "A compiled step must have shapes that do not depend on values; got "
            f"{node.target} (selection by a boolean mask, or the like). Use torch.where, a mask "
            "(poutine.mask), or integer indices."
        )


def _indexes_by_integers(node: fx.Node) -> bool:
    if node.target is not torch.ops.aten.index.Tensor:
        return False
    indices = (i for i in node.args[1] if i is not None)
    return all(_dtype(node, i) in (torch.int64, torch.int32) for i in indices)


def _dtype(node: fx.Node, index: fx.Node) -> torch.dtype:
    if index.op == "get_attr":
        return getattr(node.graph.owning_module, index.target).dtype
    return index.meta["val"].dtype


@contextmanager
def same_python_randomness() -> Iterator[None]:
    """Refuse a program that draws from the global generators of numpy or of Python.

    Raises:
        NotCompilable: naming the generator.
    """
    before = {"numpy": _numpy_state(), "random": random.getstate()}
    yield
    after = {"numpy": _numpy_state(), "random": random.getstate()}
    for name, state in before.items():
        if after[name] != state:
            raise NotCompilable(
                f"A compiled step must draw its random numbers from torch; got draws from "
                f"{name}, which would be the same in every step."
            )


def _numpy_state() -> tuple:
    kind, keys, *rest = np.random.get_state()
    return kind, keys.tobytes(), *rest
