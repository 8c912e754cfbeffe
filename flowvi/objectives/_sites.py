"""Whether model and guide have the same latent sites."""

from __future__ import annotations

from pyro.poutine import Trace

from flowvi.objectives._traces import sample_sites

__all__ = ["check_sites_match"]


def check_sites_match(model_trace: Trace, guide_trace: Trace) -> None:
    """Refuse a guide that leaves out latent sites of the model, or draws others.

    A latent site that the guide lacks would be drawn from the model and counted with its
    density; a site that only the guide has would lower every bound by its own density. Sites that
    the guide needs for itself are marked ``infer={"is_auxiliary": True}``.

    Raises:
        ValueError: naming the sites.
    """
    in_model = _sites(model_trace, observed=False)
    sites = sample_sites(guide_trace)
    auxiliary = {s["name"] for s in sites if _is_auxiliary(s)}
    in_guide = {s["name"] for s in sites} - auxiliary
    missing = sorted(in_model - in_guide - auxiliary)
    if missing:
        raise ValueError(
            f"`guide` must draw every latent site of the model; got none of {missing}."
        )
    observed = sorted(in_guide & _sites(model_trace, observed=True))
    if observed:
        raise ValueError(
            f"`guide` must not draw sites that the model observes; got {observed}. "
            "Hide them from the guide with poutine.block."
        )
    surplus = sorted(in_guide - in_model)
    if surplus:
        raise ValueError(
            f"`guide` must draw no latent site that the model lacks; got {surplus}. "
            'Mark sites of its own with infer={"is_auxiliary": True}.'
        )
    shared = sorted(auxiliary & in_model)
    if shared:
        raise ValueError(
            f"`guide` must give auxiliary sites names that the model does not use; got {shared}."
        )


def _sites(trace: Trace, *, observed: bool) -> set[str]:
    return {s["name"] for s in sample_sites(trace) if s["is_observed"] == observed}


def _is_auxiliary(site: dict) -> bool:
    return bool(site["infer"].get("is_auxiliary"))
