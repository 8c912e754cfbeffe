"""Which sites of a trace are random variables."""

from __future__ import annotations

from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample

__all__ = ["is_latent", "sample_sites"]


def sample_sites(trace: Trace) -> list[dict]:
    """Sample sites in order, without the indices of subsampled plates."""
    nodes = trace.nodes.values()
    return [s for s in nodes if s["type"] == "sample" and not site_is_subsample(s)]


def is_latent(site: dict) -> bool:
    """Whether a site is a latent variable."""
    return site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
