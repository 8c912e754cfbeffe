"""Variational autoencoders with any posterior family and any prior."""

from __future__ import annotations

import torch
from pyro import sample
from pyro.distributions import Categorical, Distribution, MixtureSameFamily
from torch import Tensor, nn

from flowvi.distributions import StandardNormal
from flowvi.models.image_pair import ImagePair
from flowvi.models.likelihoods import Likelihood

__all__ = ["VAE", "VampPrior"]


class VAE(ImagePair):
    r"""Variational autoencoder: one latent vector behind each image.

    .. math:: z \sim p(z), \quad x \sim p(x \mid f(z)), \qquad q(z \mid x) = q(z \mid e(x))

    The latent site is "z". With ``context_dim`` (one-hot labels, for instance) the context is
    appended to the latent vector and to the features, and reaches a prior that takes one.

    Args:
        encoder: maps images, pixels from 0 to 1, to features; it says its ``output_dim``.
        decoder: maps latents to what the likelihood takes.
        likelihood: law of an image given that.
        posterior: its call on features gives the law of the latent vector;
            :class:`DiagonalPosterior`, or what :func:`iaf_posterior` and its like make.
        prior: its call gives the law of the latent vector: a flow, :class:`VampPrior`, or, if
            left out, a standard normal.
        context_dim: length of the context; 0 for none.
        num_total: number of images in all, where ``x`` is a minibatch.

    Shape:
        x: ``(B, *event_shape)``; context: ``(B, context_dim)``; z: ``(B, latent_dim)``.

    Raises:
        ValueError: if sizes do not fit, if images or context have the wrong shape or dtype; with
            Pyro's validation on also if pixels are out of range.

    References:
        Kingma and Welling (2014), Auto-encoding variational Bayes, arXiv:1312.6114; Rezende,
        Mohamed and Wierstra (2014), Stochastic backpropagation, arXiv:1401.4082.

    Example:
        >>> from flowvi.models import BernoulliLikelihood, DiagonalPosterior
        >>> from flowvi.models import MLPDecoder, MLPEncoder
        >>> likelihood = BernoulliLikelihood((1, 8, 8))
        >>> encoder = MLPEncoder((1, 8, 8), (16,))
        >>> decoder = MLPDecoder(2, (16,), likelihood.output_shape)
        >>> vae = VAE(encoder, decoder, likelihood, DiagonalPosterior(16, 2))
        >>> vae.terms(torch.zeros(5, 1, 8, 8)).elbo.shape
        torch.Size([5])
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: Likelihood,
        posterior: nn.Module,
        prior: nn.Module | None = None,
        *,
        context_dim: int = 0,
        num_total: int | None = None,
    ) -> None:
        super().__init__(likelihood, context_dim=context_dim, num_total=num_total)
        latent_dim = posterior.latent_dim
        _check_fit("posterior", "feature_dim", posterior, encoder.output_dim + context_dim)
        _check_fit("decoder", "input_dim", decoder, latent_dim + context_dim)
        _check_fit("decoder", "output_shape", decoder, likelihood.output_shape)
        self.encoder = encoder
        self.decoder = decoder
        self.posterior = posterior
        self.prior = StandardNormal(latent_dim) if prior is None else prior

    def generate(self, context: Tensor | None) -> Distribution:
        z = sample("z", self.latent_prior(context))
        return self.likelihood(self.decoder(append(z, context)))

    def infer(self, x: Tensor, context: Tensor | None) -> None:
        sample("z", self.latent_posterior(x, context))

    def latent_prior(self, context: Tensor | None = None) -> Distribution:
        """Law of the latent vector before an image is seen."""
        return self.prior(context) if getattr(self.prior, "context_dim", 0) else self.prior()

    def latent_posterior(self, x: Tensor, context: Tensor | None = None) -> Distribution:
        """Law of the latent vector of each image, batch ``(B,)``."""
        return self.posterior(append(self.encoder(self.inputs(x)), context))


class VampPrior(nn.Module):
    r"""Mixture of the posteriors of learned pseudo-inputs.

    .. math:: p(z) = \frac1K \sum_k q(z \mid u_k)

    Give it the very encoder and posterior of the autoencoder; it shares their parameters.

    Args:
        encoder: the encoder.
        posterior: the posterior, which must be able to score any value.
        inputs: the :math:`u_k` to begin with, pixels from 0 to 1, ``(K, *event_shape)``: images
            of the training set, for instance.

    References:
        Tomczak and Welling (2018), VAE with a VampPrior, arXiv:1705.07120.

    Example:
        >>> from flowvi.models import DiagonalPosterior, MLPEncoder
        >>> encoder, posterior = MLPEncoder((4,), (8,)), DiagonalPosterior(8, 2)
        >>> VampPrior(encoder, posterior, torch.rand(10, 4))().sample().shape
        torch.Size([2])
    """

    def __init__(self, encoder: nn.Module, posterior: nn.Module, inputs: Tensor) -> None:
        super().__init__()
        if inputs.dim() < 2 or not inputs.is_floating_point():
            raise ValueError(
                "`inputs` must be images (K, *event_shape) of a floating dtype; got shape "
                f"{tuple(inputs.shape)}, {inputs.dtype}."
            )
        self.encoder = encoder
        self.posterior = posterior
        self.raw = nn.Parameter(inputs.detach().clamp(0.01, 0.99).logit())

    @property
    def inputs(self) -> Tensor:
        """The pseudo-inputs, pixels from 0 to 1."""
        return self.raw.sigmoid()

    def forward(self) -> Distribution:
        laws = self.posterior(self.encoder(self.inputs))
        weights = Categorical(logits=self.raw.new_zeros(len(self.raw)), validate_args=False)
        return MixtureSameFamily(weights, laws, validate_args=False)


def append(z: Tensor, context: Tensor | None) -> Tensor:
    """Rows with the context behind them."""
    if context is None:
        return z
    return torch.cat([z, context.to(z.dtype).expand(*z.shape[:-1], -1)], -1)


def _check_fit(name: str, attribute: str, module: nn.Module, wanted: object) -> None:
    got = getattr(module, attribute, wanted)
    if got != wanted:
        raise ValueError(f"`{name}` must have {attribute} {wanted} to fit the others; got {got}.")
