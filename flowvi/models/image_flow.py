"""Flows as densities of images with whole levels."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from pyro import sample
from pyro.distributions import Distribution
from torch import Tensor

from flowvi.distributions import Flow
from flowvi.distributions.quantised import Quantised
from flowvi.models.dequantisation import Dequantizer, UniformDequantizer
from flowvi.models.image_pair import ImagePair
from flowvi.models.likelihoods import _LevelLikelihood
from flowvi.transforms import ActNorm, initialize_norms

__all__ = ["FlowDecoded", "ImageFlow", "ImageFlowLikelihood"]


class ImageFlowLikelihood(_LevelLikelihood):
    r"""Law of whole levels whose real image is drawn from a flow.

    .. math:: v \sim p(v \mid features), \quad x = \lfloor v \rfloor, \qquad v \sim q(v \mid x)

    Its call samples the latent site "v" of a Pyro model and gives the law of the levels;
    :meth:`dequantize` samples it in the guide. A decoder's output is the context of the flow.

    Args:
        flow: flow over real images, in the units of levels.
        num_levels: number of levels n, at least 2; images hold 0 to n - 1.
        dequantizer: law of the real image given its levels; uniform if left out.
        context_shape: shape of what a decoder gives, whose size is the flow's ``context_dim``;
            a vector if left out.

    Shape:
        features: ``(*batch, *context_shape)``; x, v: ``(*batch, *event_shape)``.

    Raises:
        ValueError: if shapes do not fit.

    Example:
        >>> from flowvi.flows import glow_image
        >>> likelihood = ImageFlowLikelihood(glow_image((1, 8, 8), 3, hidden_dims=(8, 8)), 17)
        >>> likelihood.draw(torch.zeros(5, 3)).shape
        torch.Size([5, 1, 8, 8])
    """

    def __init__(
        self,
        flow: Flow,
        num_levels: int = 256,
        dequantizer: Dequantizer | None = None,
        *,
        context_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(tuple(flow.transform.event_shape), num_levels)
        self.context_shape = tuple((flow.context_dim,) if context_shape is None else context_shape)
        if math.prod(self.context_shape) != flow.context_dim:
            raise ValueError(
                f"`context_shape` must have size {flow.context_dim} (context_dim of the flow); "
                f"got {self.context_shape}."
            )
        dequantizer = UniformDequantizer(self.event_shape) if dequantizer is None else dequantizer
        if tuple(dequantizer.event_shape) != self.event_shape:
            raise ValueError(
                f"`dequantizer` must have event shape {self.event_shape} (that of the flow); "
                f"got {tuple(dequantizer.event_shape)}."
            )
        self.flow = flow
        self.dequantizer = dequantizer

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.context_shape

    def forward(self, features: Tensor | None = None) -> Distribution:
        """Sample the site "v", and give the law of the levels."""
        return self._levels(sample("v", self.flow(self._flat(features))))

    def dequantize(self, x: Tensor) -> None:
        """Sample the site "v" from its posterior."""
        sample("v", self.dequantizer(x))

    @torch.no_grad()
    def draw(
        self,
        features: Tensor | None = None,
        sample_shape: Sequence[int] = (),
        *,
        temperature: float = 1.0,
    ) -> Tensor:
        """Images from base noise whose standard deviation is the temperature.

        Args:
            features: context of the flow.
            sample_shape: shape of the draws for each row of features.
            temperature: positive; 0.7 gives cleaner images than 1.
        """
        law = self.flow.tempered(temperature)(self._flat(features))
        return self._levels(law.sample(sample_shape)).mean

    @torch.no_grad()
    def noise_of(self, x: Tensor, features: Tensor | None = None) -> Tensor:
        """Base noise of dequantised images, shaped like ``x``."""
        v = self.dequantizer(x).sample()
        return self.flow.transform.inverse_and_ladj(v, self._flat(features))[0]

    @torch.no_grad()
    def image_of(self, noise: Tensor, features: Tensor | None = None) -> Tensor:
        """Images made of base noise."""
        return self._levels(self.flow.transform(noise, self._flat(features))).mean

    @torch.no_grad()
    def initialize(self, x: Tensor, features: Tensor | None = None) -> None:
        """Start the flow's activation normalisations from images; without any, do nothing.

        Args:
            x: images of the training set, at least two.
            features: context of the flow for each.
        """
        transform = self.flow.transform
        if any(isinstance(module, ActNorm) for module in transform.modules()):
            initialize_norms(transform, self.dequantizer(x).sample(), self._flat(features))

    def _levels(self, v: Tensor) -> Distribution:
        return self._law(v).to_event(len(self.event_shape))

    def _law(self, params: Tensor) -> Distribution:
        return Quantised(params, self.num_levels, validate_args=False)

    def _flat(self, features: Tensor | None) -> Tensor | None:
        if features is None or not self.flow.context_dim:
            return None
        return features.flatten(-len(self.context_shape))


class FlowDecoded(ImagePair):
    """Base of pairs whose images come from an :class:`ImageFlowLikelihood`.

    A subclass says what latents there are besides the real image, and what the flow reads.
    """

    likelihood: ImageFlowLikelihood

    @abstractmethod
    def prior_latents(self, num_items: int, context: Tensor | None) -> Tensor | None:
        """Latents drawn from their prior; None without latents."""

    @abstractmethod
    def latents_of(self, x: Tensor, context: Tensor | None) -> Tensor | None:
        """Latents drawn from their posterior given images; None without latents."""

    @abstractmethod
    def features(self, z: Tensor | None, context: Tensor | None) -> Tensor | None:
        """Context of the flow."""

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Start the flow's activation normalisations from images of the training set.

        Args:
            x: at least two images ``(B, C, H, W)``.
            context: what they are conditioned on, ``(B, context_dim)``.
        """
        x = self._checked(x, context)
        with torch.no_grad():
            features = self.features(self.latents_of(x, context), context)
        self.likelihood.initialize(x, features)

    @torch.no_grad()
    def sample(
        self, num_items: int = 1, context: Tensor | None = None, *, temperature: float = 1.0
    ) -> Tensor:
        """Draws of the model; the temperature is the standard deviation of the flow's noise."""
        self._checked(None, context)
        rows = num_items if context is None else len(context)
        with self._evaluating():
            features = self.features(self.prior_latents(rows, context), context)
            shape = (rows,) if features is None else ()
            return self.likelihood.draw(features, shape, temperature=temperature)

    @torch.no_grad()
    def interpolate(self, x: Tensor, num_steps: int = 8, context: Tensor | None = None) -> Tensor:
        """Images on the line between two in the spaces of base noise, latents and contexts.

        Args:
            x: two images ``(2, C, H, W)``.
            num_steps: number of images, the two included; at least 2.
            context: what the two are conditioned on, ``(2, context_dim)``.

        Returns:
            ``(num_steps, C, H, W)``.

        Raises:
            ValueError: if there are not two images, or fewer than two steps.
        """
        if len(x) != 2:
            raise ValueError(f"`x` must hold 2 images; got {len(x)}.")
        x = self._checked(x, context)
        with self._evaluating():
            z = self.latents_of(x, context)
            noise = self.likelihood.noise_of(x, self.features(z, context))
            z, context = (None if t is None else _between(t, num_steps) for t in (z, context))
            features = self.features(z, context)
            return self.likelihood.image_of(_between(noise, num_steps), features)


class ImageFlow(FlowDecoded):
    r"""Density of images with whole levels, by a flow and dequantisation.

    .. math:: \log P(x) \ge E_{q(v \mid x)}[\log p(v) - \log q(v \mid x)]

    The latent site is "v", the real image; the floor of it is the data. Uniform dequantisation
    and a learned one are trained by stock ``SVI`` alike. Begin with :meth:`initialize`.

    Args:
        flow: flow over real images in the units of levels, such as
            :func:`flowvi.flows.glow_image`; conditional if it has a ``context_dim``.
        num_levels: number of levels n of a pixel, at least 2; images hold 0 to n - 1.
        dequantizer: law of the real image given its levels; uniform if left out.
        num_total: number of images in all, where ``x`` is a minibatch.

    Shape:
        x, v: ``(B, C, H, W)``; context: ``(B, context_dim)``.

    Raises:
        ValueError: if shapes do not fit, if images or context have the wrong shape or dtype; with
            Pyro's validation on also if levels are out of range.

    References:
        Theis, van den Oord and Bethge (2016), arXiv:1511.01844, section 3.1; Ho et al. (2019),
        Flow++, arXiv:1902.00275, equation 11.

    Example:
        >>> from flowvi.flows import glow_image
        >>> glow = ImageFlow(glow_image((1, 8, 8), hidden_dims=(8, 8)), num_levels=17)
        >>> glow.sample(3, temperature=0.7).shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(
        self,
        flow: Flow,
        num_levels: int = 256,
        dequantizer: Dequantizer | None = None,
        *,
        num_total: int | None = None,
    ) -> None:
        likelihood = ImageFlowLikelihood(flow, num_levels, dequantizer)
        super().__init__(likelihood, context_dim=flow.context_dim, num_total=num_total)

    def generate(self, context: Tensor | None) -> Distribution:
        return self.likelihood(context)

    def infer(self, x: Tensor, context: Tensor | None) -> None:
        self.likelihood.dequantize(x)

    def prior_latents(self, num_items: int, context: Tensor | None) -> None:
        return None

    def latents_of(self, x: Tensor, context: Tensor | None) -> None:
        return None

    def features(self, z: None, context: Tensor | None) -> Tensor | None:
        return context


def _between(ends: Tensor, num_steps: int) -> Tensor:
    """Points on the line between two, the two included, along a new first dimension."""
    if not isinstance(num_steps, int) or num_steps < 2:
        raise ValueError(f"`num_steps` must be an integer of at least 2; got {num_steps!r}.")
    first, last = ends
    share = torch.linspace(0, 1, num_steps, dtype=ends.dtype, device=ends.device)
    return torch.lerp(first, last, share.reshape(-1, *[1] * first.dim()))
