"""Names of parameters in Pyro's global store: two modules of flowvi never share one."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import pyro
import torch
from pyro.nn import PyroModule
from pyro.params.param_store import param_with_module_name
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["claim_name", "claim_store_name"]

# Every parameter a module of flowvi has used in this process. A tensor in the store under its
# name that is not in here was loaded from a file, so it is the module's own and is taken over.
_KNOWN = WeakTensorKeyDictionary()


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


def claim_store_name(wanted: str, own: dict[str, nn.Parameter]) -> str:
    """The wanted name, or the next free one, for parameters given by what follows the name.

    Raises:
        ValueError: if the store was loaded from a file whose shapes differ.
    """
    store = pyro.get_param_store()._params
    if all(store.get(wanted + suffix) is p for suffix, p in own.items()):
        return wanted
    name = next(n for n in _candidates(wanted) if _is_free(store, n, own))
    for suffix, parameter in own.items():
        _take_over(name + suffix, parameter)
        _KNOWN[parameter] = None
    return name


def _suffixes(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    for key, parameter in module._parameters.items():
        if parameter is not None:
            yield f"{prefix}.{key}", parameter
    for key, child in module._modules.items():
        if isinstance(child, PyroModule):
            yield from _suffixes(child, f"{prefix}.{key}")
        elif child is not None:
            for name, parameter in child.named_parameters():
                yield param_with_module_name(f"{prefix}.{key}", name), parameter


def _candidates(name: str) -> Iterator[str]:
    yield name
    stem = re.sub(r"_\d+$", "", name)
    yield from (f"{stem}_{i}" for i in itertools.count(1))


def _is_free(store: dict, name: str, own: dict[str, nn.Parameter]) -> bool:
    mine = {name + suffix: p for suffix, p in own.items()}
    return all(
        mine.get(full) is tensor or tensor not in _KNOWN
        for full, tensor in store.items()
        if full.startswith(name + ".")
    )


def _rename(module: PyroModule, name: str) -> None:
    module._pyro_name = name
    for key, child in module._modules.items():
        if isinstance(child, PyroModule):
            _rename(child, f"{name}.{key}")


def _take_over(full: str, parameter: nn.Parameter) -> None:
    store = pyro.get_param_store()
    held = store._params.get(full)
    if held is None or held is parameter:
        return
    if held.shape != parameter.shape:
        raise ValueError(
            f"The parameter store must hold `{full}` with shape {tuple(parameter.shape)}; got "
            f"{tuple(held.shape)}. Call pyro.clear_param_store() if it belongs to another guide."
        )
    with torch.no_grad():
        parameter.copy_(held)
    store._params[full] = parameter
    store._param_to_name.pop(held, None)
    store._param_to_name[parameter] = full
