"""A latent SDE of a stochastic Lorenz attractor, learnt in two ways.

The attractor is simulated, observed at 41 times with noise, and learnt by a posterior that is
simulated and by one that is not. Printed are the parts of the evidence lower bound of series that
were held out; the picture shows draws of both priors beside the data. Sizes are smaller than in
the literature (48 hidden units, noise of scale 0.1), so that one core does.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pyro
import torch
from matplotlib import pyplot as plt
from pyro.infer import SVI
from pyro.optim import ClippedAdam
from torch import Tensor
from tqdm import tqdm

from flowvi.models import (
    DiffusionMLP,
    DriftMLP,
    GaussianDecoder,
    LatentSDE,
    LatentTerms,
    NormalStart,
    RecurrentEncoder,
    SimulatedLatent,
    SimulationFreeLatent,
)
from flowvi.objectives import BetaELBO, LinearSchedule
from flowvi.paths import SDE, StateDiffusion
from flowvi.samplers import Milstein, simulate

RESIDUAL, HIDDEN = 0.1, 48
COLUMNS = "{:>7}{:>14}{:>12}{:>12}{:>14}{:>9}"


@dataclass(frozen=True)
class Series:
    """Observations ``(B, T, data_dim)`` and the times that they share."""

    data: Tensor
    times: Tensor


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=1500, help="steps of the simulated one")
    parser.add_argument("--smoke-test", action="store_true", help="a few steps only, for tests")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for results")
    return parser.parse_args()


def train(
    latent: LatentSDE,
    series: Series,
    num_steps: int,
    *,
    lr: float,
    decay: float,
    anneal: int,
    batch: int,
) -> float:
    """Stock SVI with a divergence that is weighed in slowly; gives the seconds it took."""
    pyro.clear_param_store()
    objective = BetaELBO(1, beta=LinearSchedule(anneal), max_plate_nesting=1)
    optim = ClippedAdam({"lr": lr, "lrd": decay, "clip_norm": 1e6})
    svi = SVI(latent.model, latent.guide, optim, objective)
    began = time.process_time()
    for _ in tqdm(range(num_steps), leave=False):
        chosen = torch.randint(len(series.data), (batch,))
        svi.step(series.data[chosen], series.times)
    return time.process_time() - began


def terms(latent: LatentSDE, series: Series, num_samples: int = 20) -> LatentTerms:
    """Parts of the ELBO without a gradient."""
    with torch.no_grad():
        return latent.terms(series.data, series.times, num_samples=num_samples)


def row(label: object, value: LatentTerms, seconds: float) -> str:
    """One line of the log: the data term, both divergences and the bound, per series."""
    parts = (value.data, value.start, value.path, value.elbo)
    return COLUMNS.format(label, *(f"{float(p.mean()):.2f}" for p in parts), f"{seconds:.0f}")


def lorenz(num_series: int) -> Series:
    """Stochastic Lorenz attractor at 41 times on [0, 1], normalised, with observation noise."""
    rates = 10.0, 28.0, 8.0 / 3.0

    def drift(x: Tensor, t: Tensor) -> Tensor:
        a, b, c = x.unbind(-1)
        return torch.stack([rates[0] * (b - a), a * (rates[1] - c) - b, a * b - rates[2] * c], -1)

    sde = SDE(drift, StateDiffusion(lambda x, t: 0.15 * x, elementwise=True))
    fine = torch.linspace(0, 1, 401)
    states = simulate(sde, torch.randn(num_series, 3), fine, solver=Milstein()).states[::10]
    clean = (states - states.mean((0, 1))) / states.std((0, 1))
    return Series((clean + RESIDUAL * torch.randn_like(clean)).movedim(0, 1), fine[::10])


def make(simulated: bool, smoke_test: bool) -> LatentSDE:
    """Four latent dimensions, recurrent encoder, linear decoder, noise of known scale."""
    dim, context_dim, hidden = (2, 4, (8,)) if smoke_test else (4, 32, (HIDDEN, HIDDEN))
    process = SDE(
        DriftMLP(dim, hidden, time_dependent=False),
        DiffusionMLP(dim, hidden[0], scale=2.0),
    )
    encoder = RecurrentEncoder(3, context_dim, hidden[0])
    if simulated:
        drift = DriftMLP(dim, hidden, context_dim)
        posterior = SimulatedLatent(drift, encoder, dim, steps_per_interval=2)
    else:
        posterior = SimulationFreeLatent(encoder, dim, hidden_dims=hidden, num_times=8)
    return LatentSDE(process, GaussianDecoder(dim, 3, scale=RESIDUAL), posterior, NormalStart(dim))


def run(args: argparse.Namespace) -> None:
    """Both posteriors on the same series: the parts of the bound, and draws beside the data."""
    torch.manual_seed(0)
    series, fresh = lorenz(32 if args.smoke_test else 1024), lorenz(16 if args.smoke_test else 256)
    # A simulation-free step costs about half.
    settings = {"simulated": (True, 1), "simulation-free": (False, 2)}
    print(COLUMNS.format("", "data term", "start KL", "path KL", "ELBO", "seconds"))
    models = {}
    for name, (simulated, factor) in settings.items():
        torch.manual_seed(1)
        latent = models[name] = make(simulated, args.smoke_test)
        num_steps = factor * (1 if args.smoke_test else args.num_steps)
        seconds = train(
            latent,
            series,
            num_steps,
            lr=1e-2,
            decay=0.05 ** (1 / num_steps),
            anneal=num_steps // 4 + 1,
            batch=64,
        )
        print(f"{name}, {num_steps} steps, held-out series:")
        print(row("", terms(latent, fresh), seconds))
    picture(models, fresh, args.output / "latent_sde.png")


@torch.no_grad()
def picture(models: dict[str, LatentSDE], series: Series, path: Path) -> None:
    """Data beside draws of each learnt prior, as curves in three dimensions."""
    torch.manual_seed(2)
    figure = plt.figure(figsize=(4.5 * (1 + len(models)), 4.5), layout="constrained")
    shown = {"data": series.data[:30]}
    for name, latent in models.items():
        states = latent.model(None, series.times, num_series=30)
        shown[f"draws of the prior, {name}"] = latent.likelihood(states).mean
    for place, (name, curves) in enumerate(shown.items(), 1):
        ax = figure.add_subplot(1, len(shown), place, projection="3d")
        for curve in curves:
            ax.plot(*curve.T.numpy(), linewidth=0.8)
        ax.set_title(name, y=0.95)
        ax.set(xlim=(-3, 3), ylim=(-3, 3), zlim=(-3, 3))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Learn it twice and save the picture."""
    matplotlib.use("Agg")
    args = parse()
    args.output.mkdir(parents=True, exist_ok=True)
    pyro.enable_validation(False)
    run(args)
    print(f"The picture is in {args.output}/latent_sde.png.")


if __name__ == "__main__":
    main()
