"""Objectives: each a ``pyro.infer.ELBO`` that estimates one bound."""

from flowvi.objectives._free_bits import FreeBits
from flowvi.objectives.base import Objective
from flowvi.objectives.beta import BetaELBO
from flowvi.objectives.cubo import CUBO
from flowvi.objectives.elbo import ELBO
from flowvi.objectives.eubo import EUBO, ForwardKL
from flowvi.objectives.items import ItemLogWeights, item_log_weights
from flowvi.objectives.iwae import IWAE, STLIWAE, DReG
from flowvi.objectives.multisample import MultiSample
from flowvi.objectives.regularized import Regularized
from flowvi.objectives.renyi import Renyi, VRMax
from flowvi.objectives.schedules import CyclicalSchedule, GeometricSchedule, LinearSchedule
from flowvi.objectives.stl import STL
from flowvi.objectives.tempered import Tempered
from flowvi.objectives.tvo import TVO, log_uniform_partition
from flowvi.objectives.vimco import VIMCO
from flowvi.objectives.wake_sleep import ReweightedWakeSleep
from flowvi.objectives.weights import LogWeight, log_weights

__all__ = [
    "CUBO",
    "ELBO",
    "EUBO",
    "IWAE",
    "STL",
    "STLIWAE",
    "TVO",
    "VIMCO",
    "BetaELBO",
    "CyclicalSchedule",
    "DReG",
    "ForwardKL",
    "FreeBits",
    "GeometricSchedule",
    "ItemLogWeights",
    "LinearSchedule",
    "LogWeight",
    "MultiSample",
    "Objective",
    "Regularized",
    "Renyi",
    "ReweightedWakeSleep",
    "Tempered",
    "VRMax",
    "item_log_weights",
    "log_uniform_partition",
    "log_weights",
]
