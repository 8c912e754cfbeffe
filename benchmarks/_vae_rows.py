"""Rows of ``vae_tables.py``: networks, optimisers and published numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import pyro
from torch import nn

from flowvi.infer import GlobalOptim, Schedule
from flowvi.models import (
    VAE,
    BernoulliLikelihood,
    CategoricalLikelihood,
    ConvDecoder,
    ConvEncoder,
    DiagonalPosterior,
    HierarchicalVAE,
    LadderVAE,
    MLPDecoder,
    MLPEncoder,
    ModelGuidePair,
    cnf_posterior,
    iaf_posterior,
    orthogonal_sylvester_posterior,
    planar_posterior,
)


@dataclass(frozen=True)
class Run:
    """One row of a table.

    Args:
        build: makes the pair from the shape of an image and the number of grey levels.
        steps: most steps that are taken.
        warmup: share of the steps over which the divergences are weighed in.
        published: published numbers, as they are printed.
        look_every: steps between looks at the validation set.
        free_bits: nats of each layer that cost nothing.
    """

    build: Callable[[tuple[int, ...], int], ModelGuidePair]
    steps: int
    warmup: float = 0.0
    published: dict[str, float] = field(default_factory=dict)
    look_every: int = 1000
    free_bits: float = 0.0


def adam_with_cosine(pair: ModelGuidePair, lr: float, num_steps: int) -> GlobalOptim:
    schedule = Schedule(num_steps, final=0.02)
    optim = GlobalOptim(lr, betas=(0.9, 0.999), schedule=schedule)
    optim.admit(pair.named_parameters())
    return optim


def rmsprop(pair: ModelGuidePair, lr: float, num_steps: int) -> pyro.optim.PyroOptim:
    """The optimiser of the published MNIST pair: a constant rate, centred second moments."""
    return pyro.optim.RMSprop({"lr": lr, "centered": True})


@dataclass(frozen=True)
class Table:
    """Runs on the same data with the same optimiser.

    Args:
        runs: the rows.
        batch: images in a step.
        lr: learning rate at its highest.
        dynamic: whether images are binarised anew in every step.
        optimizer: makes the optimiser of a pair from the rate and the number of steps.
        patience: looks in a row without a better validation bound that are borne; the parameters
            of the best look are kept. The last parameters are kept if left out.
    """

    runs: dict[str, Run]
    batch: int
    lr: float
    dynamic: bool = False
    optimizer: Callable[[ModelGuidePair, float, int], pyro.optim.PyroOptim] = adam_with_cosine
    patience: int | None = None


def perceptron(
    shape: tuple[int, ...], levels: int, *, posterior: Callable, width: int = 256
) -> VAE:
    likelihood = BernoulliLikelihood(shape)
    latent = width // 2
    return VAE(
        MLPEncoder(shape, (width, width)),
        MLPDecoder(latent, (width, width), likelihood.output_shape),
        likelihood,
        posterior(width, latent),
    )


def convolutional(
    shape: tuple[int, ...], levels: int, *, posterior: Callable, channels: tuple[int, int]
) -> VAE:
    likelihood = CategoricalLikelihood(shape, levels)
    return VAE(
        ConvEncoder(shape, channels, 256),
        ConvDecoder(64, channels, likelihood.output_shape),
        likelihood,
        posterior(256, 64),
    )


def deep(shape: tuple[int, ...], levels: int, *, make: type, factor: int = 1) -> ModelGuidePair:
    return make(
        BernoulliLikelihood(shape),
        tuple(max(n // factor, 1) for n in (64, 32, 16, 8, 4)),
        tuple(max(n // factor, 4) for n in (512, 256, 128, 64, 32)),
        activation=partial(nn.LeakyReLU, 0.1),
    )


def tables(small: bool, channels: tuple[int, int]) -> dict[str, Table]:
    """All tables; small networks for a quick look."""
    mlp = partial(perceptron, width=32 if small else 256)
    conv = partial(convolutional, channels=(4, 4) if small else channels)
    stack = partial(deep, factor=16 if small else 1)
    frey = {
        "none": (DiagonalPosterior, 4.53),
        "planar": (planar_posterior, 4.40),
        "IAF": (partial(iaf_posterior, num_layers=4, hidden_dims=(160,)), 4.47),
        "Sylvester": (orthogonal_sylvester_posterior, 4.45),
        "continuous": (cnf_posterior, 4.39),
    }
    iaf = partial(iaf_posterior, hidden_dims=(256, 256))
    pairs = {
        "mean-field": Run(
            partial(mlp, posterior=DiagonalPosterior),
            200_000,
            published={"elbo": -103.31, "log_p": -97.10},
            look_every=5000,
        ),
        "IAF": Run(
            partial(mlp, posterior=iaf),
            200_000,
            published={"elbo": -101.64, "log_p": -95.33},
            look_every=10_000,
        ),
    }
    shorter = {
        "mean-field": replace(pairs["mean-field"], steps=30_000, look_every=2500),
        "IAF": replace(
            pairs["IAF"],
            build=partial(mlp, posterior=iaf_posterior),
            steps=30_000,
            look_every=2500,
        ),
    }
    return {
        "mnist": Table(pairs, batch=128, lr=1e-3, optimizer=rmsprop, patience=5),
        "mnist-cosine": Table(shorter, batch=128, lr=1e-3),
        "frey": Table(
            {
                name: Run(partial(conv, posterior=make), 32_000, 0.05, {"bits": bits})
                for name, (make, bits) in frey.items()
            },
            batch=100,
            lr=5e-4,
        ),
        "depth": Table(
            {
                "plain": Run(partial(stack, make=HierarchicalVAE), 400_000, 0.0, {}),
                "ladder": Run(
                    partial(stack, make=LadderVAE),
                    400_000,
                    warmup=0.12,
                    published={"log_p": -81.74},
                ),
                "ladder, free bits": Run(
                    partial(stack, make=LadderVAE),
                    400_000,
                    warmup=0.12,
                    published={"log_p": -81.74},
                    free_bits=0.5,
                ),
            },
            batch=256,
            lr=1e-3,
            dynamic=True,
        ),
    }
