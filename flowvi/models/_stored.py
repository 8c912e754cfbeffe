"""Modules that Pyro's parameter store knows, each under a name of its own."""

from __future__ import annotations

import pyro
from torch import nn

from flowvi.nn._store import claim_store_name, module_tensors

__all__ = ["StoredModule"]


class StoredModule(nn.Module):
    """Base of models with guides: parameters are shown to Pyro by :meth:`_register`."""

    def __init__(self) -> None:
        super().__init__()
        self._store_name = type(self).__name__.lower()

    def _register(self) -> None:
        """Show the parameters to Pyro, under a name that no other module has."""
        own = {f".{n}": t for n, t in module_tensors(self)}
        trained = {s: p for s, p in own.items() if p.requires_grad}
        shown = trained | {s: t for s, t in own.items() if not isinstance(t, nn.Parameter)}
        self._store_name = claim_store_name(self._store_name, shown)
        for suffix, parameter in trained.items():
            pyro.param(self._store_name + suffix, parameter)

    def __getstate__(self) -> dict:
        # Pyro hangs a weak reference on every parameter that it hands out, anew in every step;
        # it cannot be pickled.
        for parameter in self.parameters():
            vars(parameter).pop("unconstrained", None)
        return self.__dict__.copy()
