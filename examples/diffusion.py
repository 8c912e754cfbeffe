"""Diffusion and rectified flow side by side: bounds by their terms, samples, trajectories.

``python examples/diffusion.py`` trains a variational diffusion model (VDM), DiffEnc with as many
parameters, and Brownian bridges (rectified flows that keep their noise) under an independent, a
minibatch optimal transport and a learned coupling, on two moons and on scikit-learn's digits, by
Pyro's own ``SVI`` (some minutes on one core). It prints the evidence lower bound on test
data by its terms. With ``--data FOLDER`` the images are those of MNIST (idx.gz files) and the
diffusion's network is a U-Net. The picture shows samples and the paths that led to them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pyro
import torch
from image_bridges import BRIDGES, Pictures, bridge
from images import Images, load_images
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from planar_flows import fit, planar_bridge
from torch import Tensor, nn
from toys import TOYS

from flowvi.models import (
    VDM,
    DiffEnc,
    DiffusionModel,
    LearnedEncoder,
    LevelEnd,
    RealEnd,
    RectifiedFlow,
)
from flowvi.nn import FourierFeatures, MLPDenoiser, ResidualDenoiser, UNet
from flowvi.paths import LinearLogSNR, Prediction
from flowvi.plots import image_grid
from flowvi.samplers import Ancestral, DPMSolver, ProbabilityFlow, ReverseSDE, sample_path

DIFFUSIONS = ("VDM", "DiffEnc")
COLUMNS = ("data", "model", "parameters", "start", "data term", "path", "bound")
ROW = "{:<8}{:<22}{:>11}{:>9}{:>11}{:>10}{:>20}"


@dataclass(frozen=True)
class Task:
    """Data, what makes a model of them, and how long to train it.

    Args:
        name: of the data.
        batch: draws ``number`` training items.
        test: test items.
        make: makes a model by its name.
        values: items as a bridge takes them, real numbers in a row.
        num_steps: optimiser steps of a diffusion, and of a bridge.
        lr: learning rate of a diffusion, and of a bridge.
        log_cell: nats by which the log-density of ``values`` is above that of items.
        unit: nats that a bound is counted in.
    """

    name: str
    batch: Callable[[int], Tensor]
    test: Tensor
    make: Callable[[str], DiffusionModel | RectifiedFlow]
    values: Callable[[Tensor], Tensor]
    num_steps: tuple[int, int]
    lr: tuple[float, float]
    log_cell: float = 0.0
    unit: float = 1.0

    @property
    def is_image(self) -> bool:
        return self.test.dim() > 2


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with MNIST; digits without it")
    parser.add_argument("--toy", default="moons", choices=list(TOYS))
    parser.add_argument("--num-steps", type=int, help="steps; the task's own if left out")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="100 steps of each model")
    parser.add_argument("--smoke-test", action="store_true", help="a few steps only, for tests")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for results")
    return parser.parse_args()


def toy_task(args: argparse.Namespace) -> Task:
    """Points in the plane; networks with two residual blocks, or two hidden layers."""
    generator = torch.Generator().manual_seed(args.seed)

    def make(name: str) -> DiffusionModel | RectifiedFlow:
        if name in BRIDGES:
            return planar_bridge(name, sigma=0.7)
        schedule, end = LinearLogSNR(-6.0, 9.0), RealEnd((2,))
        network = ResidualDenoiser(2, 64 if name == "VDM" else 62, 2)
        if name == "VDM":
            return VDM(end, network, schedule, prediction=Prediction.ANGULAR)
        return DiffEnc(end, network, LearnedEncoder(MLPDenoiser(2, (40,)), schedule), schedule)

    def batch(number: int) -> Tensor:
        return TOYS[args.toy](number, generator)

    test = TOYS[args.toy](2000, torch.Generator().manual_seed(args.seed + 10_000))
    return Task(args.toy, batch, test, make, lambda x: x, (3000, 1500), (4e-3, 4e-3))


def image_task(args: argparse.Namespace) -> Task:
    """Digits with a residual network, MNIST with a U-Net."""
    images = load_images(args.data)
    shape = tuple(images.train.shape[1:])
    schedule = LinearLogSNR(-5.0, 13.3 if args.data else 5.0)

    def make(name: str) -> DiffusionModel | RectifiedFlow:
        if name in BRIDGES:
            return bridge(math.prod(shape), name)
        end, encoded = LevelEnd(shape, images.num_levels), name == "DiffEnc"
        network, encoder = _image_networks(shape, encoded=encoded, large=bool(args.data))
        if not encoded:
            return VDM(end, network, schedule, prediction=Prediction.ANGULAR)
        return DiffEnc(end, network, LearnedEncoder(encoder, schedule), schedule)

    def batch(number: int) -> Tensor:
        return images.train[torch.randint(len(images.train), (number,))]

    flat = _flat(images)
    return Task(
        "MNIST" if args.data else "digits",
        batch,
        images.test,
        make,
        lambda x: flat.values(x.flatten(1)),
        (20_000, 5000) if args.data else (4000, 1000),
        (2e-3, 2e-3) if args.data else (8e-3, 2e-3),
        # A bridge takes levels with uniform noise, spread over four.
        log_cell=math.prod(shape) * math.log(4 / images.num_levels),
        unit=math.prod(shape) * math.log(2),
    )


def _image_networks(
    shape: tuple[int, ...], *, encoded: bool, large: bool
) -> tuple[nn.Module, nn.Module]:
    """Denoiser and encoder; the frequencies tell neighbouring levels apart."""
    pixels = math.prod(shape)
    if not large:
        width = 158 if encoded else 160
        network = ResidualDenoiser(pixels, width, 2, fourier=FourierFeatures(3, 4))
        return network, MLPDenoiser(pixels, (30,))
    fourier = FourierFeatures(6, 7)
    network = UNet(shape, 28 if encoded else 32, (1, 2, 2), attention=True, fourier=fourier)
    return network, UNet(shape, 14, (1, 2, 2))


def _flat(images: Images) -> Pictures:
    train, test = (part.flatten(1) for part in (images.train, images.test))
    return Pictures(train, test, images.num_levels, images.train.shape[-1])


def train(
    task: Task, model: DiffusionModel | RectifiedFlow, args: argparse.Namespace, label: str
) -> None:
    """Stock SVI; the model is left with the moving average of its weights."""
    is_bridge = isinstance(model, RectifiedFlow)
    num_steps = args.num_steps or task.num_steps[is_bridge]

    def draw() -> Tensor:
        x = task.batch(args.batch_size)
        return task.values(x) if is_bridge else x

    label = f"{task.name}, {label}"
    fit(model, draw, num_steps, label, lr=task.lr[is_bridge], clip_norm=100.0)


@torch.no_grad()
def measure(task: Task, model: DiffusionModel | RectifiedFlow, label: str, repeats: int) -> str:
    """A line of the table: terms on test data, with the standard error of the bound."""
    parts = [[] for _ in range(3)]
    for x in task.test.split(500):
        if isinstance(model, RectifiedFlow):
            runs = [model.terms(task.values(x)) for _ in range(repeats)]
            chosen = [(r.coupling, -r.reference - task.log_cell, r.path) for r in runs]
            found = [torch.stack(column).mean(0) for column in zip(*chosen, strict=True)]
        else:
            terms = model.terms(x, num_times=repeats)
            found = [terms.prior, terms.reconstruction, terms.diffusion]
        for column, part in zip(parts, found, strict=True):
            column.append(part / task.unit)
    columns = [torch.cat(column) for column in parts]
    loss = sum(columns)
    size = sum(p.numel() for p in model.parameters())
    bound = f"{loss.mean():.4f} +- {loss.std() / len(loss) ** 0.5:.4f}"
    return ROW.format(task.name, label, size, *(f"{c.mean():.4f}" for c in columns), bound)


def draw_points(model: DiffusionModel | RectifiedFlow, axes: list[Axes], num_steps: int) -> str:
    """Samples, and some of the paths that led to them; gives the sampler's name."""
    is_bridge = isinstance(model, RectifiedFlow)
    plain = not is_bridge and model.path.encoder is None
    sampler = ReverseSDE() if is_bridge else ProbabilityFlow() if plain else Ancestral()
    path = sample_path(model if is_bridge else model.process(), sampler, (1000,), num_steps)
    axes[0].plot(*path.end.T, ".", ms=2, color="#0072B2")
    few = path.states[:, :12]
    axes[1].plot(few[..., 0], few[..., 1], lw=0.5, color="#999999")
    axes[1].plot(*few[0].T, ".", ms=3, color="#000000")
    axes[1].plot(*few[-1].T, ".", ms=4, color="#D55E00")
    return type(sampler).__name__


def draw_images(
    task: Task, model: DiffusionModel | RectifiedFlow, axes: list[Axes], num_steps: int
) -> str:
    """Samples, and what some of them looked like on the way; gives the sampler's name."""
    is_bridge = isinstance(model, RectifiedFlow)
    plain = not is_bridge and model.path.encoder is None
    sampler = ReverseSDE() if is_bridge else DPMSolver(2) if plain else Ancestral()
    path = sample_path(model if is_bridge else model.process(), sampler, (64,), num_steps)
    shape, size = task.test.shape[1:], 2.0 if is_bridge else 1.0
    image_grid(path.end.unflatten(-1, shape), axes[0], low=-size, high=size)
    chosen = torch.linspace(0, len(path.states) - 1, 8).long()
    few = path.states[chosen, :8].transpose(0, 1).flatten(0, 1).unflatten(-1, shape)
    image_grid(few, axes[1], num_columns=8, low=-1.5 * size, high=1.5 * size)
    return type(sampler).__name__


def draw(
    task: Task, model: DiffusionModel | RectifiedFlow, axes: list[Axes], label: str, num_steps: int
) -> None:
    """Both pictures of a model, with their titles."""
    if task.is_image:
        name = draw_images(task, model, axes, num_steps)
        axes[1].set_title(f"{name}, t from 0 to 1", fontsize=9)
    else:
        name = draw_points(model, axes, num_steps)
        axes[1].set_title(f"{name} (black: start)", fontsize=9)
    axes[0].set_title(label)


def draw_data(task: Task, axes: list[Axes]) -> None:
    """Test data, in the first column."""
    if task.is_image:
        image_grid(task.test[:64], axes[0])
    else:
        axes[0].plot(*task.test[:1000].T, ".", ms=2, color="#444444")
    axes[0].set_title(f"{task.name}: data", fontweight="bold")
    axes[1].axis("off")


def main() -> None:
    """Train, print the table, save the picture."""
    args = parse()
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    if args.smoke_test or args.quick:
        args.num_steps = 2 if args.smoke_test else 100
    names = (*DIFFUSIONS, *BRIDGES)
    figure, axes = plt.subplots(4, 1 + len(names), figsize=(17, 12), layout="constrained")
    lines = [ROW.format(*COLUMNS)]
    for row, task in enumerate((toy_task(args), image_task(args))):
        pair = axes[2 * row : 2 * row + 2]
        draw_data(task, list(pair[:, 0]))
        for column, name in enumerate(names, start=1):
            label = name if name in DIFFUSIONS else f"bridge, {name}"
            pyro.set_rng_seed(args.seed)
            model = task.make(name)
            train(task, model, args, label)
            lines.append(measure(task, model, label, 2 if args.smoke_test else 50))
            draw(task, model, list(pair[:, column]), label, 4 if args.smoke_test else 100)
        if not task.is_image:
            for ax in pair.flat:
                ax.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal", xticks=[], yticks=[])
    args.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output / "diffusion.png", dpi=80)
    plt.close(figure)
    lines.append(
        "\nMinus the bound and its terms on test data; points: nats, images: bits per pixel.\n"
        "VDM, DiffEnc: prior, reconstruction, diffusion. Bridges: divergence of the coupling,\n"
        "untied Brownian motion, integral of the drift. A batch pays for its optimal transport."
    )
    (args.output / "diffusion.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    print(f"Table and picture are in {args.output}/ (diffusion.txt, diffusion.png).")


if __name__ == "__main__":
    main()
