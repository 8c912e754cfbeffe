"""Fitting a guide to a model: the target density, the warm start, the fit loop."""

from flowvi.infer.averaging import Average
from flowvi.infer.compiled import CompiledSVI
from flowvi.infer.distributed import DistributedSVI, Spread
from flowvi.infer.fit import fit
from flowvi.infer.minibatches import StratifiedMinibatches, stratified_indices
from flowvi.infer.modes import Mode
from flowvi.infer.optim import GlobalOptim, Schedule
from flowvi.infer.result import Fit
from flowvi.infer.start import Start, warm_start
from flowvi.infer.svi import FlowSVI
from flowvi.infer.target import Target

__all__ = [
    "Average",
    "CompiledSVI",
    "DistributedSVI",
    "Fit",
    "FlowSVI",
    "GlobalOptim",
    "Mode",
    "Schedule",
    "Spread",
    "Start",
    "StratifiedMinibatches",
    "Target",
    "fit",
    "stratified_indices",
    "warm_start",
]
