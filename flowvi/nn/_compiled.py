"""Functions through ``torch.compile``, with a way back to the functions themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Compiled", "can_compile", "compiled", "structure"]

# Inductor's vectorised tanh takes three times as long as this one by the exponential, whose error
# is that of rounding numbers near 1.
_OPTIONS = {"cpp.use_decompose_tanh": True}

_FUNCTIONS: dict[Hashable, Compiled] = {}


class Compiled:
    """A function compiled at its first call, or left as it is where that does not work.

    Every kind of input (number of dimensions, dtype, which tensors need gradients) is compiled
    once, and once more for other sizes than the first; torch limits how many there may be. Where
    compilation fails, one warning gives the reason, and the function itself runs from then on.

    Args:
        function: of tensors, modules and containers of them, without side effects.
        name: what the warning calls it.
    """

    def __init__(self, function: FunctionType, name: str) -> None:
        # torch keeps what it compiled with the code of a function: copies do not share it.
        self.function = FunctionType(
            function.__code__.replace(),
            function.__globals__,
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        self.name = name
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
            known = set(torch._inductor.list_options())
            options = {name: value for name, value in _OPTIONS.items() if name in known}
            self._compiled = torch.compile(self.function, fullgraph=True, options=options)
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


def compiled(function: FunctionType, name: str, *key: Hashable) -> Compiled:
    """The compiled function, made once for every key.

    Args:
        function: what to compile, the same for all calls with this key.
        name: what the warning calls it.
        key: what the compiled code depends on, apart from the kind of the tensors; see
            :func:`structure`.
    """
    entry = (function.__module__, function.__qualname__, *key)
    if entry not in _FUNCTIONS:
        _FUNCTIONS[entry] = Compiled(function, name)
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
