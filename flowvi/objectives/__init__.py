"""Objectives: each a ``pyro.infer.ELBO`` that estimates one bound."""

from flowvi.objectives.base import Objective
from flowvi.objectives.elbo import ELBO
from flowvi.objectives.items import ItemLogWeights, item_log_weights
from flowvi.objectives.multisample import MultiSample
from flowvi.objectives.stl import STL
from flowvi.objectives.weights import LogWeight, log_weights

__all__ = [
    "ELBO",
    "STL",
    "ItemLogWeights",
    "LogWeight",
    "MultiSample",
    "Objective",
    "item_log_weights",
    "log_weights",
]
