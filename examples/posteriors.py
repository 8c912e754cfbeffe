"""Six guides on four real posteriors: one table, one picture, one honest verdict per fit.

``python examples/posteriors.py --quick`` takes under three minutes on two cores; without
``--quick`` the fits run to the end. Every number in the table comes from draws of the fitted
guide. Nothing is read from outside this folder but scikit-learn's own tables.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt
from problems import PROBLEMS
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from tqdm import tqdm

from flowvi import plots
from flowvi.flows import iaf, nsf, realnvp
from flowvi.guides import AutoFlow, AutoMixtureFlow
from flowvi.infer import fit

GUIDES: dict[str, Callable] = {
    "AutoNormal": AutoNormal,
    "full-rank normal": AutoMultivariateNormal,
    "RealNVP": lambda model: AutoFlow(model, realnvp),
    "NSF": lambda model: AutoFlow(model, nsf),
    "IAF": lambda model: AutoFlow(model, iaf),
    "mixture": lambda model: AutoMixtureFlow(model, num_components=2),
}
JOINT = ("AutoNormal", "RealNVP")  # guides whose joint draws are shown as points
COLUMNS = ("posterior", "guide", "ELBO", "IW-ELBO", "Pareto k", "k says", "check", "seconds")
ROW = "{:<24}{:<18}{:>19}{:>11}{:>10}  {:<9}{:<10}{:>7}"


@dataclass(frozen=True)
class Job:
    """One guide on one posterior."""

    problem: str
    guide: str
    seed: int
    num_steps: int
    num_particles: int | None


@dataclass(frozen=True)
class Outcome:
    """What is shown of a fit: a row of the table, the verdict, draws of two coordinates."""

    job: Job
    row: tuple[str, ...]
    verdict: str
    draws: dict[str, torch.Tensor]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="shorter fits, for a first look")
    parser.add_argument("--smoke-test", action="store_true", help="a few steps only, for tests")
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--guides", nargs="+", default=list(GUIDES), choices=list(GUIDES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 4))
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for results")
    return parser.parse_args()


def run(job: Job) -> Outcome:
    """Fit, check and draw."""
    torch.set_num_threads(1)
    problem = PROBLEMS[job.problem](torch.float64)
    result = fit(
        problem.model,
        GUIDES[job.guide](problem.model),
        *problem.args,
        seed=job.seed,
        num_steps=job.num_steps,
        num_particles=job.num_particles,
        progress_bar=False,
    )
    check = result.check(seed=job.seed)
    best = check.iw_elbo[max(check.iw_elbo)]
    row = (
        problem.title,
        job.guide,
        f"{check.elbo.value:.3f} +- {check.elbo.se:.3f}",
        f"{best.value:.3f}",
        f"{check.pareto_k:.2f}",
        "trust" if check.pareto_k <= check.pareto_k_threshold else "no",
        "good" if check.good else "not good",
        f"{result.seconds:.1f}",
    )
    columns = {name: column(check.draws.values, name) for name in problem.joint}
    return Outcome(job, row, check.verdict, columns)


def column(values: dict[str, torch.Tensor], label: str) -> torch.Tensor:
    """Draws of one coordinate, labelled like ``coef[0,1]``."""
    site, _, index = label.rstrip("]").partition("[")
    picked = tuple(int(i) for i in index.split(",")) if index else ()
    return values[site].detach()[(slice(None), *picked)]


def run_all(jobs: list[Job], workers: int) -> Iterator[Outcome]:
    """Run the jobs on all cores, giving them back as they end."""
    if workers == 1:
        yield from map(run, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for future in as_completed([pool.submit(run, job) for job in jobs]):
            yield future.result()


def picture(outcomes: list[Outcome], path: Path) -> None:
    """One row per posterior: two marginals of every guide, and the joint of three guides."""
    matplotlib.use("Agg")
    names = list(dict.fromkeys(o.job.problem for o in outcomes))
    figure, axes = plt.subplots(
        len(names), 3, figsize=(13, 3.6 * len(names)), squeeze=False, layout="constrained"
    )
    for row, name in zip(axes, names, strict=True):
        mine = [o for o in outcomes if o.job.problem == name]
        mine.sort(key=lambda o: o.job.guide not in JOINT)  # first, so that colours agree
        first, second = mine[0].draws
        for ax, label in zip(row, (first, second), strict=False):
            draws = {o.job.guide: o.draws[label] for o in mine}
            plots.marginals(draws, ax, label=label)
        row[0].set_title(PROBLEMS[name](torch.float64).title, loc="left", fontweight="bold")
        row[1].get_legend().remove()
        shown = [o for o in mine if o.job.guide in JOINT] or mine[:1]
        joint = {o.job.guide: torch.stack([o.draws[first], o.draws[second]], -1) for o in shown}
        plots.pairs(joint, row[2], labels=(first, second))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Fit everything, print the table and the verdicts, save the picture."""
    args = parse()
    num_steps, num_particles = (250, 32) if args.quick else (1000, None)
    if args.smoke_test:
        num_steps, num_particles = 5, 8
    jobs = [
        Job(problem, guide, args.seed, num_steps, num_particles)
        for problem in args.problems
        for guide in args.guides
    ]
    outcomes = {}
    with tqdm(total=len(jobs), desc="fitting") as bar:
        for outcome in run_all(jobs, args.workers):
            outcomes[outcome.job] = outcome
            bar.set_postfix_str(f"{outcome.job.problem}, {outcome.job.guide}")
            bar.update()
    lines = [ROW.format(*COLUMNS), *[ROW.format(*outcomes[job].row) for job in jobs]]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "posteriors.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    for job in jobs:
        if not args.smoke_test and job.guide == "RealNVP":
            print(f"\n{job.problem}, {job.guide}: {outcomes[job].verdict}")
    picture([outcomes[job] for job in jobs], args.output / "posteriors.png")
    print(f"\nTable and picture are in {args.output}/ (posteriors.txt, posteriors.png).")


if __name__ == "__main__":
    main()
