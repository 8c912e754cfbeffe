"""AutoMixtureFlow: a mixture of flows over the joint latent, for separated modes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.score_parts import ScoreParts
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor

from flowvi.distributions import Flow, MixtureFlow, MixtureFlowDistribution
from flowvi.flows import realnvp
from flowvi.guides._recipes import check_whitening, make_flow
from flowvi.guides.auto import AutoFlow
from flowvi.transforms import FlowTransform, Whitening

__all__ = ["AutoMixtureFlow"]


class ModeLike(Protocol):
    """A mode in unconstrained coordinates, such as :class:`flowvi.infer.Mode`."""

    loc: Tensor
    scale_tril: Tensor
    weight: float


class _AuxiliaryMixture(MixtureFlowDistribution):
    """A mixture at an auxiliary site, with the gradient of its weights right in stock Pyro.

    ``Trace_ELBO`` multiplies a score function with the log-weight of the sites of the model, so
    an auxiliary site's own log-density is left out and the weights would be trained without their
    entropy. It is put back through the entropy term. Objectives that count all sites of the guide
    take ``score_parts_in_full_reward`` instead.
    """

    score_parts_in_full_reward = MixtureFlowDistribution.score_parts

    def score_parts(self, x: Tensor) -> ScoreParts:
        parts = super().score_parts(x)
        missing = parts.log_prob.detach() * parts.score_function
        return parts._replace(entropy_term=parts.entropy_term + missing)

    def _replace(self, **changes: object) -> MixtureFlowDistribution:
        new = super()._replace(**changes)
        # Path gradients are taken by flowvi's own objectives only, which count every site.
        if new._path:
            return new
        return _AuxiliaryMixture(
            new.components,
            new.logits,
            batch_shape=new.batch_shape,
            stratified=new._stratified,
            validate_args=new._validate_args,
        )


class AutoMixtureFlow(AutoFlow):
    r"""Automatic guide for separated modes: a mixture of flows, each in its own coordinates.

    .. math:: q(z) = \sum_k w_k\, q_k(z), \qquad z = m_k + L_k\,T_k(x)

    Give it the modes: started elsewhere, components tend to share one mode. The weights need a
    score-function gradient, which stock ``Trace_ELBO`` computes; it works best with several
    particles. A draw costs a pass of every component, a score an inverse pass of every component.
    It has no single transform, so it cannot be used in ``NeuTraReparam``.

    Args:
        model: a Pyro model with continuous latent sites.
        num_components: number of flows, at least 1; ignored if ``modes`` are given.
        recipe: function of the latent dimension that makes a flow.
        modes: objects with ``loc``, ``scale_tril`` and ``weight``; one component starts at each.
        init_loc_fn: strategy for the initial point, as for Pyro's automatic guides.
        init_scale: initial standard deviation of each unconstrained coordinate.
        create_plates: function of the model's arguments returning the plates to use.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> guide = AutoMixtureFlow(model, num_components=3).initialize()
        >>> guide.weights
        tensor([0.3333, 0.3333, 0.3333])
    """

    def __init__(
        self,
        model: Callable,
        num_components: int = 2,
        recipe: Callable[[int], Flow] = realnvp,
        *,
        modes: Sequence[ModeLike] | None = None,
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
        if isinstance(recipe, Flow):
            raise TypeError("`recipe` must be a function that makes a Flow; got one Flow for all.")
        if modes is not None:
            num_components = len(modes)
        if not isinstance(num_components, int) or num_components < 1:
            raise ValueError(
                f"`num_components` must be an integer of at least 1; got {num_components!r}."
            )
        self.num_components = num_components
        self._modes = modes

    def _build(self, initial: dict[str, Tensor]) -> None:
        loc = torch.cat([value.reshape(-1) for value in initial.values()])
        self.latent_dim = len(loc)
        flows = []
        for _ in range(self.num_components):
            flow = make_flow(self._recipe[0], self.latent_dim)
            flows.append(flow.then(Whitening(self.latent_dim)))
        self.flow = MixtureFlow(flows).to(device=loc.device, dtype=loc.dtype)
        self._whiten(loc, self._init_scale * torch.diag(torch.ones_like(loc)))
        if self._modes is not None:
            self.whiten_modes(self._modes)
        self._recipe = self._modes = None

    @property
    def weights(self) -> Tensor:
        """Probabilities of the components, ``(num_components,)``."""
        self._require_built()
        return self.flow.logits.detach().softmax(-1)

    @property
    def whitenings(self) -> list[Whitening]:
        """The whitening of each component."""
        self._require_built()
        return [flow.transform.parts[-1] for flow in self.flow.flows]

    def _whiten(self, loc: Tensor, scale_tril: Tensor) -> None:
        # One whitening for all components; all but the first are moved at random.
        for k, whitening in enumerate(self.whitenings):
            shift = torch.randn_like(loc) if k else torch.zeros_like(loc)
            whitening.set_(loc + scale_tril @ shift, scale_tril)

    def whiten_modes(self, modes: Sequence[ModeLike]) -> None:
        """Start one component at each mode, with the mode's weight.

        With fewer modes than components, modes are shared. With more, the lightest are left out
        and a warning says so.

        Args:
            modes: objects with ``loc`` ``(latent_dim,)``, ``scale_tril`` ``(latent_dim,
                latent_dim)`` and ``weight``, a positive number.

        Raises:
            ValueError: if there is no mode, or one has a wrong shape or weight.
        """
        self._require_built()
        modes = sorted(modes, key=lambda mode: -float(mode.weight))
        if not modes:
            raise ValueError("`modes` must hold at least one mode; got none.")
        for mode in modes:
            check_whitening(mode.loc, mode.scale_tril, self.latent_dim)
            if not 0 < float(mode.weight) < float("inf"):
                raise ValueError(f"`weight` of a mode must be positive; got {mode.weight!r}.")
        if len(modes) > self.num_components:
            warnings.warn(
                f"AutoMixtureFlow has {self.num_components} components for {len(modes)} modes; "
                "the lightest are left out. Raise num_components to keep them.",
                stacklevel=2,
            )
        kept = modes[: self.num_components]
        used = [kept[k % len(kept)] for k in range(self.num_components)]
        shares = [float(m.weight) / sum(other is m for other in used) for m in used]
        for whitening, mode in zip(self.whitenings, used, strict=True):
            whitening.set_(mode.loc, mode.scale_tril)
        with torch.no_grad():
            self.flow.logits.copy_(self.flow.logits.new_tensor(shares).log())

    def get_base_dist(self) -> TorchDistribution:
        """Not available: a mixture is not one map of one base."""
        raise NotImplementedError(
            "AutoMixtureFlow has no single base and transform. Use AutoFlow for NeuTraReparam."
        )

    def get_transform(self, *args: Any, **kwargs: Any) -> FlowTransform:
        """Not available: a mixture is not one map of one base."""
        return self.get_base_dist()

    def get_posterior(self, *args: Any, **kwargs: Any) -> MixtureFlowDistribution:
        """Law of the joint unconstrained latent."""
        self._require_built()
        law = self.flow()
        return _AuxiliaryMixture(law.components, law.logits)
