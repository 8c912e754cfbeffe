"""Variational autoencoders on images: posteriors, priors and layers side by side.

``python examples/vae.py`` trains six on scikit-learn's 8 x 8 digits by Pyro's own ``SVI`` (a few
minutes on one core); ``--data FOLDER`` takes MNIST's idx.gz files, or freyfaces.npz, instead. The
first has two latents and a tanh decoder, as in the textbooks; the others have more latents and
differ in one thing: a normalizing flow as posterior, a flow or a VampPrior as prior, or four
layers of latents in a ladder.

Printed are the test set's ELBO and importance-weighted log-likelihood with its standard error over
images, how much of the divergence is information about the image and how much a better prior could
save, and the active latents of each layer. Pictures show the plane of two latents, samples and
reconstructions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import pyro
import torch
from f_vae import size_of, train
from images import Images, load_images
from matplotlib import pyplot as plt
from torch import Tensor, nn

from flowvi.diagnostics import active_units, aggregate_posterior
from flowvi.flows import realnvp
from flowvi.models import (
    VAE,
    DiagonalPosterior,
    DiscretisedLogisticLikelihood,
    ImagePair,
    LadderVAE,
    MLPDecoder,
    MLPEncoder,
    VampPrior,
    iaf_posterior,
)
from flowvi.objectives import BetaELBO, LinearSchedule
from flowvi.plots import image_grid, latent_manifold, latent_points

ROW = "{:<15}{:>11}{:>9}{:>16}{:>13}{:>13}  {}"
HEADER = ("", "parameters", "ELBO", "log p", "information", "prior's gap", "active latents")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with MNIST or Frey Faces")
    parser.add_argument("--latent-dim", type=int, default=16)
    parser.add_argument("--width", type=int, default=128, help="hidden units of a layer")
    parser.add_argument("--num-steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--particles", type=int, default=200, help="importance samples per image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke-test", action="store_true", help="a few steps only, for tests")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for results")
    args = parser.parse_args()
    if args.smoke_test:
        args.num_steps, args.width, args.particles = 2, 8, 2
    return args


def make_plane(images: Images, args: argparse.Namespace) -> VAE:
    """The textbook's: two latents, one hidden layer of tanh units on each side."""
    shape, width = tuple(images.train.shape[1:]), 2 * args.width
    likelihood = DiscretisedLogisticLikelihood(shape, images.num_levels)
    encoder = MLPEncoder(shape, (width,), activation=nn.Tanh)
    decoder = MLPDecoder(2, (width,), likelihood.output_shape, activation=nn.Tanh)
    return VAE(encoder, decoder, likelihood, DiagonalPosterior(width, 2))


def make_vae(images: Images, args: argparse.Namespace, kind: str) -> VAE:
    """More latents, and what ``kind`` says instead of a diagonal posterior or a normal prior."""
    shape, width = tuple(images.train.shape[1:]), args.width
    likelihood = DiscretisedLogisticLikelihood(shape, images.num_levels)
    encoder = MLPEncoder(shape, (width, width))
    decoder = MLPDecoder(args.latent_dim, (width, width), likelihood.output_shape)
    family = iaf_posterior if kind == "IAF posterior" else DiagonalPosterior
    posterior, prior = family(width, args.latent_dim), None
    if kind == "flow prior":
        prior = realnvp(args.latent_dim, hidden_dims=(width // 2,))
    elif kind == "VampPrior":
        prior = VampPrior(encoder, posterior, images.train[:100] / (images.num_levels - 1))
    return VAE(encoder, decoder, likelihood, posterior, prior)


def make_ladder(images: Images, args: argparse.Namespace) -> LadderVAE:
    """Four layers of latents."""
    likelihood = DiscretisedLogisticLikelihood(images.train.shape[1:], images.num_levels)
    latents = [max(args.latent_dim // 2**k, 2) for k in range(4)]
    return LadderVAE(likelihood, latents, [max(args.width // 2**k, 4) for k in range(4)])


@torch.no_grad()
def report(name: str, pair: ImagePair, test: Tensor, args: argparse.Namespace) -> None:
    """One line of the table, nats per image."""
    pair.eval()
    weighted = pair.log_likelihood(test, args.particles)
    whole = aggregate_posterior(pair, test)
    units = active_units(pair, test, num_particles=2 if args.smoke_test else 32)
    active = ", ".join(f"{n} of {units.sizes[k]}" for k, n in sorted(units.counts.items()))
    numbers = (
        f"{pair.terms(test, num_particles=5).elbo.mean():.2f}",
        f"{weighted.mean:.2f} +- {weighted.mean_se:.2f}",
        f"{whole.mutual_information.value:.2f}",
        f"{whole.marginal_divergence.value:.2f}",
        active,
    )
    print(ROW.format(name, size_of(pair), *numbers), flush=True)


def draw_plane(plane: VAE, images: Images, path: Path) -> None:
    """What the plane decodes to, and where the test set lies in it."""
    plane.eval()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5), layout="constrained")
    latent_manifold(
        lambda z: plane.likelihood(plane.decoder(z)).mean, left, high=images.num_levels - 1
    )
    with torch.no_grad():
        means = plane.latent_posterior(images.test[:2000]).mean
    labels = images.test_labels
    latent_points(means, right, labels=None if labels is None else labels[:2000])
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_images(pairs: dict[str, ImagePair], images: Images, path: Path) -> None:
    """Samples on the left, the test set and its reconstructions on the right."""
    test, high = images.test[:12], images.num_levels - 1
    figure, axes = plt.subplots(
        len(pairs), 2, figsize=(13, 1.6 * len(pairs)), layout="constrained", squeeze=False
    )
    for (left, right), (name, pair) in zip(axes, pairs.items(), strict=True):
        torch.manual_seed(1)
        image_grid(pair.sample_mean(24), left, num_columns=12, high=high)
        both = torch.cat([test, pair.reconstruct(test)])
        image_grid(both, right, num_columns=12, high=high)
        left.set_title(f"{name}: samples", loc="left", fontsize=9)
        right.set_title("test set and reconstructions", loc="left", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Train, print, draw."""
    args = parse()
    matplotlib.use("Agg")
    args.output.mkdir(parents=True, exist_ok=True)
    images = load_images(args.data)
    torch.manual_seed(args.seed)
    kinds = ("VAE", "IAF posterior", "flow prior", "VampPrior")
    pairs: dict[str, ImagePair] = {
        "two latents": make_plane(images, args),
        **{kind: make_vae(images, args, kind) for kind in kinds},
        "ladder": make_ladder(images, args),
    }
    test = images.test[: 20 if args.smoke_test else 1000]
    for name, pair in pairs.items():
        warm_up = LinearSchedule(max(1, args.num_steps // 5))
        objective = BetaELBO(beta=warm_up, max_plate_nesting=1) if name == "ladder" else None
        train(pair, name, images, args, objective)
    print(ROW.format(*HEADER))
    for name, pair in pairs.items():
        report(name, pair, test, args)
    draw_plane(pairs["two latents"], images, args.output / "vae_plane.png")
    draw_images(pairs, images, args.output / "vae_images.png")
    print(f"The pictures are in {args.output}/vae_plane.png and vae_images.png.")


if __name__ == "__main__":
    with pyro.validation_enabled(False):
        main()
