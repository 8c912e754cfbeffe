"""The random draws of a guide, and whether they depend on each other."""

from __future__ import annotations

from collections.abc import Iterator

from pyro.distributions import Delta
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample

from flowvi.objectives._constants import leaf_of

__all__ = ["check_independent", "random_sites"]


def random_sites(trace: Trace) -> Iterator[dict]:
    """Latent sites of a trace that draw at random: no Delta, nothing observed, no subsample."""
    for site in trace.nodes.values():
        if site["type"] != "sample" or site["is_observed"] or site_is_subsample(site):
            continue
        if not isinstance(leaf_of(site["fn"]), Delta):
            yield site


def check_independent(trace: Trace, bound: str) -> None:
    """Refuse a guide in which the law of one site depends on the draw of another.

    Densities with detached parameters lose that dependence: harmless to the mean of the ELBO's
    gradient, not to that of weighted ones.

    Args:
        trace: of the guide, with its graph.
        bound: name of the objective.

    Raises:
        NotImplementedError: naming both sites.
    """
    sites = [s for s in random_sites(trace) if s["value"].grad_fn is not None]
    if len(sites) < 2:
        return
    draws = {site["value"].grad_fn: site["name"] for site in sites}
    for site in sites:
        other = _first_reached(site["value"].grad_fn, draws)
        if other is not None:
            raise NotImplementedError(
                f"{bound} needs guide sites with independent laws; the law of site "
                f"`{site['name']}` depends on the draw of site `{other}`. Use IWAE for this "
                "guide."
            )


def _first_reached(start: object, draws: dict[object, str]) -> str | None:
    seen, stack = {start}, [start]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None or node in seen:
                continue
            if node in draws:
                return draws[node]
            seen.add(node)
            stack.append(node)
    return None
