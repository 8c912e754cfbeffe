"""What ``pyro.sample`` draws from: flows, mixtures of flows, adapters."""

from flowvi.distributions.flow import Flow, FlowDistribution, StandardNormal

__all__ = ["Flow", "FlowDistribution", "StandardNormal"]
