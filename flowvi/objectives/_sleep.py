"""Simulated data for the sleep phase, and how a guide gets to see them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.infer.autoguide import AutoGuide
from pyro.poutine import Trace
from torch import Tensor

__all__ = [
    "Feed",
    "check_amortised",
    "feed_by_default",
    "observed_values",
    "simulate",
    "sleep_plate",
    "takes_observations",
]

Feed = Callable[[Mapping[str, Tensor], tuple, dict], tuple[tuple, dict]]


def simulate(
    model: Callable, args: tuple, kwargs: dict, num_particles: int = 1, particle_dim: int = -1
) -> Trace:
    """Trace of a run of the model in which observed sites are drawn, too.

    They are marked as observed in the trace, with the values drawn; ``infer["obs"]`` keeps the
    real ones.

    Args:
        model: Pyro model.
        args: its arguments, with the real data.
        kwargs: its keyword arguments.
        num_particles: simulations in one batch, in a plate of their own if more than one.
        particle_dim: dim of that plate, negative.

    Raises:
        NotImplementedError: if the model has a factor, which cannot be simulated.
    """
    program = poutine.uncondition(model)
    with torch.no_grad():
        if num_particles == 1:
            trace = poutine.trace(program).get_trace(*args, **kwargs)
        else:
            plate = sleep_plate(num_particles, particle_dim)
            trace = poutine.trace(plate(program)).get_trace(*args, **kwargs)
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or not site["infer"].get("was_observed"):
            continue
        if isinstance(site["fn"], Unit):
            raise NotImplementedError(
                f"The sleep phase simulates data; model site `{name}` is a pyro.factor, which "
                "cannot be simulated. Use insomnia=1.0."
            )
        site["is_observed"] = True
    return trace


def sleep_plate(num_particles: int, particle_dim: int) -> pyro.plate:
    """Plate of simulations in one batch."""
    return pyro.plate("num_sleep_particles_vectorized", num_particles, dim=particle_dim)


def observed_values(trace: Trace) -> dict[str, dict]:
    """Observed sites of a simulation, but for those that are functions of others."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and not site["infer"].get("_deterministic")
    }


def takes_observations(guide: Callable, kwargs: Mapping[str, object]) -> bool:
    """Whether data reach the guide as Pyro's reweighted wake-sleep has it, by ``observations``."""
    if "observations" in kwargs:
        return True
    program = getattr(guide, "forward", guide)
    try:
        return "observations" in inspect.signature(program).parameters
    except (TypeError, ValueError):
        return False


def feed_by_default(
    trace: Trace, guide: Callable, args: tuple, kwargs: dict
) -> tuple[tuple, dict]:
    """Arguments of the guide with simulated data in place of the real ones.

    By keyword ``observations`` where that is the programs' convention; else by replacing the
    arguments that the model observes as they are.

    Raises:
        NotImplementedError: if an observed value is no argument, so that its place is not known.
    """
    sites = observed_values(trace)
    if takes_observations(guide, kwargs):
        return args, {**kwargs, "observations": {n: s["value"] for n, s in sites.items()}}
    places = {id(s["infer"]["obs"]): s["value"] for s in sites.values()}
    given = {id(value) for value in (*args, *kwargs.values())}
    for name, site in sites.items():
        real, value = site["infer"]["obs"], site["value"]
        if id(real) not in given or value.shape != real.shape:
            raise NotImplementedError(
                f"The sleep phase shows simulated data to the guide; the observed value of site "
                f"`{name}` is not an argument of the model as it is, so its place is not known. "
                "Pass `feed`, a function that puts simulated data into the arguments, or let "
                "model and guide take the keyword `observations`."
            )
    new_args = tuple(places.get(id(value), value) for value in args)
    return new_args, {key: places.get(id(value), value) for key, value in kwargs.items()}


def check_amortised(guide: Callable) -> None:
    """Refuse an automatic guide that is not a function of the data."""
    if isinstance(guide, AutoGuide) and not getattr(guide, "_depends_on_arguments", False):
        raise NotImplementedError(
            f"The sleep phase trains the guide on simulated data; {type(guide).__name__} does not "
            "depend on the data and would be trained towards the prior. Use AmortizedFlow, or "
            "insomnia=1.0."
        )
