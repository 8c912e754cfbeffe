"""Time-dependent marginals q(x, t | y): schedules, paths, and the processes that share them."""

from flowvi.paths.base import Path, PathPoint, with_time
from flowvi.paths.chain import ChainPath, LayerTimes
from flowvi.paths.diffusion import Diffusion, StateDiffusion, TimeDiffusion
from flowvi.paths.faded_flow import FadedFlowPath
from flowvi.paths.flow_path import FlowPath
from flowvi.paths.gaussian import DiffusionPath, GaussianPath, ScheduleDiffusion
from flowvi.paths.interpolant import (
    BridgeNoise,
    BrownianBridge,
    InterpolantNoise,
    StochasticInterpolant,
)
from flowvi.paths.matching import matched
from flowvi.paths.mixture import MixturePath
from flowvi.paths.prediction import PredictedDrift, Prediction, convert, prediction_family, split
from flowvi.paths.process import ProcessFamily
from flowvi.paths.schedules import (
    AlphaSigma,
    Linear,
    Schedule,
    ScheduleValues,
    VarianceExploding,
)
from flowvi.paths.sde import SDE, Drift
from flowvi.paths.times import DensityTimes, LateTimes, TimeLaw, UniformTimes
from flowvi.paths.variance_preserving import (
    LearnedMonotone,
    LinearLogSNR,
    SubVariancePreserving,
    VariancePreserving,
    VariancePreservingCosine,
)
from flowvi.paths.variance_trained import VarianceTrained

__all__ = [
    "SDE",
    "AlphaSigma",
    "BridgeNoise",
    "BrownianBridge",
    "ChainPath",
    "DensityTimes",
    "Diffusion",
    "DiffusionPath",
    "Drift",
    "FadedFlowPath",
    "FlowPath",
    "GaussianPath",
    "InterpolantNoise",
    "LateTimes",
    "LayerTimes",
    "LearnedMonotone",
    "Linear",
    "LinearLogSNR",
    "MixturePath",
    "Path",
    "PathPoint",
    "PredictedDrift",
    "Prediction",
    "ProcessFamily",
    "Schedule",
    "ScheduleDiffusion",
    "ScheduleValues",
    "StateDiffusion",
    "StochasticInterpolant",
    "SubVariancePreserving",
    "TimeDiffusion",
    "TimeLaw",
    "UniformTimes",
    "VarianceExploding",
    "VariancePreserving",
    "VariancePreservingCosine",
    "VarianceTrained",
    "convert",
    "matched",
    "prediction_family",
    "split",
    "with_time",
]
