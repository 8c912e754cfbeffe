"""Thermodynamic variational objective."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from flowvi.objectives._constants import check_reparameterised, leaf_of
from flowvi.objectives.base import check_several_particles
from flowvi.objectives.items import to_items
from flowvi.objectives.multisample import MultiSample
from flowvi.objectives.weights import GuideTerm, attached, log_weights, with_gradient_of

__all__ = ["TVO", "log_uniform_partition"]


def log_uniform_partition(num_partitions: int, first: float = 0.1) -> tuple[float, ...]:
    r"""Points :math:`0 = \beta_0 < \beta_1 < \dots < \beta_n = 1`, evenly spaced in log.

    Args:
        num_partitions: number n of intervals, at least 1.
        first: :math:`\beta_1`, in (0, 1); without effect for one interval.

    Example:
        >>> [round(beta, 3) for beta in log_uniform_partition(3)]
        [0.0, 0.1, 0.316, 1.0]
    """
    if not isinstance(num_partitions, int) or num_partitions < 1:
        raise ValueError(
            f"`num_partitions` must be an integer of at least 1; got {num_partitions!r}."
        )
    if not 0 < first < 1:
        raise ValueError(f"`first` must be in (0, 1); got {first!r}.")
    steps = num_partitions - 1
    return (0.0, *(first ** (1 - i / steps) for i in range(steps)), 1.0)


class TVO(MultiSample):
    r"""Thermodynamic variational objective: a Riemann sum of an integral that equals log p.

    .. math:: \log p(x) = \int_0^1 E_{\pi_\beta}\Big[\log \frac{p(x, z)}{q(z)}\Big] d\beta,
        \qquad \pi_\beta(z) \propto q(z)^{1 - \beta}\, p(x, z)^\beta

    The integrand rises, so the sum over left ends is a lower bound (two points, 0 and 1, give the
    ELBO) and the sum over right ends an upper bound. Each expectation is estimated per item (see
    :func:`item_log_weights`) by weighing the same K draws of q with :math:`w^\beta`, which is
    biased for finite K: towards the ELBO, so the lower bound stays one, while the upper bound is
    one only as K grows.

    The gradient is by default the covariance estimator with draws held constant, so it covers
    discrete sites; the guide's flow must be able to score given values:

    .. math:: \nabla E_{\pi_\beta}[\log w] = E_{\pi_\beta}[\nabla \log w]
        + \operatorname{Cov}_{\pi_\beta}[\nabla \log \tilde\pi_\beta, \log w]

    (consistent as K grows). With ``reparameterised`` it is the gradient of the estimate itself
    through the draws: unbiased for the mean of the reported value at every K.

    Args:
        num_particles: K; at least 2, or 1 with ``reparameterised``.
        partition: points from 0 to 1, rising.
        upper: sum over right ends. The loss is then the upper bound itself, and training makes it
            small; leave the model's parameters out of that.
        reparameterised: differentiate through the draws.
        max_plate_nesting: number of nested plates of model and guide; guessed if left out.
        vectorize_particles: run all particles as one batch or one after the other.

    Raises:
        NotImplementedError: at the first step, if sites differ in scale (a global latent with a
            subsampled plate); with ``reparameterised``, if a guide site is not.

    References:
        Masrani, Le and Wood (2019), The thermodynamic variational objective, arXiv:1907.00031,
        sections 3 and 4.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> loss = TVO(num_particles=8)(model, AutoNormal(model))()
        >>> loss.shape
        torch.Size([])
    """

    def __init__(
        self,
        num_particles: int = 10,
        *,
        partition: Sequence[float] = log_uniform_partition(5),
        upper: bool = False,
        reparameterised: bool = False,
        max_plate_nesting: float = float("inf"),
        vectorize_particles: bool = True,
    ) -> None:
        super().__init__(
            num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
        )
        if not reparameterised:
            check_several_particles(num_particles, "TVO's covariances")
        points = tuple(float(beta) for beta in partition)
        rising = all(a < b for a, b in zip(points, points[1:], strict=False))
        if len(points) < 2 or points[0] != 0 or points[-1] != 1 or not rising:
            raise ValueError(f"`partition` must rise from 0 to 1; got {points}.")
        self.partition = points
        self.is_upper_bound = upper
        self.reparameterised = reparameterised

    def _guide_handler(self) -> AbstractContextManager:
        return super()._guide_handler() if self.reparameterised else _ConstantDraws()

    def _guide_term(self, site: dict) -> Tensor:
        if self.reparameterised and torch.is_grad_enabled() and not site["is_observed"]:
            instead = "TVO without `reparameterised`"
            check_reparameterised(site["fn"], site["name"], "Reparameterised TVO", instead)
        return attached(site)

    def _combine(self, traces: list[tuple[Trace, Trace]], num_particles: int) -> Tensor:
        if self.reparameterised or not torch.is_grad_enabled():
            result = super()._combine(traces, num_particles)
        else:
            result = self._combine_constant(traces, num_particles)
        return -result if self.is_upper_bound else result

    def _bound(self, log_w: Tensor) -> Tensor:
        return sum(
            width * ((beta * log_w).softmax(0) * log_w).sum(0) for beta, width in self._points()
        )

    def _points(self) -> list[tuple[float, float]]:
        """Where the integrand is taken, and the width of each strip."""
        pairs = zip(self.partition, self.partition[1:], strict=False)
        return [(right if self.is_upper_bound else left, right - left) for left, right in pairs]

    def _combine_constant(self, traces: list[tuple[Trace, Trace]], num_particles: int) -> Tensor:
        runs, found = [], []
        for model_trace, guide_trace in traces:
            term, log_q = _recorded(self._guide_term)
            runs.append(log_weights(model_trace, guide_trace, term, max_dim=self._max_dim))
            found.append(log_q)
        items = self._items(runs, num_particles)
        dims, particle_dim = [f.dim for f in items.plates], self._particle_dim
        log_q = torch.cat(
            [sum(to_items(t, dims, num_particles, particle_dim) for t in terms) for terms in found]
        )
        log_w, constant, carrier = items.value, items.value.detach(), 0.0
        for beta, width in self._points():
            share = (beta * constant).softmax(0)
            mean = (share * constant).sum(0)
            term = share * (log_w + (constant - mean) * (log_q + beta * log_w))
            carrier = carrier + width * term.sum(0)
        return items.total(with_gradient_of(self._bound(constant), carrier))


class _ConstantDraws(Messenger):
    """Detach what the guide draws; a Delta is a parameter, or made of draws."""

    def _pyro_post_sample(self, msg: dict) -> None:
        if msg["is_observed"] or site_is_subsample(msg) or isinstance(leaf_of(msg["fn"]), Delta):
            return
        msg["value"] = msg["value"].detach()


def _recorded(guide_term: GuideTerm) -> tuple[GuideTerm, list[Tensor]]:
    """The same function, and a list that gets the terms it forms, masked as in the weights."""
    terms: list[Tensor] = []

    def term(site: dict) -> Tensor:
        log_q = guide_term(site)
        terms.append(scale_and_mask(log_q, 1.0, site["mask"]))
        return log_q

    return term, terms
