"""The random draws of a guide: what makes a path gradient, and its weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pyro.distributions import Delta
from pyro.poutine import Trace
from torch import Tensor

from flowvi.objectives._constants import (
    check_reparameterised,
    leaf_of,
    with_constant_parameters,
)
from flowvi.objectives._traces import is_latent
from flowvi.objectives.items import ItemLogWeights, from_items
from flowvi.objectives.weights import attached

__all__ = ["check_path_site", "path_log_prob", "random_sites", "reweight_draws"]

# What covers guide sites that are not reparameterised.
_INSTEAD = "ELBO or VIMCO"


def random_sites(trace: Trace) -> Iterator[dict]:
    """Latent sites of a trace that draw at random: no Delta, nothing observed, no subsample."""
    for site in trace.nodes.values():
        if is_latent(site) and not isinstance(leaf_of(site["fn"]), Delta):
            yield site


def path_log_prob(site: dict, bound: str) -> Tensor:
    """Log-density of a guide site whose gradient runs through its value alone."""
    fn = site["fn"]
    if site["is_observed"]:
        return attached(site)
    if torch.is_grad_enabled():
        check_path_site(site, bound)
        if not hasattr(leaf_of(fn), "path_derivative"):
            fn = with_constant_parameters(fn, site["name"], bound, _INSTEAD)
    return fn.log_prob(site["value"], *site["args"], **site["kwargs"])


def check_path_site(site: dict, bound: str) -> None:
    """Refuse a site whose draws do not carry its whole gradient, or carry more than that.

    Raises:
        NotImplementedError: naming the site.
    """
    name, leaf = site["name"], leaf_of(site["fn"])
    check_reparameterised(site["fn"], name, bound, _INSTEAD)
    if getattr(leaf, "draws_hold_parameters", False):
        raise NotImplementedError(
            f"{bound} needs draws through which all of a site's gradient flows; those of site "
            f"`{name}`, from {type(leaf).__name__}, hold drifts as well. Use IWAE, or the grid "
            "path SDEPath."
        )


def reweight_draws(
    items: ItemLogWeights, guides: list[Trace], factor: Tensor, particle_dim: int
) -> None:
    """Multiply the gradient that arrives at every reparameterised draw of the guide.

    Args:
        items: the log-weights, for the place of their dims.
        guides: guide trace of each run.
        factor: of every particle and item, ``(num_particles, *items)``.
        particle_dim: dim of the particle plate, negative.
    """
    dims = [f.dim for f in items.plates]
    for guide_trace, rows in zip(guides, factor.chunk(len(guides)), strict=True):
        for site in random_sites(guide_trace):
            if site["value"].requires_grad:
                rows_at_site = from_items(rows, dims, particle_dim, site["fn"].event_dim)
                site["value"].register_hook(_Multiply(rows_at_site))


class _Multiply:
    """Hook that multiplies a gradient by a constant."""

    def __init__(self, factor: Tensor) -> None:
        self._factor = factor

    def __call__(self, grad: Tensor) -> Tensor:
        return grad * self._factor
