"""Density estimation with continuous flows on four 2-D toys, with and without penalties on paths.

``python examples/cnf_density.py`` trains two flows per toy by maximum likelihood with Pyro's own
``SVI`` (minutes per toy on one core), evaluates them by an adaptive solver, and prints the test
negative log-likelihood, the integral of the density over a grid, and the number of evaluations of
the field (NFE). The picture shows data, densities and paths.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import pyro
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from pyro.infer import SVI
from torch import Tensor
from toys import TOYS
from tqdm import tqdm

from flowvi.distributions import Flow
from flowvi.flows import cnf
from flowvi.objectives import ELBO, Objective, Regularized
from flowvi.transforms import (
    RK4,
    Adaptive,
    Continuous,
    DivergenceRate,
    JacobianNorm,
    KineticEnergy,
)

HALF_WIDTH = 5.0
COLUMNS = ("toy", "flow", "test NLL", "integral", "NFE", "kinetic energy")
ROW = "{:<18}{:<14}{:>16}{:>11}{:>6}{:>16}"


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toys", nargs="+", default=list(TOYS), choices=list(TOYS))
    parser.add_argument("--num-steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--kinetic", type=float, default=0.02, help="weight of the kinetic energy")
    parser.add_argument("--jacobian", type=float, default=0.02, help="weight of the Jacobian norm")
    parser.add_argument(
        "--divergence-rate", type=float, default=3e-4, help="weight of the divergence's rate"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke-test", action="store_true", help="a few steps only, for tests")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for results")
    return parser.parse_args()


def train(toy: str, objective: Objective, args: argparse.Namespace) -> Flow:
    """Maximum likelihood by stock SVI, on fresh data at every step."""
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    flow = cnf(2, solver=RK4(16), eval_solver=Adaptive())

    def model(x: Tensor) -> None:
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=1 / len(x)):
            pyro.sample("x", flow(), obs=x)

    optimizer = pyro.optim.ClippedAdam({"lr": 1e-2, "lrd": 0.03 ** (1 / args.num_steps)})
    svi = SVI(model, lambda x: None, optimizer, objective)
    bar = tqdm(range(args.num_steps), desc=f"{toy}, {type(objective).__name__}")
    for step in bar:
        loss = svi.step(TOYS[toy](args.batch_size, generator))
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss:.3f}")
    return flow.eval()


@torch.no_grad()
def density_on_grid(flow: Flow, size: int) -> tuple[Tensor, float]:
    """Density ``(size, size)`` and its integral."""
    axis = torch.linspace(-HALF_WIDTH, HALF_WIDTH, size)
    grid = torch.cartesian_prod(axis, axis)
    log_prob = torch.cat([flow().log_prob(part) for part in grid.split(10_000)])
    density = log_prob.exp().reshape(size, size)
    return density, float(density.double().sum() * (axis[1] - axis[0]) ** 2)


@torch.no_grad()
def measure(flow: Flow, test: Tensor) -> tuple[float, float, int, float]:
    """Test negative log-likelihood, its standard error, NFE and mean kinetic energy."""
    log_prob = flow().log_prob(test)
    path: Continuous = flow.transform.parts[0]
    energy = path.call_with_integrals(
        torch.randn(1000, 2), [lambda stage: 0.5 * stage.velocity.square().sum(-1)]
    )[2][0]
    return (
        -float(log_prob.mean()),
        float(log_prob.std()) / len(test) ** 0.5,
        path.last_solve.num_evaluations,
        float(energy.mean()),
    )


@torch.no_grad()
def draw_paths(flow: Flow, ax: Axes, number: int = 60) -> None:
    """Paths from base to target, in the coordinates before the last affine map."""
    path: Continuous = flow.transform.parts[0]
    start = torch.randn(number, 2)
    x = path.trajectory(start, torch.linspace(0, 1, 30)).x
    ax.plot(x[..., 0], x[..., 1], color="#0072B2", lw=0.6, alpha=0.7)
    ax.plot(*start.T, ".", color="#888888", ms=2)
    ax.plot(*x[-1].T, ".", color="#D55E00", ms=3)


def draw_row(axes: list[Axes], toy: str, test: Tensor, flows: dict[str, Flow], size: int) -> None:
    """Data, and density and paths of every flow."""
    axes[0].plot(*test[:3000].T, ".", ms=1, color="#444444")
    axes[0].set_title(toy, loc="left", fontweight="bold")
    for i, (name, flow) in enumerate(flows.items()):
        density, _ = density_on_grid(flow, size)
        extent = (-HALF_WIDTH, HALF_WIDTH) * 2
        axes[1 + 2 * i].imshow(density.T, origin="lower", extent=extent, cmap="viridis")
        axes[1 + 2 * i].set_title(f"{name}: density")
        draw_paths(flow, axes[2 + 2 * i])
        axes[2 + 2 * i].set_title(f"{name}: paths")
    for ax in axes:
        ax.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal", xticks=[], yticks=[])


def main() -> None:
    """Train, print the table, save the picture."""
    args = parse()
    size, num_test = 200, 10_000
    if args.smoke_test:
        args.num_steps, args.toys, size, num_test = 3, args.toys[:1], 60, 500
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    figure, axes = plt.subplots(
        len(args.toys), 5, figsize=(15, 3.1 * len(args.toys)), squeeze=False, layout="constrained"
    )
    lines = [ROW.format(*COLUMNS)]
    for row, toy in zip(axes, args.toys, strict=True):
        penalties = (
            KineticEnergy(args.kinetic),
            JacobianNorm(args.jacobian),
            DivergenceRate(args.divergence_rate),
        )
        objectives = {"plain": ELBO(), "regularised": Regularized(ELBO(), *penalties)}
        test = TOYS[toy](num_test, torch.Generator().manual_seed(args.seed + 10_000))
        flows = {name: train(toy, objective, args) for name, objective in objectives.items()}
        for name, flow in flows.items():
            nll, error, nfe, energy = measure(flow, test)
            integral = density_on_grid(flow, size)[1]
            cells = (f"{nll:.3f} +- {error:.3f}", f"{integral:.5f}", nfe, f"{energy:.2f}")
            lines.append(ROW.format(toy, name, *cells))
        draw_row(list(row), toy, test, flows, size)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "cnf_density.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    figure.savefig(args.output / "cnf_density.png", dpi=100)
    plt.close(figure)
    print("\n".join(lines))
    print(f"\nTable and picture are in {args.output}/ (cnf_density.txt, cnf_density.png).")


if __name__ == "__main__":
    main()
