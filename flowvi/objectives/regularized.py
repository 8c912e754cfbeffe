"""Any objective with penalties on the paths of the continuous flows in model and guide."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from flowvi.objectives.base import Objective
from flowvi.transforms.regularizers import PathPenalty, Regularizer, collect_penalties

__all__ = ["Regularized"]


class Regularized(Objective):
    r"""An objective minus penalties on how continuous flows move.

    .. math:: \mathcal{L} - \sum_i \sum_r w_r\, R_r(\text{path of row } i)

    Rows count as their log-densities do in the bound: once for a joint latent, once per item of a
    plate, with the plate's scale if it is subsampled, and averaged over particles. So weights
    mean the same for a guide and for maximum likelihood, with and without minibatches. Every
    :class:`flowvi.transforms.Continuous` in model and guide is penalised, in the solve that it is
    used in anyway. ``report`` holds the mean of every penalty over the rows, without weight, and
    under ``"bound"`` the value without penalties.

    Args:
        objective: what to regularise.
        *regularizers: the penalties with their weights, at least one.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if there is no regulariser; at the first step, if there is no continuous flow
            to train.

    References:
        Finlay, Jacobsen, Nurbekyan and Oberman (2020), How to train your neural ODE,
        arXiv:2002.02798, equation 12; Onken, Wu Fung, Li and Ruthotto (2021), OT-Flow,
        arXiv:2006.00104, equation 10.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from flowvi.flows import cnf
        >>> from flowvi.guides import AutoFlow
        >>> from flowvi.objectives import ELBO
        >>> from flowvi.transforms import JacobianNorm, KineticEnergy
        >>> def model():
        ...     pyro.sample("z", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        >>> objective = Regularized(ELBO(8), KineticEnergy(0.05), JacobianNorm(0.05))
        >>> loss = objective(model, AutoFlow(model, cnf))()
        >>> sorted(objective.report)
        ['JacobianNorm', 'KineticEnergy', 'bound']
    """

    def __init__(self, objective: Objective, *regularizers: Regularizer) -> None:
        if not isinstance(objective, Objective):
            raise TypeError(
                f"`objective` must be a flowvi Objective; got {type(objective).__name__}."
            )
        if not regularizers:
            raise ValueError("`regularizers` must hold at least one Regularizer; got none.")
        for regularizer in regularizers:
            if not isinstance(regularizer, Regularizer):
                raise TypeError(
                    "`regularizers` must hold Regularizer objects; "
                    f"got {type(regularizer).__name__}."
                )
        self.objective = copy.copy(objective)
        self.regularizers = regularizers
        super().__init__(
            objective.num_particles,
            max_plate_nesting=objective.max_plate_nesting,
            vectorize_particles=objective.vectorize_particles,
        )
        # Pyro's constructor has counted the plate of particles once more.
        self.max_plate_nesting = objective.max_plate_nesting

    def __copy__(self) -> Regularized:
        return Regularized(self.objective, *self.regularizers)

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: object, **kwargs: object
    ) -> Tensor:
        if self.objective.max_plate_nesting == float("inf"):
            # Before anything is collected, because the guess runs model and guide.
            with torch.no_grad():
                self.objective._guess_max_plate_nesting(model, guide, args, kwargs)
        with _Sites() as sites, collect_penalties(self.regularizers) as penalties:
            loss = self.objective.differentiable_loss(model, guide, *args, **kwargs)
        if not penalties:
            raise ValueError(
                "`model` or `guide` must hold a continuous flow to train for Regularized; "
                "got none."
            )
        self.report = {**self.objective.report, "bound": -loss.detach()}
        return loss + self._penalty(penalties, sites)

    def log_weight_draws(
        self, model: Callable, guide: Callable, *args: object, **kwargs: object
    ) -> Tensor:
        return self.objective.log_weight_draws(model, guide, *args, **kwargs)

    def state_dict(self) -> dict[str, Tensor]:
        return self.objective.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.objective.load_state_dict(state)

    @property
    def settled_from(self) -> float:
        return self.objective.settled_from

    def _penalty(self, penalties: list[PathPenalty], sites: _Sites) -> Tensor:
        """Weighted sum over flows and regularisers of rows counted as in the bound."""
        means: dict[str, list[Tensor]] = {r.label: [] for r in self.regularizers}
        total: Tensor | float = 0.0
        for flow, solves in _by_flow(penalties).items():
            count = sites.count(flow, self.num_particles)
            for regularizer, rows in zip(
                self.regularizers, zip(*solves, strict=True), strict=True
            ):
                mean = torch.cat([r.reshape(-1) for r in rows]).mean()
                total = total + regularizer.weight * count * mean
                means[regularizer.label].append(mean.detach())
        self.report.update({label: sum(values) for label, values in means.items()})
        return total

    def _surrogate(self, model_trace: Trace, guide_trace: Trace, num_particles: int) -> Tensor:
        return self.objective._surrogate(model_trace, guide_trace, num_particles)

    # Settings are those of the inner objective, also when they are changed.

    @property
    def num_particles(self) -> int:
        return self.objective.num_particles

    @num_particles.setter
    def num_particles(self, value: int) -> None:
        self.objective.num_particles = value

    @property
    def max_plate_nesting(self) -> float:
        return self.objective.max_plate_nesting

    @max_plate_nesting.setter
    def max_plate_nesting(self, value: float) -> None:
        self.objective.max_plate_nesting = value

    @property
    def vectorize_particles(self) -> bool:
        return self.objective.vectorize_particles

    @vectorize_particles.setter
    def vectorize_particles(self, value: bool) -> None:
        self.objective.vectorize_particles = value


class _Sites(Messenger):
    """Remembers which modules the laws of the sites hold, and how often each law counts."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[tuple[set[nn.Module], float | Tensor]] = []

    def _pyro_post_sample(self, msg: dict) -> None:
        if site_is_subsample(msg) or not torch.is_tensor(msg["value"]):
            return
        modules = set(_modules(msg["fn"], set()))
        if modules:
            ones = msg["value"].detach().new_ones(msg["fn"].batch_shape)
            self._seen.append((modules, scale_and_mask(ones, msg["scale"], msg["mask"]).sum()))

    def count(self, flow: nn.Module, num_particles: int) -> float | Tensor:
        """Rows of a flow per particle; 1 for one that is used outside of sites."""
        counts = [number for modules, number in self._seen if flow in modules]
        return sum(counts) / num_particles if counts else 1.0


def _by_flow(penalties: list[PathPenalty]) -> dict[nn.Module, list[tuple[Tensor, ...]]]:
    """Penalties of all solves of each flow."""
    solves: dict[nn.Module, list[tuple[Tensor, ...]]] = {}
    for penalty in penalties:
        solves.setdefault(penalty.flow, []).append(penalty.values)
    return solves


def _modules(value: object, seen: set[int]) -> Iterator[nn.Module]:
    """Modules inside a distribution, at any depth."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield from value.modules()
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _modules(item, seen)
    elif isinstance(value, (Distribution, Transform)):
        for item in vars(value).values():
            yield from _modules(item, seen)
