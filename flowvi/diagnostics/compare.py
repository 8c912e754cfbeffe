"""Objectives and guides side by side on the user's own model, with an equal budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
from tqdm.auto import tqdm

from flowvi.diagnostics._comparison import Comparison, ComparisonRow
from flowvi.diagnostics._pairs import Budget, Sizes, Task, run_pair
from flowvi.diagnostics._random import seeded
from flowvi.infer._setup import find_target
from flowvi.infer.start import Start, warm_start
from flowvi.infer.target import Target
from flowvi.objectives import Objective

__all__ = ["Comparison", "ComparisonRow", "compare"]


def compare(
    model: Callable,
    guides: Mapping[str, Callable[[Callable], Callable]],
    objectives: Mapping[str, Objective],
    *args: Any,
    num_evaluations: int | None = None,
    num_steps: int | None = None,
    max_seconds: float | None = None,
    train: bool = True,
    lr: float = 1e-2,
    start: bool | Start = True,
    iw_particles: tuple[int, ...] = (10, 100, 1000),
    num_draws: int = 10_000,
    num_gradients: int = 50,
    log_evidence: float | None = None,
    seed: int = 0,
    progress_bar: bool = True,
    **kwargs: Any,
) -> Comparison:
    """Train every guide with every objective and measure all of them in the same way.

    Each pair gets a fresh guide, the same seed, the same warm start (found once) and the same
    budget, one of ``num_evaluations``, ``num_steps`` and ``max_seconds``. It is trained by
    :func:`flowvi.infer.fit` without its stopping rule. ELBO, importance-weighted bounds and
    Pareto k are of the trained guide, from common draws, whatever it was trained with.
    A pair that is refused or fails is a row that says why.

    A model that is no density by itself (subsampled plates, discrete latents) gets no Pareto k,
    and its bounds come from minibatches.

    Args:
        model: Pyro model.
        guides: name -> function of the model that makes a new guide, such as ``AutoNormal`` or
            ``lambda model: AutoFlow(model, nsf)``.
        objectives: name -> objective; each pair uses a copy.
        *args: arguments of model and guide.
        num_evaluations: budget per pair as evaluations of the model, particles times steps;
            32,000 if no budget is given.
        num_steps: budget per pair as steps.
        max_seconds: budget per pair as wall seconds.
        train: train the guides, or take them as they are (``guides`` then gives trained ones).
        lr: largest learning rate.
        start: find a warm start for the guides that can take one; or a given one; or ``False``.
        iw_particles: numbers of particles of the importance-weighted bounds.
        num_draws: draws of each trained guide.
        num_gradients: gradients per pair for their noise.
        log_evidence: log p(x) in nats, where it is known.
        seed: seed of every pair; the global random state is left as it was.
        progress_bar: show a bar.
        **kwargs: keyword arguments of model and guide.

    Raises:
        ValueError: if there is no guide or objective, or a number is at fault.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> from flowvi.objectives import ELBO
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> table = compare(
        ...     model, {"normal": AutoNormal}, {"ELBO": ELBO(8)}, num_steps=20,
        ...     num_draws=200, iw_particles=(10,), num_gradients=5, progress_bar=False,
        ... )
        >>> table.to_dataframe().loc[("normal", "ELBO"), "num_steps"].item()
        20
    """
    budget = Budget.of(num_evaluations, num_steps, max_seconds)
    _check(guides, objectives, iw_particles, num_draws, num_gradients)
    with seeded(seed), pyro.get_param_store().scope():
        target, reason = find_target(model, args, kwargs)
        if start is True and train:
            start = _found_start(target)
    sizes = Sizes(iw_particles, num_draws, num_gradients)
    task = Task(model, args, kwargs, target, reason, budget, sizes, start, train, lr, seed)
    rows = []
    with tqdm(total=len(guides) * len(objectives), disable=not progress_bar) as bar:
        for guide_name, make in guides.items():
            for name, objective in objectives.items():
                bar.set_description(f"{guide_name}, {name}")
                rows.append(run_pair(task, guide_name, make, name, objective))
                bar.update()
    return Comparison(tuple(rows), str(budget) if train else "no training", log_evidence)


def _check(
    guides: Mapping, objectives: Mapping, iw_particles: tuple, num_draws: int, num_gradients: int
) -> None:
    for name, value in (("guides", guides), ("objectives", objectives)):
        if not isinstance(value, Mapping) or not value:
            raise ValueError(f"`{name}` must be a mapping with at least one entry; got {value!r}.")
    if any(not isinstance(n, int) or not 1 <= n <= num_draws // 2 for n in iw_particles):
        raise ValueError(
            f"`iw_particles` must be integers from 1 to half of num_draws ({num_draws // 2}); "
            f"got {iw_particles}."
        )
    if num_gradients < 2:
        raise ValueError(f"`num_gradients` must be at least 2; got {num_gradients}.")


def _found_start(target: Target | None) -> bool | Start:
    if target is None:
        return False
    try:
        return warm_start(target)
    except RuntimeError:
        return False
