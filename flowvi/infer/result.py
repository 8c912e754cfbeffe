"""What a fit hands back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

if TYPE_CHECKING:
    from flowvi.infer.start import Start

__all__ = ["Fit"]


@dataclass(frozen=True)
class Fit:
    """A trained guide with the record of its training.

    Parameters of modules live in the modules; the parameter store as it was at the end (which
    ``pyro.param`` of plain functions needs) is kept here and put back by :meth:`scope`.

    Args:
        guide: the trained guide.
        model: the model.
        args: positional arguments of both.
        kwargs: keyword arguments of both.
        losses: loss of every step, in nats, on the CPU.
        history: what else the objective reported of every step, by name, on the CPU; the plain
            ELBO of an annealed objective is under ``"elbo"``.
        elbo: ELBO of the result in nats, from fresh draws; ``-inf`` if a draw has no density.
        elbo_se: its standard error.
        num_steps: steps taken.
        seconds: wall seconds, the start included.
        skipped: steps skipped because loss or gradient was not finite.
        skipped_sites: where they became so, in words, with counts.
        start: the warm start, where there was one.
        stop_reason: why the run ended, in words.
        averaged: whether the averaged iterates were better than the last and are kept.
        notes: what a reader of the result should know, such as a warm start left out.
        store: state of the parameter store.
    """

    guide: Callable
    model: Callable
    args: tuple
    kwargs: dict[str, Any]
    losses: Tensor
    elbo: float
    elbo_se: float
    num_steps: int
    seconds: float
    skipped: int
    stop_reason: str
    averaged: bool = False
    start: Start | None = None
    skipped_sites: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    history: dict[str, Tensor] = field(default_factory=dict, repr=False)
    store: dict = field(default_factory=lambda: {"params": {}, "constraints": {}}, repr=False)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Inside, the parameter store is this fit's own; outside, it is as it was.

        Needed to call a guide whose parameters are named in the store (stock guides, plain
        functions), because two guides of one class share their names there.
        """
        with pyro.get_param_store().scope(self.store):
            yield

    def sample(self, num_draws: int) -> dict[str, Tensor]:
        """Posterior draws by site, ``(num_draws, *site shape)``.

        Raises:
            ValueError: if ``num_draws`` is not an integer of at least 1.
        """
        if not isinstance(num_draws, int) or num_draws < 1:
            raise ValueError(f"`num_draws` must be an integer of at least 1; got {num_draws!r}.")
        with self.scope(), torch.no_grad(), pyro.validation_enabled(False):
            single = _latent_values(self.guide, self.args, self.kwargs)
            depth = max((site["depth"] for site in single.values()), default=0)
            plate = pyro.plate("_flowvi_fit_draws", num_draws, dim=-1 - depth)
            many = _latent_values(plate(self.guide), self.args, self.kwargs)
        return {
            name: site["value"]
            .expand(num_draws, *site["value"].shape[1:])
            .reshape(num_draws, *single[name]["value"].shape)
            for name, site in many.items()
        }

    def check(self, **options: object) -> Any:
        """Whether the result can be trusted; see :func:`flowvi.diagnostics.check`."""
        from flowvi.diagnostics import check

        if self.start is not None and self.start.modes:
            options.setdefault("modes", self.start.modes)
        with self.scope():
            return check(self.model, self.guide, *self.args, **options, **self.kwargs)

    def to_arviz(self, **options: object) -> Any:
        """Draws and statistics for ArviZ; see :func:`flowvi.diagnostics.to_arviz`."""
        from flowvi.diagnostics import to_arviz

        with self.scope():
            return to_arviz(self.model, self.guide, *self.args, **options, **self.kwargs)

    def __str__(self) -> str:
        lines = [
            f"ELBO {self.elbo:.3f} +- {self.elbo_se:.3f} nats after {self.num_steps} steps and "
            f"{self.seconds:.1f} s ({self.stop_reason})"
        ]
        if self.skipped:
            places = ", ".join(f"{n} x {site}" for site, n in self.skipped_sites.items())
            lines.append(f"{self.skipped} steps skipped: {places or 'not reproducible'}")
        if not math.isfinite(self.elbo):
            lines.append(
                "The ELBO is not finite: the guide reaches where the model has no density."
            )
        return "\n".join([*lines, *self.notes])


def _latent_values(guide: Callable, args: tuple, kwargs: dict) -> dict[str, dict]:
    trace = prune_subsample_sites(poutine.trace(guide).get_trace(*args, **kwargs))
    return {
        name: {
            "value": site["value"],
            "depth": max((-f.dim for f in site["cond_indep_stack"] if f.vectorized), default=0),
        }
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and not site["infer"].get("is_auxiliary")
    }
