"""A guide's draws as ArviZ data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from flowvi.diagnostics._random import seeded
from flowvi.diagnostics.arviz_adapter import inference_data
from flowvi.diagnostics.importance import resample, smoothed_log_weights
from flowvi.infer.draws import Draws, guide_draws
from flowvi.infer.target import Target

__all__ = ["to_arviz"]


def to_arviz(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_draws: int = 1000,
    num_chains: int = 4,
    resampled: bool = False,
    seed: int | None = None,
    target: Target | None = None,
    **kwargs: Any,
) -> Any:
    """Draws of a guide, their log-likelihood and importance weights, for ArviZ.

    The groups are ``posterior``, ``log_likelihood`` (one variable per observed site; likelihoods
    given by ``pyro.factor`` are not data and have none), ``observed_data``, and ``sample_stats``
    with ``lp`` and ``log_q`` (log joint and guide density in unconstrained coordinates, nats),
    ``log_weight`` and the Pareto-smoothed normalised ``smoothed_log_weight``. Plates become
    dimensions with coordinates. Pareto k is an attribute of ``posterior``.

    The draws are independent; they are laid out as several chains only because ArviZ's
    convergence statistics ask for them.

    Args:
        model: a Pyro model.
        guide: a guide for it.
        *args: arguments of model and guide.
        num_draws: number of draws in all chains together, a multiple of ``num_chains``.
        num_chains: number of chains to lay the draws out in.
        resampled: resample the draws by their smoothed importance weights, nearer the posterior.
        seed: seed for the draws; the global random state is then left as it was.
        target: the model's :class:`Target`, if there is one already.
        **kwargs: keyword arguments of model and guide.

    Returns:
        ``arviz.InferenceData``, or ``xarray.DataTree`` with ArviZ 1.x.

    Raises:
        ValueError: if ``num_draws`` is not a positive multiple of ``num_chains``, or the model is
            one that :class:`Target` refuses.
    """
    if num_chains < 1:
        raise ValueError(f"`num_chains` must be at least 1; got {num_chains}.")
    if num_draws < num_chains or num_draws % num_chains:
        raise ValueError(
            f"`num_draws` must be a positive multiple of num_chains ({num_chains}); "
            f"got {num_draws}."
        )
    target = Target(model, args, kwargs) if target is None else target
    with seeded(seed), torch.no_grad():
        draws = guide_draws(guide, target, num_draws, args, kwargs)
        smoothed, k = smoothed_log_weights(draws.log_weights)
        if resampled:
            draws = resample(draws, num_draws)
            smoothed = torch.zeros_like(smoothed) - np.log(num_draws)
        log_likelihood = target.log_likelihood(draws.z)
    stats = {
        "lp": draws.log_p,
        "log_q": draws.log_q,
        "log_weight": draws.log_weights,
        "smoothed_log_weight": smoothed,
    }
    dims, coords = _dimensions(model, target, draws, args, kwargs)
    groups = {
        "posterior": _in_chains(draws.values, num_chains),
        "log_likelihood": _in_chains(log_likelihood, num_chains),
        "sample_stats": _in_chains(stats, num_chains),
        "observed_data": {n: _to_numpy(value) for n, value in target.observed.items()},
    }
    attrs = {"inference_library": "flowvi", "pareto_k": k, "resampled": int(resampled)}
    return inference_data(groups, coords=coords, dims=dims, attrs=attrs)


def _in_chains(values: dict[str, Tensor], num_chains: int) -> dict[str, np.ndarray]:
    return {
        name: _to_numpy(value.reshape(num_chains, -1, *value.shape[1:]))
        for name, value in values.items()
    }


def _to_numpy(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()


def _dimensions(
    model: Callable, target: Target, draws: Draws, args: tuple, kwargs: dict
) -> tuple[dict[str, list[str]], dict[str, np.ndarray]]:
    """Names of every site's dimensions (plates by their name) and coordinates of the plates."""
    first = {name: value[0] for name, value in draws.values.items()}
    with torch.no_grad(), pyro.validation_enabled(False):
        trace = poutine.trace(poutine.condition(model, data=first)).get_trace(*args, **kwargs)
    dims, coords = {}, {}
    for name in [*target.sites, *target.observed]:
        site = trace.nodes[name]
        batch, event = site["fn"].batch_shape, site["fn"].event_shape
        plates = {frame.dim: frame for frame in site["cond_indep_stack"] if frame.vectorized}
        dims[name] = []
        for position, size in enumerate(batch + event):
            frame = plates.get(position - len(batch)) if position < len(batch) else None
            if frame is None or size != frame.size:
                dims[name].append(f"{name}_dim_{position}")
                continue
            dims[name].append(frame.name)
            coords[frame.name] = np.arange(size)
    return dims, coords
