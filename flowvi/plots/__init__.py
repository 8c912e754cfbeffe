"""Pictures of fits: every function takes data and an Axes, draws on it, and returns it."""

from flowvi.plots.comparisons import comparison, gradients
from flowvi.plots.fits import (
    drift_scores,
    elbo_trace,
    marginals,
    pairs,
    pareto_k_bars,
    shift_errors,
)
from flowvi.plots.images import image_grid
from flowvi.plots.latents import latent_manifold, latent_points

__all__ = [
    "comparison",
    "drift_scores",
    "elbo_trace",
    "gradients",
    "image_grid",
    "latent_manifold",
    "latent_points",
    "marginals",
    "pairs",
    "pareto_k_bars",
    "shift_errors",
]
