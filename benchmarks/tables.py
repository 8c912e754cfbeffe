"""The README's tables of measured numbers, made from the results of real runs.

    python benchmarks/tables.py            # writes them into README.md
    python benchmarks/tables.py --check    # fails if README.md is not what the results say

A table stands between ``<!-- measured: NAME -->`` and ``<!-- end -->``. Each names the command
whose results it shows, and keeps the rows where flowvi loses.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from _timing import last_gap, table

__all__ = ["TABLES", "rendered"]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_PLACE = re.compile(r"<!-- measured: (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def _times(value: float) -> str:
    return f"{value:.2f}x" if value < 10 else f"{value:.0f}x"


def _with_command(script: str, about: str, header: list[str], rows: list[list[str]]) -> str:
    return f"{about} (`python benchmarks/{script}.py`):\n\n{table(header, rows)}"


def steps() -> str:
    rows = []
    for result in _read("svi_step")["results"]:
        micros, ratios = result["microseconds"], result["ratios"]
        names = ("pyro", "step", "numpyro update", "run", "numpyro scan")
        cells = [f"{micros[name]:,.0f}" if name in micros else "" for name in names]
        scan = ratios.get("run / numpyro scan")
        cells.append("" if scan is None else _times(scan))
        rows.append([f"{result['model']}, {result['guide']}", *cells])
    header = ["", "Pyro `step`", "`step`", "NumPyro update", "`run`", "NumPyro scan", "run / scan"]
    about = "Microseconds per step of SVI, one draw, without validation; `step` is read each time"
    return _with_command("svi_step", about, header, rows)


def flows() -> str:
    rows = []
    columns = ("log_prob", "log_prob, backward", "sample", "sample and log_prob, backward")
    for result in _read("flows")["results"]:
        if result["dim"] != 64:
            continue
        found = [result["ratios"][column] for column in columns]
        for label, prefix in (("", ""), (", compiled", "compiled, ")):
            if f"{prefix}to matrix products" in found[0]:
                names = (f"{prefix}to matrix products", f"{prefix}to best peer")
                cells = ["{} ({})".format(*(_times(r[name]) for name in names)) for r in found]
                rows.append([result["kind"] + label, *cells])
    header = ["", "log_prob", "with backward", "sample", "sample, log_prob, backward"]
    about = (
        "Time over that of the networks' bare matrix products, and over the fastest of zuko, "
        "nflows, normflows, Pyro and flowjax, 64 dimensions, five layers, batch 1024"
    )
    return _with_command("flows", about, header, rows)


def continuous() -> str:
    (result,) = (r for r in _read("cnf")["results"] if r["dim"] == 16)
    (compiled,) = (r for r in _read("cnf-compiled")["results"] if r["dim"] == 16)
    entries = {**compiled["entries"], **result["entries"]}
    names = (
        "flowvi, RK4(20)", "flowvi, RK4(20), compiled", "flowvi, DormandPrince(10)",
        "flowvi, adaptive", "torchdiffeq, trace loop", "zuko, exact",
        "matrix products of RK4(20)",
    )  # fmt: skip
    rows, columns = [], ("log_prob", "log_prob, backward")
    for name in (name for name in names if name in entries):
        entry = entries[name]
        cells = [f"{entry[c]['median']:.0f}" for c in columns]
        if name not in result["entries"]:
            eager = compiled["entries"][name.removesuffix(", compiled")]
            beside = " and ".join(f"{eager[c]['median']:.0f}" for c in columns)
            name += f" (of another run, eager {beside})"
        rows.append([name, *cells, f"{entry['error']:.0e}" if entry["error"] else ""])
    about = "Milliseconds of an exact log-density in 16 dimensions, batch 512"
    header = ["", "log_prob", "with backward", "largest error"]
    return _with_command("cnf", about, header, rows)


def densities() -> str:
    found = _read("cnf_density")
    results, settings = found["results"], found["settings"]
    beside = {k.split(", ")[0]: (k.split(", ")[1], r) for k, r in results.items() if "zuko" in r}
    rows = []
    for key, result in results.items():
        # Zuko is compared on one seed.
        if len(settings[key].get("seeds", [0])) == 1:
            continue
        plain, penalised = result.values()
        toy = key.split(", ")[0]
        equal_steps, peers = beside[toy]
        ahead = peers["zuko"]["test nll"] - peers["flowvi"]["test nll"]
        rows.append(
            [
                toy,
                f"{plain['test nll']:.3f} ({plain['steps']:.0f})",
                f"{penalised['over plain']:+.4f} +- {penalised['se over plain']:.4f} "
                f"({penalised['steps']:.0f})",
                f"{plain['nfe']:.0f}",
                f"{penalised['nfe']:.0f}",
                f"{penalised['nfe'] / plain['nfe']:.2f}",
                f"{ahead:+.3f} ({equal_steps})",
            ]
        )
    header = [
        "", "plain", "with penalties, over plain", "evaluations, plain", "with penalties", "ratio",
        "zuko over plain",
    ]  # fmt: skip
    about = (
        "Test negative log-likelihoods (nats, training steps in brackets) and evaluations of an "
        "adaptive solver, means over three seeds, zuko's of one"
    )
    return _with_command("cnf_density", about, header, rows)


def processes() -> str:
    found = _read("sde")["ms"]
    names = [
        "flowvi", "flowvi, simulation-free", "plain loop", "jax scan", "torchsde sdeint",
        "torchsde adjoint",
    ]  # fmt: skip
    rows = []
    for name in names:
        if all(name in entries for entries in found.values()):
            rows.append([name, *(f"{entries[name]['median']:.0f}" for entries in found.values())])
    about = "Milliseconds of a training step of a latent SDE by number of time steps, batch 256"
    return _with_command("sde", about, ["", *found], rows)


def networks() -> str:
    rows = []
    for name, entries in _read("vae")["results"].items():
        names = ("flowvi", "flowvi, compiled")
        cells = [_times(entries[n]["ratio"]) if n in entries else "" for n in names]
        rows.append([f"autoencoder {name} (`vae.py`)", *cells])
    for name, entries in _read("diffusion")["speed"].items():
        bare = entries["bare"]["median"]
        cells = [
            _times(entries[n]["median"] / bare) if n in entries else ""
            for n in ("flowvi", "compiled")
        ]
        rows.append([f"diffusion, {name} (`diffusion.py`)", *cells])
    header = ["time over bare torch's, training step", "eager", "compiled"]
    return f"{table(header, rows)}"


def bounds() -> str:
    parts, rows = ("prior", "reconstruction", "diffusion", "total"), []
    for name, found in _read("diffusion")["quality"].items():
        seeds = len(found["runs"]) // 2
        size = found["runs"]["VDM, seed 0"]["parameters"]
        steps = found["settings"]["num_steps"]
        label = f"{name}, {size:,} parameters, {steps} steps, {seeds} seeds"
        for model, values in {**found["means"], "difference": found["difference"]}.items():
            sign = "+" if model == "difference" else "-"
            cells = [f"{values[p][0]:{sign}.4f} +- {values[p][1]:.4f}" for p in parts]
            rows.append([f"{label}: {model}" if model == "VDM" else model, *cells])
    about = (
        "Bounds on test images, bits per dimension; after half of the steps both models go on "
        "from one VDM"
    )
    return _with_command("diffusion", about, ["", *parts], rows)


def couplings() -> str:
    found, rows = _read("rectified_flow"), []
    for problem, published in found["published"].items():
        runs: dict[str, list[dict[str, float]]] = {}
        for run in found["runs"].values():
            if run["problem"] == problem:
                runs.setdefault(run["coupling"], []).append(run)
        worst = mean(run["few"] for run in runs["independent"])
        for coupling, own in runs.items():
            few = [run["few"] for run in own]
            rows.append(
                [
                    problem,
                    coupling,
                    f"{mean(run['path_energy'] for run in own):.3f}",
                    str(published.get(coupling, "")),
                    f"{mean(few):.3f} +- {stdev(few) / len(few) ** 0.5:.3f}",
                    _times(worst / mean(few)),
                ]
            )
    header = [
        "", "coupling", "path energy", "published", "W2 after five calls", "independent / this",
    ]  # fmt: skip
    about = (
        "Normalised path energy (beside that of Tong et al., 2024, arXiv:2302.00482) and "
        "2-Wasserstein distance to the data, three seeds"
    )
    return _with_command("rectified_flow", about, header, rows)


def quality() -> str:
    results = _read("quality")["results"]
    targets = dict.fromkeys(result["target"] for result in results)
    found: dict[str, dict[str, str]] = {}
    for result in results:
        found.setdefault(result["guide"], {})[result["target"]] = last_gap(result["curve"])
    rows = [[name, *(cells.get(t, "") for t in targets)] for name, cells in found.items()]
    about = "Exact log evidence minus ELBO at the end of training, nats, with its CPU seconds"
    return _with_command("quality", about, ["", *(t.replace("_", " ") for t in targets)], rows)


def large() -> str:
    data, spread = _read("large_data"), _read("distributed")
    speeds = {name: value / 1e6 for name, value in data["rows_per_second"].items()}
    own, memory = speeds.pop("flowvi"), data["own_memory_mb_every_10_steps"]
    others = ", ".join(f"{name} {value:.2f}" for name, value in speeds.items())
    return (
        f"Ten million rows in batches of {data['batch']:,} (`python benchmarks/large_data.py`): "
        f"{own:.2f} million rows per second; {others}. Own memory is {memory[0]:.0f} MB at first "
        f"and {memory[-1]:.0f} MB at the end. Two processes on two cores take a step "
        f"{spread['speed_up']:.2f} times as fast as one (`python benchmarks/distributed.py`)."
    )


TABLES: dict[str, Callable[[], str]] = {
    "steps": steps,
    "flows": flows,
    "continuous": continuous,
    "densities": densities,
    "processes": processes,
    "networks": networks,
    "bounds": bounds,
    "couplings": couplings,
    "quality": quality,
    "large": large,
}


def rendered(text: str) -> str:
    """A text with its tables made anew.

    Raises:
        ValueError: if a table has no place, or a place no table.
    """
    places = _PLACE.findall(text)
    if sorted(places) != sorted(TABLES):
        raise ValueError(f"Places must be those of {sorted(TABLES)}; got {sorted(places)}.")
    return _PLACE.sub(
        lambda place: f"<!-- measured: {place[1]} -->\n{TABLES[place[1]]()}\n<!-- end -->", text
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    old = readme.read_text("utf-8")
    new = rendered(old)
    if args.check and new != old:
        parser.exit(1, "README.md differs from the results. Run python benchmarks/tables.py.\n")
    if not args.check:
        readme.write_text(new, "utf-8")


if __name__ == "__main__":
    main()
