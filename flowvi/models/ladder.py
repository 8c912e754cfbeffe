"""Ladder variational autoencoders: what the model expects merged with what the image says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pyro.distributions import Distribution, Normal
from torch import Tensor, nn

from flowvi.distributions import StandardNormal
from flowvi.models.hierarchical import DenseBlock, DenseDecoder, NormalLayer, check_layers
from flowvi.models.latent_posteriors import normal_of
from flowvi.models.likelihoods import Likelihood
from flowvi.models.top_down import Stage, TopDownVAE
from flowvi.nn.mlp import MLP

__all__ = ["LadderStage", "LadderVAE", "precision_weighted"]


def precision_weighted(first: Distribution, second: Distribution) -> Distribution:
    r"""Product of two normal laws, normalised.

    .. math:: \sigma^{-2} = \sigma_1^{-2} + \sigma_2^{-2}, \qquad
        \mu = \sigma^2 (\mu_1 \sigma_1^{-2} + \mu_2 \sigma_2^{-2})

    Args:
        first: independent normal laws, event shape ``(dim,)``.
        second: likewise.

    References:
        Sonderby et al. (2016), Ladder variational autoencoders, arXiv:1602.02282, section 2.

    Example:
        >>> import torch
        >>> law = Normal(torch.tensor([0.0]), 1.0).to_event(1)
        >>> other = Normal(torch.tensor([3.0]), 1.0).to_event(1)
        >>> precision_weighted(law, other).mean
        tensor([1.5000])
    """
    # With the ratio of the variances nothing overflows where one of them is small.
    share = first.variance / (first.variance + second.variance)
    loc = first.mean + share * (second.mean - first.mean)
    return Normal(loc, (share * second.variance).sqrt(), validate_args=False).to_event(1)


class LadderStage(Stage):
    """Latents whose prior comes from those above and whose posterior is merged from both sides.

    Args:
        latent_dim: length of the latent vector.
        above_dim: length of the latent vector above; 0 at the top.
        width: width of the block that reads it.
        activation: makes the block's nonlinearity.
        batch_norm: whether the block normalises over the batch.
    """

    def __init__(
        self,
        latent_dim: int,
        above_dim: int = 0,
        width: int = 0,
        *,
        activation: Callable[[], nn.Module] = nn.LeakyReLU,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        options = {"activation": activation, "batch_norm": batch_norm}
        if above_dim:
            self.law = NormalLayer(above_dim, width, latent_dim, **options)
        else:
            self.law = StandardNormal(latent_dim)

    def prior(self, state: Tensor | None) -> Distribution:
        return self.law() if state is None else self.law(state)

    def posterior(
        self, prior: Distribution, state: Tensor | None, evidence: Tensor
    ) -> Distribution:
        seen = normal_of(evidence)
        return seen if state is None else precision_weighted(seen, prior)

    def advance(self, state: Tensor | None, z: Tensor) -> Tensor:
        return z


class LadderEncoder(nn.Module):
    """Deterministic blocks upwards, each with a linear map to what its stage gets; top first."""

    def __init__(
        self,
        input_dim: int,
        latent_dims: Sequence[int],
        hidden_dims: Sequence[int],
        **options: object,
    ) -> None:
        super().__init__()
        below = (input_dim, *hidden_dims)
        self.blocks = nn.ModuleList(
            DenseBlock(*sizes, **options) for sizes in zip(below, hidden_dims, strict=False)
        )
        self.heads = nn.ModuleList(
            MLP(width, (), 2 * latent, zero_last=False)
            for width, latent in zip(hidden_dims, latent_dims, strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        h, made = x.flatten(1), []
        for block, head in zip(self.blocks, self.heads, strict=True):
            h = block(h)
            made.append(head(h))
        return made[::-1]


class LadderVAE(TopDownVAE):
    r"""Ladder variational autoencoder.

    .. math:: q(z_l \mid z_{l+1}, x) \propto N(z_l; \hat\mu_l(x), \hat\sigma_l(x)^2)\,
        p(z_l \mid z_{l+1}), \qquad q(z_L \mid x) = N(\hat\mu_L(x), \hat\sigma_L(x)^2)

    The published recipe trains it with ``BetaELBO(beta=LinearSchedule(...))``, which warms the
    divergences up, and with batch normalisation; :class:`flowvi.objectives.FreeBits` are another
    way to keep the upper layers in use. Sites are "z1", next to the image, to "zL".

    Args:
        likelihood: law of an image.
        latent_dims: lengths of the latent vectors, the one next to the image first.
        hidden_dims: widths of the blocks, likewise.
        activation: makes the nonlinearity.
        batch_norm: normalise over the batch in every block.
        num_total: number of images in all, where ``x`` is a minibatch.

    Raises:
        ValueError: if there is no layer, or the two lists differ in length.

    References:
        Sonderby, Raiko, Maaloe, Sonderby and Winther (2016), Ladder variational autoencoders,
        arXiv:1602.02282, section 2.

    Example:
        >>> import torch
        >>> from flowvi.models import BernoulliLikelihood
        >>> pair = LadderVAE(BernoulliLikelihood((1, 8, 8)), (8, 4), (16, 16))
        >>> pair.terms(torch.zeros(5, 1, 8, 8)).elbo.shape
        torch.Size([5])
    """

    def __init__(
        self,
        likelihood: Likelihood,
        latent_dims: Sequence[int],
        hidden_dims: Sequence[int],
        *,
        activation: Callable[[], nn.Module] = nn.LeakyReLU,
        batch_norm: bool = True,
        num_total: int | None = None,
    ) -> None:
        check_layers(latent_dims, hidden_dims)
        options = {"activation": activation, "batch_norm": batch_norm}
        stages = [LadderStage(latent_dims[-1])]
        for k in reversed(range(len(latent_dims) - 1)):
            above = latent_dims[k + 1]
            stages.append(LadderStage(latent_dims[k], above, hidden_dims[k + 1], **options))
        super().__init__(
            LadderEncoder(likelihood.num_pixels, latent_dims, hidden_dims, **options),
            stages,
            DenseDecoder(latent_dims[0], hidden_dims[0], likelihood, **options),
            likelihood,
            num_total=num_total,
        )
