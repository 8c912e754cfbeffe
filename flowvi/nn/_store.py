"""What Pyro's global store holds of a module: all of it, under names that no other module has.

Buffers (the coordinates that a flow starts from, a random reordering) are as much of a law as the
parameters, but Pyro puts parameters alone into the store: saved and loaded, it would give another
law, without a word. So the store holds the buffers too, as tensors that share their memory.
"""

from __future__ import annotations

import itertools
import re
import weakref
from collections.abc import Iterator

import pyro
import torch
from pyro.nn import PyroModule
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["claim_name", "claim_store_name", "is_shown_buffer", "module_tensors"]

# Every parameter a module of flowvi has used in this process. A tensor in the store under its
# name that is not in here was loaded from a file, so it is the module's own and is taken over.
_KNOWN = WeakTensorKeyDictionary()

# Tensors in the store that are views of buffers, and a weak reference to the buffer of each.
_SHOWN = WeakTensorKeyDictionary()


def claim_name(guide: PyroModule) -> None:
    """Give ``guide`` a name under which the store holds its own parameters or none.

    Pyro gives every automatic guide the name of its class. ``pyro.module`` then hands the second
    guide's optimiser the first guide's tensors, so the second trains nothing and nobody is told.

    Raises:
        ValueError: if the store was loaded from a file whose shapes differ from the guide's.
    """
    name = claim_store_name(guide._pyro_name, dict(_suffixes(guide)))
    if name != guide._pyro_name:
        _rename(guide, name)


def claim_store_name(wanted: str, own: dict[str, Tensor]) -> str:
    """The wanted name, or the next free one, for tensors given by what follows the name.

    Args:
        wanted: name to begin with.
        own: parameters and buffers of a module.

    Raises:
        ValueError: if the store was loaded from a file whose shapes differ.
    """
    held = pyro.get_param_store()._params
    parameters = {s: t for s, t in own.items() if isinstance(t, nn.Parameter)}
    buffers = {s: t for s, t in own.items() if s not in parameters}
    name = wanted
    if not all(held.get(wanted + suffix) is p for suffix, p in parameters.items()):
        name = next(n for n in _candidates(wanted) if _is_free(held, n, parameters))
        for suffix, tensor in own.items():
            _take_over(name + suffix, tensor)
            _KNOWN[tensor] = None
    for suffix, buffer in buffers.items():
        _show(name + suffix, buffer)
    return name


def is_shown_buffer(tensor: Tensor) -> bool:
    """Whether a tensor of the store is a buffer, which nothing trains."""
    return tensor in _SHOWN


def module_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Named parameters, and the buffers that are saved; counters are left out."""
    yield from module.named_parameters()
    for path, part in module.named_modules():
        for key, buffer in _saved_buffers(part):
            yield f"{path}.{key}" if path else key, buffer


def _saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for key, buffer in module._buffers.items():
        if buffer is None or key in module._non_persistent_buffers_set:
            continue
        if buffer.is_floating_point() or buffer.dim() > 0:
            yield key, buffer


def _suffixes(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, parameter in module._parameters.items():
        if parameter is not None:
            yield f"{prefix}.{key}", parameter
    for key, buffer in _saved_buffers(module):
        yield f"{prefix}.{key}", buffer
    for key, child in module._modules.items():
        if isinstance(child, PyroModule):
            yield from _suffixes(child, f"{prefix}.{key}")
        elif child is not None:
            for name, tensor in module_tensors(child):
                yield param_with_module_name(f"{prefix}.{key}", name), tensor


def _candidates(name: str) -> Iterator[str]:
    yield name
    stem = re.sub(r"_\d+$", "", name)
    yield from (f"{stem}_{i}" for i in itertools.count(1))


def _is_free(store: dict, name: str, own: dict[str, nn.Parameter]) -> bool:
    mine = {name + suffix: p for suffix, p in own.items()}
    return all(
        mine.get(full) is tensor or tensor in _SHOWN or tensor not in _KNOWN
        for full, tensor in store.items()
        if full.startswith(name + ".")
    )


def _rename(module: PyroModule, name: str) -> None:
    module._pyro_name = name
    for key, child in module._modules.items():
        if isinstance(child, PyroModule):
            _rename(child, f"{name}.{key}")


def _take_over(full: str, tensor: Tensor) -> None:
    """Copy what was loaded under a name, and put the module's own parameter in its place."""
    held = pyro.get_param_store()._params.get(full)
    if held is None or held is tensor or held in _SHOWN:
        return
    if held.shape != tensor.shape:
        raise ValueError(
            f"The parameter store must hold `{full}` with shape {tuple(tensor.shape)}; got "
            f"{tuple(held.shape)}. Call pyro.clear_param_store() if it belongs to another guide."
        )
    with torch.no_grad():
        tensor.copy_(held)
    if isinstance(tensor, nn.Parameter):
        _put(full, tensor)


def _show(full: str, buffer: Tensor) -> None:
    """Have the store hold a view of a buffer; a buffer that was moved is another tensor."""
    held = pyro.get_param_store()._params.get(full)
    if held is None or held not in _SHOWN or _SHOWN[held]() is not buffer:
        # Asks for gradients, which it never gets, because programs hang hooks on whatever they
        # find in the store.
        view = buffer.detach().requires_grad_(buffer.is_floating_point())
        _SHOWN[view] = weakref.ref(buffer)
        _put(full, view)


def _put(full: str, tensor: Tensor) -> None:
    store = pyro.get_param_store()
    store._param_to_name.pop(store._params.get(full), None)
    store._params[full] = tensor
    store._param_to_name[tensor] = full
    store._constraints[full] = constraints.real
