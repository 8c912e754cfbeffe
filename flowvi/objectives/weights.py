"""Log-weights of a model trace against a guide trace, per independent item."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer.util import MultiFrameTensor
from pyro.poutine import Trace
from torch import Tensor

from flowvi.objectives._constants import leaf_of
from flowvi.objectives._traces import sample_sites

__all__ = [
    "LogWeight",
    "log_mean_exp",
    "log_weights",
    "per_particle",
    "score_function_term",
    "with_gradient_of",
]

GuideTerm = Callable[[dict], Tensor]


@dataclass(frozen=True)
class LogWeight:
    r"""``log p - log q`` of the sites that share plates and a scale.

    Bounds that exponentiate weights (IWAE, Renyi) must do so on ``value`` and multiply by
    ``scale`` afterwards; the plain ELBO may use their product.

    Args:
        plates: the vectorised plates around these sites, the particle plate among them.
        value: sum of log-densities before any plate scale, in nats, one number per item of
            ``plates`` at the plates' own dims.
        scale: factor of a subsampled plate (N/B) and of ``poutine.scale``.
        sites: the sites of model and guide that are in ``value``.
    """

    plates: tuple
    value: Tensor
    scale: float | Tensor
    sites: tuple[dict, ...] = field(default=(), repr=False, compare=False)

    @property
    def scaled(self) -> Tensor:
        """``scale * value``."""
        return self.value if is_identically_one(self.scale) else self.value * self.scale


def is_identically_one(scale: float | Tensor) -> bool:
    """Whether a scale is known to be one without looking at a tensor's value."""
    return isinstance(scale, (int, float)) and scale == 1


def with_gradient_of(value: Tensor, carrier: Tensor | float) -> Tensor:
    """``value`` with the gradient of ``carrier`` (a plain number has none)."""
    if carrier is value or not torch.is_tensor(carrier):
        return value if carrier is value else value.detach()
    return value.detach() + (carrier - carrier.detach())


def log_mean_exp(log_w: Tensor) -> Tensor:
    """Logarithm of the mean of exponentials over the first dim, in nats."""
    return log_w.logsumexp(0) - math.log(log_w.shape[0])


def attached(site: dict) -> Tensor:
    """Log-density of a guide site as it is, with its whole graph."""
    return site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])


def log_weights(
    model_trace: Trace,
    guide_trace: Trace,
    guide_term: GuideTerm = attached,
    *,
    max_dim: int | None = None,
) -> list[LogWeight]:
    r"""Group :math:`\log p(x, z) - \log q(z)` by the plates that its terms share.

    Args:
        model_trace: trace of the model replayed against ``guide_trace``.
        guide_trace: trace of the guide; subsample sites are pruned from both.
        guide_term: gives the log-density of a guide site (nats, its batch shape); an estimator
            replaces it to change what carries a gradient, never the value.
        max_dim: number of plate dims, that of the particles included; ``None`` checks nothing.

    Returns:
        One :class:`LogWeight` per set of plates and scale, in order of appearance. Terms are not
        summed over plates, so nothing has been mixed that is independent given the globals.

    Raises:
        ValueError: if a site has more batch dims than there are plates, which would be counted
            once for every particle too often.
    """
    groups: dict[tuple, LogWeight] = {}
    for site in sample_sites(model_trace):
        _add(groups, site, attached(site), max_dim)
    for site in sample_sites(guide_trace):
        _add(groups, site, -guide_term(site), max_dim)
    return list(groups.values())


def per_particle(weights: Iterable[LogWeight], num_particles: int, particle_dim: int) -> Tensor:
    """Sum scaled log-weights over everything but the (leftmost) particle dimension.

    Args:
        weights: what :func:`log_weights` gives.
        num_particles: size of the particle plate; 1 where there is none.
        particle_dim: dim of that plate, negative.

    Shape:
        result: ``(num_particles,)``, in nats.
    """
    total = None
    for weight in weights:
        value = weight.scaled
        if num_particles > 1 and value.dim() == -particle_dim:
            value = value.reshape(num_particles, -1).sum(-1)
        else:
            value = value.sum().expand(num_particles)
        total = value if total is None else total + value
    if total is None:
        raise ValueError("`model` must have at least one sample site; got none.")
    return total


def score_function_term(
    weights: Iterable[LogWeight],
    scores: Iterable[tuple[dict, Tensor]],
    num_particles: int,
    particle_dim: int,
) -> Tensor | None:
    r"""Zero whose gradient is the likelihood-ratio (REINFORCE) term, summed over particles.

    For each site with a score function :math:`s`, :math:`\sum (r - b)\, s` where :math:`r` is the
    detached log-weight of everything inside the site's own plates. The baseline :math:`b` is
    the mean of the other particles, so the estimate stays unbiased. Mixtures of flows draw their
    components stratified over the particles, which fixes the counts up to one; there :math:`b`
    is the mean of all particles, and what is left is of order :math:`S^{-2}` and zero where
    all components have the same mean log-weight.

    References:
        Ranganath, Gerrish and Blei (2014), Black box variational inference, arXiv:1401.0118,
        equations 4 and 5; Kool, van Hoof and Welling (2019), Buy 4 REINFORCE samples, get a
        baseline for free, equation 8.
    """
    scores = [(site, s) for site, s in scores if not is_identically_zero(s)]
    if not scores:
        return None
    rewards = MultiFrameTensor(*[(w.plates, w.scaled.detach()) for w in weights])
    total = None
    for site, score in scores:
        reward = rewards.sum_to(site["cond_indep_stack"])
        if num_particles > 1 and reward.dim() >= -particle_dim:
            reward = reward - reward.mean(particle_dim, keepdim=True)
            if not _is_stratified(site):
                reward = reward * (num_particles / (num_particles - 1))
        term = (reward * score).sum()
        total = term if total is None else total + term
    return total - total.detach()


def _is_stratified(site: dict) -> bool:
    # Partially reparameterised: has a score function and draws that carry a gradient.
    return hasattr(leaf_of(site["fn"]), "path_derivative")


def _add(groups: dict[tuple, LogWeight], site: dict, value: Tensor, max_dim: int | None) -> None:
    if max_dim is not None and value.dim() > max_dim:
        raise ValueError(
            f"Site `{site['name']}` must have at most {max_dim} batch dimensions, one for each "
            f"plate and one for the particles; its log-density has shape {tuple(value.shape)}. "
            "Write the model with indices from the right and .to_event, or give "
            "vectorize_particles=False."
        )
    plates = tuple(f for f in site["cond_indep_stack"] if f.vectorized)
    scale = site["scale"]
    value = scale_and_mask(value, 1.0, site["mask"])
    key = (frozenset(f.name for f in plates), id(scale) if torch.is_tensor(scale) else scale)
    old = groups.get(key)
    if old is None:
        groups[key] = LogWeight(plates, value, scale, (site,))
    else:
        groups[key] = LogWeight(plates, old.value + value, scale, (*old.sites, site))
