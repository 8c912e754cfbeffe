"""A tempered target that becomes the model's posterior, against the loss of modes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pyro.poutine import Trace
from torch import Tensor

from flowvi.objectives.annealed import LIKELIHOOD, AnnealedObjective, PartOfSite
from flowvi.objectives.schedules import ScheduleLike, check_schedule, last_change, value_at

__all__ = ["Tempered"]

_PRIOR, _GUIDE = "log_prior", "entropy"


class Tempered(AnnealedObjective):
    r"""ELBO of a target whose likelihood is raised to a power that grows to one.

    .. math:: \mathcal{L}_t = E_q[\beta_t \log p(x \mid z) + \log p(z) - \log q(z)]

    At a small power the posterior is wide and its modes are joined, so the guide covers them all
    before they part; the plain ELBO started in one mode stays there. With ``joint`` the prior is
    raised to the power too, :math:`E_q[\beta_t \log p(x, z) - \log q(z)]`; for models whose prior
    has the modes, or is narrow. Then :math:`p^\beta` must have a finite integral.

    Works with plates and subsampling: each factor multiplies whole sites, beside their scales.
    The plain ELBO is in ``report["elbo"]``. Flows that cannot represent separate modes leave
    bridges between them; splines or a mixture do better than affine couplings.

    Args:
        num_particles: draws per step, at least 1.
        beta: the power: a number, a schedule, or a function of the step (a tensor).
        joint: raise the prior to the power, too.
        path_gradient: gradient through the draws alone; see :class:`flowvi.objectives.STL`.
        clip_factor: see :class:`flowvi.objectives.STL`; needs ``path_gradient``.
        max_plate_nesting: number of nested plates of model and guide; guessed if left out.
        vectorize_particles: run all particles as one batch.

    References:
        Rezende and Mohamed (2015), Variational inference with normalizing flows,
        arXiv:1505.05770, equation 20 (with ``joint``); Mandt, McInerney, Abrol, Ranganath and
        Blei (2016), Variational tempering, arXiv:1411.1810.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from flowvi.objectives import GeometricSchedule
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z**2, 0.1), obs=torch.tensor(1.0))
        >>> objective = Tempered(8, beta=GeometricSchedule(500, start=0.01))
        >>> loss = objective(model, AutoNormal(model))()
        >>> bool(loss < -objective.report["elbo"])
        True
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        beta: ScheduleLike,
        joint: bool = False,
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
        check_schedule("beta", beta)
        self.beta = beta
        self.joint = joint

    @property
    def settled_from(self) -> float:
        return last_change(self.beta)

    def _parts(self, model_trace: Trace, guide_trace: Trace) -> PartOfSite:
        of_model = {id(site) for site in model_trace.nodes.values()}

        def part_of(site: dict) -> str:
            if id(site) not in of_model:
                return _GUIDE
            return LIKELIHOOD if site["is_observed"] else _PRIOR

        return part_of

    def _weigh(
        self,
        totals: Mapping[str, Tensor],
        traces: Sequence[tuple[Trace, Trace]],
        num_particles: int,
    ) -> tuple[dict[str, float | Tensor], float | Tensor]:
        like = next(iter(totals.values())).detach()
        beta = value_at(self.beta, self.step, like)
        self.report["beta"] = torch.ones_like(like) * beta
        return {LIKELIHOOD: beta, _PRIOR: beta if self.joint else 1.0, _GUIDE: 1.0}, 0.0
