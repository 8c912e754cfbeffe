"""Couplings of rectified flows: paths in the plane, and bounds on images, over seeds.

In the plane every flow is one network of the same size; what differs is which start is joined to
which item. ``NPE`` is the normalised path energy, ``W2 at 5`` the 2-Wasserstein distance to the
data after five Euler steps, between evenly spread samples; ``floor`` is the distance of two such
samples of the data, and ``above floor`` the root of the difference of the squares. Images compare
the bound of a Brownian bridge under an independent and a learned coupling: digits, and with
``--data FOLDER`` the first 2000 test images of MNIST in place of all else. Runs are written as
they finish, and a run that is in the file is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from _timing import facts, table, write_json

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from image_bridges import load, measure, train_bridge  # noqa: E402
from planar_flows import COUPLINGS, PROBLEMS, judge, train  # noqa: E402

# Normalised path energies of Tong et al. (2024), arXiv:2302.00482, for the same problems.
PUBLISHED = {
    "N to 8 Gaussians": {"independent": 0.222, "minibatch OT": 0.018},
    "moons to 8 Gaussians": {"independent": 2.738, "minibatch OT": 0.053},
}
IMAGE_COUPLINGS = ("independent", "learned")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=["plane", "digits"])
    parser.add_argument("--data", type=Path, help="folder with MNIST, which is then all that runs")
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--couplings", nargs="+", default=list(COUPLINGS), choices=list(COUPLINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--image-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num-steps", type=int, default=4000)
    parser.add_argument("--image-steps", type=int, default=500)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def in_plane(problem: str, coupling: str, num_steps: int, seed: int) -> dict[str, Any]:
    """One flow in the plane; distances also without what two samples of the data differ by."""
    began = time.process_time()
    flow = train(problem, coupling, num_steps, seed)
    seconds = time.process_time() - began
    found = asdict(judge(flow))
    found["few_above_floor"] = math.sqrt(max(found["few"] ** 2 - found["floor"] ** 2, 0.0))
    return {**found, "seconds": round(seconds, 1)}


def on_images(folder: Path | None, coupling: str, num_steps: int, seed: int) -> dict[str, Any]:
    """One bridge to images: of MNIST, or digits without a folder."""
    pictures = load("digits" if folder is None else "mnist", folder)
    pictures = replace(pictures, test=pictures.test[:2000])
    began = time.process_time()
    flow = train_bridge(pictures, coupling, num_steps, seed)
    seconds = time.process_time() - began
    terms = measure(flow, pictures, 50 if folder is None else 10)
    parts = {
        "bound": terms.elbo,
        "start": terms.coupling,
        "reference": terms.reference,
        "path": terms.path,
    }
    means = {name: float(part.mean()) for name, part in parts.items()}
    error = float(terms.elbo.std()) / math.sqrt(len(pictures.test))
    return {**means, "error": error, "seconds": round(seconds, 1)}


def run(args: argparse.Namespace, results: dict[str, Any], keep: Callable[[], None]) -> None:
    """All runs that are not in the results yet."""
    jobs: list[tuple[Callable, str | Path | None, str, int, int]] = []
    if args.data is None and "plane" in args.only:
        names = [(p, c) for p in args.problems for c in args.couplings]
        jobs += [(in_plane, p, c, args.num_steps, s) for s in args.seeds for p, c in names]
    if args.data is not None or "digits" in args.only:
        pairs = [(c, s) for s in args.image_seeds for c in IMAGE_COUPLINGS]
        jobs += [(on_images, args.data, c, args.image_steps, s) for c, s in pairs]
    for function, case, coupling, num_steps, seed in jobs:
        problem = case if isinstance(case, str) else "digits" if case is None else "MNIST"
        name = f"{problem}, {coupling}, {num_steps} steps, seed {seed}"
        if name in results:
            continue
        found = function(case, coupling, num_steps, seed)
        results[name] = {"problem": problem, "coupling": coupling, "seed": seed, **found}
        results[name]["num_steps"] = num_steps
        print(name, results[name], flush=True)
        keep()


def mean_of(runs: list[dict[str, Any]], key: str) -> str:
    """Mean over seeds, with the standard error where there are several."""
    values = [run[key] for run in runs]
    mean = f"{statistics.mean(values):.3f}"
    if len(values) < 2:
        return mean
    return f"{mean} +- {statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def summary(results: dict[str, Any]) -> str:
    """The tables, of all runs in the file."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for record in results.values():
        key = record["problem"], record["coupling"], record["num_steps"]
        groups.setdefault(key, []).append(record)
    plane, images = [], []
    for (problem, coupling, steps), runs in groups.items():
        cells = [problem, coupling, str(steps), str(len(runs))]
        if problem in PUBLISHED:
            published = PUBLISHED[problem].get(coupling, "")
            keys = ("path_energy", "few", "few_above_floor", "many", "floor", "straightness")
            plane.append([*cells, *(mean_of(runs, k) for k in keys), str(published)])
        else:
            keys = ("bound", "start", "reference", "path")
            images.append([*cells, *(mean_of(runs, k) for k in keys)])
    first = ["problem", "coupling", "steps", "seeds"]
    columns = ["NPE", "W2 at 5", "above floor", "W2", "floor", "straightness", "published NPE"]
    parts = ["bound", "KL of start", "reference", "path"]
    return table([*first, *columns], plane) + "\n\n" + table([*first, *parts], images)


def main() -> None:
    """Run, write, print."""
    args = parse()
    torch.set_num_threads(1)
    path = args.output / "rectified_flow.json"
    content = json.loads(path.read_text()) if path.exists() else {"runs": {}}

    def keep() -> None:
        content.update(published=PUBLISHED, facts=facts("torch", "pyro-ppl", "scipy"))
        write_json(path, content)

    run(args, content["runs"], keep)
    print(summary(content["runs"]))


if __name__ == "__main__":
    main()
