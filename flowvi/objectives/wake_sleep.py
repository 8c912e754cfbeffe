"""Reweighted wake-sleep."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from numbers import Real

import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from flowvi.objectives._fixed import (
    FixedDraws,
    check_has_density,
    check_scores_given,
    score_fixed,
    split_weights,
    weighted_sum,
)
from flowvi.objectives._sites import check_sites_match
from flowvi.objectives._sleep import (
    Feed,
    check_amortised,
    feed_by_default,
    observed_values,
    simulate,
    sleep_plate,
    takes_observations,
)
from flowvi.objectives.base import check_several_particles
from flowvi.objectives.items import to_items
from flowvi.objectives.multisample import MultiSample
from flowvi.objectives.weights import (
    LogWeight,
    log_mean_exp,
    log_weights,
    per_particle,
    with_gradient_of,
)

__all__ = ["ReweightedWakeSleep"]


class ReweightedWakeSleep(MultiSample):
    r"""Model trained by the importance-weighted bound, guide by the forward KL divergence.

    .. math:: \nabla_\theta &= \sum_k \bar w_k \nabla_\theta \log p_\theta(x, z_k)
        \quad\text{(wake)} \\
        \nabla_\phi &= a \sum_k \bar w_k \nabla_\phi \log q_\phi(z_k \mid x)
        + (1 - a)\, E_{p_\theta(x', z')}[\nabla_\phi \log q_\phi(z' \mid x')]
        \quad\text{(wake, sleep)}

    with :math:`a` the ``insomnia``. No draw carries a gradient, so discrete latents do as well as
    continuous ones, and more particles make the guide's gradient better, not noisier. The wake
    gradient of the guide is biased in order 1/K (see :class:`EUBO`), the sleep gradient is not,
    but is about data of the model in place of real ones.

    The loss is minus the importance-weighted bound. ``report`` has ``"wake_theta"`` (the same),
    ``"wake_phi"`` and ``"sleep_phi"``, the losses of the three phases. Flow guides can be scored
    at any value, so all phases work with them; the sleep phase needs a guide that depends on the
    data.

    **How the guide sees simulated data.** As in Pyro, by the keyword ``observations``, a mapping
    from site to value, if the call or the guide has it. Else every argument that the model
    observes as it is gets replaced. Else by ``feed``.

    Args:
        num_particles: K draws per item for the wake phases, at least 2.
        insomnia: share of the wake phase in the guide's gradient, in [0, 1].
        num_sleep_particles: simulated data sets per step, at least 1.
        model_has_params: whether the model is trained; without it and with ``insomnia`` 0 the
            guide alone is run, on simulated data, and the loss is that of the sleep phase.
        feed: ``feed(simulated, args, kwargs)`` gives the guide's arguments for simulated data.
        max_plate_nesting: number of nested plates of model and guide; guessed if left out.
        vectorize_particles: run all particles as one batch or one after the other.

    Raises:
        NotImplementedError: at the first step: if a guide site is a point or cannot score a
            value; if sites differ in scale; in the sleep phase, if an automatic guide does not
            depend on the data, the model has a factor, or the place of the data is not known.

    References:
        Bornschein and Bengio (2015), Reweighted wake-sleep, arXiv:1406.2751, section 2; Le,
        Kosiorek, Siddharth, Teh and Wood (2020), Revisiting reweighted wake-sleep for models with
        stochastic control flow, arXiv:1805.10469, section 3.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> slope = torch.zeros((), requires_grad=True)
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Bernoulli(0.5))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("z", dist.Bernoulli(logits=slope * x))
        >>> objective = ReweightedWakeSleep(8, insomnia=0.5)
        >>> objective.differentiable_loss(model, guide, torch.tensor(1.0)).backward()
        >>> sorted(objective.report)
        ['sleep_phi', 'wake_phi', 'wake_theta']
    """

    def __init__(
        self,
        num_particles: int = 2,
        *,
        insomnia: float = 1.0,
        num_sleep_particles: int = 1,
        model_has_params: bool = True,
        feed: Feed | None = None,
        max_plate_nesting: float = float("inf"),
        vectorize_particles: bool = True,
    ) -> None:
        super().__init__(
            num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
        )
        check_several_particles(num_particles, "self-normalised weights")
        if not isinstance(insomnia, Real) or not 0 <= insomnia <= 1:
            raise ValueError(f"`insomnia` must be in [0, 1]; got {insomnia!r}.")
        if not isinstance(num_sleep_particles, int) or num_sleep_particles < 1:
            raise ValueError(
                f"`num_sleep_particles` must be an integer of at least 1; "
                f"got {num_sleep_particles!r}."
            )
        if feed is not None and not callable(feed):
            raise TypeError(f"`feed` must be callable; got {type(feed).__name__}.")
        self.insomnia = float(insomnia)
        self.num_sleep_particles = num_sleep_particles
        self.model_has_params = model_has_params
        self.feed = feed

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: object, **kwargs: object
    ) -> Tensor:
        """Minus the importance-weighted bound (nats), with the gradients of all phases."""
        self.report = {}
        awake = self.model_has_params or self.insomnia > 0
        if not awake:
            self._guess(model, guide, args, kwargs)
            return self._sleep(model, guide, args, kwargs)
        loss = super().differentiable_loss(model, guide, *args, **kwargs)
        if self.insomnia == 1:
            return loss
        sleep = self._sleep(model, guide, args, kwargs)
        return loss + (1 - self.insomnia) * (sleep - sleep.detach())

    # Wake.

    def _bound(self, log_w: Tensor) -> Tensor:
        return log_mean_exp(log_w)

    def _runs(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict
    ) -> tuple[list[tuple[Trace, Trace]], int]:
        traces, batch = super()._runs(model, guide, args, kwargs)
        for _, guide_trace in traces:
            check_has_density(guide_trace, type(guide).__name__, type(self).__name__)
        return traces, batch

    def _guide_handler(self) -> AbstractContextManager:
        return FixedDraws()

    def _combine(self, traces: list[tuple[Trace, Trace]], num_particles: int) -> Tensor:
        runs = [split_weights(m, g, type(self).__name__, self._max_dim) for m, g in traces]
        # Of log p - log q, the guide gets the gradient of +log q, times the insomnia.
        turned = [[*log_p, *_times_gradient(log_q, -self.insomnia)] for log_p, log_q in runs]
        items = self._items(turned, num_particles)
        constant = items.value.detach()
        share = constant.softmax(0)
        carrier = weighted_sum(share, items.value)
        bound = items.total(with_gradient_of(self._bound(constant), carrier))
        dims, dim = [f.dim for f in items.plates], self._particle_dim
        minus_log_q = torch.cat(
            [sum(to_items(w.value, dims, num_particles, dim) for w in log_q) for _, log_q in runs]
        ).detach()
        self.report["wake_theta"] = -bound.detach()
        self.report["wake_phi"] = items.total(weighted_sum(share, minus_log_q))
        return bound

    # Sleep.

    def _guess(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> None:
        if self.max_plate_nesting == float("inf"):
            with torch.no_grad():
                self._guess_max_plate_nesting(model, guide, args, kwargs)

    def _sleep(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Tensor:
        """Mean of -log q at simulated latents, given simulated data."""
        check_amortised(guide)
        number = self.num_sleep_particles
        by_name = self.feed is None and takes_observations(guide, kwargs)
        batch = number if by_name and self.vectorize_particles else 1
        losses = [
            self._sleep_once(model, guide, args, kwargs, batch) for _ in range(number // batch)
        ]
        loss = sum(losses) / len(losses)
        self.report["sleep_phi"] = loss.detach()
        return loss

    def _sleep_once(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict, batch: int
    ) -> Tensor:
        bound = type(self).__name__
        trace = simulate(model, args, kwargs, batch, self._particle_dim)
        if self.feed is None:
            args, kwargs = feed_by_default(trace, guide, args, kwargs)
        else:
            simulated = {n: s["value"] for n, s in observed_values(trace).items()}
            args, kwargs = self.feed(simulated, args, kwargs)
        replayed = poutine.replay(guide, trace=trace)
        if batch > 1:
            replayed = sleep_plate(batch, self._particle_dim)(replayed)
        guide_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        check_sites_match(trace, guide_trace)
        check_has_density(guide_trace, type(guide).__name__, bound)
        check_scores_given(guide_trace, trace, guide, bound)
        weights = log_weights(Trace(), guide_trace, score_fixed(bound))
        return per_particle(weights, batch, self._particle_dim).mean()


def _times_gradient(weights: list[LogWeight], factor: float) -> list[LogWeight]:
    """The same values with their gradient times a factor."""
    constants = [weight.value.detach() for weight in weights]
    return [
        dataclasses.replace(weight, value=c + factor * (weight.value - c))
        for weight, c in zip(weights, constants, strict=True)
    ]
