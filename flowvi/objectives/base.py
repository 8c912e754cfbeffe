"""What every objective is: a ``pyro.infer.ELBO`` whose loss is a tensor, without a host sync."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from numbers import Real

import pyro.infer
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.util import check_model_guide_match
from torch import Tensor

from flowvi.objectives._minibatch import SameMinibatch
from flowvi.objectives._sites import check_sites_match
from flowvi.objectives.weights import log_weights, per_particle

__all__ = ["Objective", "check_several_particles"]


class Objective(pyro.infer.ELBO):
    """Base of the objectives; a new one writes ``_surrogate``.

    Usable as ``SVI(model, guide, optim, loss=objective)`` and as a module,
    ``objective(model, guide)(*args)``. Particles are one batched run by default, in a plate to the
    left of all plates of the model; ``max_plate_nesting`` is guessed in the first call.

    An objective whose loss is not all there is to know leaves more numbers of the last call in
    ``report``, by name, as detached tensors on the device; ``fit`` keeps their history.

    Args:
        num_particles: draws per step, at least 1.
        max_plate_nesting: number of nested plates of model and guide; guessed if left out.
        vectorize_particles: run all particles as one batch (needs a model that broadcasts) or
            one after the other.
    """

    # Whether the loss is an upper bound on log p itself, rather than minus a lower bound.
    is_upper_bound = False
    # Whether the runs of a step must see one minibatch, because their weights are combined.
    _joins_runs = False

    def __init__(
        self,
        num_particles: int = 1,
        *,
        max_plate_nesting: float = float("inf"),
        vectorize_particles: bool = True,
    ) -> None:
        if not isinstance(num_particles, int) or num_particles < 1:
            raise ValueError(
                f"`num_particles` must be an integer of at least 1; got {num_particles!r}."
            )
        if not isinstance(max_plate_nesting, Real) or max_plate_nesting < 0:
            raise ValueError(f"`max_plate_nesting` must be at least 0; got {max_plate_nesting!r}.")
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
        )
        self.report: dict[str, Tensor] = {}

    @property
    def settled_from(self) -> float:
        """Step from which the loss is one fixed quantity that training lowers.

        A stopping rule must wait for it; it never comes where this is infinite.
        """
        return 0

    def state_dict(self) -> dict[str, Tensor]:
        """What changes from step to step; empty for an objective that has no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: if the state is of another kind of objective.
        """
        if state:
            raise ValueError(
                f"`state` must be empty for {type(self).__name__}; got {sorted(state)}."
            )

    @abstractmethod
    def _surrogate(self, model_trace: Trace, guide_trace: Trace, num_particles: int) -> Tensor:
        """Objective of one (possibly vectorised) run: its value, and its estimator's gradient."""

    def _combine(self, traces: list[tuple[Trace, Trace]], num_particles: int) -> Tensor:
        """Objective of all runs of a step; one that is not a mean over particles replaces it.

        Args:
            traces: model and guide trace of each run; one run if particles are vectorised.
            num_particles: particles in each run.
        """
        share = num_particles / self.num_particles
        return sum(self._surrogate(m, g, num_particles) * share for m, g in traces)

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: object, **kwargs: object
    ) -> Tensor:
        """Loss (nats) whose gradient is that of the estimator; nothing leaves the device."""
        traces, batch = self._runs(model, guide, args, kwargs)
        return -self._combine(traces, batch)

    def loss_and_grads(
        self, model: Callable, guide: Callable, *args: object, **kwargs: object
    ) -> Tensor:
        """Backpropagate and give the loss as a tensor, which ``SVI.step`` turns into a float."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.detach()

    @torch.no_grad()
    def loss(self, model: Callable, guide: Callable, *args: object, **kwargs: object) -> float:
        """Loss as a float, without a gradient."""
        return self.differentiable_loss(model, guide, *args, **kwargs).item()

    @torch.no_grad()
    def log_weight_draws(
        self, model: Callable, guide: Callable, *args: object, **kwargs: object
    ) -> Tensor:
        """Log-weights with plate scales applied, one per particle.

        Shape:
            result: ``(num_particles,)``, in nats; their mean is an unbiased ELBO.
        """
        traces, batch = self._runs(model, guide, args, kwargs)
        dim = self._particle_dim
        weights = [log_weights(m, g, max_dim=self._max_dim) for m, g in traces]
        return torch.cat([per_particle(w, batch, dim) for w in weights])

    def _runs(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict
    ) -> tuple[list[tuple[Trace, Trace]], int]:
        """Trace pairs and the number of particles in each."""
        if self.max_plate_nesting == float("inf"):
            with torch.no_grad():
                self._guess_max_plate_nesting(model, guide, args, kwargs)
        if self.vectorize_particles:
            return [self._get_vectorized_trace(model, guide, args, kwargs)], self._batch
        with SameMinibatch() if self._joins_runs else nullcontext():
            runs = [self._get_trace(model, guide, args, kwargs) for _ in range(self.num_particles)]
        return runs, self._batch

    def _get_trace(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict
    ) -> tuple[Trace, Trace]:
        handler = poutine.unwrap(guide)
        if isinstance(handler, Messenger):
            guide(*args, **kwargs)
            model_trace, guide_trace = handler.get_traces()
        else:
            guide_trace = self._guide_trace(guide, args, kwargs)
            replayed = poutine.replay(model, trace=guide_trace)
            model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        check_sites_match(model_trace, guide_trace)
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
        return model_trace, guide_trace

    def _guide_trace(self, guide: Callable, args: tuple, kwargs: dict) -> Trace:
        # Outside the trace, so that the trace records what the handler has made of the sites.
        with self._guide_handler():
            return poutine.trace(guide).get_trace(*args, **kwargs)

    def _guide_handler(self) -> AbstractContextManager:
        """Handler under which the guide is run; one that changes its sites replaces it."""
        return nullcontext()

    @property
    def _batch(self) -> int:
        """Particles in one run."""
        return self.num_particles if self.vectorize_particles else 1

    @property
    def _particle_dim(self) -> int:
        return -int(self.max_plate_nesting)

    @property
    def _max_dim(self) -> int | None:
        """Most batch dims that a site may have; more would be counted once for every particle."""
        batched = self.vectorize_particles and self.num_particles > 1
        return int(self.max_plate_nesting) if batched else None


def check_several_particles(num_particles: int, purpose: str) -> None:
    """Refuse a single particle where it cannot do.

    Args:
        num_particles: the number asked for.
        purpose: what needs more of them, for the message.

    Raises:
        ValueError: if it is below 2.
    """
    if num_particles < 2:
        raise ValueError(f"`num_particles` must be at least 2 for {purpose}; got {num_particles}.")
