"""How close to the exact log evidence guides come, and in what time.

    python benchmarks/quality.py --data FOLDER    # four posteriors; about twenty minutes
    python benchmarks/quality.py --quick          # eight schools, few steps, no file needed

Eight schools, Neal's funnel, a random-effects regression (seeds) and a logistic regression (German
credit), whose log evidence is exact, by quadrature, or known to 0.001 (``examples`` says how);
the last two need ``seeds_data.json`` and ``german.data-numeric`` in the folder. Pyro's and
NumPyro's automatic guides are trained as their documentation does, by SVI with eight draws per
step and Adam whose learning rate falls from 0.01 to 0.001; flowvi's by ``fit`` as it is. The gap
is log evidence minus ELBO, from 4,000 draws at the times shown, and at the end. The clock, CPU
time of the process, runs from the first call, warm start and compiling included, and stands still
during an evaluation. One seed, float64, one thread. Finished cases are read back from the results
file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# Before torch: it limits every library to one thread.
from _timing import facts, last_gap, table, write_json  # isort: skip
import matplotlib
import numpy as np
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO, autoguide
from torch import Tensor, nn

from flowvi.flows import nsf, realnvp
from flowvi.guides import AutoFlow
from flowvi.infer import fit

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from data_problems import DATA_PROBLEMS, LOG_EVIDENCE  # noqa: E402
from problems import PROBLEMS, Problem  # noqa: E402

DRAWS, PARTICLES, FIRST, LAST = 4000, 8, 1e-2, 1e-3
TARGETS = ("eight_schools", "funnel", "seeds", "german_credit")
Curve = list[tuple[float, float, float]]


def eight_schools_evidence(problem: Problem) -> float:
    """By quadrature over tau; the rest is normal."""
    y, sigma = (t.numpy() for t in problem.args)
    angle = (np.arange(20_000) + 0.5) / 20_000 * np.pi / 2  # tau = 5 tan(angle), uniform angle
    tau2 = (5 * np.tan(angle)) ** 2
    var = sigma**2 + tau2[:, None]
    # Covariance diag(var) + 25, by the matrix determinant lemma.
    one = 1 + 25 * (1 / var).sum(1)
    quadratic = (y**2 / var).sum(1) - 25 * (y / var).sum(1) ** 2 / one
    logs = -0.5 * (quadratic + np.log(one) + np.log(2 * np.pi * var).sum(1))
    return float(np.logaddexp.reduce(logs) - np.log(len(logs)))


def load(name: str, data: Path | None) -> tuple[Problem, float]:
    if name in DATA_PROBLEMS:
        return DATA_PROBLEMS[name](data, torch.float64), LOG_EVIDENCE[name]
    problem = PROBLEMS[name](torch.float64)
    exact = LOG_EVIDENCE.get(name)
    return problem, eight_schools_evidence(problem) if exact is None else exact


class Watch:
    """A clock that stands still while the gap is measured.

    Args:
        gap: gives the gap and its standard error.
    """

    def __init__(self, gap: Callable[[], tuple[float, float]]) -> None:
        self.curve: Curve = []
        self._gap = gap
        self._spent, self._began = 0.0, time.process_time()
        self._next = 0.25

    def seconds(self) -> float:
        return self._spent + time.process_time() - self._began

    def look(self, *, now: bool = False) -> None:
        """Measure if it is time to."""
        seconds = self.seconds()
        if not now and seconds < self._next:
            return
        self._spent = seconds
        gap, error = self._gap()
        self.curve.append((round(seconds, 3), round(gap, 4), round(error, 4)))
        self._next = 1.5 * seconds
        self._began = time.process_time()


def gap_of(problem: Problem, guide: Callable, exact: float) -> tuple[float, float]:
    """Log evidence minus ELBO, with its standard error, on draws of its own."""
    state = torch.get_rng_state()
    torch.manual_seed(12345)
    objective = Trace_ELBO(DRAWS // 10, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        losses = [objective.loss(problem.model, guide, *problem.args) for _ in range(10)]
    torch.set_rng_state(state)
    return float(np.mean(losses)) + exact, float(np.std(losses) / math.sqrt(10))


def pyro_curve(make: Callable, problem: Problem, exact: float, num_steps: int) -> Curve:
    watch = Watch(lambda: gap_of(problem, guide, exact))
    guide = make(problem.model)
    guide(*problem.args)
    optim = pyro.optim.ClippedAdam({"lr": FIRST, "lrd": (LAST / FIRST) ** (1 / num_steps)})
    objective = Trace_ELBO(PARTICLES, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(problem.model, guide, optim, objective)
    for _ in range(num_steps):
        svi.step(*problem.args)
        watch.look()
    watch.look(now=True)
    return watch.curve


def flowvi_curve(make: Callable, problem: Problem, exact: float, num_steps: int) -> Curve:
    watch = Watch(lambda: gap_of(problem, guide, exact))
    guide = make(problem.model)

    def callback(step: int, loss: Tensor) -> None:
        watch.look()

    fit(
        problem.model, guide, *problem.args,
        seed=0, num_steps=num_steps, callback=callback, progress_bar=False,
    )  # fmt: skip
    watch.look(now=True)
    return watch.curve


def iaf(model: Callable) -> nn.Module:
    """Three layers, hidden sizes twice the number of latents."""
    return autoguide.AutoIAFNormal(model, num_transforms=3, hidden_dim=[50, 50])


GUIDES: dict[str, Callable[..., Curve]] = {
    "pyro AutoNormal": partial(pyro_curve, autoguide.AutoNormal),
    "pyro AutoMultivariateNormal": partial(pyro_curve, autoguide.AutoMultivariateNormal),
    "pyro AutoIAFNormal": partial(pyro_curve, iaf),
    "flowvi AutoFlow, realnvp": partial(flowvi_curve, lambda m: AutoFlow(m, realnvp)),
    "flowvi AutoFlow, nsf": partial(flowvi_curve, lambda m: AutoFlow(m, nsf)),
}
NUMPYRO = ("AutoNormal", "AutoMultivariateNormal", "AutoIAFNormal", "AutoBNAFNormal")


def measure(name: str, target: str, data: Path | None, steps: dict[str, int]) -> dict[str, Any]:
    problem, exact = load(target, data)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    library = name.split()[0]
    if library == "numpyro":
        from _quality_numpyro import numpyro_curve

        arrays = [array.numpy() for array in problem.args]
        curve = numpyro_curve(
            name.split()[1], target, arrays, exact, steps[library], (FIRST, LAST, PARTICLES, DRAWS)
        )
    else:
        curve = GUIDES[name](problem, exact, steps[library])
    seconds, gap, error = curve[-1]
    print(f"{target}, {name}: gap {gap:.3f} +- {error:.3f} after {seconds:.1f} s", flush=True)
    return {"target": target, "guide": name, "log evidence": round(exact, 4), "curve": curve}


def picture(results: list[dict[str, Any]], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    targets = [t for t in TARGETS if any(r["target"] == t for r in results)]
    figure, axes = plt.subplots(1, len(targets), figsize=(4.2 * len(targets), 4), squeeze=False)
    names = list(dict.fromkeys(r["guide"] for r in results))
    styles = {"pyro": ":", "numpyro": "--", "flowvi": "-"}
    for ax, target in zip(axes[0], targets, strict=True):
        for result in (r for r in results if r["target"] == target):
            seconds, gaps, _ = zip(*result["curve"], strict=True)
            style = styles[result["guide"].split()[0]]
            color = f"C{names.index(result['guide'])}"
            # The smallest gaps are noise of the measurement; a run that diverges leaves the frame.
            heights = [max(gap, 1e-3) for gap in gaps]
            ax.plot(seconds, heights, style, color=color, label=result["guide"])
            ax.plot(seconds[-1], heights[-1], "o", color=color, markersize=4)
        ax.set(title=target.replace("_", " "), xscale="log", yscale="log", xlabel="CPU seconds")
        ax.set_ylim(8e-4, 2e2)
    axes[0, 0].set_ylabel("log evidence - ELBO (nats)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    figure.savefig(path, dpi=110)


def report(results: list[dict[str, Any]]) -> None:
    targets = [t for t in TARGETS if any(r["target"] == t for r in results)]
    rows = []
    for name in dict.fromkeys(r["guide"] for r in results):
        found = {r["target"]: last_gap(r["curve"]) for r in results if r["guide"] == name}
        rows.append([name, *(found.get(target, "") for target in targets)])
    print(table(["gap in nats (CPU seconds)", *targets], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the German credit and seeds files")
    parser.add_argument("--quick", action="store_true", help="eight schools, few steps")
    parser.add_argument("--targets", nargs="+", choices=TARGETS)
    parser.add_argument("--out", type=Path, help="where to write JSON and picture, no suffix")
    args = parser.parse_args()
    name = "quality-quick" if args.quick else "quality"
    out = args.out or Path(__file__).parent / "results" / name
    targets = args.targets or (TARGETS if args.data else TARGETS[:2])
    targets = targets[:1] if args.quick else targets
    steps = {"pyro": 4000, "numpyro": 20_000, "flowvi": 1000}
    steps = {library: n // 40 for library, n in steps.items()} if args.quick else steps
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.enable_validation(False)
    file, content = out.with_suffix(".json"), {"results": []}
    if file.exists() and not args.quick:
        content = json.loads(file.read_text())
    guides = list(GUIDES)
    try:
        import _quality_numpyro  # noqa: F401

        guides += [f"numpyro {kind}" for kind in NUMPYRO]
    except ImportError:
        print("numpyro is not installed: left out")
    known = {(r["target"], r["guide"]): r for r in content["results"]}
    for target in targets:
        for guide in guides:
            if (target, guide) not in known:
                known[target, guide] = measure(guide, target, args.data, steps)
            order = [known[t, g] for t in TARGETS for g in guides if (t, g) in known]
            about = facts("torch", "pyro-ppl", "numpyro", "jax")
            about["command"] = about["command"].replace(str(args.data), "FOLDER")
            write_json(file, {"facts": about, "steps": steps, "results": order})
    report(order)
    picture(order, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
