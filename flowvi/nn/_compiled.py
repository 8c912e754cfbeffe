"""Functions through ``torch.compile``, with a way back to the functions themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Compiled", "can_compile", "compiled", "structure"]

# Inductor's vectorised tanh takes three times as long as this one by the exponential, whose error
# is that of rounding numbers near 1.
_OPTIONS = {"cpp.use_decompose_tanh": True}

_LEAN = {"cpp_wrapper": True}

# Without patterns, among them that of a sum with a product: it copies the other summand to where
# the product is then added, though what comes next could read both.
_BARE = {"pattern_matcher": False}

# Saving is left to products: what is elementwise is computed again from them during the backward
# pass, as memory is slower. By default the partition saves the other operands of products, too.
_PARTITION = {
    "ban_recompute_materialized_backward": False,
    "ban_recompute_used_far_apart": False,
}

# What is true around a call, apart from its arguments.
_SURROUNDINGS = {
    "AUTOGRAD_SAVED_TENSORS_HOOKS",
    "DEFAULT_DEVICE",
    "DETERMINISTIC_ALGORITHMS",
    "GLOBAL_STATE",
    "GRAD_MODE",
    "SHAPE_ENV",
    "TORCH_FUNCTION_STATE",
}

_FUNCTIONS: dict[Hashable, Compiled] = {}


class Compiled:
    """A function compiled at its first call, or left as it is where that does not work.

    Every kind of input (number of dimensions, dtype, which tensors need gradients) is compiled
    once, and once more for other sizes than the first; torch limits how many there may be. Where
    compilation fails, one warning gives the reason, and the function itself runs from then on.

    Args:
        function: of tensors, modules and containers of them, without side effects.
        name: what the warning calls it.
        lean: keep little for the backward pass, and run it all from C++: for functions of many
            matrix products, which take longer to compile so.
        deciding: names of the tensors whose kinds decide those of all others, if not all of them
            are to be looked at before every call, which costs more than a small product.
        static: compile anew for every shape: for functions with derivatives in forward mode,
            which torch cannot compile for shapes left open.
    """

    def __init__(
        self,
        function: FunctionType,
        name: str,
        *,
        lean: bool = False,
        deciding: tuple[str, ...] = (),
        static: bool = False,
    ) -> None:
        # torch keeps what it compiled with the code of a function: copies do not share it.
        self.function = FunctionType(
            function.__code__.replace(),
            function.__globals__,
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        self.name = name
        self.lean = lean
        self.deciding = deciding
        self.static = static
        self.failed = False
        self._compiled: Callable | None = None

    def __call__(self, *args: Any) -> Any:
        if self.failed:
            return self.function(*args)
        try:
            return self._run(args)
        except Exception as error:
            if not _is_of_compiler(error):
                raise
            # A mistake of the caller's is raised again here; otherwise compiling is at fault.
            result = self.function(*args)
            self.failed = True
            warnings.warn(
                f"{self.name} cannot be compiled and runs as it is: {_reason(error)}",
                stacklevel=2,
            )
            return result

    def _run(self, args: tuple) -> Any:
        if self._compiled is None:
            backend = partial(_inductor, self.lean, bool(self.deciding))
            filtered = self.deciding and hasattr(torch.compiler, "skip_all_guards_unsafe")
            self._compiled = torch.compile(
                self.function,
                fullgraph=True,
                dynamic=False if self.static else None,
                backend=backend,
                options={"guard_filter_fn": self._needed} if filtered else None,
            )
        try:
            return self._compiled(*args)
        except Exception as error:
            if not _is_of_compiler(error):
                raise
            # While it compiles torch warns of what it does itself, which fails where warnings are
            # errors.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self._compiled(*args)

    def _needed(self, guards: Sequence[Any]) -> list[bool]:
        return [
            guard.name in self.deciding
            if guard.guard_type == "TENSOR_MATCH"
            else guard.guard_type in _SURROUNDINGS
            for guard in guards
        ]


def _inductor(
    lean: bool, bare: bool, graph: torch.fx.GraphModule, inputs: Sequence[Tensor]
) -> Callable:
    """The default backend with the options of this module that its version has."""
    from torch._functorch import config as partition
    from torch._inductor.compile_fx import compile_fx

    wanted = {**_OPTIONS, **(_LEAN if lean else {}), **(_BARE if bare else {})}
    known = set(torch._inductor.list_options())
    options = {name: value for name, value in wanted.items() if name in known}
    rules = _PARTITION if lean else {}
    with partition.patch({name: v for name, v in rules.items() if hasattr(partition, name)}):
        return compile_fx(graph, inputs, config_patches=options)


def compiled(
    function: FunctionType,
    name: str,
    *key: Hashable,
    lean: bool = False,
    deciding: tuple[str, ...] = (),
    static: bool = False,
) -> Compiled:
    """The compiled function, made once for every key.

    Args:
        function: what to compile, the same for all calls with this key.
        name: what the warning calls it.
        key: what the compiled code depends on, apart from the kind of the tensors; see
            :func:`structure`.
        lean: as in :class:`Compiled`.
        deciding: as in :class:`Compiled`; the key then holds all that these tensors leave open.
        static: as in :class:`Compiled`.
    """
    entry = (function.__module__, function.__qualname__, *key)
    if entry not in _FUNCTIONS:
        _FUNCTIONS[entry] = Compiled(function, name, lean=lean, deciding=deciding, static=static)
    return _FUNCTIONS[entry]


def can_compile(x: Tensor) -> bool:
    """Whether a function of ``x`` may be compiled here.

    Not on the meta device, not inside ``torch.func`` transforms, and not while another compiler
    or tracer looks on.
    """
    return not (
        x.is_meta
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    )


def structure(module: nn.Module) -> Hashable:
    """Class of a module with names and shapes of its parameters."""
    return type(module), tuple((name, p.shape) for name, p in module.named_parameters())


def _is_of_compiler(error: Exception) -> bool:
    """Whether compiling may have failed; checkpoints end their second run by an exception."""
    own = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
    return own or isinstance(error, (RuntimeError, OSError, ImportError))


def _reason(error: Exception) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    first = next((line for line in lines if line and not line.endswith("raised:")), "")
    return first or type(error).__name__
