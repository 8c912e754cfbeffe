"""Moving states along time: solvers of differential equations."""

from flowvi.samplers.simulate import Trajectory, draw_increments, simulate
from flowvi.samplers.solvers import (
    EulerMaruyama,
    Milstein,
    SDESolver,
    StepTime,
    StochasticHeun,
)
from flowvi.samplers.torchsde_backend import TorchSDE, TorchSDEMethod

__all__ = [
    "EulerMaruyama",
    "Milstein",
    "SDESolver",
    "StepTime",
    "StochasticHeun",
    "TorchSDE",
    "TorchSDEMethod",
    "Trajectory",
    "draw_increments",
    "simulate",
]
