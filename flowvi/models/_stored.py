"""Modules that Pyro's parameter store knows, each under a name of its own."""

from __future__ import annotations

import pyro
from torch import Tensor, nn

from flowvi.nn._store import claim_store_name, module_tensors

__all__ = ["StoredModule"]


class StoredModule(nn.Module):
    """Base of models with guides: parameters are shown to Pyro by :meth:`_register`."""

    def __init__(self) -> None:
        super().__init__()
        self._store_name = type(self).__name__.lower()

    def _register(self) -> None:
        """Show the parameters to Pyro, under a name that no other module has."""
        own = {f".{n}": t for n, t in module_tensors(self) if not _is_frozen(t)}
        self._store_name = claim_store_name(self._store_name, own)
        for suffix, tensor in own.items():
            if isinstance(tensor, nn.Parameter):
                pyro.param(self._store_name + suffix, tensor)

    def __getstate__(self) -> dict:
        # Pyro hangs a weak reference on every parameter that it hands out, anew in every step;
        # it cannot be pickled.
        for parameter in self.parameters():
            vars(parameter).pop("unconstrained", None)
        return self.__dict__.copy()


def _is_frozen(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad
