"""f-VAE: a variational autoencoder whose decoder is a conditional flow of images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowvi.models.image_flow import ImageFlowLikelihood, between, check_two
from flowvi.models.vae import VAE, append

__all__ = ["FVAE"]


class FVAE(VAE):
    r"""Variational autoencoder whose decoder is a conditional flow, so that images are sharp.

    .. math:: z \sim p(z), \quad v \sim p(v \mid f(z)), \quad x = \lfloor v \rfloor, \qquad
        z \sim q(z \mid x), \quad v \sim q(v \mid x)

    The flow, a Glow for instance, gives pixels the dependence that a plain likelihood lacks: a
    small latent vector then tells what the image shows, and the flow draws it. Latent sites are
    "z" and "v", the real image. With a flow that ignores its context it is the flow alone.

    Args:
        encoder: maps images, pixels from 0 to 1, to features; it says its ``output_dim``.
        decoder: maps latents to the context of the flow.
        likelihood: the conditional flow, its levels and its dequantisation.
        posterior: its call on features gives the law of the latent vector.
        prior: its call gives the law of the latent vector; a standard normal if left out.
        context_dim: length of the context, which the encoder's features and the latents get
            appended; 0 for none.
        num_total: number of images in all, where ``x`` is a minibatch.

    Shape:
        x, v: ``(B, C, H, W)``; context: ``(B, context_dim)``; z: ``(B, latent_dim)``.

    Raises:
        TypeError: if ``likelihood`` is not a :class:`ImageFlowLikelihood`.
        ValueError: if sizes do not fit, if images or context have the wrong shape or dtype; with
            Pyro's validation on also if levels are out of range.

    References:
        Su and Wu (2018), f-VAEs: improve VAEs with conditional flows, arXiv:1809.05861.

    Example:
        >>> from flowvi.flows import glow_image
        >>> from flowvi.models import DiagonalPosterior, MLPDecoder, MLPEncoder
        >>> flow = glow_image((1, 8, 8), 128, hidden_dims=(8,), context_shape=(2, 8, 8))
        >>> likelihood = ImageFlowLikelihood(flow, num_levels=17, context_shape=(2, 8, 8))
        >>> encoder = MLPEncoder((1, 8, 8), (16,))
        >>> decoder = MLPDecoder(2, (16,), likelihood.output_shape)
        >>> f_vae = FVAE(encoder, decoder, likelihood, DiagonalPosterior(16, 2))
        >>> f_vae.sample(3, temperature=0.7).shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: ImageFlowLikelihood,
        posterior: nn.Module,
        prior: nn.Module | None = None,
        *,
        context_dim: int = 0,
        num_total: int | None = None,
    ) -> None:
        if not isinstance(likelihood, ImageFlowLikelihood):
            raise TypeError(
                f"`likelihood` must be an ImageFlowLikelihood; got {type(likelihood).__name__}. "
                "Other likelihoods are for VAE."
            )
        super().__init__(
            encoder,
            decoder,
            likelihood,
            posterior,
            prior,
            context_dim=context_dim,
            num_total=num_total,
        )

    def infer(self, x: Tensor, context: Tensor | None) -> None:
        super().infer(x, context)
        self.likelihood.dequantize(x)

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Start the flow's activation normalisations from images of the training set.

        Args:
            x: at least two images ``(B, C, H, W)``.
            context: what they are conditioned on, ``(B, context_dim)``.
        """
        x = self._checked(x, context)
        z = self.latent_posterior(x, context).sample()
        self.likelihood.initialize(x, self._features(z, context))

    @torch.no_grad()
    def sample(
        self, num_items: int = 1, context: Tensor | None = None, *, temperature: float = 1.0
    ) -> Tensor:
        """Draws of the model; the temperature is the standard deviation of the flow's noise."""
        self._checked(None, context)
        rows = num_items if context is None else len(context)
        with self._evaluating():
            z = self.latent_prior(context).expand((rows,)).sample()
            return self.likelihood.draw(self._features(z, context), temperature=temperature)

    @torch.no_grad()
    def reconstruct(
        self, x: Tensor, context: Tensor | None = None, *, temperature: float = 1.0
    ) -> Tensor:
        """Other images with the latent vectors of these, drawn from their posterior."""
        x = self._checked(x, context)
        with self._evaluating():
            z = self.latent_posterior(x, context).sample()
            return self.likelihood.draw(self._features(z, context), temperature=temperature)

    @torch.no_grad()
    def interpolate(self, x: Tensor, num_steps: int = 8, context: Tensor | None = None) -> Tensor:
        """Images on the line between two in the spaces of latents and of base noise.

        Args:
            x: two images ``(2, C, H, W)``.
            num_steps: number of images, the two included; at least 2.
            context: what the two are conditioned on, ``(2, context_dim)``.

        Returns:
            ``(num_steps, C, H, W)``.
        """
        x = self._checked(check_two(x), context)
        with self._evaluating():
            z = self.latent_posterior(x, context).sample()
            noise = self.likelihood.noise_of(x, self._features(z, context))
            context = None if context is None else between(context, num_steps)
            features = self._features(between(z, num_steps), context)
            return self.likelihood.image_of(between(noise, num_steps), features)

    def _features(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self.decoder(append(z, context))
