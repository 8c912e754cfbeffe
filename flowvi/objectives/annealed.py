"""Objectives whose terms get factors that change with the training step."""

from __future__ import annotations

import copy
import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from pyro.poutine import Trace
from torch import Tensor

from flowvi.objectives._path import PathMessenger, check_clip_factor
from flowvi.objectives._traces import sample_sites
from flowvi.objectives.base import Objective
from flowvi.objectives.elbo import full_term
from flowvi.objectives.stl import path_term
from flowvi.objectives.weights import (
    LogWeight,
    is_identically_one,
    log_weights,
    per_particle,
    score_function_term,
)

__all__ = ["LIKELIHOOD", "AnnealedObjective", "PartOfSite"]

LIKELIHOOD = "log_likelihood"

PartOfSite = Callable[[dict], str]


class AnnealedObjective(Objective):
    r"""Base of objectives that weigh parts of the ELBO by factors of the step.

    .. math:: \mathcal{L}_t = \sum_a c_{a,t}\, \mathcal{L}_a, \qquad
        \mathcal{L} = \sum_a \mathcal{L}_a \text{ is the plain ELBO}

    ``step`` counts the calls with gradients enabled, so training advances it and evaluation
    (:meth:`loss`, anything under ``torch.no_grad``) does not. It is part of ``state_dict``, and a
    copy has a count of its own. ``report`` holds the plain ELBO of the last call under ``"elbo"``,
    a tensor on the device.

    A subclass writes ``_parts``, which says in which part a site is, and ``_weigh``.

    Args:
        num_particles: draws per step, at least 1.
        path_gradient: gradient through the draws alone, as :class:`flowvi.objectives.STL` takes
            it; the whole gradient of the ELBO's estimator otherwise.
        clip_factor: see :class:`flowvi.objectives.STL`; needs ``path_gradient``.
        max_plate_nesting: number of nested plates of model and guide; guessed if left out.
        vectorize_particles: run all particles as one batch.
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        path_gradient: bool = False,
        clip_factor: float | None = None,
        max_plate_nesting: float = float("inf"),
        vectorize_particles: bool = True,
    ) -> None:
        super().__init__(
            num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
        )
        check_clip_factor(clip_factor)
        if clip_factor is not None and not path_gradient:
            raise ValueError(
                f"`clip_factor` must be None without path gradients; got {clip_factor!r}."
            )
        self.path_gradient = path_gradient
        self.clip_factor = clip_factor
        self.step = torch.zeros((), dtype=torch.int64)

    def __copy__(self) -> AnnealedObjective:
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__, step=self.step.clone(), report={})
        return new

    def state_dict(self) -> dict[str, Tensor]:
        return {"step": self.step.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if set(state) != {"step"}:
            raise ValueError(f"`state` must hold exactly `step`; got {sorted(state)}.")
        self.step = torch.as_tensor(state["step"]).clone()

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: object, **kwargs: object
    ) -> Tensor:
        """Loss (nats) at this step; with gradients enabled, the next call is the next step."""
        loss = super().differentiable_loss(model, guide, *args, **kwargs)
        if torch.is_grad_enabled():
            # In place, so that a captured graph of a step finds the count where it was.
            self.step.add_(1)
        return loss

    @abstractmethod
    def _parts(self, model_trace: Trace, guide_trace: Trace) -> PartOfSite:
        """Function of a site of model or guide: the part of the ELBO it belongs to."""

    @abstractmethod
    def _weigh(
        self,
        totals: Mapping[str, Tensor],
        traces: Sequence[tuple[Trace, Trace]],
        num_particles: int,
    ) -> tuple[dict[str, float | Tensor], float | Tensor]:
        """Factor of every part at this step, and what else to add to the objective.

        Args:
            totals: present estimate of every part, in nats.
            traces: model and guide trace of each run.
            num_particles: particles in each run.
        """

    def _guide_handler(self) -> AbstractContextManager:
        if not self.path_gradient:
            return super()._guide_handler()
        even = self._batch % 2 == 0
        return PathMessenger(self._batch, self._particle_dim, even, self.clip_factor)

    def _surrogate(self, model_trace: Trace, guide_trace: Trace, num_particles: int) -> Tensor:
        return self._combine([(model_trace, guide_trace)], num_particles)

    def _combine(self, traces: list[tuple[Trace, Trace]], num_particles: int) -> Tensor:
        dim = self._particle_dim
        runs = [self._split(*pair) for pair in traces]
        totals = {
            part: sum(per_particle(parts[part], num_particles, dim).mean() for parts, _ in runs)
            / len(runs)
            for part in runs[0][0]
        }
        self._report({part: total.detach() for part, total in totals.items()})
        factors, result = self._weigh(totals, traces, num_particles)
        for parts, scores in runs:
            weights = [_scaled(w, factors[part]) for part in parts for w in parts[part]]
            value = per_particle(weights, num_particles, dim).mean()
            extra = score_function_term(weights, scores, num_particles, dim)
            value = value if extra is None else value + extra / num_particles
            result = result + value / len(runs)
        return result

    def _split(
        self, model_trace: Trace, guide_trace: Trace
    ) -> tuple[dict[str, list[LogWeight]], list[tuple[dict, Tensor]]]:
        """Log-weights by part, and the score functions of the guide's sites."""
        part_of = self._parts(model_trace, guide_trace)
        scores: list[tuple[dict, Tensor]] = []
        guide_term = path_term(scores) if self.path_gradient else full_term(scores)
        sites = [site for trace in (model_trace, guide_trace) for site in sample_sites(trace)]
        parts = {}
        for part in dict.fromkeys(map(part_of, sites)):
            chosen = (_only(t, part, part_of) for t in (model_trace, guide_trace))
            parts[part] = log_weights(*chosen, guide_term, max_dim=self._max_dim)
        if not parts:
            raise ValueError("`model` must have at least one sample site; got none.")
        return parts, scores

    def _report(self, totals: Mapping[str, Tensor]) -> None:
        # The first total tells where the step has to live.
        like = next(iter(totals.values()))
        if self.step.device != like.device:
            self.step = self.step.to(like.device)
        self.report = {"elbo": sum(totals.values())}


def _only(trace: Trace, part: str, part_of: PartOfSite) -> Trace:
    chosen = copy.copy(trace)
    chosen.nodes = type(trace.nodes)(
        (site["name"], site) for site in sample_sites(trace) if part_of(site) == part
    )
    return chosen


def _scaled(weight: LogWeight, factor: float | Tensor) -> LogWeight:
    if is_identically_one(factor):
        return weight
    return dataclasses.replace(weight, scale=factor * weight.scale)
