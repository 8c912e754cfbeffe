"""f-VAE beside a plain VAE and a plain Glow of equal size, on images with whole grey levels.

``python examples/f_vae.py`` trains the three on scikit-learn's 8 x 8 digits by Pyro's own ``SVI``
(minutes on one core); ``--data FOLDER`` takes MNIST's four idx.gz files, or freyfaces.npz,
instead. A plain VAE has few latents and blurred images; a Glow has sharp ones and no summary of
them; the f-VAE's decoder is a Glow that reads what a few latents say (Su and Wu 2018,
arXiv:1809.05861).

Printed are the ELBO and the importance-weighted log-likelihood of the test set in bits per
dimension, and the divergence of the latents from their prior. Pictures show samples (of the flows
at ``--temperature``), reconstructions from the latents, and images between two of the test set.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib
import pyro
import torch
from images import Images, load_images
from matplotlib import pyplot as plt
from pyro.infer import SVI
from torch import Tensor
from tqdm import tqdm

from flowvi.flows import glow_image
from flowvi.infer import GlobalOptim, Schedule
from flowvi.models import (
    FVAE,
    VAE,
    DiagonalPosterior,
    DiscretisedLogisticLikelihood,
    ImageFlow,
    ImageFlowLikelihood,
    MLPDecoder,
    MLPEncoder,
    ModelGuidePair,
    bits_per_dim,
)
from flowvi.objectives import ELBO, BetaELBO, FreeBits, LinearSchedule, Objective
from flowvi.plots import image_grid
from flowvi.transforms import ToInterval

ROW = "{:<7}{:>11}{:>12}{:>14}{:>17}{:>11}"
HEADER = ("model", "parameters", "ELBO (nats)", "ELBO (bits)", "weighted (bits)", "KL of z")
FEATURES = 4


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with MNIST or Frey Faces")
    parser.add_argument("--latent-dim", type=int, default=8)
    parser.add_argument("--width", type=int, default=32, help="hidden channels of f-VAE's flow")
    parser.add_argument("--num-layers", type=int, default=3, help="steps of flow at each scale")
    parser.add_argument("--free-nats", type=float, default=8.0, help="of f-VAE's latents")
    parser.add_argument("--num-steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--particles", type=int, default=50, help="importance samples per image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke-test", action="store_true", help="a few steps only, for tests")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for results")
    args = parser.parse_args()
    if args.smoke_test:
        args.num_steps, args.width, args.num_layers, args.particles = 2, 4, 1, 2
    return args


def make_f_vae(images: Images, args: argparse.Namespace, width: int) -> FVAE:
    """Encoder and decoder of 4 layers in all, and a Glow that reads the decoder's maps."""
    shape = tuple(images.train.shape[1:])
    maps = (FEATURES, *shape[1:])
    flow = glow_image(
        shape,
        math.prod(maps),
        context_shape=maps,
        num_layers=args.num_layers,
        hidden_dims=(width, width),
    )
    flow = flow.then(pixels(images))
    likelihood = ImageFlowLikelihood(flow, images.num_levels, context_shape=maps)
    encoder = MLPEncoder(shape, (128, 64))
    decoder = MLPDecoder(args.latent_dim, (64,), maps)
    return FVAE(encoder, decoder, likelihood, DiagonalPosterior(64, args.latent_dim))


def make_glow(images: Images, args: argparse.Namespace, width: int) -> ImageFlow:
    """A Glow alone."""
    shape = tuple(images.train.shape[1:])
    flow = glow_image(shape, num_layers=args.num_layers, hidden_dims=(width, width))
    return ImageFlow(flow.then(pixels(images)), images.num_levels)


def pixels(images: Images) -> ToInterval:
    """Logit of the pixels: without it, what flows learn first is to narrow the black ones."""
    return ToInterval(images.train.shape[1:], 0.0, float(images.num_levels), margin=1e-6)


def make_vae(images: Images, args: argparse.Namespace, width: int) -> VAE:
    """Fully connected encoder and decoder, pixels by a discretised logistic law."""
    shape = tuple(images.train.shape[1:])
    likelihood = DiscretisedLogisticLikelihood(shape, images.num_levels)
    encoder = MLPEncoder(shape, (width, width))
    decoder = MLPDecoder(args.latent_dim, (width, width), likelihood.output_shape)
    return VAE(encoder, decoder, likelihood, DiagonalPosterior(width, args.latent_dim))


def of_equal_size(make: Callable[[int], ModelGuidePair], size: int) -> ModelGuidePair:
    """The narrowest model that has at least so many parameters."""
    low, high = 1, 2
    while size_of(make(high)) < size:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size_of(make(middle)) < size else (low, middle)
    return make(high)


def size_of(pair: ModelGuidePair) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in pair.parameters())


def train(
    pair: ModelGuidePair,
    name: str,
    images: Images,
    args: argparse.Namespace,
    objective: Objective | None = None,
) -> None:
    """Stock SVI; of ten looks at the validation set the best is kept."""
    objective = ELBO(max_plate_nesting=1) if objective is None else objective
    torch.manual_seed(args.seed)
    if hasattr(pair, "initialize"):
        pair.initialize(images.train[:512])
    schedule = Schedule(args.num_steps, warmup_steps=args.num_steps // 20)
    optimizer = GlobalOptim(args.lr, betas=(0.9, 0.999), clip_norm=50.0, schedule=schedule)
    svi = SVI(pair.model, pair.guide, optimizer, objective)
    best, kept = -math.inf, pair.state_dict()
    for step in tqdm(range(1, args.num_steps + 1), desc=name):
        svi.step(images.train[torch.randint(len(images.train), (args.batch_size,))])
        if step % max(1, args.num_steps // 10) == 0:
            with torch.no_grad():
                pair.eval()
                elbo = float(pair.terms(images.validation[:500]).elbo.mean())
                pair.train()
            if elbo > best:
                best, kept = elbo, copy.deepcopy(pair.state_dict())
    pair.load_state_dict(kept)


@torch.no_grad()
def report(name: str, pair: ModelGuidePair, images: Images, args: argparse.Namespace) -> None:
    """One line of the table."""
    pair.eval()
    test = images.test[: 20 if args.smoke_test else 1000]
    shape = test.shape[1:]
    terms = pair.terms(test)
    weighted = pair.log_likelihood(test, args.particles).mean
    divergence = terms.divergences.get("z")
    numbers = (
        f"{terms.elbo.mean():.1f}",
        f"{bits_per_dim(terms.elbo.mean(), shape):.3f}",
        f"{bits_per_dim(weighted, shape):.3f}",
        "-" if divergence is None else f"{divergence.mean():.1f}",
    )
    print(ROW.format(name, size_of(pair), *numbers))


def interpolate(pair: ModelGuidePair, ends: Tensor, num_steps: int) -> Tensor:
    """Images between two; the plain VAE's are means at latents on the line."""
    if hasattr(pair, "interpolate"):
        return pair.interpolate(ends, num_steps)
    with torch.no_grad():
        first, last = pair.latent_posterior(ends).sample()
        share = torch.linspace(0, 1, num_steps).unsqueeze(-1)
        return pair.likelihood(pair.decoder(torch.lerp(first, last, share))).mean


def draw(pairs: dict[str, ModelGuidePair], images: Images, args: argparse.Namespace) -> None:
    """One picture each of samples, reconstructions and interpolations."""
    test, high = images.test, images.num_levels - 1
    with_latents = {n: p for n, p in pairs.items() if n != "Glow"}

    def sample(pair: ModelGuidePair) -> Tensor:
        torch.manual_seed(args.seed)
        if isinstance(pair, VAE) and not isinstance(pair, FVAE):
            return pair.sample_mean(48)
        return pair.sample(48, temperature=args.temperature)

    def reconstruct(pair: ModelGuidePair) -> Tensor:
        if isinstance(pair, FVAE):
            return pair.reconstruct(test[:16], temperature=args.temperature)
        return pair.reconstruct(test[:16])

    rows = [interpolate_rows(pair, test) for pair in pairs.values()]
    sheets = {
        "samples": (dict(zip(pairs, map(sample, pairs.values()), strict=True)), 12),
        "reconstructions": (
            {"test set": test[:16], **{n: reconstruct(p) for n, p in with_latents.items()}},
            16,
        ),
        "interpolations": (dict(zip(pairs, rows, strict=True)), 8),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    for kind, (parts, columns) in sheets.items():
        sizes = [math.ceil(len(part) / columns) for part in parts.values()]
        figure, axes = plt.subplots(
            len(parts),
            1,
            figsize=(0.55 * columns, 0.55 * sum(sizes) + 0.4 * len(parts)),
            height_ratios=sizes,
            layout="constrained",
        )
        for ax, (name, part) in zip(axes, parts.items(), strict=True):
            image_grid(part, ax, num_columns=columns, high=high)
            ax.set_title(name, loc="left", fontsize=9)
        path = args.output / f"f_vae_{kind}.png"
        figure.savefig(path, dpi=150)
        plt.close(figure)
        print(path)


def interpolate_rows(pair: ModelGuidePair, test: Tensor) -> Tensor:
    """Four rows from one image of the test set to another."""
    return torch.cat([interpolate(pair, test[2 * k : 2 * k + 2], 8) for k in range(4)])


def main() -> None:
    """Train, print, draw."""
    args = parse()
    matplotlib.use("Agg")
    images = load_images(args.data)
    torch.manual_seed(args.seed)
    f_vae = make_f_vae(images, args, args.width)
    size = size_of(f_vae)
    pairs = {
        "VAE": of_equal_size(lambda width: make_vae(images, args, width), size),
        "Glow": of_equal_size(lambda width: make_glow(images, args, width), size),
        "f-VAE": f_vae,
    }
    for name, pair in pairs.items():
        # A strong decoder leaves its latents unused if their divergence counts from the start; a
        # flow does so even after a warm-up, so the first nats are free for the f-VAE.
        warm = {} if name == "Glow" else {"z": LinearSchedule(max(1, args.num_steps // 2))}
        free = FreeBits({"z": args.free_nats}) if name == "f-VAE" else None
        objective = BetaELBO(beta=warm or 1.0, free_bits=free, max_plate_nesting=1)
        train(pair, name, images, args, objective)
    print(ROW.format(*HEADER))
    for name, pair in pairs.items():
        report(name, pair, images, args)
    draw(pairs, images, args)


if __name__ == "__main__":
    with pyro.validation_enabled(False):
        main()
