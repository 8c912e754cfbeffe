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
from flowvi.infer.target import Evaluation, Target
from flowvi.objectives import ELBO, STL, Objective
from flowvi.objectives._constants import leaf_of

__all__ = ["default_objective", "find_start", "find_target", "first_run", "settle_objective"]

_NUM_PARTICLES, _NUM_PARTICLES_SUBSAMPLED, _NUM_PARTICLES_LOOP = 256, 16, 8
# Tighter bounds silence the rare draws that tell the tails: on a 10-D funnel 10 leaves a gap of
# 0.2 nats where 300 leaves 0.03.
_CLIP_FACTOR = 300.0


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
        num_particles: draws per step; 256, or 16 with a subsampled plate.
    """
    partial = is_subsampled(model_trace)
    default = _NUM_PARTICLES_SUBSAMPLED if partial else _NUM_PARTICLES
    number = default if num_particles is None else num_particles
    latent = (s for s in guide_trace.nodes.values() if s["type"] == "sample")
    sites = [s for s in latent if not s["is_observed"] and not site_is_subsample(s)]
    if not all(_allows_path(leaf_of(s["fn"])) for s in sites):
        return ELBO(number)
    return STL(number, antithetic=number % 2 == 0, clip_factor=_CLIP_FACTOR)


def find_target(model: Callable, args: tuple, kwargs: dict) -> tuple[Target | None, str]:
    """The model as a density, or why it is none (a subsampled plate, a discrete site)."""
    try:
        with pyro.validation_enabled(False):
            return Target(model, args, kwargs), ""
    except (NotImplementedError, ValueError, RuntimeError) as error:
        return None, str(error).splitlines()[0]


def settle_objective(
    objective: Objective,
    traces: tuple[Trace, Trace],
    target: Target | None,
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
    depth = max(map(_plate_depth, traces))
    if not objective.vectorize_particles or objective.num_particles == 1:
        objective.max_plate_nesting = depth
        return objective, []
    reason = _why_not_batched(depth, target, model, guide, args, kwargs)
    if reason is None:
        objective.max_plate_nesting = depth + 1
        return objective, []
    note = (
        "The particles run one after the other, because model and guide do not run as one "
        f"batch of particles ({reason})."
    )
    warnings.warn(note, stacklevel=3)
    objective.vectorize_particles = False
    objective.max_plate_nesting = depth
    objective.num_particles = min(objective.num_particles, _NUM_PARTICLES_LOOP)
    return objective, [note]


def _why_not_batched(
    depth: int,
    target: Target | None,
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: dict,
) -> str | None:
    """Why particles cannot run as one batch, in words; None if they can."""
    if target is not None and target.evaluation is not Evaluation.BROADCAST:
        return "the model gives other values in a batch than one by one, or raises"
    stock = Trace_ELBO(
        num_particles=3,
        vectorize_particles=True,
        max_plate_nesting=depth,
        strict_enumeration_warning=False,
    )
    try:
        with torch.no_grad(), pyro.validation_enabled(True):
            stock.loss(model, guide, *args, **kwargs)
            # Another number of particles, because a dim of the model may be 3 by chance; and
            # Pyro's checks pass over dims to the left of all plates, ours do not.
            trial = ELBO(7, max_plate_nesting=depth)
            trial.log_weight_draws(model, guide, *args, **kwargs)
    except (ValueError, RuntimeError, IndexError, AssertionError) as error:
        return str(error).strip().splitlines()[0]
    return None


def find_start(
    start: bool | Start, guide: Callable, target: Target | None, reason: str
) -> tuple[Start | None, list[str]]:
    """Find a warm start (or take the given one) and put it into the guide.

    Raises:
        ValueError: if a start is given for a model that has no target.
    """
    if start is False or not can_start(guide):
        return None, []
    if target is None:
        if start is not True:
            raise ValueError(f"`start` must be True or False for this model: {reason}")
        return None, [f"No warm start: {reason}"]
    if start is True:
        try:
            start = warm_start(target, num_mode_starts=_num_mode_starts(guide))
        except RuntimeError as error:
            return None, [f"No warm start: {str(error).splitlines()[0]}"]
    apply_start(guide, start, target)
    if len(start.modes) > 1 and not hasattr(guide, "whiten_modes"):
        shares = ", ".join(f"{mode.weight:.2f}" for mode in start.modes)
        return start, [
            f"The posterior has {len(start.modes)} separated modes (shares {shares}), and this "
            "guide starts at one of them. AutoMixtureFlow covers several."
        ]
    return start, []


def _num_mode_starts(guide: Callable) -> int:
    """A search for a guide that can use the modes, a shorter one for the note, or none."""
    if hasattr(guide, "whiten_modes"):
        return 24
    return 12 if hasattr(guide, "whiten") else 0


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
