"""Moving states along time: samplers of generative models, solvers of differential equations."""

from flowvi.samplers.base import Sampler, Span
from flowvi.samplers.ddim import DDIM, Ancestral
from flowvi.samplers.exponential import DPMSolver, ExponentialIntegrator
from flowvi.samplers.flow_ode import FlowField, ProbabilityFlow
from flowvi.samplers.langevin import AnnealedLangevin, PredictorCorrector
from flowvi.samplers.parallel import Parallel
from flowvi.samplers.process import (
    Ability,
    DriftProcess,
    FieldProcess,
    GenerativeProcess,
    PredictionProcess,
)
from flowvi.samplers.reverse_sde import ReverseSDE
from flowvi.samplers.sample import (
    SampledPath,
    log_snr_times,
    sample,
    sample_path,
    uniform_times,
)
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
    "DDIM",
    "Ability",
    "Ancestral",
    "AnnealedLangevin",
    "DPMSolver",
    "DriftProcess",
    "EulerMaruyama",
    "ExponentialIntegrator",
    "FieldProcess",
    "FlowField",
    "GenerativeProcess",
    "Milstein",
    "Parallel",
    "PredictionProcess",
    "PredictorCorrector",
    "ProbabilityFlow",
    "ReverseSDE",
    "SDESolver",
    "SampledPath",
    "Sampler",
    "Span",
    "StepTime",
    "StochasticHeun",
    "TorchSDE",
    "TorchSDEMethod",
    "Trajectory",
    "draw_increments",
    "log_snr_times",
    "sample",
    "sample_path",
    "simulate",
    "uniform_times",
]
