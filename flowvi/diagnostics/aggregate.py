"""What a fitted pair makes of its latents: active units, information, marginal divergence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from flowvi.diagnostics.importance import Bound, elbo
from flowvi.models.pair import ModelGuidePair

__all__ = ["ActiveUnits", "AggregatePosterior", "active_units", "aggregate_posterior"]


@dataclass(frozen=True)
class ActiveUnits:
    """Which coordinates of each latent site depend on the data.

    Args:
        variances: variance over the items of the posterior mean of every coordinate, by site,
            each of the site's event shape.
        threshold: variance above which a coordinate counts as active.
    """

    variances: dict[str, Tensor]
    threshold: float

    @property
    def counts(self) -> dict[str, int]:
        """Number of active coordinates of each site."""
        return {n: int((v > self.threshold).sum()) for n, v in self.variances.items()}

    @property
    def sizes(self) -> dict[str, int]:
        """Number of coordinates of each site."""
        return {name: v.numel() for name, v in self.variances.items()}


@dataclass(frozen=True)
class AggregatePosterior:
    r"""How the posteriors of many items, taken together, relate to the prior, in nats.

    .. math:: E_x\,KL(q(z \mid x) \,\|\, p(z))
        = I_q(x; z) + KL(q(z) \,\|\, p(z)), \qquad q(z) = \frac1N \sum_n q(z \mid x_n)

    Args:
        mutual_information: of the index of an item and its latents, at most log N.
        marginal_divergence: of the mixture of all posteriors from the prior; what a better prior
            could save.
    """

    mutual_information: Bound
    marginal_divergence: Bound

    @property
    def divergence(self) -> float:
        """Mean divergence of a posterior from the prior, the sum of both."""
        return self.mutual_information.value + self.marginal_divergence.value


@torch.no_grad()
def active_units(
    pair: ModelGuidePair,
    x: Tensor,
    context: Tensor | None = None,
    *,
    num_particles: int = 32,
    threshold: float = 0.01,
    batch: int = 250,
) -> ActiveUnits:
    r"""Coordinates of the latents whose posterior mean varies with the data, layer by layer.

    .. math:: A_u = \mathrm{Var}_x\big(E_{q(u \mid x)}[u]\big) > 0.01

    Means that have no closed form are averages of draws, whose own variance is taken off.

    Args:
        pair: the fitted pair; it is run in evaluation mode.
        x: items ``(N, *event_shape)``, at least 2.
        context: what they are conditioned on.
        num_particles: draws to average over, at least 2.
        threshold: variance from which on a coordinate is active.
        batch: items in one pass.

    References:
        Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders,
        arXiv:1509.00519, section 5.2.
    """
    if len(x) < 2 or num_particles < 2:
        raise ValueError(
            "`x` must hold at least 2 items and `num_particles` be at least 2; got "
            f"{len(x)} and {num_particles}."
        )
    means: dict[str, list[Tensor]] = {}
    noise: dict[str, list[Tensor]] = {}
    for rows in torch.arange(len(x), device=x.device).split(batch):
        part = None if context is None else context[rows]
        for name, site in pair.posterior_trace(x[rows], part, num_particles).items():
            law = site["fn"]
            shape = site["value"].shape
            closed = _is_normal(law)
            drawn = law.mean.expand(shape) if closed else site["value"]
            means.setdefault(name, []).append(drawn.mean(0))
            noise.setdefault(name, []).append(drawn.var(0) / num_particles)
    variances = {
        name: torch.cat(parts).var(0) - torch.cat(noise[name]).mean(0)
        for name, parts in means.items()
    }
    return ActiveUnits(variances, threshold)


@torch.no_grad()
def aggregate_posterior(
    pair: ModelGuidePair, x: Tensor, *, max_rows: int = 20_000
) -> AggregatePosterior:
    """Mutual information and marginal divergence of the aggregated posterior of some items.

    One draw per item is scored by the posteriors of all items, so the cost is the square of their
    number. The mixture is exact for these items; more of them allow more information.

    Args:
        pair: the fitted pair, without a context; it is run in evaluation mode.
        x: items ``(N, *event_shape)``, at least 2.
        max_rows: draws times items in one pass.

    References:
        Hoffman and Johnson (2016), ELBO surgery: yet another way to carve up the variational
        evidence lower bound, section 3.
    """
    if len(x) < 2:
        raise ValueError(f"`x` must hold at least 2 items; got {len(x)}.")
    own, mixed, prior = [], [], []
    for rows in torch.arange(len(x), device=x.device).split(max(1, max_rows // len(x))):
        sites = pair.posterior_trace(x[rows], None, 1)
        values = {name: site["value"].movedim(1, 0) for name, site in sites.items()}
        log_q = pair.posterior_log_prob(values, x)
        own.append(log_q[torch.arange(len(rows)), rows])
        mixed.append(log_q.logsumexp(1) - math.log(len(x)))
        prior.append(pair.prior_log_prob(values).squeeze(-1))
    own, mixed, prior = (torch.cat(parts) for parts in (own, mixed, prior))
    return AggregatePosterior(elbo(own - mixed), elbo(mixed - prior))


def _is_normal(law: object) -> bool:
    while isinstance(law, Independent):
        law = law.base_dist
    return isinstance(law, Normal)
