"""The ELBO with weighted KL terms: beta, schedules by group of sites, free bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from pyro.poutine import Trace
from torch import Tensor

from flowvi.objectives._free_bits import FreeBits, num_items, shortfall
from flowvi.objectives._groups import groups_of_sites
from flowvi.objectives.annealed import LIKELIHOOD, AnnealedObjective, PartOfSite
from flowvi.objectives.schedules import ScheduleLike, check_schedule, last_change, value_at

__all__ = ["BetaELBO"]

_ALL = "latent"


class BetaELBO(AnnealedObjective):
    r"""ELBO whose KL terms are weighted, by group of latent sites and by step.

    .. math:: \mathcal{L}_t = E_q[\log p(x \mid z)]
        - \sum_g \beta_{g,t}\, E_q[\log q(z_g \mid \cdot) - \log p(z_g \mid \cdot)]

    At :math:`\beta = 1` it is the ELBO; below, it is no bound. The gradient is unbiased: discrete
    sites are rewarded by the weighted terms. ``report`` has the plain ELBO under ``"elbo"``, the
    reconstruction under ``"log_likelihood"``, and ``"kl/<group>"`` and ``"beta/<group>"``.

    A guide that draws sites of several groups at once, such as a joint flow, has no entropy by
    group and is refused; with one ``beta`` for all sites every guide will do.

    Args:
        num_particles: draws per step, at least 1.
        beta: the weight: a number of at least 0, a schedule, or a function of the step (a
            tensor). One for all latent sites, or a mapping from group to weight, where groups
            that are left out have weight 1.
        group_of: function of a site's name that gives its group, or ``None`` for weight 1; if
            left out, a site is its own group under a mapping, and all are one group otherwise.
        free_bits: floor of the KL terms; see :class:`FreeBits`.
        path_gradient: gradient through the draws alone; see :class:`flowvi.objectives.STL`.
        clip_factor: see :class:`flowvi.objectives.STL`; needs ``path_gradient``.
        max_plate_nesting: number of nested plates of model and guide; guessed if left out.
        vectorize_particles: run all particles as one batch.

    Raises:
        ValueError: if a weight is negative, or at the first step if a group has no site.
        NotImplementedError: at the first step, if a guide site belongs to several groups.

    References:
        Higgins et al. (2017), beta-VAE, ICLR, equation 4; Bowman et al. (2016), Generating
        sentences from a continuous space, arXiv:1511.06349, section 3.1; Sonderby et al. (2016),
        Ladder variational autoencoders, arXiv:1602.02282.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from flowvi.objectives import LinearSchedule
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))
        >>> objective = BetaELBO(8, beta={"z": LinearSchedule(1000)})
        >>> loss = objective(model, AutoNormal(model))()
        >>> sorted(objective.report)
        ['beta/z', 'elbo', 'kl/z', 'log_likelihood']
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        beta: ScheduleLike | Mapping[str, ScheduleLike] = 1.0,
        group_of: Callable[[str], str | None] | None = None,
        free_bits: FreeBits | None = None,
        path_gradient: bool = False,
        clip_factor: float | None = None,
        max_plate_nesting: float = float("inf"),
        vectorize_particles: bool = True,
    ) -> None:
        super().__init__(
            num_particles,
            path_gradient=path_gradient,
            clip_factor=clip_factor,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
        )
        for group, schedule in _as_mapping(beta).items():
            check_schedule("beta" if group == _ALL else f"beta[{group!r}]", schedule)
        if group_of is not None and not callable(group_of):
            raise TypeError(f"`group_of` must be callable; got {type(group_of).__name__}.")
        if free_bits is not None and not isinstance(free_bits, FreeBits):
            raise TypeError(f"`free_bits` must be a FreeBits; got {type(free_bits).__name__}.")
        if free_bits is not None and free_bits.per_dimension and path_gradient:
            raise NotImplementedError(
                "Free bits per dimension have no path gradient. Use path_gradient=False, or a "
                "floor per group."
            )
        self.beta = beta
        self.group_of = group_of
        self.free_bits = free_bits

    @property
    def settled_from(self) -> float:
        return max(map(last_change, _as_mapping(self.beta).values()), default=0)

    def _group(self, name: str) -> str | None:
        if self.group_of is not None:
            return self.group_of(name)
        floors = None if self.free_bits is None else self.free_bits.nats
        by_site = isinstance(self.beta, Mapping) or isinstance(floors, Mapping)
        return name if by_site else _ALL

    def _named(self) -> set[str]:
        floors = None if self.free_bits is None else self.free_bits.nats
        return {g for given in (self.beta, floors) if isinstance(given, Mapping) for g in given}

    def _parts(self, model_trace: Trace, guide_trace: Trace) -> PartOfSite:
        groups = groups_of_sites(model_trace, guide_trace, self._group, self._named())
        return lambda site: groups[id(site)]

    def _weigh(
        self,
        totals: Mapping[str, Tensor],
        traces: Sequence[tuple[Trace, Trace]],
        num_particles: int,
    ) -> tuple[dict[str, float | Tensor], float | Tensor]:
        like = next(iter(totals.values())).detach()
        factors: dict[str, float | Tensor] = {LIKELIHOOD: 1.0}
        extra = 0.0
        if LIKELIHOOD in totals:
            self.report[LIKELIHOOD] = totals[LIKELIHOOD].detach()
        for group in [part for part in totals if part != LIKELIHOOD]:
            schedule = self.beta.get(group, 1.0) if isinstance(self.beta, Mapping) else self.beta
            beta = value_at(schedule, self.step, like)
            self.report[f"beta/{group}"] = torch.ones_like(like) * beta
            self.report[f"kl/{group}"] = -totals[group].detach()
            gate, more = self._floor(group, totals[group], traces, num_particles)
            factors[group] = beta * gate
            extra = extra + beta * more
        return factors, extra

    def _floor(
        self,
        group: str,
        total: Tensor,
        traces: Sequence[tuple[Trace, Trace]],
        num_particles: int,
    ) -> tuple[float | Tensor, float | Tensor]:
        """Factor of a group's term, and what to add in its place, so that its floor holds."""
        nats = 0.0 if self.free_bits is None else self.free_bits.floor(group)
        if nats == 0:
            return 1.0, 0.0
        part_of = self._parts(*traces[0])
        like = total.detach()
        floor = nats * num_items(traces[0][0], part_of, group, num_particles, like)
        if self.free_bits.per_dimension:
            return 1.0, shortfall(traces, part_of, group, floor, num_particles)
        gate = (-like > floor).to(like)
        return gate, (gate - 1) * floor


def _as_mapping(beta: ScheduleLike | Mapping[str, ScheduleLike]) -> Mapping[str, ScheduleLike]:
    return beta if isinstance(beta, Mapping) else {_ALL: beta}
