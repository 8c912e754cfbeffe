"""Evidence upper bound and forward KL divergence, by self-normalised importance sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from flowvi.objectives._fixed import (
    FixedDraws,
    GivenDraws,
    check_has_density,
    check_no_parameters,
    check_scores_given,
    split_weights,
    weighted_sum,
)
from flowvi.objectives._sites import check_sites_match
from flowvi.objectives.base import check_several_particles
from flowvi.objectives.multisample import MultiSample
from flowvi.objectives.weights import log_mean_exp, per_particle, with_gradient_of

__all__ = ["EUBO", "ForwardKL"]


class EUBO(MultiSample):
    r"""Evidence upper bound; its minimum over q is that of the forward KL divergence.

    .. math:: \mathcal{U} = E_{p(z \mid x)}[\log p(x, z) - \log q(z)]
        = \log p(x) + KL(p(z \mid x)\,\|\,q), \qquad
        \nabla_\phi \mathcal{U} = -E_{p(z \mid x)}[\nabla_\phi \log q(z)]

    The loss is the bound itself. A guide trained by it covers the posterior instead of a part.

    The posterior expectation is taken over draws of the guide with weights
    :math:`\bar w_k = w_k / \sum_j w_j`. This is **biased**: the mean of the estimate rises from
    the ELBO at K = 1 to the bound as K grows (bias of order 1/K), so it is an upper bound only
    for a K that the guide's weights allow; the gradient is biased in the same order, towards what
    the guide covers already. With ``draws`` of the posterior, from MCMC say, value and
    gradient are unbiased, and a random ``num_particles`` of them is used in each step.

    The model must have no parameters: they would be trained to raise nothing but the bound.

    Args:
        num_particles: K draws per step and item, at least 1.
        draws: posterior draws by site, ``(num_draws, *site shape)``, with all items of a plate.
        max_plate_nesting: number of nested plates of model and guide; guessed if left out.
        vectorize_particles: run all particles as one batch or one after the other.

    Raises:
        NotImplementedError: at the first step, if a guide site is a point or cannot score a
            value, if the model has parameters, or, without ``draws``, if sites differ in scale.

    References:
        Ji and Shen (2019), Stochastic variational inference via upper bound, arXiv:1912.00650;
        Bornschein and Bengio (2015), Reweighted wake-sleep, arXiv:1406.2751, section 2, for the
        weights.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from flowvi.objectives import EUBO
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> loc = torch.zeros((), requires_grad=True)
        >>> def guide():
        ...     pyro.sample("z", dist.Normal(loc, 1.0))
        >>> loss = EUBO(num_particles=8)(model, guide)()
        >>> bool(loss.abs() < 1e-6)
        True
    """

    is_upper_bound = True

    def __init__(
        self,
        num_particles: int = 100,
        *,
        draws: Mapping[str, Tensor] | None = None,
        max_plate_nesting: float = float("inf"),
        vectorize_particles: bool = True,
    ) -> None:
        super().__init__(
            num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
        )
        if draws is not None:
            _check_draws(draws)
        self.draws = None if draws is None else {n: v.detach() for n, v in draws.items()}

    @property
    def settled_from(self) -> float:
        # The bias of self-normalised weights moves with the guide.
        return math.inf if self.draws is None else 0

    def _runs(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict
    ) -> tuple[list[tuple[Trace, Trace]], int]:
        traces, batch = super()._runs(model, guide, args, kwargs)
        bound = type(self).__name__
        for model_trace, guide_trace in traces:
            check_has_density(guide_trace, type(guide).__name__, bound)
            if self.draws is not None:
                check_scores_given(guide_trace, model_trace, guide, bound)
        return traces, batch

    def _get_trace(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict
    ) -> tuple[Trace, Trace]:
        if self.draws is None:
            return super()._get_trace(model, guide, args, kwargs)
        with GivenDraws(self._choose(self._batch), self._batch):
            model_trace = poutine.trace(model).get_trace(*args, **kwargs)
        replayed = poutine.replay(guide, trace=model_trace)
        guide_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        check_sites_match(model_trace, guide_trace)
        return model_trace, guide_trace

    def _choose(self, number: int) -> dict[str, Tensor]:
        first = next(iter(self.draws.values()))
        shape = (number,) if number > 1 else ()
        rows = torch.randint(len(first), shape, device=first.device)
        return {name: values[rows] for name, values in self.draws.items()}

    def _guide_handler(self) -> AbstractContextManager:
        return FixedDraws()

    def _combine(self, traces: list[tuple[Trace, Trace]], num_particles: int) -> Tensor:
        bound = type(self).__name__
        runs = [split_weights(m, g, bound, self._max_dim) for m, g in traces]
        for log_p, _ in runs:
            check_no_parameters(log_p, bound)
        weights = [[*log_p, *log_q] for log_p, log_q in runs]
        if self.draws is not None:
            means = [per_particle(w, num_particles, self._particle_dim).mean() for w in weights]
            return -sum(means) / len(means)
        items = self._items(weights, num_particles)
        constant = items.value.detach()
        carrier = weighted_sum(constant.softmax(0), items.value)
        return -items.total(with_gradient_of(self._bound(constant), carrier))

    def _bound(self, log_w: Tensor) -> Tensor:
        return weighted_sum(log_w.softmax(0), log_w)


class ForwardKL(EUBO):
    r"""Forward KL divergence KL(p(z|x) || q), with the gradient of :class:`EUBO`.

    .. math:: \widehat{KL} = \sum_k \bar w_k \log (K \bar w_k), \qquad
        \bar w_k = w_k / \textstyle\sum_j w_j

    The loss is an estimate of the divergence itself, from 0 (equal weights) to log K (one draw
    has all the weight). It is **biased** low, and blind to what the guide does not reach: close to
    log K it says no more than that K is too small. For posterior draws use :class:`EUBO`.

    Args:
        num_particles: K draws per step and item, at least 2.
        max_plate_nesting: number of nested plates of model and guide; guessed if left out.
        vectorize_particles: run all particles as one batch or one after the other.

    Raises:
        NotImplementedError: as for :class:`EUBO`.

    References:
        Bornschein and Bengio (2015), Reweighted wake-sleep, arXiv:1406.2751, section 2.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> loss = ForwardKL(num_particles=8)(model, model)()
        >>> bool(loss.abs() < 1e-6)
        True
    """

    def __init__(
        self,
        num_particles: int = 100,
        *,
        max_plate_nesting: float = float("inf"),
        vectorize_particles: bool = True,
    ) -> None:
        super().__init__(
            num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
        )
        check_several_particles(num_particles, "ForwardKL")

    def _bound(self, log_w: Tensor) -> Tensor:
        return super()._bound(log_w) - log_mean_exp(log_w)


def _check_draws(draws: object) -> None:
    if not isinstance(draws, Mapping) or not draws:
        raise ValueError(
            f"`draws` must be a mapping from site names to tensors; got {type(draws).__name__}."
        )
    sizes = {n: len(v) if torch.is_tensor(v) and v.dim() else 0 for n, v in draws.items()}
    if len(set(sizes.values())) > 1 or 0 in sizes.values():
        raise ValueError(
            f"`draws` must have one leading size, at least 1, at all sites; got {sizes}."
        )
