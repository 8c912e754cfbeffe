"""Rectified flows with three couplings of noise and data: two problems in the plane, and digits.

``python examples/rectified_flow.py`` trains a flow under the independent, the minibatch optimal
transport and the learned coupling by Pyro's own ``SVI`` (one to four minutes each on one core),
and prints normalised path energy, straightness and 2-Wasserstein distance to the data. The picture
shows samples and their paths. ``--data digits`` (or ``mnist`` with ``--folder``) trains Brownian
bridges on images in place of that and prints the bound, part by part.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from image_bridges import BRIDGES, Pictures, load, measure, train_bridge
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from planar_flows import COUPLINGS, PROBLEMS, eight_gaussians, judge, train

from flowvi.models import RectifiedFlow
from flowvi.samplers import ProbabilityFlow, ReverseSDE, sample, sample_path
from flowvi.transforms import Euler

COLUMNS = ("problem", "coupling", "path energy", "straightness", "W2, 5 calls", "W2")
ROW = "{:<22}{:<15}{:>12}{:>14}{:>13}{:>9}"
IMAGE_COLUMNS = ("coupling", "bound", "KL of start", "reference", "path")
IMAGE_ROW = "{:<14}{:>20}{:>13}{:>12}{:>12}"
FLOW, END, START = "#0072B2", "#D55E00", "#888888"


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="plane", choices=["plane", "digits", "mnist"])
    parser.add_argument("--folder", type=Path, help="folder with the MNIST files")
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--couplings", nargs="+", default=list(COUPLINGS), choices=list(COUPLINGS))
    parser.add_argument("--num-steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke-test", action="store_true", help="a few steps only, for tests")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for results")
    return parser.parse_args()


def draw_paths(flow: RectifiedFlow, ax: Axes, number: int = 300) -> None:
    """Paths of the flow, with their starts and ends."""
    states = sample_path(flow, ProbabilityFlow(Euler), (number,), 40).states
    ax.plot(*states[:, : number // 2].unbind(-1), color=FLOW, lw=0.4, alpha=0.6)
    ax.plot(*states[0].T, ".", color=START, ms=2)
    ax.plot(*states[-1].T, ".", color=END, ms=2)


def draw_samples(flow: RectifiedFlow, ax: Axes, number: int) -> None:
    """Samples by five Euler steps over the data."""
    ax.plot(*eight_gaussians(number).T, ".", color=START, ms=1.5)
    ax.plot(*sample(flow, ProbabilityFlow(Euler), (number,), 5).T, ".", color=END, ms=1.5)


def plane(args: argparse.Namespace) -> list[str]:
    """Train on the problems in the plane; table, and a picture in the output folder."""
    number = 100 if args.smoke_test else 2000
    shape = (2 * len(args.problems), len(args.couplings))
    size = (3.2 * shape[1], 3.2 * shape[0])
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    lines = [ROW.format(*COLUMNS)]
    for row, problem in enumerate(args.problems):
        for column, coupling in enumerate(args.couplings):
            flow = train(problem, coupling, args.num_steps, args.seed)
            found = judge(flow, number)
            cells = (found.path_energy, found.straightness, found.few, found.many)
            lines.append(ROW.format(problem, coupling, *(f"{c:.3f}" for c in cells)))
            draw_paths(flow, axes[2 * row, column])
            draw_samples(flow, axes[2 * row + 1, column], number)
            axes[2 * row, column].set_title(f"{coupling}: paths", loc="left")
            axes[2 * row + 1, column].set_title("five Euler steps (grey: data)", loc="left")
        axes[2 * row, 0].set_ylabel(problem)
        lines.append(f"{'':<22}two samples of the data are {found.floor:.3f} apart")
    for ax in axes.flat:
        ax.set(xlim=(-7, 7), ylim=(-7, 7), aspect="equal", xticks=[], yticks=[])
    figure.savefig(args.output / "rectified_flow.png", dpi=110)
    plt.close(figure)
    return lines


def pictures(args: argparse.Namespace) -> list[str]:
    """Train bridges on images; table of bounds, and a picture of samples."""
    data: Pictures = load(args.data, args.folder)
    lines = [IMAGE_ROW.format(*IMAGE_COLUMNS)]
    figure, axes = plt.subplots(1, len(BRIDGES), figsize=(4 * len(BRIDGES), 4.2))
    for ax, name in zip(axes, BRIDGES, strict=True):
        flow = train_bridge(data, name, args.num_steps, args.seed)
        terms = measure(flow, data, 1 if args.smoke_test else 20)
        error = float(terms.elbo.std()) / len(data.test) ** 0.5
        bound = f"{float(terms.elbo.mean()):.2f} +- {error:.2f}"
        parts = (terms.coupling, terms.reference, terms.path)
        lines.append(IMAGE_ROW.format(name, bound, *(f"{float(p.mean()):.2f}" for p in parts)))
        steps = 5 if args.smoke_test else 100
        drawn = sample(flow, ReverseSDE(), (64,), steps).reshape(8, 8, data.side, data.side)
        ax.imshow(drawn.transpose(1, 2).reshape(8 * data.side, -1), cmap="gray_r", vmin=-2, vmax=2)
        ax.set(title=name, xticks=[], yticks=[])
    figure.savefig(args.output / "rectified_flow.png", dpi=110)
    plt.close(figure)
    return lines


def main() -> None:
    """Train, print the table, save the picture."""
    args = parse()
    if args.smoke_test:
        args.num_steps, args.problems = 2, args.problems[:1]
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    lines = plane(args) if args.data == "plane" else pictures(args)
    (args.output / "rectified_flow.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    print(f"\nTable and picture are in {args.output}/ (rectified_flow.txt, rectified_flow.png).")


if __name__ == "__main__":
    main()
