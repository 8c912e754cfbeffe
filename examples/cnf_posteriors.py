"""A continuous flow as guide on hard posteriors: the gap to the log-evidence, and a verdict.

``python examples/cnf_posteriors.py`` fits the funnel, a banana and two moons, whose log-evidence
is known. German credit joins in if ``--german`` names the file ``german.data-numeric`` of the
Statlog collection (UCI Machine Learning Repository).
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from problems import funnel
from torch import Tensor, nn

from flowvi.flows import cnf
from flowvi.guides import AutoFlow
from flowvi.infer import Fit, Start, fit
from flowvi.nn import GatedField
from flowvi.objectives import ForwardKL, GeometricSchedule, Objective, Tempered
from flowvi.transforms import RK4

COLUMNS = ("posterior", "log Z", "ELBO", "gap", "Pareto k", "check", "NFE", "seconds")
ROW = "{:<16}{:>10}{:>20}{:>8}{:>10}  {:<10}{:>5}{:>9}"


@dataclass(frozen=True)
class Posterior:
    """A model with known log-evidence.

    Args:
        model: the Pyro model.
        args: its data.
        log_evidence: in nats.
        num_steps: number of steps.
        num_particles: draws per step of the default objective.
        lr: largest learning rate.
        clip_norm: bound on the norm of the gradient.
        solver: how to follow the field.
        objective: what to maximise; the default of ``fit`` if None.
        start: where to start; found by ``fit`` if None.
        finish: what to maximise afterwards; nothing if None.
        finish_steps: number of steps of that.
        finish_lr: largest learning rate of that.
        log_density: of the two coordinates of site ``z``, for the picture.
    """

    model: Callable
    args: tuple
    log_evidence: float
    num_steps: int
    num_particles: int = 128
    lr: float = 1.5e-2
    clip_norm: float = 1000.0
    solver: RK4 = RK4(6)
    objective: Objective | None = None
    start: Start | None = None
    finish: Objective | None = None
    finish_steps: int = 350
    finish_lr: float = 5e-3
    log_density: Callable[[Tensor], Tensor] | None = None


def banana_model(like: Tensor) -> None:
    """A parabola with narrow cross-section."""
    z = pyro.sample("z", dist.Normal(like.new_zeros(2), 2.0).to_event(1))
    # Replaces the normal law of the second coordinate by one around a parabola.
    pyro.factor("bend", banana_log_density(z) - dist.Normal(0.0, 2.0).log_prob(z).sum(-1))


def banana_log_density(z: Tensor) -> Tensor:
    """Normal in the first coordinate, and in the second around half the first one's square."""
    first = dist.Normal(0.0, 2.0).log_prob(z[..., 0])
    return first + dist.Normal(0.5 * z[..., 0] ** 2 - 2, 0.5).log_prob(z[..., 1])


def moons_model(like: Tensor) -> None:
    """Two crescents on a ring."""
    wide = dist.Normal(like.new_zeros(2), 3.0)
    z = pyro.sample("z", wide.to_event(1))
    pyro.factor("moons", moons_log_density(z) - wide.log_prob(z).sum(-1))


def moons_log_density(z: Tensor) -> Tensor:
    """Potential U1 of Rezende and Mohamed (2015), table 1, without its constant."""
    ring = -0.5 * ((z.norm(dim=-1) - 2) / 0.4) ** 2
    left, right = (-0.5 * ((z[..., 0] + side) / 0.6) ** 2 for side in (2, -2))
    return ring + torch.logaddexp(left, right)


def log_integral(log_density: Callable[[Tensor], Tensor]) -> float:
    """Log of the integral of a density over the plane, on a grid."""
    axis = torch.linspace(-18, 18, 2401, dtype=torch.float64)
    total = log_density(torch.cartesian_prod(axis, axis)).logsumexp(0)
    return float(total + 2 * (axis[1] - axis[0]).log())


def credit_model(x: Tensor, label: Tensor) -> None:
    """Logistic regression with normal weights of standard deviation 10."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[-1]), 10.0).to_event(1))
    with pyro.plate("loan", len(x)):
        pyro.sample("label", dist.Bernoulli(logits=(x * w).sum(-1)), obs=label)


def credit(path: Path) -> Posterior:
    """German credit: 1000 loans, 24 features in units of their standard deviation, d = 25."""
    table = np.loadtxt(path)
    x = table[:, :24] / table[:, :24].std(0)
    x = np.concatenate([np.ones((len(x), 1)), x], axis=1)
    # The log-evidence is from importance sampling, with a standard error of 0.001.
    return Posterior(
        credit_model, (torch.tensor(x), torch.tensor(table[:, 24] - 1)), -585.099, 150
    )


def posteriors(german: Path | None) -> dict[str, Posterior]:
    """All that can be fitted."""
    like = torch.zeros((), dtype=torch.float64)
    problem = funnel(torch.float64)
    found = {
        # Its neck gives rare draws with gradients a hundred times the usual ones, and makes the
        # field stiff: hence the bound, the lower rate, and more steps of both kinds.
        "funnel": Posterior(
            problem.model,
            problem.args,
            0.0,
            2200,
            256,
            lr=1e-2,
            clip_norm=1.0,
            solver=RK4(8),
            # The ELBO leaves the tails a tenth too short; the forward divergence sees them.
            finish=ForwardKL(512),
            finish_steps=500,
            finish_lr=2e-3,
        ),
        "banana": Posterior(
            banana_model,
            (like,),
            0.0,
            400,
            log_density=banana_log_density,
        ),
        "two moons": Posterior(
            moons_model,
            (like,),
            log_integral(moons_log_density),
            700,
            objective=Tempered(
                128, beta=GeometricSchedule(400, start=0.05), joint=True, path_gradient=True
            ),
            # Wide and in the middle, as neither crescent comes first. Once they are apart, their
            # weights reach the ELBO's gradient through rare draws between them only; the
            # forward divergence sees them in every draw.
            start=Start.from_moments(like.new_zeros(2), 4 * torch.eye(2).to(like)),
            finish=ForwardKL(512),
            log_density=moons_log_density,
        ),
    }
    if german is not None:
        found["German credit"] = credit(german)
    return found


def run(posterior: Posterior, num_steps: int, num_particles: int, seed: int) -> Fit:
    """Fit a continuous flow whose field has products of coordinates, as funnels need."""
    gated = partial(GatedField, activation=nn.Identity)
    recipe = partial(cnf, field=gated, hidden_dims=(64,), solver=posterior.solver)
    options = {"seed": seed, "tolerance": None, "progress_bar": False}
    result = fit(
        posterior.model,
        AutoFlow(posterior.model, recipe),
        *posterior.args,
        objective=posterior.objective,
        start=posterior.start or True,
        num_steps=num_steps,
        num_particles=num_particles,
        lr=posterior.lr,
        clip_norm=posterior.clip_norm,
        **options,
    )
    if posterior.finish is None:
        return result
    more = fit(
        posterior.model,
        result.guide,
        *posterior.args,
        objective=posterior.finish,
        start=False,
        num_steps=min(posterior.finish_steps, num_steps),
        lr=posterior.finish_lr,
        clip_norm=posterior.clip_norm,
        **options,
    )
    return replace(more, seconds=result.seconds + more.seconds)


def measure(posterior: Posterior, result: Fit, seed: int) -> dict[str, float | str | list[str]]:
    """Numbers of one fit.

    Coordinates with heavy tails, as the funnel's, need more draws and chains than by default to
    tell whether a standard deviation is 10 % off.
    """
    check = result.check(num_draws=16_000, num_chains=800, seed=seed)
    path = result.guide.flow.transform.parts[0]
    return {
        "seed": seed,
        "log evidence": round(posterior.log_evidence, 4),
        "elbo": round(check.elbo.value, 4),
        "se": round(check.elbo.se, 4),
        "gap": round(posterior.log_evidence - check.elbo.value, 4),
        "pareto k": round(check.pareto_k, 2),
        "check": "good" if check.good else "not good",
        "findings": [finding.message for finding in check.findings],
        "evaluations": path.last_solve.num_evaluations,
        "seconds": round(result.seconds),
    }


def describe(name: str, found: dict[str, float | str | list[str]]) -> str:
    """A row of the table."""
    return ROW.format(
        name,
        f"{found['log evidence']:.3f}",
        f"{found['elbo']:.3f} +- {found['se']:.3f}",
        f"{found['gap']:.3f}",
        f"{found['pareto k']:.2f}",
        found["check"],
        found["evaluations"],
        found["seconds"],
    )


def record(file: Path, name: str, found: list[dict]) -> None:
    """Put the numbers of one posterior into a JSON file, beside those of others."""
    kept = json.loads(file.read_text("utf-8")) if file.exists() else {}
    seeds = " ".join(str(fit["seed"]) for fit in found)
    german = " --german FILE" if name == "German credit" else ""
    command = (
        f"python examples/cnf_posteriors.py{german} --posteriors {shlex.quote(name)} "
        f"--seeds {seeds}"
    )
    kept[name] = {"command": command, "fits": found}
    file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def draw(posterior: Posterior, result: Fit, ax: Axes, name: str) -> None:
    """Draws of the guide over contours of the posterior."""
    draws = result.sample(3000)
    z = draws["z"] if posterior.log_density else torch.stack([draws["z"][:, 0], draws["z0"]], -1)
    ax.plot(*z.detach().T, ".", ms=1.5, color="#0072B2", alpha=0.5)
    ax.set_title(name, loc="left", fontweight="bold")
    if posterior.log_density is None:
        ax.set(xlim=(-25, 25), xlabel="z[0]", ylabel="z0")
        return
    low, high = z.min(0).values - 0.5, z.max(0).values + 0.5
    first, second = (torch.linspace(float(low[i]), float(high[i]), 200) for i in (0, 1))
    grid = torch.stack(torch.meshgrid(first, second, indexing="xy"), -1)
    log_density = posterior.log_density(grid)
    top = float(log_density.max())
    levels = [top - 6.0, top - 3.0, top - 1.0, top - 0.3]
    ax.contour(
        first, second, log_density, levels, colors="#D55E00", linewidths=1, linestyles="solid"
    )


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--german", type=Path, help="file german.data-numeric")
    parser.add_argument("--posteriors", nargs="+", help="names of those to fit; all if left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--smoke-test", action="store_true", help="a few steps only, for tests")
    parser.add_argument("--record", type=Path, help="JSON file to put the numbers into")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for results")
    return parser.parse_args()


def main() -> None:
    """Fit everything, print the table, save the picture."""
    args = parse()
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    found = posteriors(args.german)
    names = args.posteriors or list(found)
    if args.smoke_test:
        names = ["banana"]
    lines = [ROW.format(*COLUMNS)]
    print(lines[0])
    drawn = [name for name in names if name != "German credit"] or names
    figure, axes = plt.subplots(
        1, len(drawn), figsize=(4.5 * len(drawn), 4.2), squeeze=False, layout="constrained"
    )
    for name in names:
        posterior = found[name]
        num_steps, num_particles = posterior.num_steps, posterior.num_particles
        if args.smoke_test:
            num_steps, num_particles = 3, 8
        measured = []
        for seed in args.seeds:
            result = run(posterior, num_steps, num_particles, seed)
            measured.append(measure(posterior, result, seed))
            lines.append(describe(name, measured[-1]))
            print(lines[-1], flush=True)
            if args.record is not None:
                record(args.record, name, measured)
        if name != "German credit":
            draw(posterior, result, axes[0, drawn.index(name)], name)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "cnf_posteriors.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    figure.savefig(args.output / "cnf_posteriors.png", dpi=110)
    plt.close(figure)
    print(f"\nTable and picture are in {args.output}/ (cnf_posteriors.txt, cnf_posteriors.png).")


if __name__ == "__main__":
    main()
