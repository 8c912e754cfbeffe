"""Importance-weighted bound for guides that are not reparameterised."""

from __future__ import annotations

import math

import torch
from pyro.distributions.util import is_identically_zero
from pyro.poutine import Trace
from torch import Tensor

from flowvi.objectives._constants import leaf_of
from flowvi.objectives.base import check_several_particles
from flowvi.objectives.items import ItemLogWeights, to_items
from flowvi.objectives.multisample import MultiSample
from flowvi.objectives.weights import attached, log_mean_exp, log_weights, with_gradient_of

__all__ = ["VIMCO"]

Scores = list[tuple[dict, Tensor]]


class VIMCO(MultiSample):
    r"""Importance-weighted bound with a score-function gradient, for discrete latents.

    .. math:: \nabla \mathcal{L}_K = E\Big[\sum_k (\hat L - \hat L_{-k}) \nabla \log q(z_k)
        + \sum_k \bar w_k \nabla \log w_k\Big], \qquad
        \hat L = \log \frac{1}{K} \sum_k w_k

    where :math:`\hat L_{-k}` is :math:`\hat L` with :math:`w_k` replaced by the geometric mean of
    the others: a baseline that the other particles give for free and that keeps the gradient
    unbiased. The value is that of :class:`IWAE`. Reparameterised sites of the same guide keep
    their pathwise gradient. Where all sites are reparameterised, :class:`DReG` is less noisy.

    Args:
        num_particles: K, at least 2.
        max_plate_nesting: number of nested plates of model and guide; guessed if left out.
        vectorize_particles: run all particles as one batch or one after the other.

    Raises:
        NotImplementedError: at the first step, if a mixture's draws depend on each other, or if
            sites differ in scale (a global latent with a subsampled plate).

    References:
        Mnih and Rezende (2016), Variational inference for Monte Carlo objectives,
        arXiv:1602.06725, section 2 and algorithm 1.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> probs = torch.tensor(0.3, requires_grad=True)
        >>> def model():
        ...     pyro.sample("z", dist.Bernoulli(0.5))
        >>> def guide():
        ...     pyro.sample("z", dist.Bernoulli(probs))
        >>> VIMCO(4).differentiable_loss(model, guide).backward()
        >>> probs.grad.shape
        torch.Size([])
    """

    def __init__(
        self,
        num_particles: int = 2,
        *,
        max_plate_nesting: float = float("inf"),
        vectorize_particles: bool = True,
    ) -> None:
        super().__init__(
            num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
        )
        check_several_particles(num_particles, "VIMCO")

    def _bound(self, log_w: Tensor) -> Tensor:
        return log_mean_exp(log_w)

    def _combine(self, traces: list[tuple[Trace, Trace]], num_particles: int) -> Tensor:
        runs, scores = [], []
        for model_trace, guide_trace in traces:
            found: Scores = []
            term = _score_term(found)
            runs.append(log_weights(model_trace, guide_trace, term, max_dim=self._max_dim))
            scores.append(found)
        items = self._items(runs, num_particles)
        bound = self._bound(items.value)
        if not any(scores):
            return items.total(bound)
        signal = bound.detach() - leave_one_out(items.value.detach())
        score = torch.cat([self._score(found, items, num_particles) for found in scores])
        extra = (signal * score).sum(0)
        return items.total(with_gradient_of(bound, bound + extra))

    def _score(self, found: Scores, items: ItemLogWeights, num_particles: int) -> Tensor:
        dims = [f.dim for f in items.plates]
        terms = (to_items(s, dims, num_particles, self._particle_dim) for _, s in found)
        return sum(terms)


def _score_term(found: Scores) -> object:
    def term(site: dict) -> Tensor:
        fn = site["fn"]
        if not torch.is_grad_enabled() or site["is_observed"]:
            return attached(site)
        if hasattr(leaf_of(fn), "path_derivative") and not fn.has_rsample:
            raise NotImplementedError(
                f"VIMCO needs independent particles; site `{site['name']}` draws from "
                f"{type(leaf_of(fn)).__name__}, whose components are stratified over them. "
                "Use ELBO or STL for this guide."
            )
        parts = fn.score_parts(site["value"], *site["args"], **site["kwargs"])
        if not is_identically_zero(parts.score_function):
            found.append((site, parts.score_function))
        return parts.log_prob

    return term


def leave_one_out(log_w: Tensor) -> Tensor:
    """Log-mean-exp with each weight in turn replaced by the geometric mean of the others.

    Args:
        log_w: log-weights ``(num_particles, *items)``, at least two particles.

    Shape:
        result: as ``log_w``, in nats.
    """
    number = log_w.shape[0]
    # Sums over the others from both ends; subtracting from the total would cancel.
    total = _others(log_w.cumsum(0), log_w.flip(0).cumsum(0).flip(0), 0.0, torch.add)
    lower, upper = log_w.logcumsumexp(0), log_w.flip(0).logcumsumexp(0).flip(0)
    log_sum = _others(lower, upper, -math.inf, torch.logaddexp)
    return torch.logaddexp(log_sum, total / (number - 1)) - math.log(number)


def _others(lower: Tensor, upper: Tensor, empty: float, join: object) -> Tensor:
    """Join what comes before each row with what comes after it."""
    edge = torch.full_like(lower[:1], empty)
    return join(torch.cat([edge, lower[:-1]]), torch.cat([upper[1:], edge]))
