"""Objectives: each a ``pyro.infer.ELBO`` that estimates one bound."""

from flowvi.objectives._free_bits import FreeBits
from flowvi.objectives.base import Objective
from flowvi.objectives.beta import BetaELBO
from flowvi.objectives.elbo import ELBO
from flowvi.objectives.items import ItemLogWeights, item_log_weights
from flowvi.objectives.iwae import IWAE, STLIWAE, DReG
from flowvi.objectives.multisample import MultiSample
from flowvi.objectives.regularized import Regularized
from flowvi.objectives.schedules import CyclicalSchedule, GeometricSchedule, LinearSchedule
from flowvi.objectives.stl import STL
from flowvi.objectives.tempered import Tempered
from flowvi.objectives.weights import LogWeight, log_weights

__all__ = [
    "ELBO",
    "IWAE",
    "STL",
    "STLIWAE",
    "BetaELBO",
    "CyclicalSchedule",
    "DReG",
    "FreeBits",
    "GeometricSchedule",
    "ItemLogWeights",
    "LinearSchedule",
    "LogWeight",
    "MultiSample",
    "Objective",
    "Regularized",
    "Tempered",
    "item_log_weights",
    "log_weights",
]
