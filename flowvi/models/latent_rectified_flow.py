"""Autoencoder whose latent vector is the end of a rectified flow, trained by one bound."""

from __future__ import annotations

from dataclasses import dataclass

import pyro
import torch
from pyro.distributions import Delta, Distribution
from torch import Tensor, nn

from flowvi.models.likelihoods import Likelihood
from flowvi.models.rectified_flow import RectifiedFlow
from flowvi.models.rectified_terms import RectifiedTerms
from flowvi.models.vae import VAE, append

__all__ = ["LatentRectifiedFlow", "LatentRectifiedTerms"]


@dataclass(frozen=True)
class LatentRectifiedTerms:
    r"""The parts of the loss of each item, in nats, averaged over draws.

    Args:
        log_likelihood: expected log-density of the item given its latent vector, ``(B,)``.
        encoder: :math:`\log q(z_1 \mid x)`, minus the entropy of the posterior, ``(B,)``.
        flow: the parts of the loss of the latent vector.
    """

    log_likelihood: Tensor
    encoder: Tensor
    flow: RectifiedTerms

    @property
    def loss(self) -> Tensor:
        """What training makes small, ``(B,)``."""
        return self.encoder + self.flow.loss - self.log_likelihood

    @property
    def elbo(self) -> Tensor:
        """Lower bound of the log-density of each item, ``(B,)``.

        Raises:
            NotImplementedError: if the loss of the flow bounds nothing.
        """
        return self.log_likelihood - self.encoder + self.flow.elbo


class LatentRectifiedFlow(VAE):
    r"""Autoencoder with a rectified flow as the law of its latent vector.

    .. math:: \log p(x) \ge E_{q(z_1 \mid x)}\big[\log p(x \mid z_1) - \log q(z_1 \mid x)
        + B(z_1)\big]

    where :math:`B(z_1)` is the bound of the flow with its own posterior of the path. Encoder,
    decoder, flow and coupling are trained together. The latent sites are "z" and "path";
    log-weights are estimates, so bounds that exponentiate them refuse this model.

    Args:
        encoder: maps images, pixels from 0 to 1, to features; it says its ``output_dim``.
        decoder: maps latents to what the likelihood takes.
        likelihood: law of an image given that.
        posterior: its call on features gives the law of the latent vector.
        flow: on latent vectors, without pairs; a context reaches it too.
        num_total: number of images in all, where ``x`` is a minibatch.

    Shape:
        x: ``(B, *event_shape)``; context: ``(B, context_dim)`` with the ``context_dim`` of the
        field of the flow; z: ``(B, latent_dim)``.

    Raises:
        TypeError: if ``flow`` is no :class:`RectifiedFlow`.
        ValueError: if sizes do not fit, or the flow's paths do not end at the latent vector.

    References:
        Vahdat, Kreis and Kautz (2021), Score-based generative modeling in latent space,
        arXiv:2106.05931, for one bound over encoder, decoder and process.

    Example:
        >>> from flowvi.models import DiagonalPosterior, MLPDecoder, MLPEncoder, NormalLikelihood
        >>> from flowvi.nn import MLPField
        >>> from flowvi.paths import BrownianBridge
        >>> likelihood = NormalLikelihood((8,))
        >>> model = LatentRectifiedFlow(
        ...     MLPEncoder((8,), (16,)), MLPDecoder(2, (16,), likelihood.output_shape), likelihood,
        ...     DiagonalPosterior(16, 2), RectifiedFlow(MLPField(2), BrownianBridge(2, 0.5)))
        >>> model.terms(torch.zeros(5, 8)).elbo.shape
        torch.Size([5])
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: Likelihood,
        posterior: nn.Module,
        flow: RectifiedFlow,
        *,
        num_total: int | None = None,
    ) -> None:
        if not isinstance(flow, RectifiedFlow):
            raise TypeError(f"`flow` must be a RectifiedFlow; got {type(flow).__name__}.")
        if flow.coupling is None or flow.coupling.takes_pairs:
            raise ValueError(
                "`flow` must have paths that end at the latent vector, with a coupling that takes "
                "no pairs; got another kind."
            )
        if flow.dim != posterior.latent_dim:
            raise ValueError(
                f"`flow` must have dim {posterior.latent_dim} (latent_dim of the posterior); got "
                f"{flow.dim}."
            )
        context_dim = flow.field.context_dim
        super().__init__(
            encoder, decoder, likelihood, posterior, context_dim=context_dim, num_total=num_total
        )
        self.flow = flow

    def generate(self, context: Tensor | None) -> Distribution:
        prior = self.flow.prior(context)
        end = prior.unpack(pyro.sample("path", prior)).end
        # The path's score has accounted for its end.
        z = pyro.sample("z", Delta(end, event_dim=1, validate_args=False))
        return self.likelihood(self.decoder(append(z, context)))

    def infer(self, x: Tensor, context: Tensor | None) -> None:
        z = pyro.sample("z", self.latent_posterior(x, context))
        pyro.sample("path", self.flow.posterior(z, context))

    def latent_prior(self, context: Tensor | None = None) -> Distribution:
        """Law of the end of a path, where the flow has a density."""
        return self.flow.density()(context)

    def terms(
        self, x: Tensor, context: Tensor | None = None, *, num_particles: int = 1
    ) -> LatentRectifiedTerms:
        x = self._checked(x, context)
        law = self.latent_posterior(x, context)
        fits, scores, flows = [], [], []
        for _ in range(num_particles):
            z = law.rsample()
            scores.append(law.log_prob(z))
            flows.append(self.flow.terms(z, context))
            fits.append(self.likelihood(self.decoder(append(z, context))).log_prob(x))
        parts = ("coupling", "reference", "path")
        means = (torch.stack([getattr(f, name) for f in flows]).mean(0) for name in parts)
        flow = RectifiedTerms(*means, self.flow.has_bound)
        return LatentRectifiedTerms(torch.stack(fits).mean(0), torch.stack(scores).mean(0), flow)
