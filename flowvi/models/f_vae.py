"""f-VAE: a variational autoencoder whose decoder is a conditional flow of images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowvi.models.image_flow import FlowDecoded, ImageFlowLikelihood
from flowvi.models.vae import VAE, append

__all__ = ["FVAE"]


class FVAE(FlowDecoded, VAE):
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

    def prior_latents(self, num_items: int, context: Tensor | None) -> Tensor:
        return self.latent_prior(context).expand((num_items,)).sample()

    def latents_of(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.latent_posterior(x, context).sample()

    def features(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self.decoder(append(z, context))

    @torch.no_grad()
    def reconstruct(
        self, x: Tensor, context: Tensor | None = None, *, temperature: float = 1.0
    ) -> Tensor:
        """Other images with the latent vectors of these, drawn from their posterior."""
        x = self._checked(x, context)
        with self._evaluating():
            features = self.features(self.latents_of(x, context), context)
            return self.likelihood.draw(features, temperature=temperature)
