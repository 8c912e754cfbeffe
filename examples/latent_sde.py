"""Latent SDEs on two data sets: a stochastic Lorenz attractor, and human motion.

Without arguments a Lorenz attractor with noise is simulated, observed and learnt twice, by a
posterior that is simulated and by one that is not. With ``--data FOLDER`` the task is motion
capture: from 3 frames of a walk, predict the other 297. FOLDER holds ``mocap35.npz`` with arrays
``train`` (16, 300, 50), ``val`` (3, 300, 50) and ``test`` (4, 300, 50): subject 35 of the CMU
motion capture database (mocap.cs.cmu.edu), prepared as in Yildiz, Heinonen and Lahdesmaki (2019),
ODE2VAE, arXiv:1905.10994.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pyro
import torch
from matplotlib import pyplot as plt
from pyro.infer import SVI
from pyro.optim import ClippedAdam
from torch import Tensor, nn
from tqdm import tqdm

from flowvi.models import (
    DriftMLP,
    FirstFramesEncoder,
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

FRAMES_SEEN, FRAME_TIME = 3, 0.1
COLUMNS = "{:>7}{:>14}{:>12}{:>12}{:>14}{:>9}"


class Elementwise(nn.Module):
    """Diffusion with a small network for each coordinate."""

    def __init__(self, dim: int, hidden_dim: int, scale: float) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(dim, hidden_dim))
        self.bias = nn.Parameter(torch.randn(dim, hidden_dim))
        self.last = nn.Parameter(torch.randn(dim, hidden_dim) / hidden_dim)
        self.offset = nn.Parameter(torch.zeros(dim))
        self.scale = scale

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = torch.tanh(x.unsqueeze(-1) * self.first + self.bias)
        return self.scale * torch.sigmoid((hidden * self.last).sum(-1) + self.offset) + 1e-3


@dataclass(frozen=True)
class Series:
    """Observations ``(B, T, data_dim)`` and the times that they share."""

    data: Tensor
    times: Tensor


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with mocap35.npz; Lorenz without it")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    parser.add_argument(
        "--num-steps", type=int, help="optimiser steps; the task's own if left out"
    )
    parser.add_argument("--substeps", type=int, default=1, help="steps between two frames")
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
    batch: int | None = None,
    length: Callable[[int], int | None] = lambda step: None,
    look: Callable[[int], object] = lambda step: None,
) -> float:
    """Stock SVI with a divergence that is weighed in slowly; gives the seconds it took.

    ``length`` says how many observations a step sees: long series are learnt from their beginning.
    """
    pyro.clear_param_store()
    objective = BetaELBO(1, beta=LinearSchedule(anneal), max_plate_nesting=1)
    optim = ClippedAdam({"lr": lr, "lrd": decay, "clip_norm": 1e6})
    svi = SVI(latent.model, latent.guide, optim, objective)
    began = time.process_time()
    for step in tqdm(range(num_steps), leave=False):
        data = series.data
        if batch is not None:
            data = data[torch.randint(len(data), (batch,))]
        shown = length(step)
        svi.step(data[:, :shown], series.times[:shown])
        look(step + 1)
    return time.process_time() - began


def terms(latent: LatentSDE, series: Series, num_samples: int = 20) -> LatentTerms:
    """Parts of the ELBO without a gradient."""
    with torch.no_grad():
        return latent.terms(series.data, series.times, num_samples=num_samples)


def row(label: object, value: LatentTerms, seconds: float) -> str:
    """One line of the log: the data term, both divergences and the bound, per series."""
    parts = (value.data, value.start, value.path, value.elbo)
    return COLUMNS.format(label, *(f"{float(p.mean()):.2f}" for p in parts), f"{seconds:.0f}")


# Lorenz.


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
    return Series((clean + 0.01 * torch.randn_like(clean)).movedim(0, 1), fine[::10])


def lorenz_model(simulated: bool, smoke_test: bool) -> LatentSDE:
    """Four latent dimensions, recurrent encoder, linear decoder, noise of scale 0.01."""
    dim, context_dim, hidden = (2, 4, (8,)) if smoke_test else (4, 64, (100, 100))
    process = SDE(
        DriftMLP(dim, hidden, time_dependent=False),
        StateDiffusion(Elementwise(dim, hidden[0], 2.0), elementwise=True),
    )
    encoder = RecurrentEncoder(3, context_dim, hidden[0])
    if simulated:
        drift = DriftMLP(dim, hidden, context_dim)
        posterior = SimulatedLatent(drift, encoder, dim, steps_per_interval=2)
    else:
        posterior = SimulationFreeLatent(encoder, dim, hidden_dims=hidden, num_times=4)
    return LatentSDE(process, GaussianDecoder(dim, 3, scale=0.01), posterior, NormalStart(dim))


def run_lorenz(args: argparse.Namespace) -> None:
    """Both posteriors on the same series: the parts of the bound, and draws beside the data."""
    torch.manual_seed(0)
    series, fresh = lorenz(32 if args.smoke_test else 1024), lorenz(16 if args.smoke_test else 256)
    # A simulation-free step costs about a fifth.
    settings = {"simulated": (True, 1), "simulation-free": (False, 5)}
    print(COLUMNS.format("", "data term", "start KL", "path KL", "ELBO", "seconds"))
    models = {}
    for name, (simulated, factor) in settings.items():
        torch.manual_seed(1)
        latent = models[name] = lorenz_model(simulated, args.smoke_test)
        num_steps = factor * (1 if args.smoke_test else args.num_steps or 1500)
        seconds = train(
            latent,
            series,
            num_steps,
            lr=3e-3,
            decay=0.05 ** (1 / num_steps),
            anneal=num_steps // 3 + 1,
            batch=128,
        )
        print(f"{name}, {num_steps} steps, held-out series:")
        print(row("", terms(latent, fresh), seconds))
    lorenz_picture(models, fresh, args.output / "latent_sde.png")


@torch.no_grad()
def lorenz_picture(models: dict[str, LatentSDE], series: Series, path: Path) -> None:
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
        ax.set_title(name)
        ax.set(xlim=(-3, 3), ylim=(-3, 3), zlim=(-3, 3))
    figure.savefig(path, dpi=110)
    plt.close(figure)


# Motion capture.


def mocap(folder: Path) -> Iterator[Series]:
    """Training, validation and test series."""
    arrays = np.load(folder / "mocap35.npz")
    for name in ("train", "val", "test"):
        data = torch.as_tensor(arrays[name])
        yield Series(data, FRAME_TIME * torch.arange(data.shape[1]))


def mocap_model(smoke_test: bool, substeps: int) -> LatentSDE:
    """Six latent dimensions and a context of three numbers from the first three frames."""
    dim, context_dim, width, data_dim = 6, 3, 8 if smoke_test else 30, 50
    process = SDE(
        DriftMLP(dim, (width,), time_dependent=False),
        StateDiffusion(Elementwise(dim, width, 0.3), elementwise=True),
    )
    encoder = FirstFramesEncoder(data_dim, context_dim + dim, FRAMES_SEEN, (width,))
    drift = DriftMLP(dim, (width,), context_dim + dim, time_dependent=False)
    posterior = SimulatedLatent(
        drift, encoder, dim, steps_per_interval=1 if smoke_test else substeps
    )
    decoder = GaussianDecoder(dim, data_dim, (width,), scale=1.0, learn_scale=True)
    return LatentSDE(process, decoder, posterior, NormalStart(dim))


def forecast_errors(latent: LatentSDE, series: Series, num_samples: int) -> tuple[float, float]:
    """Squared error after the seen frames: of the mean of the draws, and mean over draws."""
    seen, times = series.data[:, :FRAMES_SEEN], series.times
    drawn = latent.interpolate(seen, times[:FRAMES_SEEN], times, num_samples=num_samples).means
    gap = drawn[:, :, FRAMES_SEEN:] - series.data[:, FRAMES_SEEN:]
    return float(gap.mean(0).square().mean()), float(gap.square().mean())


def run_mocap(args: argparse.Namespace) -> None:
    """Train on 16 walks, choose the iterate on 3, report the error on 4."""
    train_set, val_set, test_set = mocap(args.data)
    num_steps = 2 if args.smoke_test else args.num_steps or 800
    draws, results = 2 if args.smoke_test else 50, []
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        latent = mocap_model(args.smoke_test, args.substeps)
        best: list = [float("inf"), 0, None]
        print(
            COLUMNS.format(f"seed {seed}", "data term", "start KL", "path KL", "ELBO", "val MSE")
        )

        def look(step: int, latent: LatentSDE = latent, best: list = best) -> None:
            if step % 20 and step != num_steps:
                return
            error, _ = forecast_errors(latent, val_set, 5 if not args.smoke_test else 1)
            if error < best[0]:
                best[:] = [error, step, copy.deepcopy(latent.state_dict())]
            if step % 100 == 0 or step == num_steps:
                line = row(step, terms(latent, train_set, 1), 0.0)[:-9]
                print(f"{line}{error:9.2f}", flush=True)

        seconds = train(
            latent,
            train_set,
            num_steps,
            lr=0.01,
            decay=0.998,
            anneal=200,
            length=lambda step: 40 + step // 2,
            look=look,
        )
        latent.load_state_dict(best[2])
        results.append(forecast_errors(latent, test_set, draws))
        print(
            f"seed {seed}: test MSE {results[-1][0]:.2f} of the mean of {draws} draws, "
            f"{results[-1][1]:.2f} mean over draws (step {best[1]}, {seconds:.0f} s)",
            flush=True,
        )
    errors = torch.tensor(results)
    spread = errors.std(0) if len(errors) > 1 else torch.zeros(2)
    print(
        f"test MSE over {len(errors)} seeds: {errors[:, 0].mean():.2f} +- {spread[0]:.2f} "
        f"(mean of draws), {errors[:, 1].mean():.2f} +- {spread[1]:.2f} (over draws)"
    )
    mocap_picture(latent, test_set, args.output / "latent_sde.png")


@torch.no_grad()
def mocap_picture(latent: LatentSDE, series: Series, path: Path) -> None:
    """Bands of the forecast of the four sensors that move most, for the first test walk."""
    seen, times = series.data[:1, :FRAMES_SEEN], series.times
    drawn = latent.interpolate(seen, times[:FRAMES_SEEN], times, num_samples=100).means[:, 0]
    noise = latent.likelihood.log_scale.exp() * torch.randn_like(drawn)
    bands = torch.quantile(drawn + noise, torch.tensor([0.05, 0.5, 0.95]), 0)
    figure, axes = plt.subplots(4, 1, figsize=(10, 9), sharex=True, layout="constrained")
    for ax, sensor in zip(axes, series.data[0].std(0).topk(4).indices, strict=True):
        low, middle, high = bands[:, :, sensor]
        ax.fill_between(times, low, high, alpha=0.3, label="5 % to 95 %")
        ax.plot(times, middle, label="median")
        ax.plot(times, series.data[0, :, sensor], "k", linewidth=0.8, label="walk")
        ax.set_ylabel(f"sensor {int(sensor)}")
    axes[0].legend(loc="upper right", ncols=3)
    axes[-1].set_xlabel("time")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run the task that was asked for and save its picture."""
    matplotlib.use("Agg")
    args = parse()
    args.output.mkdir(parents=True, exist_ok=True)
    pyro.enable_validation(False)
    if args.data is None:
        run_lorenz(args)
    else:
        run_mocap(args)
    print(f"The picture is in {args.output}/latent_sde.png.")


if __name__ == "__main__":
    main()
