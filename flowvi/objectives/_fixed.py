"""Draws held constant, from the guide or from elsewhere, and scoring them under the guide."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from pyro.distributions import Delta, Distribution
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from flowvi.objectives._constants import leaf_of
from flowvi.objectives._traces import is_latent
from flowvi.objectives.weights import LogWeight, log_weights

__all__ = [
    "FixedDraws",
    "GivenDraws",
    "check_has_density",
    "check_no_parameters",
    "check_scores_given",
    "score_fixed",
    "split_weights",
    "weighted_sum",
]


class FixedDraws(Messenger):
    """Draw every latent site without a graph, so that its density is a function of parameters."""

    def _pyro_sample(self, msg: dict) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        with torch.no_grad():
            value = msg["value"] if msg["done"] else msg["fn"](*msg["args"], **msg["kwargs"])
        msg["value"] = value.detach()
        msg["done"] = True


class GivenDraws(Messenger):
    """Give latent sites of a model values that are known, with their particles on the left.

    Args:
        values: site name to values ``(num_particles, *site shape)``, of all items of its plates;
            without the leading dimension if there is no particle plate.
        num_particles: number of particles; 1 where there is no particle plate.
    """

    def __init__(self, values: Mapping[str, Tensor], num_particles: int) -> None:
        super().__init__()
        self._values = values
        self._num_particles = num_particles
        self._indices: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: dict) -> None:
        if site_is_subsample(msg):
            self._indices[msg["name"]] = msg["value"]

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] not in self._values or msg["is_observed"]:
            return
        fn, value = msg["fn"], self._values[msg["name"]]
        for frame in msg["cond_indep_stack"]:
            if frame.vectorized and frame.name in self._indices:
                value = value.index_select(frame.dim - fn.event_dim, self._indices[frame.name])
        if self._num_particles > 1:
            missing = len(fn.batch_shape) + fn.event_dim - value.dim()
            value = value.reshape(value.shape[:1] + (1,) * missing + value.shape[1:])
        if value.shape != fn.batch_shape + fn.event_shape:
            lead = 1 if self._num_particles > 1 else 0
            raise ValueError(
                f"`draws[{msg['name']!r}]` must have draws of shape "
                f"{tuple((fn.batch_shape + fn.event_shape)[lead:])}; "
                f"got {tuple(self._values[msg['name']].shape[lead:])}."
            )
        msg["value"] = value
        msg["done"] = True


def score_fixed(bound: str) -> Callable[[dict], Tensor]:
    """Log-density of a guide site at a value held constant.

    Args:
        bound: name of the objective, for the message.
    """

    def term(site: dict) -> Tensor:
        fn, value = site["fn"], site["value"]
        try:
            # A new object, because transforms that remember their last value would give back the
            # base-side value of the draw, which does not move with the parameters.
            return fn.log_prob(value.detach(), *site["args"], **site["kwargs"])
        except (KeyError, NotImplementedError) as error:
            raise NotImplementedError(
                f"{bound} scores values held constant, which guide site `{site['name']}` "
                f"({_shown(fn)}) cannot: {str(error).strip()} Use a flow that has an inverse, "
                "such as realnvp or nsf."
            ) from error

    return term


def check_has_density(guide_trace: Trace, guide: str, bound: str) -> None:
    """Refuse a guide with a site that is a point, which has no density to weigh by.

    Args:
        guide_trace: of a guide whose draws are fixed.
        guide: name of the guide's class.
        bound: name of the objective.
    """
    latent = [s for s in guide_trace.nodes.values() if is_latent(s)]
    points = [s for s in latent if isinstance(leaf_of(s["fn"]), Delta)]
    only_points = len(points) == len(latent)
    for site in points:
        # The value of a Delta that is cut from a fixed draw carries no gradient.
        if only_points or leaf_of(site["fn"]).v.requires_grad:
            raise NotImplementedError(
                f"{bound} needs a guide with a density; site `{site['name']}` of {guide} is a "
                "point (Delta). Use AutoFlow, AutoNormal or another guide that draws at random."
            )


def check_scores_given(
    guide_trace: Trace, model_trace: Trace, guide: Callable, bound: str
) -> None:
    """Refuse a guide that cannot score values it has not drawn itself.

    Args:
        guide_trace: of the guide replayed against ``model_trace``.
        model_trace: of the model, with the given values.
        guide: the guide.
        bound: name of the objective.
    """
    if hasattr(guide, "log_q"):
        return
    for name, site in guide_trace.nodes.items():
        if is_latent(site) and name not in model_trace.nodes:
            raise NotImplementedError(
                f"{bound} lets the guide score values from outside; {type(guide).__name__} draws "
                f"them through its own site `{name}` and cannot. Use a guide of flowvi, or one "
                "that draws the model's sites directly."
            )


def check_no_parameters(weights: list[LogWeight], bound: str) -> None:
    """Refuse a model with parameters, which an upper bound would train the wrong way."""
    for weight in weights:
        if weight.value.requires_grad:
            names = [site["name"] for site in weight.sites]
            raise NotImplementedError(
                f"{bound} trains the guide only; the model has parameters, at one of the sites "
                f"{names}. Use ReweightedWakeSleep, or detach them."
            )


def split_weights(
    model_trace: Trace, guide_trace: Trace, bound: str, max_dim: int | None
) -> tuple[list[LogWeight], list[LogWeight]]:
    """``log p`` and ``-log q`` apart, each grouped by plates and scale."""
    return (
        log_weights(model_trace, Trace(), max_dim=max_dim),
        log_weights(Trace(), guide_trace, score_fixed(bound), max_dim=max_dim),
    )


def weighted_sum(share: Tensor, value: Tensor) -> Tensor:
    """Sum over the first dim; where the share is zero nothing is added, be the value infinite."""
    return torch.where(share > 0, share * value, torch.zeros_like(share)).sum(0)


def _shown(fn: Distribution) -> str:
    leaf = leaf_of(fn)
    parts = getattr(leaf, "transforms", None)
    return type(leaf).__name__ if not parts else " and ".join(type(t).__name__ for t in parts)
