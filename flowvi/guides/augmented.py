"""AutoAugmentedFlow: a joint flow with extra dimensions that let paths pass each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro.distributions import Delta, TorchDistribution
from pyro.infer.autoguide.initialization import init_to_median
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

from flowvi.distributions import AugmentedFlowDistribution, Flow, FlowDistribution
from flowvi.distributions.augmented import check_auxiliary, gaussian_auxiliary
from flowvi.flows import realnvp
from flowvi.guides._recipes import make_flow
from flowvi.guides._replay import Supply
from flowvi.guides.auto import AutoFlow
from flowvi.transforms import FlowTransform, Whitening, compose

__all__ = ["AutoAugmentedFlow"]


class AutoAugmentedFlow(AutoFlow):
    r"""Automatic guide: a flow over the joint latent and extra dimensions.

    .. math:: \log p(x) \ge E_{q(z, a)}[\log p(x, z) + \log r(a \mid z) - \log q(z, a)]

    The bound is that of the guide's law of ``z`` alone, minus the mean KL divergence between
    :math:`q(a \mid z)` and the auxiliary law ``r``, which is trained along. Importance weights
    stay unbiased for the evidence. The density of ``z`` alone is known only by the bound that
    :meth:`log_q` gives, and there is no transform for ``NeuTraReparam``.

    Args:
        model: a Pyro model with continuous latent sites.
        recipe: function of the number of dimensions, the extra ones included, that makes a flow;
            or a flow.
        num_extra: number of extra dimensions, at least 1.
        auxiliary: flow of the extra dimensions given the whitened latent, or a function of both
            numbers of dimensions that makes one; a Gaussian with a network if left out.
        init_loc_fn: strategy for the initial point, as for Pyro's automatic guides.
        init_scale: initial standard deviation of each unconstrained coordinate.
        create_plates: function of the model's arguments returning the plates to use.

    References:
        Dupont, Doucet and Teh (2019), Augmented neural ODEs, arXiv:1904.01681; Agakov and Barber
        (2004), An auxiliary variational method, equation 5; Ranganath, Tran and Blei (2016),
        Hierarchical variational models, arXiv:1511.02386, equation 6.

    Example:
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("scale", dist.Gamma(2.0, 1.0))
        >>> guide = AutoAugmentedFlow(model, num_extra=2).initialize()
        >>> guide()["scale"].shape
        torch.Size([])
    """

    num_score_draws = 64

    def __init__(
        self,
        model: Callable,
        recipe: Callable[[int], Flow] | Flow = realnvp,
        *,
        num_extra: int = 1,
        auxiliary: Callable[[int, int], Flow] | Flow | None = None,
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
        create_plates: Callable | None = None,
    ) -> None:
        super().__init__(
            model,
            recipe,
            init_loc_fn=init_loc_fn,
            init_scale=init_scale,
            create_plates=create_plates,
        )
        if not isinstance(num_extra, int) or num_extra < 1:
            raise ValueError(f"`num_extra` must be an integer of at least 1; got {num_extra!r}.")
        self.num_extra = num_extra
        self._recipe = (recipe, gaussian_auxiliary if auxiliary is None else auxiliary)

    def _build(self, initial: dict[str, Tensor]) -> None:
        loc = torch.cat([value.reshape(-1) for value in initial.values()])
        self.latent_dim = len(loc)
        recipe, auxiliary = self._recipe
        flow = make_flow(recipe, self.latent_dim + self.num_extra)
        if not isinstance(auxiliary, Flow):
            auxiliary = auxiliary(self.num_extra, self.latent_dim)
        check_auxiliary(auxiliary, self.num_extra, self.latent_dim)
        self.flow = flow.to(device=loc.device, dtype=loc.dtype)
        self.auxiliary = auxiliary.to(device=loc.device, dtype=loc.dtype)
        self.whitening = Whitening(self.latent_dim + self.num_extra).to(loc)
        self._whiten(loc, self._init_scale * torch.diag(torch.ones_like(loc)))
        self._recipe = None

    def _whiten(self, loc: Tensor, scale_tril: Tensor) -> None:
        # The extra dimensions keep theirs.
        extra = torch.ones_like(loc[:1]).expand(self.num_extra)
        self.whitening.set_(
            torch.cat([loc, 0 * extra]), torch.block_diag(scale_tril, torch.diag(extra))
        )

    def get_base_dist(self) -> TorchDistribution:
        """Not available: the latent alone is not one map of one base."""
        raise NotImplementedError(
            "AutoAugmentedFlow has no base and transform of the latent alone. Use AutoFlow for "
            "NeuTraReparam."
        )

    def get_transform(self, *args: Any, **kwargs: Any) -> FlowTransform:
        """Not available: the latent alone is not one map of one base."""
        return self.get_base_dist()

    def get_posterior(self, *args: Any, **kwargs: Any) -> AugmentedFlowDistribution:
        """Law of the joint unconstrained latent, scored by a bound."""
        self._require_built()
        flow = self.flow
        joint = FlowDistribution(flow.base(), compose(flow.transform, self.whitening))
        return AugmentedFlowDistribution(
            joint,
            self.auxiliary,
            num_draws=self.num_score_draws,
            common=True,
            given=self._whitened,
        )

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draw latent and extra dimensions at one auxiliary site, weighed by ``r``."""
        posterior = self.get_posterior(*args, **kwargs)
        self._complete_supply(posterior)
        both = pyro.sample(self.latent_name, posterior.joint, infer={"is_auxiliary": True})
        latent, extra = both.split([self.latent_dim, self.num_extra], -1)
        log_r = posterior.log_auxiliary(latent, extra)
        weight = Delta(torch.zeros_like(log_r), -log_r, validate_args=False)
        pyro.sample(f"{self.latent_name}_auxiliary", weight, infer={"is_auxiliary": True})
        return latent

    def log_q(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Lower bound on the guide's log-density (nats) at values of all its latent sites.

        The mean of ``q(z, a) / r(a | z)`` over ``num_score_draws`` draws of the auxiliary law, the
        same in all calls; it is exact in the limit of many.

        Args:
            values: site name to value ``(*batch, *site shape)``; ``batch`` is common to all.
            *args: the model's arguments, which this guide does not depend on.
            **kwargs: the model's keyword arguments, likewise.

        Returns:
            Tensor ``(*batch,)``; ``-inf`` outside the support.
        """
        return super().log_q(values, *args, **kwargs)

    def _whitened(self, latent: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(latent, (0, self.num_extra))
        return self.whitening.inverse_and_ladj(padded)[0][..., : self.latent_dim]

    def _complete_supply(self, posterior: AugmentedFlowDistribution) -> None:
        """Draw extra dimensions for a latent that comes from outside."""
        for frame in _PYRO_STACK:
            if isinstance(frame, Supply) and self.latent_name in frame.values:
                latent = frame.values[self.latent_name]
                both = torch.cat([latent, posterior.draw_extra(latent)], -1)
                frame.values = {**frame.values, self.latent_name: both}
