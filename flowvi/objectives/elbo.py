"""The evidence lower bound with its full gradient."""

from __future__ import annotations

from collections.abc import Callable

from pyro.poutine import Trace
from torch import Tensor

from flowvi.objectives.base import Objective
from flowvi.objectives.weights import (
    log_weights,
    per_particle,
    score_function_term,
    with_gradient_of,
)

__all__ = ["ELBO", "full_term"]


class ELBO(Objective):
    r"""Evidence lower bound, reparameterised where possible and by the score function elsewhere.

    .. math:: \mathcal{L} = E_{q(z)}[\log p(x, z) - \log q(z)]

    Discrete sites, and weights of mixtures, get a likelihood-ratio gradient with the mean of the
    other particles as baseline, so they profit from ``num_particles > 1``. With a subsampled plate
    the estimate is unbiased: local terms are scaled by N/B.

    Args:
        num_particles: draws per step, at least 1.
        max_plate_nesting: number of nested plates of model and guide; guessed if left out.
        vectorize_particles: run all particles as one batch.

    References:
        Ranganath, Gerrish and Blei (2014), Black box variational inference, arXiv:1401.0118,
        equation 1; Kingma and Welling (2014), Auto-encoding variational Bayes, arXiv:1312.6114,
        equation 6.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> loss = ELBO(num_particles=8)(model, AutoNormal(model))()
        >>> loss.shape
        torch.Size([])
    """

    def _surrogate(self, model_trace: Trace, guide_trace: Trace, num_particles: int) -> Tensor:
        scores: list[tuple[dict, Tensor]] = []
        weights = log_weights(model_trace, guide_trace, full_term(scores), max_dim=self._max_dim)
        elbo = per_particle(weights, num_particles, self._particle_dim).mean()
        extra = score_function_term(weights, scores, num_particles, self._particle_dim)
        return elbo if extra is None else elbo + extra / num_particles


def full_term(scores: list[tuple[dict, Tensor]]) -> Callable[[dict], Tensor]:
    """Log-density of a guide site with the whole gradient of the ELBO's estimator.

    Args:
        scores: gets the sites with their score functions, as the terms are formed.
    """

    def guide_term(site: dict) -> Tensor:
        fn = site["fn"]
        # An auxiliary site may have score parts made for Trace_ELBO, whose reward leaves such
        # sites out; here the reward holds every site.
        score_parts = getattr(fn, "score_parts_in_full_reward", fn.score_parts)
        parts = score_parts(site["value"], *site["args"], **site["kwargs"])
        scores.append((site, parts.score_function))
        return with_gradient_of(parts.log_prob, parts.entropy_term)

    return guide_term
