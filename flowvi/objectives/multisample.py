"""Base of the bounds that combine the particles of each item before they add items up."""

from __future__ import annotations

from abc import abstractmethod

import torch
from pyro.poutine import Trace
from torch import Tensor

from flowvi.objectives._constants import check_reparameterised
from flowvi.objectives.base import Objective
from flowvi.objectives.items import ItemLogWeights, item_log_weights
from flowvi.objectives.weights import LogWeight, attached, log_weights

__all__ = ["MultiSample"]


class MultiSample(Objective):
    """Base of multi-sample bounds; a new one writes ``_bound``, a function of log-weights.

    Args:
        num_particles: draws per item and step, at least 1.
        max_plate_nesting: number of nested plates of model and guide; guessed if left out.
        vectorize_particles: run all particles as one batch or one after the other.
    """

    _joins_runs = True

    @abstractmethod
    def _bound(self, log_w: Tensor) -> Tensor:
        """Bound of each item, ``items``, from its log-weights ``(num_particles, *items)``."""

    def _weights(self, model_trace: Trace, guide_trace: Trace) -> list[LogWeight]:
        return log_weights(model_trace, guide_trace, self._guide_term, max_dim=self._max_dim)

    def _guide_term(self, site: dict) -> Tensor:
        # Only the gradient needs the draws to carry it; values are right for any guide.
        if torch.is_grad_enabled() and not site["is_observed"]:
            check_reparameterised(site["fn"], site["name"], type(self).__name__, "ELBO or VIMCO")
        return attached(site)

    def _combine(self, traces: list[tuple[Trace, Trace]], num_particles: int) -> Tensor:
        items = self._items([self._weights(m, g) for m, g in traces], num_particles)
        return items.total(self._bound(items.value))

    def _items(self, runs: list[list[LogWeight]], num_particles: int) -> ItemLogWeights:
        return item_log_weights(runs, num_particles, self._particle_dim, type(self).__name__)

    def _surrogate(self, model_trace: Trace, guide_trace: Trace, num_particles: int) -> Tensor:
        return self._combine([(model_trace, guide_trace)], num_particles)
