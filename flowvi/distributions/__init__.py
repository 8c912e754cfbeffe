"""What ``pyro.sample`` draws from: flows, mixtures of flows, adapters."""

from flowvi.distributions.adapters import adapt, import_zuko
from flowvi.distributions.flow import Flow, FlowDistribution, StandardNormal
from flowvi.distributions.mixture import MixtureFlow, MixtureFlowDistribution

__all__ = [
    "Flow",
    "FlowDistribution",
    "MixtureFlow",
    "MixtureFlowDistribution",
    "StandardNormal",
    "adapt",
    "import_zuko",
]
