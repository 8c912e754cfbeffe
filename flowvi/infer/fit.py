"""Training a guide: one call from a model to a result that can be checked."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyro
import torch
from torch import Tensor

from flowvi.infer._inputs import check_arguments, check_numbers, is_subsampled
from flowvi.infer._plateau import Plateau
from flowvi.infer._run import Run, RunOptions
from flowvi.infer._setup import (
    default_objective,
    find_start,
    find_target,
    first_run,
    settle_objective,
)
from flowvi.infer.averaging import Average, copy_into
from flowvi.infer.checkpoint import get_rng_state, set_rng_state
from flowvi.infer.compiled import Backend, CompiledSVI
from flowvi.infer.distributed import DistributedSVI, Spread
from flowvi.infer.optim import GlobalOptim, Schedule
from flowvi.infer.result import Fit
from flowvi.infer.start import Start
from flowvi.infer.svi import FlowSVI
from flowvi.objectives import ELBO, STL, Objective

__all__ = ["fit"]

_NUM_STEPS, _NUM_STEPS_SUBSAMPLED = 1000, 5000
_SELECTION_DRAWS, _REPORT_DRAWS, _LOOP_DRAWS, _MEASURED_TOGETHER = 512, 2048, 256, 128


def fit(
    model: Callable,
    guide: Callable,
    *args: object,
    objective: Objective | None = None,
    num_steps: int | None = None,
    lr: float = 1e-2,
    num_particles: int | None = None,
    start: bool | Start = True,
    seed: int | None = None,
    tolerance: float | None = 0.02,
    clip_norm: float | None = 1000.0,
    average: float = 0.99,
    max_seconds: float | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 100,
    callback: Callable[[int, Tensor], object] | None = None,
    progress_bar: bool = True,
    spread: Spread | None = None,
    compile: bool | Backend = False,
    **kwargs: object,
) -> Fit:
    r"""Train ``guide`` on ``model`` with :class:`pyro.infer.SVI` and defaults that are robust.

    In order: a warm start (a Gaussian by quasi-Newton, Pathfinder and batch-and-match, in whose
    coordinates the guide starts); one Adam over all parameters, with warm-up and cosine decay;
    the average of the iterates or the last one, whichever is better on common draws, by the
    objective (by the ELBO while that is still annealed).

    **Stopping.** After every window (1/33 of ``num_steps``, at least 30 steps) the mean
    loss is compared with the window before. After two windows in a row that surely gained less
    than ``tolerance`` (gain plus two standard errors), or six in a row whose gain is below two
    standard errors, the learning rate decays to zero over one last window. The rule waits until
    the schedules of an annealed objective have ended.

    **Guard.** A step with a non-finite loss or gradient changes nothing and is counted in
    ``Fit.skipped``; the site is named in ``Fit.skipped_sites``. Fifty in a row end the run.

    **Scope.** The run has a parameter store of its own, empty at the start, so nothing that
    another fit or the user has in the global store is read or changed. Parameters of modules stay
    in the modules; those of ``pyro.param`` in plain functions are kept in the result: call such a
    guide inside ``with fit.scope():``.

    Args:
        model: Pyro model, called as ``model(*args, **kwargs)``.
        guide: Pyro guide, stock, hand-written or of flowvi, called in the same way.
        *args: data for both. Keyword arguments that are not named here go to both as well.
        objective: what to maximise; path gradients (STL) where the guide allows them, else ELBO.
        num_steps: largest number of steps; 1000, or 5000 with a subsampled plate.
        lr: largest learning rate.
        num_particles: draws per step of the default objective.
        start: find a warm start; or a given :class:`Start`; or ``False``.
        seed: seed of the run; the global random state is put back afterwards. ``None`` uses it.
        tolerance: improvement in nats per window worth going on for; ``None`` runs all steps.
        clip_norm: bound on the norm of the whole gradient; ``None`` clips nothing.
        average: decay rate of the average of the iterates, in [0, 1); short runs get a smaller
            one, so that the average forgets their start.
        max_seconds: wall seconds after which the run stops, the start included.
        checkpoint: file to save the run in. If it exists, the run is taken up from it, bit for
            bit on a CPU.
        checkpoint_every: number of steps between two writes.
        callback: called as ``callback(step, loss)`` after every step.
        progress_bar: show a bar with the smoothed ELBO and its standard error.
        spread: what the processes of a program started with ``torchrun`` share out, see
            :class:`DistributedSVI`; the first one alone writes the checkpoint.
        compile: take steps as one compiled graph (:class:`flowvi.infer.CompiledSVI`), or eager
            ones where that cannot be, which ``Fit.notes`` says with the reason; or what is to
            run the graph. A first compilation takes tens of seconds.
        **kwargs: keyword data for model and guide.

    Returns:
        The trained guide with the record of the run.

    Raises:
        ValueError: if a number, the data, or the match of model and guide is at fault.
        RuntimeError: if fifty steps in a row are not finite.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> y = torch.ones(20)
        >>> result = fit(model, AutoNormal(model), y, seed=0, num_steps=100, progress_bar=False)
        >>> bool(abs(result.sample(1000)["mean"].mean() - 1) < 0.1)
        True
    """
    check_numbers(
        {
            "num_steps": num_steps,
            "num_particles": num_particles,
            "checkpoint_every": checkpoint_every,
        },
        {"lr": lr, "max_seconds": max_seconds, "tolerance": tolerance, "clip_norm": clip_norm},
    )
    if not 0 <= average < 1:
        raise ValueError(f"`average` must lie in [0, 1); got {average!r}.")
    if spread is not None and max_seconds is not None:
        raise ValueError(
            f"`max_seconds` must be None with `spread`, since clocks differ; got {max_seconds}."
        )
    if spread is not None and compile is not False:
        raise ValueError(f"`compile` must be False with `spread`; got {compile!r}.")
    check_arguments(model, guide, args, kwargs)
    store: dict = {"params": {}, "constraints": {}}
    with _seeded(seed), pyro.get_param_store().scope(store):
        began = time.monotonic()
        traces = first_run(model, guide, args, kwargs)
        if objective is None:
            objective = default_objective(*traces, num_particles)
        target, reason = find_target(model, args, kwargs)
        objective, notes = settle_objective(objective, traces, target, model, guide, args, kwargs)
        if num_steps is None:
            num_steps = _NUM_STEPS_SUBSAMPLED if is_subsampled(traces[0]) else _NUM_STEPS
        if num_steps < objective.settled_from < math.inf:
            notes.append(
                f"The schedules of the objective last {objective.settled_from} steps and the run "
                f"{num_steps}: what was trained is still annealed."
            )
        optim = GlobalOptim(lr, clip_norm=clip_norm, schedule=Schedule(num_steps))
        run = Run(
            _svi(model, guide, optim, objective, spread, compile),
            Average.over(num_steps, average),
            None if tolerance is None else Plateau(max(num_steps // 33, 30), tolerance),
            RunOptions(
                num_steps, max_seconds, checkpoint, checkpoint_every, callback, progress_bar
            ),
            args,
            kwargs,
            began,
        )
        with pyro.validation_enabled(False):
            find = functools.partial(find_start, start, guide, target, reason)
            return _finish(run, find, notes, store)


def _svi(
    model: Callable,
    guide: Callable,
    optim: GlobalOptim,
    objective: Objective,
    spread: Spread | None,
    compile: bool | Backend,
) -> FlowSVI | CompiledSVI:
    if spread is not None:
        return DistributedSVI(model, guide, optim, objective, spread=spread)
    if compile is False:
        return FlowSVI(model, guide, optim, objective)
    backend = None if compile is True else compile
    return CompiledSVI(model, guide, optim, objective, backend=backend, fallback=True)


def _finish(run: Run, find: Callable, notes: list[str], store: dict) -> Fit:
    """Start or resume, train, choose the iterate, and measure the result."""
    svi, checkpoint = run.svi, run.options.checkpoint
    found = None
    run.svi.optim.admit(svi.named_parameters())
    if not run.resume():
        found, more = find()
        notes = [*notes, *more]
        svi.optim.admit(svi.named_parameters())
    run.train()
    averaged = _keep_better_iterate(run)
    if checkpoint is not None:
        run.save()
    elbo, elbo_se = _measure(run, _REPORT_DRAWS)
    return Fit(
        guide=svi.guide,
        model=svi.model,
        args=run.args,
        kwargs=run.kwargs,
        losses=run.losses[: run.step].cpu(),
        history={name: values[: run.step].cpu() for name, values in run.history.items()},
        elbo=elbo,
        elbo_se=elbo_se,
        num_steps=run.step,
        seconds=run.seconds,
        skipped=run.skipped,
        skipped_sites=run.skipped_sites,
        stop_reason=run.stop_reason,
        averaged=averaged,
        start=found,
        notes=(*notes, *svi.notes),
        store=store,
    )


def _keep_better_iterate(run: Run) -> bool:
    """Keep the averaged parameters if on common draws they are not worse than the last ones."""
    params = list(run.svi.optim.named_parameters())
    state = get_rng_state()
    last = _merit(run)
    with run.average.swapped(params):
        set_rng_state(state)
        averaged = _merit(run)
    if not averaged >= last:
        return False
    copy_into((p, run.average.values[n]) for n, p in params)
    return True


@torch.no_grad()
def _merit(run: Run) -> float:
    """What the objective raises, if that is one fixed quantity by now; else the ELBO."""
    objective = run.svi.objective
    if isinstance(objective, ELBO | STL) or objective.settled_from > run.step:
        return _measure(run, _SELECTION_DRAWS)[0]
    draws = _SELECTION_DRAWS if objective.vectorize_particles else _LOOP_DRAWS
    losses = [
        objective.differentiable_loss(run.svi.model, run.svi.guide, *run.args, **run.kwargs)
        for _ in range(max(math.ceil(draws / objective.num_particles), 4))
    ]
    mean = torch.stack(losses).mean()
    return -mean.item() if mean.isfinite() else -math.inf


def _measure(run: Run, num_draws: int) -> tuple[float, float]:
    """Plain ELBO and its standard error over independent runs of the objective's batch size."""
    svi, like = run.svi, run.svi.objective
    single = not like.vectorize_particles or like.num_particles == 1
    number = like.num_particles if single else max(like.num_particles, _MEASURED_TOGETHER)
    plain = ELBO(number, vectorize_particles=not single)
    plain.max_plate_nesting = like.max_plate_nesting
    batches = max(math.ceil(min(num_draws, _LOOP_DRAWS if single else num_draws) / number), 4)
    draws = [
        plain.log_weight_draws(svi.model, svi.guide, *run.args, **run.kwargs)
        for _ in range(batches)
    ]
    # Particles share a subsample, so batches are the independent units where there are enough.
    units = torch.stack(draws).mean(-1) if batches >= 16 else torch.cat(draws)
    if not units.isfinite().all():
        return -math.inf, math.nan
    return units.mean().item(), (units.std() / math.sqrt(len(units))).item()


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Run with a seed of its own and put the global random state back; no seed, no change."""
    if seed is None:
        yield
        return
    before = get_rng_state()
    try:
        pyro.set_rng_seed(seed)
        yield
    finally:
        set_rng_state(before)
