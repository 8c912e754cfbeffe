"""Diffusion with and without a learned encoder: bounds by their terms, samples, trajectories.

``python examples/diffusion.py`` trains a variational diffusion model (VDM) and DiffEnc, with about
as many parameters in all, on two moons and on scikit-learn's digits, by Pyro's own ``SVI`` (about
ten minutes on one core), and prints the evidence lower bound on test data by its terms. With
``--data FOLDER`` the images are those of MNIST (idx.gz files) and the network is a U-Net. The
picture shows samples, and trajectories of the generative process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pyro
import torch
from images import load_images
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from toys import TOYS
from tqdm import tqdm

from flowvi.infer import Average
from flowvi.models import VDM, DiffEnc, DiffusionModel, LearnedEncoder, LevelEnd, RealEnd
from flowvi.nn import FourierFeatures, MLPDenoiser, ResidualDenoiser, UNet
from flowvi.paths import LinearLogSNR, Prediction
from flowvi.plots import image_grid
from flowvi.samplers import Ancestral, DPMSolver, ProbabilityFlow, sample_path

COLUMNS = ("data", "model", "parameters", "prior", "reconstruction", "diffusion", "bound")
ROW = "{:<9}{:<9}{:>11}{:>9}{:>16}{:>11}{:>20}"


@dataclass(frozen=True)
class Task:
    """Data, what makes a model of them, and how long to train it.

    Args:
        name: of the data.
        batch: draws ``number`` training items.
        test: test items.
        make: makes a model; with or without an encoder.
        num_steps: optimiser steps.
        per_pixel: whether bounds are in bits per pixel, not in nats.
    """

    name: str
    batch: Callable[[int], Tensor]
    test: Tensor
    make: Callable[[bool], DiffusionModel]
    num_steps: int
    per_pixel: bool


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with MNIST; digits without it")
    parser.add_argument("--toy", default="moons", choices=list(TOYS))
    parser.add_argument("--num-steps", type=int, help="steps; the task's own if left out")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke-test", action="store_true", help="a few steps only, for tests")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for results")
    return parser.parse_args()


def toy_task(args: argparse.Namespace) -> Task:
    """Points in the plane; networks with two hidden layers."""
    generator = torch.Generator().manual_seed(args.seed)
    schedule = LinearLogSNR(-6.0, 9.0)

    def make(encoded: bool) -> DiffusionModel:
        end, network = RealEnd((2,)), MLPDenoiser(2, (128, 117 if encoded else 128))
        if not encoded:
            return VDM(end, network, schedule, prediction=Prediction.ANGULAR)
        return DiffEnc(end, network, LearnedEncoder(MLPDenoiser(2, (40,)), schedule), schedule)

    def batch(number: int) -> Tensor:
        return TOYS[args.toy](number, generator)

    test = TOYS[args.toy](5000, torch.Generator().manual_seed(args.seed + 10_000))
    return Task(args.toy, batch, test, make, 4000, False)


def image_task(args: argparse.Namespace) -> Task:
    """Digits with a residual network, MNIST with a U-Net."""
    images = load_images(args.data)
    shape = tuple(images.train.shape[1:])
    schedule = LinearLogSNR(-5.0, 13.3 if args.data else 9.0)

    def network(width: int) -> nn.Module:
        if args.data:
            return UNet(shape, width, (1, 2, 2), attention=True, fourier=FourierFeatures(2, 3))
        return ResidualDenoiser(shape[1] * shape[2], width, 3, fourier=FourierFeatures(0, 1))

    def make(encoded: bool) -> DiffusionModel:
        end = LevelEnd(shape, images.num_levels)
        wide, narrow, small = (32, 28, 14) if args.data else (256, 230, 96)
        if not encoded:
            return VDM(end, network(wide), schedule, prediction=Prediction.ANGULAR)
        return DiffEnc(end, network(narrow), LearnedEncoder(network(small), schedule), schedule)

    def batch(number: int) -> Tensor:
        return images.train[torch.randint(len(images.train), (number,))]

    name = "MNIST" if args.data else "digits"
    return Task(name, batch, images.test, make, 20_000 if args.data else 4000, True)


def train(task: Task, model: DiffusionModel, num_steps: int, args: argparse.Namespace) -> None:
    """Stock SVI; the model is left with the moving average of its weights."""
    pyro.clear_param_store()
    optimizer = pyro.optim.ClippedAdam({"lr": 2e-3, "lrd": 0.05 ** (1 / num_steps)})
    svi = SVI(model.model, model.guide, optimizer, Trace_ELBO())
    average = Average(max(0.0, 1 - 20 / num_steps))
    bar = tqdm(range(num_steps), desc=f"{task.name}, {type(model).__name__}")
    with pyro.validation_enabled(False):
        for step in bar:
            loss = svi.step(task.batch(args.batch_size)) / args.batch_size
            average.update(model.named_parameters())
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss:.2f}")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(average.values[name])


@torch.no_grad()
def measure(task: Task, model: DiffusionModel, num_times: int) -> str:
    """A line of the table: terms on test data, with the standard error of the bound."""
    model.eval()
    terms = [model.terms(part, num_times=num_times) for part in task.test.split(500)]
    unit = model.end.num_pixels * torch.tensor(2.0).log() if task.per_pixel else 1.0

    def column(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in terms]) / unit

    loss = -column("elbo")
    size = sum(p.numel() for p in model.parameters())
    parts = (f"{column(n).mean():.4f}" for n in ("prior", "reconstruction", "diffusion"))
    bound = f"{loss.mean():.4f} +- {loss.std() / len(loss) ** 0.5:.4f}"
    return ROW.format(task.name, type(model).__name__, size, *parts, bound)


def draw_points(task: Task, model: DiffusionModel, axes: list[Axes], num_steps: int) -> None:
    """Samples, and some of the trajectories that led to them."""
    sampler = ProbabilityFlow() if model.path.encoder is None else Ancestral()
    path = sample_path(model.process(), sampler, (1000,), num_steps)
    axes[0].plot(*path.end.T, ".", ms=2, color="#0072B2")
    axes[0].set_title(f"{type(model).__name__}: samples")
    few = path.states[:, :40]
    axes[1].plot(few[..., 0], few[..., 1], lw=0.5, color="#888888")
    axes[1].plot(*few[0].T, ".", ms=3, color="#000000")
    axes[1].plot(*few[-1].T, ".", ms=4, color="#D55E00")
    axes[1].set_title(f"{type(model).__name__}: {type(sampler).__name__}")


def draw_images(task: Task, model: DiffusionModel, axes: list[Axes], num_steps: int) -> None:
    """Samples, and what some of them looked like on the way."""
    sampler = DPMSolver(2) if model.path.encoder is None else Ancestral()
    shape = model.end.event_shape
    path = sample_path(model.process(), sampler, (64,), num_steps)
    samples = model.law_at_end(path.end).mean
    image_grid(samples, axes[0], high=float(samples.max()))
    axes[0].set_title(f"{type(model).__name__}: samples")
    chosen = torch.linspace(0, num_steps, 8).long()
    few = path.states[chosen, :8].transpose(0, 1).flatten(0, 1).unflatten(-1, shape)
    image_grid(few, axes[1], num_columns=8, low=-1.5, high=1.5)
    axes[1].set_title(f"{type(model).__name__}: {type(sampler).__name__}, t from 0 to 1")


def main() -> None:
    """Train, print the table, save the picture."""
    args = parse()
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    figure, axes = plt.subplots(2, 5, figsize=(16, 6.6), layout="constrained")
    lines = [ROW.format(*COLUMNS)]
    for row, task in zip(axes, (toy_task(args), image_task(args)), strict=True):
        num_steps = 2 if args.smoke_test else (args.num_steps or task.num_steps)
        sampled = 4 if args.smoke_test else 64
        if task.per_pixel:
            image_grid(task.test[:64], row[0])
        else:
            row[0].plot(*task.test[:1000].T, ".", ms=2, color="#444444")
        row[0].set_title(task.name, loc="left", fontweight="bold")
        draw = draw_images if task.per_pixel else draw_points
        for i, encoded in enumerate((False, True)):
            pyro.set_rng_seed(args.seed)
            model = task.make(encoded)
            train(task, model, num_steps, args)
            lines.append(measure(task, model, 2 if args.smoke_test else 100))
            draw(task, model, list(row[1 + 2 * i : 3 + 2 * i]), sampled)
        if not task.per_pixel:
            for ax in row:
                ax.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal", xticks=[], yticks=[])
    args.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output / "diffusion.png", dpi=100)
    plt.close(figure)
    lines.append("\nPoints: nats; images: bits per pixel. Terms are on test data, 100 times each.")
    (args.output / "diffusion.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    print(f"Table and picture are in {args.output}/ (diffusion.txt, diffusion.png).")


if __name__ == "__main__":
    main()
