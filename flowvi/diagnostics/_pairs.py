"""One pair of a comparison: a fresh guide trained with one objective, and its measures."""

from __future__ import annotations

import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import pyro
import torch
from pyro import poutine
from torch import Tensor

from flowvi.diagnostics._comparison import ComparisonRow
from flowvi.diagnostics._moments import (
    Moments,
    gradient_moments,
    guide_parameters,
    placed,
    plate_depth,
    reason_of,
)
from flowvi.diagnostics._random import seeded
from flowvi.diagnostics.importance import Bound, elbo, iw_elbo, pareto_k, pareto_k_threshold
from flowvi.infer import fit
from flowvi.infer._setup import find_start, first_run
from flowvi.infer.draws import guide_draws
from flowvi.infer.start import Start
from flowvi.infer.target import Target
from flowvi.objectives import ELBO, IWAE, Objective
from flowvi.objectives._fixed import check_has_density

__all__ = ["Budget", "Sizes", "Task", "run_pair"]

_NUM_EVALUATIONS = 32_000
_MOST_VALUES, _LOOP_DRAWS = 64, 400


@dataclass(frozen=True)
class Budget:
    """What each pair may use; one of the three is given."""

    num_evaluations: int | None
    num_steps: int | None
    max_seconds: float | None

    @classmethod
    def of(
        cls, num_evaluations: int | None, num_steps: int | None, max_seconds: float | None
    ) -> Budget:
        given = {
            "num_evaluations": num_evaluations,
            "num_steps": num_steps,
            "max_seconds": max_seconds,
        }
        named = {name: value for name, value in given.items() if value is not None}
        if len(named) > 1:
            raise ValueError(f"`{'` or `'.join(named)}` must be given alone; got {len(named)}.")
        for name, value in named.items():
            if not value > 0:
                raise ValueError(f"`{name}` must be positive; got {value!r}.")
        return cls(**(given if named else {**given, "num_evaluations": _NUM_EVALUATIONS}))

    def steps(self, objective: Objective, seconds_per_step: float) -> int:
        """Steps of an objective; for a time budget about as many as there will be time for."""
        if self.num_steps is not None:
            return self.num_steps
        if self.num_evaluations is not None:
            return max(self.num_evaluations // objective.num_particles, 1)
        return max(math.ceil(self.max_seconds / seconds_per_step), 1)

    def __str__(self) -> str:
        if self.num_steps is not None:
            return f"{self.num_steps:,} steps"
        if self.num_evaluations is not None:
            return f"{self.num_evaluations:,} evaluations of the model (particles x steps)"
        return f"{self.max_seconds:g} seconds"


@dataclass(frozen=True)
class Sizes:
    """Numbers of draws and repeats that measure a pair."""

    iw_particles: tuple[int, ...]
    num_draws: int
    num_gradients: int


@dataclass(frozen=True)
class Task:
    """All that the pairs have in common."""

    model: Callable
    args: tuple
    kwargs: dict
    target: Target | None
    reason: str
    budget: Budget
    sizes: Sizes
    start: bool | Start
    train: bool
    lr: float
    seed: int


def run_pair(
    task: Task, guide_name: str, make: Callable, name: str, objective: Objective
) -> ComparisonRow:
    """Train and measure; whatever is raised on the way becomes the row's reason."""
    began = time.perf_counter()
    row = ComparisonRow(
        guide_name,
        name,
        objective.num_particles,
        is_upper_bound=objective.is_upper_bound,
        num_gradients=task.sizes.num_gradients,
    )
    try:
        with seeded(task.seed), warnings.catch_warnings():
            # What a fit warns about is in its notes.
            warnings.simplefilter("ignore")
            row = (
                _trained(task, row, make, objective)
                if task.train
                else _given(task, row, make, objective)
            )
    except Exception as error:  # a model, a guide or an objective may raise anything
        row = replace(row, failure=reason_of(error))
    return replace(row, seconds=time.perf_counter() - began)


def _given(task: Task, row: ComparisonRow, make: Callable, objective: Objective) -> ComparisonRow:
    """Measure a guide as it is."""
    guide = make(task.model)
    with torch.no_grad():
        trace = poutine.trace(guide).get_trace(*task.args, **task.kwargs)
    check_has_density(trace, type(guide).__name__, "A comparison")
    moments = _gradient(task, guide, objective)
    row = replace(row, signal_to_noise=moments.signal_to_noise, milliseconds=moments.milliseconds)
    return _judged(task, row, guide, objective, moments)


def _trained(
    task: Task, row: ComparisonRow, make: Callable, objective: Objective
) -> ComparisonRow:
    with pyro.get_param_store().scope():
        guide = make(task.model)
        _, guide_trace = first_run(task.model, guide, task.args, task.kwargs)
        check_has_density(guide_trace, type(guide).__name__, "A comparison")
        find_start(task.start, guide, task.target, task.reason)
        at_start = _gradient(task, guide, objective)
    num_steps = task.budget.steps(objective, 1e-3 * at_start.milliseconds)
    clock = _Clock()
    result = fit(
        task.model,
        make(task.model),
        *task.args,
        objective=copy.copy(objective),
        num_steps=num_steps,
        max_seconds=task.budget.max_seconds,
        tolerance=None,
        lr=task.lr,
        start=task.start,
        seed=task.seed,
        callback=clock,
        progress_bar=False,
        **task.kwargs,
    )
    # That the posterior has several modes is about the model, not the pair.
    notes = tuple(n for n in result.notes if not n.startswith("The posterior has"))
    if result.skipped:
        notes += (f"{result.skipped} of {result.num_steps} steps skipped, not finite",)
    row = replace(
        row,
        num_steps=result.num_steps,
        milliseconds=clock.milliseconds,
        signal_to_noise=at_start.signal_to_noise,
        notes=notes,
    )
    objective = _at_step(objective, result.num_steps)
    with result.scope():
        moments = _gradient(task, result.guide, objective)
        return _judged(task, row, result.guide, objective, moments)


def _judged(
    task: Task, row: ComparisonRow, guide: Callable, objective: Objective, moments: Moments
) -> ComparisonRow:
    """Fill in what is measured of a guide as it stands."""
    row = replace(row, gradient_sd=moments.sd, bound=_value(task, guide, objective))
    if task.target is None:
        return replace(row, **_bounds_by_batches(task, guide, objective, row.notes))
    number = task.sizes.num_draws
    number = number if task.target.vectorized else min(number, _LOOP_DRAWS)
    log_w = guide_draws(guide, task.target, number, task.args, task.kwargs).log_weights
    k = pareto_k(log_w)
    return replace(
        row,
        elbo=elbo(log_w),
        iw_elbo={n: iw_elbo(log_w, n) for n in task.sizes.iw_particles if n <= number // 2},
        pareto_k=k,
        trusted=k <= pareto_k_threshold(int(log_w.isfinite().sum())),
    )


def _bounds_by_batches(
    task: Task, guide: Callable, objective: Objective, notes: tuple[str, ...]
) -> dict:
    """Bounds of a model that is no density by itself, from runs of objectives."""
    batched = objective.vectorize_particles
    single = ELBO(objective.num_particles, vectorize_particles=batched)
    found: dict = {"elbo": _value(task, guide, single)}
    try:
        found["iw_elbo"] = {
            n: _value(task, guide, IWAE(n, vectorize_particles=batched))
            for n in task.sizes.iw_particles
        }
    except NotImplementedError as error:
        found["notes"] = (*notes, f"No importance-weighted bound: {reason_of(error)}")
    return found


def _value(task: Task, guide: Callable, objective: Objective) -> Bound:
    """Mean of the objective's value over independent runs, with its standard error."""
    depth = plate_depth(task.model, guide, task.args, task.kwargs)
    objective = placed(objective, depth)
    repeats = min(max(task.sizes.num_draws // objective.num_particles, 8), _MOST_VALUES)
    with torch.no_grad(), pyro.validation_enabled(False):
        losses = torch.stack(
            [
                objective.differentiable_loss(task.model, guide, *task.args, **task.kwargs)
                for _ in range(repeats)
            ]
        ).double()
    sign = 1.0 if objective.is_upper_bound else -1.0
    return Bound(sign * float(losses.mean()), float(losses.std()) / math.sqrt(repeats))


def _gradient(task: Task, guide: Callable, objective: Objective) -> Moments:
    args, kwargs = task.args, task.kwargs
    depth = plate_depth(task.model, guide, args, kwargs)
    params: list[Tensor] = list(guide_parameters(guide, args, kwargs).values())
    return gradient_moments(
        placed(objective, depth), task.model, guide, args, kwargs, params, task.sizes.num_gradients
    )


def _at_step(objective: Objective, num_steps: int) -> Objective:
    """A copy of an objective as it is at the end of its schedule."""
    objective = copy.copy(objective)
    state = objective.state_dict()
    if "step" in state:
        objective.load_state_dict({**state, "step": torch.full_like(state["step"], num_steps)})
    return objective


class _Clock:
    """Callback of a fit that times its steps."""

    def __init__(self) -> None:
        self._ticks: list[float] = []

    def __call__(self, step: int, loss: Tensor) -> None:
        self._ticks.append(time.perf_counter())

    @property
    def milliseconds(self) -> float:
        gaps = [b - a for a, b in zip(self._ticks, self._ticks[1:], strict=False)]
        return 1e3 * statistics.median(gaps) if gaps else math.nan
