"""Brownian bridges to images under an independent and a learned coupling."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyro
import torch
from images import digits, mnist
from planar_flows import fit
from torch import Tensor, nn

from flowvi.models import (
    LearnedCoupling,
    OptimalTransportCoupling,
    RectifiedFlow,
    RectifiedTerms,
    realnvp_posterior,
)
from flowvi.nn import MLPField
from flowvi.paths import BrownianBridge

__all__ = ["BRIDGES", "Pictures", "bridge", "load", "measure", "train_bridge"]

SIGMA, WIDTH, BATCH = 1.0, 256, 128


@dataclass(frozen=True)
class Pictures:
    """Grey levels of images, flat.

    Args:
        train: levels to learn from, ``(N, side * side)``.
        test: levels to report on.
        num_levels: number of levels.
        side: pixels along a side.
    """

    train: Tensor
    test: Tensor
    num_levels: int
    side: int

    def values(self, levels: Tensor) -> Tensor:
        """Levels with uniform noise within their cell, from -2 to 2."""
        return 4 * (levels + torch.rand_like(levels)) / self.num_levels - 2


def load(name: str, folder: Path | None) -> Pictures:
    """Digits of 8 x 8 pixels, or MNIST."""
    images = digits() if name == "digits" else mnist(folder)
    train, test = (part.flatten(1).float() for part in (images.train, images.test))
    return Pictures(train, test, images.num_levels, images.train.shape[-1])


def learned(dim: int) -> LearnedCoupling:
    """Affine couplings of an encoded image."""
    encoder = nn.Sequential(nn.Linear(dim, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 64), nn.SiLU())
    return LearnedCoupling(realnvp_posterior(64, dim), encoder)


BRIDGES = {
    "independent": lambda dim: None,
    "minibatch OT": lambda dim: OptimalTransportCoupling(),
    "learned": learned,
}


def bridge(dim: int, name: str) -> RectifiedFlow:
    """Field and coupling, not trained yet."""
    field = MLPField(dim, (WIDTH, WIDTH), activation=nn.SiLU, num_frequencies=6)
    return RectifiedFlow(field, BrownianBridge(dim, SIGMA), BRIDGES[name](dim))


def train_bridge(data: Pictures, name: str, num_steps: int, seed: int) -> RectifiedFlow:
    """Field and coupling by stock SVI on the bound."""
    pyro.set_rng_seed(seed)
    flow = bridge(data.train.shape[1], name)

    def draw() -> Tensor:
        return data.values(data.train[torch.randint(len(data.train), (BATCH,))])

    return fit(flow, draw, num_steps, name, lr=2e-3, clip_norm=100.0)


@torch.no_grad()
def measure(flow: RectifiedFlow, data: Pictures, repeats: int) -> RectifiedTerms:
    """Parts of the bound of every test image, averaged over noise, times and starts."""
    runs = [flow.terms(data.values(data.test)) for _ in range(repeats)]
    means = (
        torch.stack([getattr(run, name) for run in runs]).mean(0)
        for name in ("coupling", "reference", "path")
    )
    return RectifiedTerms(*means, has_bound=True)
