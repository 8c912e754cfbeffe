"""What ``pyro.sample`` draws from: flows, mixtures of flows, paths of SDEs, adapters."""

from flowvi.distributions.adapters import adapt, import_zuko
from flowvi.distributions.augmented import AugmentedFlow, AugmentedFlowDistribution
from flowvi.distributions.flow import Flow, FlowDistribution, StandardNormal
from flowvi.distributions.mixture import MixtureFlow, MixtureFlowDistribution
from flowvi.distributions.path_draw import PathDraw, PathLayout, PathTerms
from flowvi.distributions.path_posterior import PathPosterior
from flowvi.distributions.path_prior import PathPrior
from flowvi.distributions.pixels import (
    CategoricalLevels,
    ContinuousBernoulli,
    DiscretisedLogistic,
)
from flowvi.distributions.quantised import Quantised
from flowvi.distributions.sde_path import SDEPath
from flowvi.distributions.simulated import LogRatio, SimulatedPosterior, SimulatedPrior
from flowvi.distributions.simulated_draw import SimulatedDraw, SimulatedLayout

__all__ = [
    "AugmentedFlow",
    "AugmentedFlowDistribution",
    "CategoricalLevels",
    "ContinuousBernoulli",
    "DiscretisedLogistic",
    "Flow",
    "FlowDistribution",
    "LogRatio",
    "MixtureFlow",
    "MixtureFlowDistribution",
    "PathDraw",
    "PathLayout",
    "PathPosterior",
    "PathPrior",
    "PathTerms",
    "Quantised",
    "SDEPath",
    "SimulatedDraw",
    "SimulatedLayout",
    "SimulatedPosterior",
    "SimulatedPrior",
    "StandardNormal",
    "adapt",
    "import_zuko",
]
