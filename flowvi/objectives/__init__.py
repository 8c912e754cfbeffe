"""Objectives: each a ``pyro.infer.ELBO`` that estimates one bound."""

from flowvi.objectives.base import Objective
from flowvi.objectives.elbo import ELBO
from flowvi.objectives.stl import STL
from flowvi.objectives.weights import LogWeight, log_weights

__all__ = ["ELBO", "STL", "LogWeight", "Objective", "log_weights"]
