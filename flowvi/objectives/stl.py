"""Sticking the landing: the evidence lower bound with path gradients only."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from pyro.poutine import Trace
from torch import Tensor

from flowvi.objectives._constants import leaf_of, with_constant_parameters
from flowvi.objectives._path import PathMessenger, check_clip_factor
from flowvi.objectives.base import Objective
from flowvi.objectives.weights import (
    log_weights,
    per_particle,
    score_function_term,
    with_gradient_of,
)

__all__ = ["STL", "path_term"]


class STL(Objective):
    r"""Evidence lower bound whose gradient runs through the draws alone.

    .. math:: \nabla_\theta \mathcal{L} = E\big[\nabla_z \{\log p(x, z)
        - \log q_{\bar\theta}(z)\}\; \partial z / \partial\theta\big],
        \qquad \bar\theta \text{ held constant}

    The left-out score of q has mean zero, so the estimate stays unbiased, and its variance is
    zero at q = p. Sites whose distribution offers ``path_derivative`` use it (one pass, for flows
    with a score recursion); other reparameterised sites are scored with detached parameters.

    Args:
        num_particles: draws per step, at least 1.
        antithetic: draw flows and Gaussians in opposite pairs (needs an even ``num_particles``).
        clip_factor: bound on one draw's gradient, in units of the median length over the draws,
            measured in coordinates whitened by the guide; ``None`` clips nothing. Bounds of 10
            and below bias the result where tails matter (funnels); hundreds do not. With a bound,
            draws with a non-finite log-weight or gradient are left out of both, as long as at
            least half of the draws remain.
        max_plate_nesting: number of nested plates of model and guide; guessed if left out.
        vectorize_particles: run all particles as one batch.

    Raises:
        NotImplementedError: at the first step, if a guide site is not reparameterised.

    References:
        Roeder, Wu and Duvenaud (2017), Sticking the landing, arXiv:1703.09194, equation 8; Vaitl,
        Nicoli, Nakajima and Kessel (2022), Gradients should stay on path, arXiv:2207.08219.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> loss = STL(num_particles=8)(model, AutoNormal(model))()
        >>> loss.shape
        torch.Size([])
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        antithetic: bool = False,
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
        if antithetic and num_particles % 2:
            raise ValueError(
                f"`num_particles` must be even for antithetic draws; got {num_particles}."
            )
        self.antithetic = antithetic
        self.clip_factor = clip_factor

    def _guide_handler(self) -> AbstractContextManager:
        return PathMessenger(self._batch, self._particle_dim, self.antithetic, self.clip_factor)

    def _surrogate(self, model_trace: Trace, guide_trace: Trace, num_particles: int) -> Tensor:
        scores: list[tuple[dict, Tensor]] = []

        weights = log_weights(model_trace, guide_trace, path_term(scores), max_dim=self._max_dim)
        draws = per_particle(weights, num_particles, self._particle_dim)
        elbo = draws.mean() if self.clip_factor is None else _finite_mean(draws)
        extra = score_function_term(weights, scores, num_particles, self._particle_dim)
        return elbo if extra is None else elbo + extra / num_particles


def path_term(scores: list[tuple[dict, Tensor]]) -> Callable[[dict], Tensor]:
    """Log-density of a guide site with the gradient through its value alone.

    Args:
        scores: gets the sites with their score functions, as the terms are formed.
    """

    def guide_term(site: dict) -> Tensor:
        fn = site["fn"]
        if hasattr(leaf_of(fn), "path_derivative"):
            parts = fn.score_parts(site["value"])
            scores.append((site, parts.score_function))
            return with_gradient_of(parts.log_prob, parts.entropy_term)
        if site["is_observed"]:
            return fn.log_prob(site["value"])
        return with_constant_parameters(fn, site["name"]).log_prob(site["value"])

    return guide_term


def _finite_mean(draws: Tensor) -> Tensor:
    """Mean of the finite entries; NaN where they are fewer than half."""
    finite = draws.isfinite()
    number = finite.sum()
    number = torch.where(2 * number >= len(draws), number, torch.nan)
    return draws.where(finite, torch.zeros_like(draws)).sum() / number
