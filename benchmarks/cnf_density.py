"""Test log-likelihood, function evaluations and time of continuous flows on 2-D toys.

Three flows see the same batches in turn: flowvi's plain, flowvi's with penalties on its paths
(those of RNODE, and the rate at which the divergence changes, which an adaptive solver of the
log-density feels most), and zuko's, all with one field of the same widths, activation and time
features, Adam and one learning-rate schedule. The penalties fall along a cosine to a small
remainder, as many fields give one density and a weak penalty suffices to choose among them.
Afterwards all are evaluated by one and the same adaptive solver; "over plain" is the difference
of the test negative log-likelihood of the same points to that of the plain flow. Evaluations grow
as a flow fits more closely, so flows are compared where they fit alike: ``--plain-steps`` ends
the plain one earlier.
With several seeds all numbers are means over them, each with its own weights, batches and test
points, "se" and "se over plain" are standard errors over seeds, and the integral is the one
farthest from 1; with one seed they are those over test points.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from _timing import facts, steady_allocator, table, write_json
from torch import Tensor, nn

from flowvi.distributions import Flow
from flowvi.nn import MLPField
from flowvi.objectives import ELBO, Regularized
from flowvi.transforms import (
    RK4,
    Continuous,
    DivergenceRate,
    JacobianNorm,
    KineticEnergy,
    Regularizer,
)

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from toys import TOYS  # noqa: E402

HIDDEN, FREQUENCIES, TEST_POINTS, NFE_POINTS = (64, 64), 3, 10_000, 1000
TOLERANCE = 1e-5
GRID = {"half width": 6.0, "points per axis": 320}
Rates = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Contestant:
    """One flow in training."""

    module: nn.Module
    loss: Callable[[Tensor], Tensor]
    velocity: Rates
    backwards: bool
    penalties: tuple[Regularizer, ...] = ()
    num_steps: int = 0
    seconds: float = 0.0
    optimizer: torch.optim.Optimizer = field(init=False)
    schedule: torch.optim.lr_scheduler.LRScheduler = field(init=False)

    def prepare(self, lr: float, num_steps: int) -> None:
        self.num_steps = num_steps
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, num_steps)
        self.weights = [penalty.weight for penalty in self.penalties]

    def step(self, x: Tensor, left: float) -> None:
        began = time.process_time()
        for penalty, weight in zip(self.penalties, self.weights, strict=True):
            penalty.weight = left * weight
        self.optimizer.zero_grad()
        self.loss(x).backward()
        self.optimizer.step()
        self.schedule.step()
        self.seconds += time.process_time() - began


def flowvi_flow(num_steps: int, penalties: tuple[Regularizer, ...] = ()) -> Contestant:
    flow = Flow(Continuous(MLPField(2, HIDDEN), solver=RK4(num_steps)))
    objective = Regularized(ELBO(), *penalties) if penalties else ELBO()
    objective.max_plate_nesting = 1

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", flow(), obs=x)

    def loss(x: Tensor) -> Tensor:
        return objective.differentiable_loss(model, lambda x: None, x) / len(x)

    field = flow.transform.field
    return Contestant(flow, loss, lambda t, x: field(t, x), True, penalties)


def zuko_flow() -> Contestant:
    import zuko

    flow = zuko.flows.CNF(
        2, freqs=FREQUENCIES, hidden_features=HIDDEN, activation=nn.Tanh, atol=1e-5, rtol=1e-5
    )
    transform = flow.transform
    return Contestant(
        flow, lambda x: -flow().log_prob(x).mean(), lambda t, x: transform.f(t, x), False
    )


def contestants(args: argparse.Namespace) -> Iterator[tuple[str, Contestant]]:
    penalties = (
        KineticEnergy(args.kinetic),
        JacobianNorm(args.jacobian),
        DivergenceRate(args.divergence_rate),
    )
    yield "flowvi", flowvi_flow(args.solver_steps)
    if not args.without_penalties:
        # Its paths are smooth from the start, so fewer steps follow them.
        yield "flowvi, regularised", flowvi_flow(args.regularised_steps, penalties)
    if not args.without_zuko:
        yield "zuko", zuko_flow()


@torch.no_grad()
def evaluate(one: Contestant, x: Tensor) -> tuple[Tensor, int]:
    """Log-density of data by an adaptive solver from data to base, and its evaluations."""
    from torchdiffeq import odeint

    calls = 0

    def rates(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        with torch.enable_grad():
            point = state[0].detach().requires_grad_()
            velocity = one.velocity(t, point)
            rows = [
                torch.autograd.grad(velocity[:, i].sum(), point, retain_graph=True)[0][:, i]
                for i in range(2)
            ]
        return velocity.detach(), rows[0] + rows[1]

    # Both libraries run time from 0 to 1; flowvi's field moves base to data, zuko's data to base.
    ts = x.new_tensor([1.0, 0.0] if one.backwards else [0.0, 1.0])
    start = (x, x.new_zeros(len(x)))
    end, ladj = odeint(rates, start, ts, rtol=TOLERANCE, atol=TOLERANCE, method="dopri5")
    base = -0.5 * end[-1].square().sum(-1) - math.log(2 * math.pi)
    return base + ladj[-1], calls


def integral(one: Contestant) -> float:
    """Integral of the density over a grid that is finer than the arms of the pinwheel."""
    axis = torch.linspace(-GRID["half width"], GRID["half width"], GRID["points per axis"])
    grid = torch.cartesian_prod(axis, axis)
    log_prob = torch.cat([evaluate(one, part)[0] for part in grid.split(20_000)])
    return float(log_prob.double().exp().sum() * (axis[1] - axis[0]) ** 2)


def penalty_left(progress: float, args: argparse.Namespace) -> float:
    """Factor of the penalties after a part of the steps."""
    falling = (1 + math.cos(math.pi * min(1.0, progress / args.settled))) / 2
    return args.remainder + (1 - args.remainder) * falling


def run(toy: str, seed: int, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Train on one toy and evaluate."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    runners = dict(contestants(args))
    for name, one in runners.items():
        one.prepare(args.lr, (name == "flowvi" and args.plain_steps) or args.num_steps)
    for step in range(args.num_steps):
        x = TOYS[toy](args.batch, generator)
        for one in runners.values():
            if step < one.num_steps:
                one.step(x, penalty_left(step / one.num_steps, args))
    test = TOYS[toy](TEST_POINTS, torch.Generator().manual_seed(10_000 + seed))
    nlls = {name: -evaluate(one, test)[0] for name, one in runners.items()}
    results = {}
    for name, one in runners.items():
        nll, over = nlls[name], nlls[name] - nlls["flowvi"]
        _, calls = evaluate(one, test[:NFE_POINTS])
        results[name] = {
            "test nll": round(float(nll.mean()), 4),
            "se": round(float(nll.std()) / TEST_POINTS**0.5, 4),
            "over plain": round(float(over.mean()), 4),
            "se over plain": round(float(over.std()) / TEST_POINTS**0.5, 4),
            "nfe": calls,
            "integral": round(integral(one), 5),
            "steps": one.num_steps,
            "ms per step": round(1e3 * one.seconds / one.num_steps, 2),
            "parameters": sum(p.numel() for p in one.module.parameters()),
        }
    return results


def summary(found: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Means over seeds, with standard errors."""
    if len(found) == 1:
        return found[0]
    results = {}
    for name in found[0]:
        columns = {key: [one[name][key] for one in found] for key in found[0][name]}
        means = {key: round(statistics.mean(values), 4) for key, values in columns.items()}
        for key, source in (("se", "test nll"), ("se over plain", "over plain")):
            means[key] = round(statistics.stdev(columns[source]) / len(found) ** 0.5, 4)
        means["integral"] = max(columns["integral"], key=lambda value: abs(value - 1))
        results[name] = means
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toys", nargs="+", default=list(TOYS), choices=list(TOYS))
    parser.add_argument("--num-steps", type=int, default=200)
    parser.add_argument("--plain-steps", type=int, help="of the plain flow; as others if left out")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--solver-steps", type=int, default=12, help="RK4 steps in training")
    parser.add_argument("--regularised-steps", type=int, default=8, help="with penalties")
    parser.add_argument("--kinetic", type=float, default=0.06)
    parser.add_argument("--jacobian", type=float, default=0.06)
    parser.add_argument("--divergence-rate", type=float, default=0.0003)
    parser.add_argument("--settled", type=float, default=0.9, help="when penalties are at least")
    parser.add_argument("--remainder", type=float, default=0.03, help="part of them that stays")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--label", default="", help="what to add to the names of the results")
    parser.add_argument("--without-zuko", action="store_true")
    parser.add_argument("--without-penalties", action="store_true")
    parser.add_argument("--keep", action="store_true", help="keep other results of the file")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "cnf_density.json"
    )
    args = parser.parse_args()
    steady_allocator()
    warnings.filterwarnings("ignore")
    pyro.enable_validation(False)
    torch.set_num_threads(1)
    kept = args.keep and args.out.exists()
    old = json.loads(args.out.read_text("utf-8")) if kept else {}
    results, settings = old.get("results", {}), old.get("settings", {})
    for toy in args.toys:
        key = f"{toy}, {args.num_steps} steps" + args.label
        by_seed = []
        for seed in args.seeds:
            by_seed.append(run(toy, seed, args))
            found = summary(by_seed)
            results[key], settings[key] = found, {**setting(args), "by seed": by_seed}
            save(results, settings, args.out)
        columns = list(next(iter(found.values())))
        rows = [[name, *(str(r[c]) for c in columns)] for name, r in found.items()]
        print(f"\n{toy}\n\n" + table(["", *columns], rows), flush=True)


def setting(args: argparse.Namespace) -> dict[str, Any]:
    """What may differ between the results of one file."""
    return {
        "command": facts()["command"],
        "seeds": args.seeds,
        "batch": args.batch,
        "lr": args.lr,
        "training solver": f"RK4, {args.solver_steps} steps (flowvi), {args.regularised_steps} "
        "steps (flowvi, regularised); adaptive, 1e-5 (zuko)",
        "penalties": {
            "kinetic": args.kinetic,
            "jacobian": args.jacobian,
            "divergence rate": args.divergence_rate,
            "least after this part of the steps": args.settled,
            "remainder": args.remainder,
        },
        "grid": GRID,
    }


def save(results: dict[str, Any], settings: dict[str, Any], out: Path) -> None:
    """Write the results so far, with their settings."""
    common = {
        "hidden": HIDDEN,
        "evaluation": f"torchdiffeq dopri5, rtol = atol = {TOLERANCE}, for all",
        "dtype": "float32",
    }
    packages = ("torch", "pyro-ppl", "zuko", "torchdiffeq")
    found = {"setting": common, "settings": settings, "results": results}
    write_json(out, {"facts": facts(*packages), **found})


if __name__ == "__main__":
    main()
