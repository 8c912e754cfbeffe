"""Hierarchical variational autoencoders: several layers of latents, inferred from the bottom."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pyro import sample
from pyro.distributions import Distribution
from torch import Tensor, nn

from flowvi.distributions import StandardNormal
from flowvi.models.image_pair import ImagePair
from flowvi.models.latent_posteriors import normal_of
from flowvi.models.likelihoods import Likelihood
from flowvi.nn.conv import batched
from flowvi.nn.mlp import MLP

__all__ = ["DenseBlock", "HierarchicalVAE", "NormalLayer"]


class DenseBlock(nn.Module):
    """Two linear layers of one width, each normalised over the batch if asked for and activated.

    Args:
        input_dim: length of the input.
        width: length of the output.
        activation: makes the nonlinearity.
        batch_norm: normalise over the batch before each nonlinearity.

    Shape:
        x: ``(*batch, input_dim)``; result: ``(*batch, width)``.
    """

    def __init__(
        self,
        input_dim: int,
        width: int,
        *,
        activation: Callable[[], nn.Module] = nn.LeakyReLU,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for size in (input_dim, width):
            layers.append(nn.Linear(size, width, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm1d(width))
            layers.append(activation())
        self.network = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return batched(self.network, x, 1)


class NormalLayer(nn.Module):
    """Independent normal laws whose means and scales come from a block.

    Args:
        input_dim: length of the input.
        width: width of the block.
        latent_dim: length of the latent vector.
        activation: makes the block's nonlinearity.
        batch_norm: whether the block normalises over the batch.

    Shape:
        x: ``(*batch, input_dim)``; the law: batch ``(*batch)``, event ``(latent_dim,)``.
    """

    def __init__(
        self,
        input_dim: int,
        width: int,
        latent_dim: int,
        *,
        activation: Callable[[], nn.Module] = nn.LeakyReLU,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.block = DenseBlock(input_dim, width, activation=activation, batch_norm=batch_norm)
        self.head = MLP(width, (), 2 * latent_dim, zero_last=False)

    def forward(self, x: Tensor) -> Distribution:
        return normal_of(self.head(self.block(x)))


class HierarchicalVAE(ImagePair):
    r"""Autoencoder with layers of latents, each inferred from the one below.

    .. math:: p(z_L) \prod_{l<L} p(z_l \mid z_{l+1})\, p(x \mid z_1), \qquad
        q(z_1 \mid x) \prod_{l>1} q(z_l \mid z_{l-1})

    Sites are "z1", next to the image, to "zL". Without a warm-up of the divergences
    (:class:`flowvi.objectives.BetaELBO`) the upper layers tend to stay unused; see
    :func:`flowvi.diagnostics.active_units` and :class:`LadderVAE`.

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
        Rezende, Mohamed and Wierstra (2014), Stochastic backpropagation, arXiv:1401.4082; the
        baseline of Sonderby et al. (2016), Ladder variational autoencoders, arXiv:1602.02282,
        section 2.

    Example:
        >>> import torch
        >>> from flowvi.models import BernoulliLikelihood
        >>> pair = HierarchicalVAE(BernoulliLikelihood((1, 8, 8)), (8, 4), (16, 16))
        >>> sorted(pair.terms(torch.zeros(5, 1, 8, 8)).divergences)
        ['z1', 'z2']
    """

    def __init__(
        self,
        likelihood: Likelihood,
        latent_dims: Sequence[int],
        hidden_dims: Sequence[int],
        *,
        activation: Callable[[], nn.Module] = nn.LeakyReLU,
        batch_norm: bool = False,
        num_total: int | None = None,
    ) -> None:
        super().__init__(likelihood, num_total=num_total)
        check_layers(latent_dims, hidden_dims)
        options = {"activation": activation, "batch_norm": batch_norm}
        below = (likelihood.num_pixels, *latent_dims)
        self.up = nn.ModuleList(
            NormalLayer(*sizes, **options)
            for sizes in zip(below, hidden_dims, latent_dims, strict=False)
        )
        self.down = nn.ModuleList(
            NormalLayer(latent_dims[k + 1], hidden_dims[k + 1], latent_dims[k], **options)
            for k in range(len(latent_dims) - 1)
        )
        self.top = StandardNormal(latent_dims[-1])
        self.decoder = DenseDecoder(latent_dims[0], hidden_dims[0], likelihood, **options)

    def generate(self, context: Tensor | None) -> Distribution:
        z = sample(f"z{len(self.up)}", self.top())
        for k in reversed(range(len(self.down))):
            z = sample(f"z{k + 1}", self.down[k](z))
        return self.likelihood(self.decoder(z))

    def infer(self, x: Tensor, context: Tensor | None) -> None:
        below = self.inputs(x).flatten(1)
        for k, layer in enumerate(self.up, start=1):
            below = sample(f"z{k}", layer(below))


class DenseDecoder(nn.Module):
    """A block and a linear map to what a likelihood takes."""

    def __init__(
        self, latent_dim: int, width: int, likelihood: Likelihood, **options: object
    ) -> None:
        super().__init__()
        self.output_shape = likelihood.output_shape
        self.block = DenseBlock(latent_dim, width, **options)
        size = likelihood.num_params * likelihood.num_pixels
        self.head = MLP(width, (), size, zero_last=False)

    def forward(self, z: Tensor) -> Tensor:
        return self.head(self.block(z)).unflatten(-1, self.output_shape)


def check_layers(latent_dims: Sequence[int], hidden_dims: Sequence[int]) -> None:
    """Refuse lists of sizes that make no stack of layers."""
    if not latent_dims or len(latent_dims) != len(hidden_dims):
        raise ValueError(
            "`latent_dims` and `hidden_dims` must have the same length, at least 1; got "
            f"{tuple(latent_dims)} and {tuple(hidden_dims)}."
        )
    if min(*latent_dims, *hidden_dims) < 1:
        raise ValueError(
            "`latent_dims` and `hidden_dims` must be at least 1; got "
            f"{tuple(latent_dims)} and {tuple(hidden_dims)}."
        )
