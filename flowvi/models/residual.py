"""Top-down autoencoders of residual convolutional blocks, with latents at every resolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.distributions import Distribution, Normal
from torch import Tensor, nn

from flowvi.models.likelihoods import Likelihood
from flowvi.models.marginals import scale_of
from flowvi.models.top_down import Stage, TopDownVAE
from flowvi.nn.conv import batched
from flowvi.transforms.base import common_shape

__all__ = ["ResidualStage", "ResidualVAE"]


class ResidualBlock(nn.Module):
    """Two convolutions with activations before them, added to the input; at first the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        last = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        first = nn.Conv2d(width, width, 3, padding=1)
        self.network = nn.Sequential(nn.SiLU(), first, nn.SiLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.network(x)


class ResidualStage(Stage):
    r"""Maps of latents whose posterior is a correction of the prior.

    .. math:: p(z \mid s) = N(\mu(s), \sigma(s)^2), \qquad
        q(z \mid s, e) = N\big(\mu(s) + \Delta\mu(s, e),\ (\sigma(s)\,\Delta\sigma(s, e))^2\big)

    The correction starts at none. The state is then changed by the latents and a residual block,
    and doubled in size where the next stage is finer.

    Args:
        width: channels of the state.
        latent_channels: channels of the latents.
        grow: whether the state is doubled in size afterwards.

    Shape:
        state, evidence: ``(*batch, width, H, W)``; latents: ``(*batch, latent_channels, H, W)``.

    References:
        Vahdat and Kautz (2020), NVAE: a deep hierarchical variational autoencoder,
        arXiv:2007.03898, section 3.2; Child (2021), Very deep VAEs, arXiv:2011.10650, section 3.
    """

    def __init__(self, width: int, latent_channels: int, *, grow: bool = False) -> None:
        super().__init__()
        self.prior_net = _head(width, latent_channels)
        self.correction_net = _head(2 * width, latent_channels)
        self.enter = nn.Conv2d(latent_channels, width, 1)
        block: list[nn.Module] = [ResidualBlock(width)]
        if grow:
            block.append(nn.Upsample(scale_factor=2))
        self.block = nn.Sequential(*block)

    def prior(self, state: Tensor) -> Distribution:
        loc, raw = batched(self.prior_net, state).chunk(2, -3)
        return _normal_map(loc, scale_of(raw))

    def posterior(self, prior: Distribution, state: Tensor, evidence: Tensor) -> Distribution:
        lead = common_shape(state.shape[:-3], evidence.shape[:-3])
        both = torch.cat([t.expand(*lead, *t.shape[-3:]) for t in (state, evidence)], -3)
        shift, raw = batched(self.correction_net, both).chunk(2, -3)
        return _normal_map(prior.mean + shift, prior.stddev * scale_of(raw))

    def advance(self, state: Tensor, z: Tensor) -> Tensor:
        return batched(self.block, state + batched(self.enter, z))


class ResidualEncoder(nn.Module):
    """Residual blocks from the image down to the coarsest maps; gives the maps, coarsest first."""

    def __init__(self, colours: int, width: int, num_stages: Sequence[int]) -> None:
        super().__init__()
        self.num_stages = tuple(num_stages)
        self.enter = nn.Conv2d(colours, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(width) for _ in range(count)))
            for count in reversed(self.num_stages)
        )
        self.shrink = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> list[Tensor]:
        h, maps = self.enter(x), []
        for level, block in enumerate(self.blocks):
            h = block(self.shrink(h) if level else h)
            maps.append(h)
        pairs = zip(maps[::-1], self.num_stages, strict=True)
        return [h for h, count in pairs for _ in range(count)]


class ResidualDecoder(nn.Module):
    """A residual block and a convolution from the last state to what a likelihood takes."""

    def __init__(self, width: int, output_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.output_shape = output_shape
        size = output_shape[0] * output_shape[1]
        self.network = nn.Sequential(nn.SiLU(), nn.Conv2d(width, size, 3, padding=1))

    def forward(self, state: Tensor) -> Tensor:
        return batched(self.network, state).unflatten(-3, self.output_shape[:2])


class ResidualVAE(TopDownVAE):
    """Top-down autoencoder with maps of latents at several resolutions.

    A small form of the deep convolutional hierarchies: the state starts as a learned map of the
    coarsest size, every stage adds its latents to it, and the posterior of each is a correction
    of the prior by what the encoder saw at that resolution. Sites are "z1", the finest, to "zL".

    Args:
        likelihood: law of an image ``(C, H, W)``; sides must be divisible by two to the number
            of resolutions less one.
        num_stages: number of stages at each resolution, the coarsest first.
        width: channels of the state and of the encoder.
        latent_channels: channels of each stage's latents.
        num_total: number of images in all, where ``x`` is a minibatch.

    Raises:
        ValueError: if there is no stage, or the image cannot be halved that often.

    References:
        Vahdat and Kautz (2020), NVAE, arXiv:2007.03898; Child (2021), Very deep VAEs,
        arXiv:2011.10650.

    Example:
        >>> from flowvi.models import BernoulliLikelihood
        >>> pair = ResidualVAE(BernoulliLikelihood((1, 8, 8)), (1, 2), width=8, latent_channels=2)
        >>> {k: v.shape[0] for k, v in pair.terms(torch.zeros(5, 1, 8, 8)).divergences.items()}
        {'z3': 5, 'z2': 5, 'z1': 5}
    """

    def __init__(
        self,
        likelihood: Likelihood,
        num_stages: Sequence[int] = (2, 2),
        *,
        width: int = 32,
        latent_channels: int = 4,
        num_total: int | None = None,
    ) -> None:
        if not num_stages or min(num_stages) < 1:
            raise ValueError(f"`num_stages` must hold positive integers; got {num_stages!r}.")
        shape, factor = likelihood.event_shape, 2 ** (len(num_stages) - 1)
        if len(shape) != 3 or shape[1] % factor or shape[2] % factor:
            raise ValueError(
                f"`likelihood` must be of images (C, H, W) with sides divisible by {factor}; got "
                f"{shape}."
            )
        stages = [
            ResidualStage(
                width, latent_channels, grow=k == count - 1 and level < len(num_stages) - 1
            )
            for level, count in enumerate(num_stages)
            for k in range(count)
        ]
        super().__init__(
            ResidualEncoder(shape[0], width, num_stages),
            stages,
            ResidualDecoder(width, likelihood.output_shape),
            likelihood,
            start=0.1 * torch.randn(width, shape[1] // factor, shape[2] // factor),
            num_total=num_total,
        )


def _head(width: int, latent_channels: int) -> nn.Module:
    """Two convolutions to means and raw scales that start at 0."""
    last = nn.Conv2d(width, 2 * latent_channels, 3, padding=1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.SiLU(), nn.Conv2d(width, width, 1), nn.SiLU(), last)


def _normal_map(loc: Tensor, scale: Tensor) -> Distribution:
    return Normal(loc, scale, validate_args=False).to_event(3)
