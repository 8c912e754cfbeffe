"""Free bits: a floor under KL terms, so that latents are not switched off."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from pyro.distributions import Delta, Distribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Independent

from flowvi.objectives._constants import leaf_of
from flowvi.objectives._traces import is_latent
from flowvi.objectives.annealed import PartOfSite

__all__ = ["FreeBits", "num_items", "shortfall"]


@dataclass(frozen=True)
class FreeBits:
    r"""Floor of KL terms, per group of sites or per dimension, averaged over the minibatch.

    .. math:: \sum_g \max(\lambda_g,\ \overline{KL}_g), \qquad
        \overline{KL}_g = \frac{1}{N} \sum_{i=1}^N E_q[\log q(z_{g,i}) - \log p(z_{g,i})]

    per item of the plates around the group, so the floor of the whole term is :math:`N\lambda_g`
    (N summed over the sets of plates, if a group has several); the mean is over particles and the
    items in the minibatch, before the maximum is taken. A term below its floor counts as the
    floor and has no gradient. The mean is estimated by draws and the maximum is convex, so with
    few draws the floor acts a little high.

    Args:
        nats: the floor :math:`\lambda` in nats per item; or a mapping from group to floor, where
            groups that are left out have none.
        per_dimension: a floor for every coordinate of every site of the group by itself; needs
            sites whose laws factorise over coordinates, in model and guide.

    Raises:
        ValueError: if a floor is negative or not finite.

    References:
        Kingma et al. (2016), Improving variational inference with inverse autoregressive flow,
        arXiv:1606.04934, appendix C.8, equation 15.

    Example:
        >>> FreeBits(0.25).floor("z")
        0.25
    """

    nats: float | Mapping[str, float]
    per_dimension: bool = False

    def __post_init__(self) -> None:
        floors = self.nats.values() if isinstance(self.nats, Mapping) else [self.nats]
        for nats in floors:
            if not isinstance(nats, Real) or not math.isfinite(nats) or nats < 0:
                raise ValueError(f"`nats` must be a finite number of at least 0; got {nats!r}.")

    def floor(self, group: str) -> float:
        """Nats per item below which the KL term of a group does not count."""
        return self.nats.get(group, 0.0) if isinstance(self.nats, Mapping) else self.nats


def num_items(
    model_trace: Trace, part_of: PartOfSite, group: str, num_particles: int, like: Tensor
) -> Tensor:
    """Number of items of a group in the whole data set; masked ones do not count.

    Sites in the same plates have common items; those of other plates are counted besides.

    Args:
        model_trace: trace of one run.
        part_of: group of a site.
        group: the group.
        num_particles: particles in the run.
        like: tensor of the wanted dtype and device.

    Raises:
        NotImplementedError: if the group has no site of the model.
    """
    sites = [s for s in model_trace.nodes.values() if is_latent(s) and part_of(s) == group]
    if not sites:
        raise NotImplementedError(
            f"Free bits need the whole KL term of a group; `{group}` has no site of the model. "
            "Give `group_of` that puts the auxiliary site into the group of the sites it draws."
        )
    firsts = {frozenset(f.name for f in s["cond_indep_stack"]): s for s in reversed(sites)}
    total = torch.zeros_like(like)
    for site in firsts.values():
        ones = like.new_ones(site["fn"].batch_shape)
        total = total + scale_and_mask(ones, site["scale"], site["mask"]).sum() / num_particles
    return total


def shortfall(
    traces: Sequence[tuple[Trace, Trace]],
    part_of: PartOfSite,
    group: str,
    floor: Tensor,
    num_particles: int,
) -> Tensor:
    r"""Sum over coordinates of :math:`\min(KL_j - floor, 0)`, whose gradient undoes theirs.

    Args:
        traces: model and guide trace of each run.
        part_of: group of a site, for the sites of the first run.
        group: the group.
        floor: floor of a coordinate, for all items together, in nats.
        num_particles: particles in each run.
    """
    chosen = (s for s in traces[0][0].nodes.values() if is_latent(s) and part_of(s) == group)
    total = torch.zeros_like(floor)
    for name in [site["name"] for site in chosen]:
        runs = [_kl_by_coordinate(m.nodes[name], g.nodes[name], num_particles) for m, g in traces]
        kl = sum(runs) / len(runs)
        total = total + torch.where(kl < floor, kl - floor, torch.zeros_like(kl)).sum()
    return total


def _kl_by_coordinate(model_site: dict, guide_site: dict, num_particles: int) -> Tensor:
    value, event_dim = model_site["value"], model_site["fn"].event_dim
    log_q = _coordinates(guide_site, "guide").log_prob(value)
    ratio = log_q - _coordinates(model_site, "model").log_prob(value)
    batch = range(ratio.dim() - event_dim)
    scale, mask = (_with_event_dims(model_site[k], event_dim) for k in ("scale", "mask"))
    ratio = scale_and_mask(ratio, scale, mask)
    return (ratio.sum(list(batch)) if len(batch) else ratio) / num_particles


def _with_event_dims(value: object, event_dim: int) -> object:
    return value[(..., *(None,) * event_dim)] if torch.is_tensor(value) else value


def _coordinates(site: dict, owner: str) -> Distribution:
    """Law of the single coordinates of a site."""
    fn = site["fn"]
    while isinstance(fn, Independent):
        fn = fn.base_dist
    good = fn.event_dim == 0 and not isinstance(fn, Delta) and leaf_of(fn) is fn
    if not good or (owner == "guide" and not fn.has_rsample):
        raise NotImplementedError(
            f"Free bits per dimension need a reparameterised law that factorises over "
            f"coordinates; {owner} site `{site['name']}` has {type(leaf_of(fn)).__name__}. "
            "Use FreeBits with per_dimension=False."
        )
    return fn
