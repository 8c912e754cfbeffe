"""What fit settles before the loop: first run, objective, warm start."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pyro
import torch
from pyro.distributions import Delta
from pyro.distributions.distribution import Distribution as PyroDistribution
from pyro.infer import Trace_ELBO
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample

from flowvi.infer._inputs import is_subsampled, trace_programs
from flowvi.infer._starting import apply_start, can_start
from flowvi.infer.start import Start, warm_start
from flowvi.infer.target import Target
from flowvi.objectives import ELBO, STL, Objective
from flowvi.objectives._constants import leaf_of

__all__ = ["default_objective", "find_start", "first_run", "settle_objective"]

_NUM_PARTICLES, _NUM_PARTICLES_SUBSAMPLED, _NUM_PARTICLES_LOOP = 128, 16, 8
_CLIP_FACTOR = 10.0


def first_run(model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple[Trace, Trace]:
    """Let the guide make its parameters, run both programs once, and check what they show."""
    with torch.no_grad(), pyro.validation_enabled(True):
        if hasattr(guide, "initialize"):
            guide.initialize(*args, **kwargs)
        return trace_programs(model, guide, args, kwargs)


def default_objective(
    model_trace: Trace, guide_trace: Trace, num_particles: int | None = None
) -> Objective:
    """STL where every guide site allows path gradients at the cost of a pass, else the ELBO.

    A site allows them if it is reparameterised and its density at a draw is cheap: by a score
    recursion or an exact inverse for flows, by its formula for other distributions.

    Args:
        model_trace: trace of the model.
        guide_trace: trace of the guide.
        num_particles: draws per step; 128, or 16 with a subsampled plate.
    """
    partial = is_subsampled(model_trace)
    default = _NUM_PARTICLES_SUBSAMPLED if partial else _NUM_PARTICLES
    number = default if num_particles is None else num_particles
    latent = (s for s in guide_trace.nodes.values() if s["type"] == "sample")
    sites = [s for s in latent if not s["is_observed"] and not site_is_subsample(s)]
    if not all(_allows_path(leaf_of(s["fn"])) for s in sites):
        return ELBO(number)
    return STL(number, antithetic=number % 2 == 0, clip_factor=_CLIP_FACTOR)


def settle_objective(
    objective: Objective,
    traces: tuple[Trace, Trace],
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: dict,
) -> tuple[Objective, list[str]]:
    """Try the objective with Pyro's checks on; give up batching where model or guide cannot.

    Returns:
        A copy of the objective that knows the depth of the plates, and notes.
    """
    objective = copy.copy(objective)
    if not objective.vectorize_particles or objective.num_particles == 1:
        return objective, []
    depth = max(map(_plate_depth, traces))
    stock = Trace_ELBO(
        num_particles=2,
        vectorize_particles=True,
        max_plate_nesting=depth,
        strict_enumeration_warning=False,
    )
    try:
        with torch.no_grad(), pyro.validation_enabled(True):
            stock.loss(model, guide, *args, **kwargs)
    except (ValueError, RuntimeError, IndexError, AssertionError) as error:
        note = (
            "The particles run one after the other, because model and guide do not run as one "
            f"batch of particles ({str(error).strip().splitlines()[0]})."
        )
        warnings.warn(note, stacklevel=4)
        objective.vectorize_particles = False
        objective.max_plate_nesting = depth
        objective.num_particles = min(objective.num_particles, _NUM_PARTICLES_LOOP)
        return objective, [note]
    objective.max_plate_nesting = stock.max_plate_nesting
    return objective, []


def find_start(
    start: bool | Start, model: Callable, guide: Callable, args: tuple, kwargs: dict
) -> tuple[Start | None, list[str]]:
    """Find a warm start (or take the given one) and put it into the guide."""
    if start is False or not can_start(guide):
        return None, []
    try:
        target = Target(model, args, kwargs)
        if start is True:
            start = warm_start(target)
    except (NotImplementedError, ValueError, RuntimeError) as error:
        if start is not True:
            raise
        return None, [f"No warm start: {str(error).splitlines()[0]}"]
    apply_start(guide, start, target)
    return start, []


def _plate_depth(trace: Trace) -> int:
    frames = (f for s in trace.nodes.values() for f in s.get("cond_indep_stack", ()))
    return max((-f.dim for f in frames if f.vectorized), default=0)


def _allows_path(leaf: PyroDistribution) -> bool:
    if isinstance(leaf, Delta):
        return True
    if hasattr(leaf, "path_derivative"):
        transform = getattr(leaf, "transform", None)
        return transform is None or transform.has_score_recursion or transform.exact_inverse
    stock_flow = isinstance(leaf, torch.distributions.TransformedDistribution)
    plain_score = type(leaf).score_parts is PyroDistribution.score_parts
    return leaf.has_rsample and plain_score and not stock_flow
