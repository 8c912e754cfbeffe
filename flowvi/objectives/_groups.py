"""Groups of latent sites, and which group a site of a guide belongs to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from pyro.distributions import Delta
from pyro.poutine import Trace

from flowvi.objectives._constants import leaf_of
from flowvi.objectives._traces import is_latent, sample_sites
from flowvi.objectives.annealed import LIKELIHOOD

__all__ = ["REST", "groups_of_sites"]

REST = "rest"


def groups_of_sites(
    model_trace: Trace,
    guide_trace: Trace,
    group_of: Callable[[str], str | None],
    named: Collection[str],
) -> dict[int, str]:
    """Group of every site of model and guide, by the identity of the site.

    Observed sites are the likelihood. An auxiliary site of a guide, which draws a joint latent
    that the named sites are cut from, belongs to the group of those: they follow it, inside its
    plates, with no other auxiliary site in between that has more of their plates.

    Args:
        model_trace: trace of the model.
        guide_trace: trace of the guide.
        group_of: group of a site by its name; ``None`` for the rest.
        named: groups that the user has named.

    Raises:
        ValueError: if a named group has no site.
        NotImplementedError: if an auxiliary site draws sites of several groups.
    """
    groups, latents = {}, {}
    for name, site in model_trace.nodes.items():
        if is_latent(site):
            groups[id(site)] = latents[name] = group_of(name) or REST
        else:
            groups[id(site)] = LIKELIHOOD
    known, auxiliary = {*latents.values(), *named}, []
    for site in sample_sites(guide_trace):
        name = site["name"]
        if name in latents or site["is_observed"]:
            groups[id(site)] = latents.get(name, LIKELIHOOD)
        elif group_of(name) in known:
            groups[id(site)] = group_of(name)
        else:
            auxiliary.append(site)
    for site in auxiliary:
        groups[id(site)] = _common_group(site, guide_trace, latents)
    missing = sorted(set(named) - set(groups.values()))
    if missing:
        raise ValueError(
            f"`beta` and `free_bits` must name groups of latent sites; got {missing}, where the "
            f"groups are {sorted(set(latents.values()))}."
        )
    return groups


def _common_group(auxiliary: dict, guide_trace: Trace, latents: dict[str, str]) -> str:
    cut = [name for name in latents if _source(name, guide_trace, latents) is auxiliary]
    groups = {latents[name] for name in (cut or latents)}
    if len(groups) > 1:
        raise NotImplementedError(
            f"Guide site `{auxiliary['name']}` draws latent sites of several groups, "
            f"{sorted(groups)}, so its entropy belongs to none of them. Use one `beta` for all, "
            "a guide with a site for each group, or name that site in `beta` as well."
        )
    return groups.pop()


def _source(name: str, guide_trace: Trace, latents: dict[str, str]) -> dict | None:
    """The auxiliary site that a site of Delta law is cut from."""
    site = guide_trace.nodes.get(name)
    if site is None or not isinstance(leaf_of(site["fn"]), Delta):
        return None
    own, best = _plates(site), None
    for other in _before(site, guide_trace.nodes.values()):
        if not is_latent(other) or other["name"] in latents:
            continue
        inside = _plates(other) <= own
        if inside and (best is None or len(_plates(other)) >= len(_plates(best))):
            best = other
    return best


def _before(site: dict, sites: Iterable[dict]) -> Iterable[dict]:
    for other in sites:
        if other is site:
            return
        yield other


def _plates(site: dict) -> frozenset[str]:
    return frozenset(frame.name for frame in site["cond_indep_stack"])
