"""ELBO variants side by side: objectives and guides on real posteriors, one table and picture.

``python examples/compare.py --quick`` takes about a minute on two cores; without ``--quick`` the
fits are longer. The default problems need no file. German credit and seeds, whose log evidence is
known, are added by ``--data FOLDER`` (files ``german.data-numeric`` and ``seeds_data.json``).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import pyro
import torch
from data_problems import DATA_PROBLEMS, LOG_EVIDENCE
from matplotlib import pyplot as plt
from problems import PROBLEMS, Problem
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from tqdm import tqdm

from flowvi import plots
from flowvi.diagnostics import Comparison, compare
from flowvi.flows import iaf, realnvp
from flowvi.guides import AutoFlow
from flowvi.infer import warm_start
from flowvi.infer.start import Start
from flowvi.infer.target import Target
from flowvi.objectives import (
    CUBO,
    ELBO,
    EUBO,
    IWAE,
    STL,
    STLIWAE,
    TVO,
    DReG,
    GeometricSchedule,
    Objective,
    Renyi,
    Tempered,
)

GUIDES: dict[str, Callable] = {
    "mean-field": AutoNormal,
    "full rank": AutoMultivariateNormal,
    "RealNVP": lambda model: AutoFlow(model, partial(realnvp, num_layers=4)),
    "IAF": lambda model: AutoFlow(model, partial(iaf, num_layers=2)),
}
DEFAULT = ("logistic", "eight_schools", "funnel")


def objectives(num_particles: int, num_steps: int) -> dict[str, Objective]:
    """Everything that is compared, all with the same number of particles."""
    k = num_particles
    return {
        "ELBO": ELBO(k),
        "STL": STL(k),
        "tempered ELBO": Tempered(k, beta=GeometricSchedule(max(num_steps // 2, 1), start=0.1)),
        "IWAE": IWAE(k),
        "DReG": DReG(k),
        "STL-IWAE": STLIWAE(k),
        "Renyi 0.5": Renyi(0.5, k),
        "TVO": TVO(k),
        "CUBO": CUBO(k),
        "EUBO": EUBO(k),
    }


@dataclass(frozen=True)
class Setting:
    """How much work a pair gets."""

    num_particles: int
    num_steps: int
    num_draws: int
    num_gradients: int
    iw_particles: tuple[int, ...]


FULL = Setting(16, 600, 10_000, 50, (10, 100, 1000))
QUICK = Setting(16, 20, 500, 6, (10, 100))
SMOKE = Setting(4, 3, 100, 3, (10,))
QUICK_OBJECTIVES = (
    "ELBO", "STL", "tempered ELBO", "IWAE", "DReG", "Renyi 0.5", "CUBO", "EUBO"
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One guide on one problem, with all objectives."""

    problem: str
    guide: str
    objectives: tuple[str, ...]
    setting: Setting
    seed: int
    data: Path | None
    start: Start


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*PROBLEMS, *DATA_PROBLEMS]
    parser.add_argument("--problems", nargs="+", choices=names, help="which posteriors")
    parser.add_argument("--guides", nargs="+", default=list(GUIDES), choices=list(GUIDES))
    parser.add_argument("--objectives", nargs="+", choices=list(objectives(2, 1)))
    parser.add_argument("--data", type=Path, help="folder of the German credit and seeds files")
    parser.add_argument("--quick", action="store_true", help="short fits, for a first look")
    parser.add_argument("--smoke-test", action="store_true", help="a few steps only, for tests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 4))
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for results")
    args = parser.parse_args()
    if args.problems is None:
        given = list(DATA_PROBLEMS) if args.data else []
        args.problems = [*given, "funnel"] if given else list(DEFAULT)
    if args.objectives is None:
        brief = args.quick or args.smoke_test
        args.objectives = QUICK_OBJECTIVES if brief else list(objectives(2, 1))
    missing = [n for n in args.problems if n in DATA_PROBLEMS and args.data is None]
    if missing:
        parser.error(f"--data must name the folder with the files of {', '.join(missing)}")
    return args


def load(name: str, data: Path | None) -> Problem:
    """A problem in float64."""
    if name in DATA_PROBLEMS:
        return DATA_PROBLEMS[name](data, torch.float64)
    return PROBLEMS[name](torch.float64)


def find_start(name: str, data: Path | None, seed: int) -> Start:
    """The warm start that all guides of a problem share."""
    torch.set_num_threads(1)
    problem = load(name, data)
    pyro.set_rng_seed(seed)
    return warm_start(Target(problem.model, problem.args))


def run(job: Job) -> Comparison:
    """Train one guide with every objective."""
    torch.set_num_threads(1)
    problem = load(job.problem, job.data)
    setting = job.setting
    known = objectives(setting.num_particles, setting.num_steps)
    return compare(
        problem.model,
        {job.guide: GUIDES[job.guide]},
        {name: known[name] for name in job.objectives},
        *problem.args,
        num_evaluations=setting.num_particles * setting.num_steps,
        start=job.start,
        iw_particles=setting.iw_particles,
        num_draws=setting.num_draws,
        num_gradients=setting.num_gradients,
        log_evidence=LOG_EVIDENCE.get(job.problem),
        seed=job.seed,
        progress_bar=False,
    )


def run_all(jobs: list[Job], workers: int) -> Iterator[tuple[Job, Comparison]]:
    """Run the jobs on all cores, giving them back as they end."""
    if workers == 1:
        yield from ((job, run(job)) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = {pool.submit(run, job): job for job in jobs}
        for future in as_completed(waiting):
            yield waiting[future], future.result()


def save(title: str, name: str, result: Comparison, folder: Path) -> str:
    """Write table, numbers and picture of one problem; give the table."""
    text = f"{title}\n\n{result}\n"
    (folder / f"compare-{name}.txt").write_text(text, encoding="utf-8")
    result.to_dataframe().to_csv(folder / f"compare-{name}.csv")
    ax = plots.comparison(result)
    ax.set_title(title, loc="right", fontweight="bold", fontsize=10)
    ax.figure.savefig(folder / f"compare-{name}.png", dpi=130)
    plt.close(ax.figure)
    return text


def main() -> None:
    """Compare, print one table per problem, save tables and pictures."""
    args = parse()
    matplotlib.use("Agg")
    began = time.perf_counter()
    setting = SMOKE if args.smoke_test else QUICK if args.quick else FULL
    starts = {name: find_start(name, args.data, args.seed) for name in args.problems}
    # The slowest guides first, so that no core waits at the end.
    jobs = [
        Job(problem, guide, tuple(args.objectives), setting, args.seed, args.data, starts[problem])
        for guide in reversed(args.guides)
        for problem in args.problems
    ]
    parts = {}
    with tqdm(total=len(jobs), desc="comparing") as bar:
        for job, result in run_all(jobs, args.workers):
            parts[job.problem, job.guide] = result
            bar.set_postfix_str(f"{job.problem}, {job.guide}")
            bar.update()
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.problems:
        result = Comparison.join([parts[name, guide] for guide in args.guides])
        print(save(load(name, args.data).title, name, result, args.output))
    seconds = time.perf_counter() - began
    print(f"{seconds:.0f} s. Tables, numbers and pictures are in {args.output}/ (compare-*).")


if __name__ == "__main__":
    main()
