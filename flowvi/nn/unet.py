"""A small U-Net for noised images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowvi.nn.denoisers import Denoiser
from flowvi.nn.time_embedding import FourierFeatures

__all__ = ["UNet"]


class UNet(Denoiser):
    """Convolutions at falling and rising resolutions, joined across; time modulates each block.

    States are flat, as paths have them, and are folded to images inside.

    Args:
        image_shape: ``(channels, height, width)``.
        width: channels of the first resolution, at least 1.
        multipliers: channels of each resolution over ``width``; each is half as fine as the one
            before. Height and width must be divisible so often.
        num_blocks: residual blocks at each resolution, at least 1.
        context_dim: length of the context vector; 0 for none.
        time_dim: length of the features of time.
        max_frequency: largest frequency of these features.
        attention: let all pixels of the coarsest resolution look at each other.
        fourier: features of the pixels to see besides the pixels themselves.
        dropout: probability of a dropped unit in a block.

    Shape:
        x: ``(*batch, channels * height * width)``; t: ``(*batch, 1)``; output like ``x``.

    Raises:
        ValueError: if the image cannot be halved so often, or a size is too small.

    References:
        Ronneberger, Fischer and Brox (2015), U-Net, arXiv:1505.04597; with time as in Ho, Jain
        and Abbeel (2020), Denoising diffusion probabilistic models, arXiv:2006.11239, appendix B.

    Example:
        >>> net = UNet((1, 8, 8), width=8)
        >>> net(torch.zeros(5, 64), torch.zeros(5, 1)).shape
        torch.Size([5, 64])
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        width: int = 32,
        multipliers: Sequence[int] = (1, 2),
        num_blocks: int = 1,
        context_dim: int = 0,
        *,
        time_dim: int = 32,
        max_frequency: float = 1000.0,
        attention: bool = False,
        fourier: FourierFeatures | None = None,
        dropout: float = 0.0,
    ) -> None:
        image_shape = tuple(image_shape)
        halvings = len(multipliers) - 1
        if len(image_shape) != 3 or any(n % 2**halvings or n < 1 for n in image_shape[1:]):
            raise ValueError(
                f"`image_shape` must be (channels, height, width) with sides divisible by "
                f"{2**halvings}; got {image_shape}."
            )
        if width < 1 or num_blocks < 1:
            raise ValueError(
                f"`width` and `num_blocks` must be at least 1; got {width} and {num_blocks}."
            )
        channels, height, columns = image_shape
        super().__init__(
            channels * height * columns,
            context_dim,
            time_dim=time_dim,
            max_frequency=max_frequency,
        )
        self.image_shape = image_shape
        self.fourier = fourier
        multiple = 1 if fourier is None else fourier.multiple
        self.condition = nn.Sequential(
            nn.Linear(self.condition_dim, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width)
        )
        sizes = [width * m for m in multipliers]

        def block(inputs: int, outputs: int) -> _Block:
            return _Block(inputs, outputs, 4 * width, dropout)

        self.first = nn.Conv2d(multiple * channels, sizes[0], 3, padding=1)
        self.down = nn.ModuleList()
        kept, present = [sizes[0]], sizes[0]
        for level, size in enumerate(sizes):
            for _ in range(num_blocks):
                self.down.append(block(present, size))
                present = size
                kept.append(size)
            if level < halvings:
                self.down.append(_Halve(size))
                kept.append(size)
        self.middle = nn.ModuleList([block(present, present), block(present, present)])
        self.attention = _Attention(present) if attention else None
        self.up = nn.ModuleList()
        for level, size in reversed(list(enumerate(sizes))):
            for _ in range(num_blocks + 1):
                self.up.append(block(present + kept.pop(), size))
                present = size
            if level:
                self.up.append(_Double(size))
        self.last = nn.Sequential(_norm(present), nn.SiLU(), _zero(_conv(present, channels)))

    def predict(self, x: Tensor, condition: Tensor) -> Tensor:
        batch = torch.broadcast_shapes(x.shape[:-1], condition.shape[:-1])
        condition = self.condition(condition).expand(*batch, -1)
        condition = condition.reshape(-1, condition.shape[-1])
        h = x.expand(*batch, -1).reshape(-1, *self.image_shape)
        h = self.first(h if self.fourier is None else self.fourier(h, dim=1))
        kept = [h]
        for layer in self.down:
            h = layer(h, condition)
            kept.append(h)
        h = self.middle[0](h, condition)
        if self.attention is not None:
            h = self.attention(h)
        h = self.middle[1](h, condition)
        for layer in self.up:
            if isinstance(layer, _Block):
                h = torch.cat([h, kept.pop()], 1)
            h = layer(h, condition)
        return self.last(h).reshape(*batch, -1)


class _Block(nn.Module):
    """Two convolutions beside a short cut; time scales and shifts what is between them.

    It does so after the normalisation, which would take a shift away again.
    """

    def __init__(self, inputs: int, outputs: int, condition: int, dropout: float) -> None:
        super().__init__()
        self.before = nn.Sequential(_norm(inputs), nn.SiLU(), _conv(inputs, outputs))
        self.norm = _norm(outputs)
        self.modulation = nn.Linear(condition, 2 * outputs)
        self.after = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), _zero(_conv(outputs, outputs)))
        self.short = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        modulation = self.modulation(F.silu(condition)).unsqueeze(-1).unsqueeze(-1)
        scale, shift = modulation.chunk(2, 1)
        h = self.norm(self.before(x))
        return self.short(x) + self.after(torch.addcmul(h + shift, h, scale))


class _Halve(nn.Module):
    """Half the resolution."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(size, size, 3, stride=2, padding=1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.conv(x)


class _Double(nn.Module):
    """Twice the resolution."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.conv = _conv(size, size)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Attention(nn.Module):
    """Every pixel looks at all others, beside a short cut."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = _norm(size)
        self.inputs = nn.Conv2d(size, 3 * size, 1)
        self.output = _zero(nn.Conv2d(size, size, 1))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.flatten(2).transpose(1, 2) for part in self.inputs(self.norm(x)).chunk(3, 1)
        )
        seen = F.scaled_dot_product_attention(query, key, value)
        return x + self.output(seen.transpose(1, 2).reshape(x.shape))


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _norm(size: int) -> nn.GroupNorm:
    groups = next(g for g in (8, 4, 2, 1) if size % g == 0)
    return nn.GroupNorm(groups, size)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer, set to zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
