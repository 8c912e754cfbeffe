"""Draws of any guide, scored by guide and model in unconstrained coordinates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from flowvi.infer.target import Target

__all__ = ["Draws", "guide_draws"]

_PLATE = "_flowvi_draws"


@dataclass(frozen=True)
class Draws:
    """Draws of a guide with their log-densities.

    Args:
        z: unconstrained draws ``(num_draws, dim)``, in the order of the target.
        log_q: guide's log-density of ``z`` ``(num_draws,)``, in nats.
        log_p: log joint of the model at ``z`` with the Jacobian ``(num_draws,)``, in nats;
            ``-inf`` where the model cannot be evaluated.
        values: constrained draws, site name -> ``(num_draws, *site shape)``.
        vectorized: whether all draws were made at once.
    """

    z: Tensor
    log_q: Tensor
    log_p: Tensor
    values: dict[str, Tensor]
    vectorized: bool = True

    def __len__(self) -> int:
        return self.z.shape[0]

    @property
    def log_weights(self) -> Tensor:
        """``log_p - log_q`` in nats; ``-inf`` where either is not finite."""
        log_w = self.log_p - self.log_q
        return torch.where(torch.isfinite(log_w), log_w, log_w.new_full((), -math.inf))

    def __getitem__(self, index: Tensor | slice) -> Draws:
        return Draws(
            self.z[index],
            self.log_q[index],
            self.log_p[index],
            {name: value[index] for name, value in self.values.items()},
            self.vectorized,
        )


def guide_draws(
    guide: Callable,
    target: Target,
    num_draws: int,
    args: tuple = (),
    kwargs: Mapping | None = None,
    *,
    chunk_size: int = 1000,
) -> Draws:
    """Draw from any Pyro guide and score the draws under guide and model.

    The guide runs once per chunk inside an outer plate. The first two draws of the first chunk
    are scored again one by one; if the guide cannot run inside a plate, or the numbers differ, it
    runs once per draw instead. ``log_q`` is the sum over the guide's sites, the auxiliary ones
    and the Jacobians included, plus :meth:`Target.log_abs_det`.

    Args:
        guide: callable that samples every latent site of the model.
        target: the model with its data.
        num_draws: number of draws, at least 1.
        args: arguments of the guide.
        kwargs: keyword arguments of the guide.
        chunk_size: draws per run of guide and model.

    Raises:
        ValueError: if ``num_draws`` is below 1, or the guide lacks a latent site of the model.
    """
    if num_draws < 1:
        raise ValueError(f"`num_draws` must be at least 1; got {num_draws}.")
    kwargs = {} if kwargs is None else dict(kwargs)
    with torch.no_grad(), pyro.validation_enabled(False):
        proto = _trace(guide, args, kwargs)
        _check_sites(proto, target)
        sizes = [min(chunk_size, num_draws - i) for i in range(0, num_draws, chunk_size)]
        vectorized = True
        parts = []
        for size in sizes:
            values = _run_vectorized(guide, target, size, args, kwargs, proto, not parts)
            if values is None:
                vectorized = False
                break
            parts.append(values)
        if not vectorized:
            parts = [_run_loop(guide, target, num_draws, args, kwargs)]
        scored = [_score(target, values, log_q, chunk_size) for values, log_q in parts]
    return replace(_concatenate(scored), vectorized=vectorized)


def _trace(guide: Callable, args: tuple, kwargs: Mapping) -> poutine.Trace:
    trace = prune_subsample_sites(poutine.trace(guide).get_trace(*args, **kwargs))
    trace.compute_log_prob()
    return trace


def _check_sites(proto: poutine.Trace, target: Target) -> None:
    sampled = {
        name: site
        for name, site in proto.nodes.items()
        if site["type"] == "sample" and not site["is_observed"]
    }
    missing = [name for name in target.sites if name not in sampled]
    if missing:
        raise ValueError(
            f"`guide` must sample every latent site of the model; got no {', '.join(missing)}."
        )


def _log_q(trace: poutine.Trace, size: int | None = None) -> Tensor:
    """Sum over sites of the trace's log-probability; per row if a size is given."""
    total: Tensor | float = 0.0
    for site in trace.nodes.values():
        if site["type"] != "sample":
            continue
        term = site["log_prob"]
        if size is None:
            term = term.sum()
        elif term.dim() and term.shape[0] == size:
            term = term.reshape(size, -1).sum(-1)
        else:
            raise ValueError("a site of the guide ignores the outer plate")
        total = total + term
    return total


def _run_vectorized(
    guide: Callable,
    target: Target,
    size: int,
    args: tuple,
    kwargs: Mapping,
    proto: poutine.Trace,
    verify: bool,
) -> tuple[dict[str, Tensor], Tensor] | None:
    """Values and log_q of one chunk, or None if the guide must run draw by draw."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pyro.plate(_PLATE, size, dim=-1 - target.max_plate_nesting):
                trace = _trace(guide, args, kwargs)
        log_q = _log_q(trace, size)
        rows = {
            name: trace.nodes[name]["value"].reshape(size, *proto.nodes[name]["value"].shape)
            for name in target.sites
        }
        if verify and not _agrees(guide, trace, proto, log_q, args, kwargs):
            return None
    except (ValueError, RuntimeError, IndexError, KeyError, NotImplementedError):
        return None
    return rows, log_q


def _agrees(
    guide: Callable,
    trace: poutine.Trace,
    proto: poutine.Trace,
    log_q: Tensor,
    args: tuple,
    kwargs: Mapping,
) -> bool:
    """Whether the first draws get the same log_q when the guide runs on them one by one."""
    size = log_q.shape[0]
    for row in range(min(2, size)):
        single = proto.copy()
        for name, site in proto.nodes.items():
            if site["type"] == "sample" and not site["is_observed"]:
                value = trace.nodes[name]["value"].reshape(size, *site["value"].shape)[row]
                single.nodes[name] = {**site, "value": value}
        again = _trace(poutine.replay(guide, trace=single), args, kwargs)
        tolerance = 1e-3 if log_q.dtype == torch.float32 else 1e-6
        if not torch.allclose(_log_q(again), log_q[row], rtol=tolerance, atol=tolerance):
            return False
    return True


def _run_loop(
    guide: Callable, target: Target, num_draws: int, args: tuple, kwargs: Mapping
) -> tuple[dict[str, Tensor], Tensor]:
    traces = [_trace(guide, args, kwargs) for _ in range(num_draws)]
    log_q = torch.stack([_log_q(trace) for trace in traces])
    values = {
        name: torch.stack([trace.nodes[name]["value"] for trace in traces])
        for name in target.sites
    }
    return values, log_q


def _score(target: Target, values: dict[str, Tensor], log_q: Tensor, chunk_size: int) -> Draws:
    # A point guide returns its parameter itself, gradient and all, even without grad mode.
    values = {name: value.detach() for name, value in values.items()}
    z = target.unconstrain(values)
    log_q = log_q + target.log_abs_det(z)
    log_p = torch.cat([target.guarded_log_prob(part) for part in z.split(chunk_size)])
    return Draws(z, log_q, log_p, values)


def _concatenate(parts: list[Draws]) -> Draws:
    first = parts[0]
    return Draws(
        torch.cat([part.z for part in parts]),
        torch.cat([part.log_q for part in parts]),
        torch.cat([part.log_p for part in parts]),
        {name: torch.cat([part.values[name] for part in parts]) for name in first.values},
    )
