"""Speed of a latent-SDE training step: flowvi, torchsde and bare loops, interleaved.

    python benchmarks/sde.py            # 100, 200 and 400 steps; some minutes, one thread
    python benchmarks/sde.py --quick    # 100 steps, few repeats

One ELBO step (forward, backward, Adam) in float32: batch 256, four latent dimensions, posterior
drift MLP(t, x) and prior drift MLP(x) with two hidden layers of 64 and softplus, learnt
elementwise diffusion, Euler-Maruyama, 11 observation times on [0, 1]. Every entry has the same
networks and the same bound. Times are medians of process CPU time. Where jax is installed, the
entry "jax scan" is the same step as one jitted program with a scan over the steps.

torchsde takes dt as a number and adds it up in float32: at dt = 0.01 step 101 is a sliver left by
rounding, from which its Brownian interval takes the resolution of its tree, of which it then
builds some 100,000 nodes. That is the entry "100 steps".
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

# Before jax, which would use all processors.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)
# Before torch: it limits every library to one thread.
from _timing import facts, interleave, steady_allocator, table, write_json  # isort: skip
import torch
from pyro.distributions import Normal
from torch import Tensor, nn

from flowvi.distributions import (
    LogRatio,
    PathPosterior,
    PathPrior,
    SimulatedPosterior,
    SimulatedPrior,
)
from flowvi.models import DriftMLP
from flowvi.paths import SDE, GaussianPath, StateDiffusion
from flowvi.samplers import simulate

BATCH, DIM, HIDDEN, OBSERVED, RESIDUAL = 256, 4, (64, 64), 11, 0.1
TARGET = torch.linspace(0, 1, OBSERVED).sin()[:, None, None].expand(OBSERVED, BATCH, DIM)
SIMULATION_FREE = "flowvi, simulation-free"


class Noise(nn.Module):
    """Elementwise diffusion."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(DIM)), nn.Parameter(torch.zeros(DIM))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.2 + torch.sigmoid(self.a * x + self.b)


class Parts(nn.Module):
    """The learnt parts that all entries share."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = DriftMLP(DIM, HIDDEN, time_dependent=False)
        self.posterior = DriftMLP(DIM, HIDDEN)
        self.noise = Noise()
        self.loc = nn.Parameter(torch.zeros(DIM))
        self.log_scale = nn.Parameter(torch.zeros(DIM))

    @property
    def start(self) -> Normal:
        scale = self.log_scale.exp()
        return Normal(self.loc.expand(BATCH, DIM), scale, validate_args=False).to_event(1)

    @property
    def prior_start(self) -> Normal:
        zero = torch.zeros(DIM)
        return Normal(zero, torch.ones(DIM), validate_args=False).to_event(1)

    def start_divergence(self) -> Tensor:
        square = self.loc.square() + (2 * self.log_scale).exp() - 1
        return (0.5 * square - self.log_scale).sum()


def training_step(parts: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """One optimiser step."""
    optimizer = torch.optim.Adam(parts.parameters(), lr=1e-3)

    def run() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return run


def log_likelihood(states: Tensor) -> Tensor:
    """Mean over the batch, for states ``(OBSERVED, BATCH, DIM)``."""
    return -0.5 * ((states - TARGET) / RESIDUAL).square().sum((0, 2)).mean()


def flowvi_step(steps: int, num_segments: int = 1) -> Callable[[], None]:
    parts, times = Parts(), torch.linspace(0, 1, steps + 1)
    sde = SDE(parts.prior, StateDiffusion(parts.noise, elementwise=True))
    simulator = partial(simulate, num_segments=num_segments)
    given = {"simulator": simulator, "log_ratio": LogRatio.KL, "validate_args": False}

    def loss() -> Tensor:
        q = SimulatedPosterior(sde, parts.posterior, parts.start, times, **given)
        p = SimulatedPrior(sde, parts.prior_start, times, num_pieces=num_segments, **given)
        value = q.rsample()
        states = q.unpack(value).states[:, :: steps // (OBSERVED - 1)].movedim(1, 0)
        return (q.log_prob(value) - p.log_prob(value)).mean() - log_likelihood(states)

    return training_step(parts, loss)


def simulation_free_step(steps: int) -> Callable[[], None]:
    """Gaussian marginals of a network of time, as wide; the number of steps plays no part."""
    parts = Parts()
    network = nn.Sequential(
        nn.Linear(1, 64), nn.Softplus(), nn.Linear(64, 64), nn.Softplus(), nn.Linear(64, 2 * DIM)
    )
    parts.add_module("marginals", network)
    path = GaussianPath(
        DIM,
        lambda y, t: network(t)[..., :DIM],
        lambda y, t: network(t)[..., DIM:].exp(),
        StateDiffusion(parts.noise, elementwise=True),
    )
    at = torch.linspace(0, 1, OBSERVED)

    def loss() -> Tensor:
        q = PathPosterior(path, torch.zeros(BATCH, 1), at=at, num_times=4, validate_args=False)
        p = PathPrior(
            path,
            parts.prior,
            parts.prior_start,
            at=at,
            num_times=4,
            num_steps=steps,
            validate_args=False,
        )
        value = q.rsample()
        states = q.unpack(value).observed.movedim(1, 0)
        return (q.log_prob(value) - p.log_prob(value)).mean() - log_likelihood(states)

    return training_step(parts, loss)


class TorchsdeLatent(Parts):
    """The same process by the names that torchsde looks for, with plain linear layers."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self) -> None:
        super().__init__()
        self.posterior, self.prior = _plain(DIM + 1), _plain(DIM)

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.posterior(torch.cat([y, t.expand(len(y), 1)], -1))

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return self.noise(y, t)

    def h(self, t: Tensor, y: Tensor) -> Tensor:
        return self.prior(y)


def _plain(input_dim: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(input_dim, 64),
        nn.Softplus(),
        nn.Linear(64, 64),
        nn.Softplus(),
        nn.Linear(64, DIM),
    )


def torchsde_step(steps: int, adjoint: bool) -> Callable[[], None]:
    import torchsde

    solve = torchsde.sdeint_adjoint if adjoint else torchsde.sdeint
    options = {"adjoint_method": "euler"} if adjoint else {}
    sde, times = TorchsdeLatent(), torch.linspace(0, 1, OBSERVED)

    def loss() -> Tensor:
        states, path = solve(
            sde, sde.start.rsample(), times, method="euler", dt=1 / steps, logqp=True, **options
        )
        return path.sum(0).mean() + sde.start_divergence() - log_likelihood(states)

    return training_step(sde, loss)


def loop_step(steps: int) -> Callable[[], None]:
    """A plain loop with the noise drawn at once and the divergence added up on the way."""
    sde, dt = TorchsdeLatent(), 1 / steps
    times = [torch.tensor(k * dt) for k in range(steps)]

    def loss() -> Tensor:
        x, path = sde.start.rsample(), 0.0
        noise = torch.randn(steps, BATCH, DIM) * dt**0.5
        states = [x]
        for k, t in enumerate(times):
            f, b, h = sde.f(t, x), sde.g(t, x), sde.h(t, x)
            path = path + 0.5 * dt * ((f - h) / b).square().sum(-1)
            x = x + f * dt + b * noise[k]
            if (k + 1) % (steps // (OBSERVED - 1)) == 0:
                states.append(x)
        return path.mean() + sde.start_divergence() - log_likelihood(torch.stack(states))

    return training_step(sde, loss)


def entries(steps: int) -> dict[str, Callable[[], None]]:
    root = round(steps**0.5)
    made = {
        "flowvi": flowvi_step(steps),
        "flowvi, segments": flowvi_step(steps, root),
        SIMULATION_FREE: simulation_free_step(steps),
        "torchsde sdeint": torchsde_step(steps, adjoint=False),
        "torchsde adjoint": torchsde_step(steps, adjoint=True),
        "plain loop": loop_step(steps),
    }
    if find_spec("jax") is None:
        return made
    from _scan import scan_step

    return made | {"jax scan": scan_step(TorchsdeLatent(), TARGET, RESIDUAL, steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="100 steps, few repeats")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "sde.json"
    )
    args = parser.parse_args()
    steady_allocator()
    torch.set_num_threads(1)
    counts, repeats = ((100,), 2) if args.quick else ((100, 200, 400), 5)
    results, rows = {}, {}
    for steps in counts:
        torch.manual_seed(0)
        timings = interleave(entries(steps), repeats, slow=1.5)
        results[str(steps)] = {name: timing.record() for name, timing in timings.items()}
        for name, timing in timings.items():
            median = "-" if timing.median is None else f"{1e3 * timing.median:.0f}"
            rows.setdefault(name, [name]).append(median)
    print(table(["ms per step, by Euler steps", *map(str, counts)], list(rows.values())))
    ratios = {
        f"{peer} over flowvi": {
            steps: round(cell[peer]["median"] / cell["flowvi"]["median"], 2)
            for steps, cell in results.items()
        }
        for peer in ("torchsde sdeint", "torchsde adjoint", "plain loop", "jax scan")
        if all(cell.get(peer, {}).get("median") for cell in results.values())
    }
    for name, ratio in ratios.items():
        print(f"{name}: " + ", ".join(f"{value} at {steps}" for steps, value in ratio.items()))
    content = {
        "facts": facts("torch", "pyro-ppl", "torchsde", "jax"),
        "ms": results,
        "ratios": ratios,
    }
    write_json(args.output, content)


if __name__ == "__main__":
    main()
