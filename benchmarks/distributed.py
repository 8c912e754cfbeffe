"""Data-parallel SVI on one and two processes with the same minibatch in all.

    python benchmarks/distributed.py           # about a minute on two cores
    python benchmarks/distributed.py --quick

Logistic regression with a RealNVP guide over 50 coefficients, 200,000 simulated rows, minibatches
of 8192 rows in all, 16 particles, float32. Each process has one thread and is started by
``torchrun`` (gloo). Wall time, because that is what several processes are for; the runs with one
and with two processes take turns. Two processes on two cores cannot be twice as fast as one: the
guide is evaluated by both, and gradients have to be exchanged.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Before torch: it limits every library to one thread.
from _timing import facts, table, write_json  # isort: skip
import pyro
import pyro.distributions as dist
import torch
import torch.distributed
from torch import Tensor

from flowvi.flows import realnvp
from flowvi.guides import AutoFlow
from flowvi.infer import DistributedSVI, GlobalOptim
from flowvi.objectives import STL

ROWS, FEATURES, BATCH, PARTICLES = 200_000, 50, 8192, 16


def work(steps: int, output: Path) -> None:
    """What every process does; the first writes down how long it took."""
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    pyro.enable_validation(False)
    number = BATCH // torch.distributed.get_world_size()
    x = torch.randn(ROWS, FEATURES)
    y = (torch.rand(ROWS) < torch.sigmoid(x[:, 0] - x[:, 1])).float()

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(FEATURES), 1.0).to_event(1))
        with pyro.plate("rows", ROWS, subsample_size=number) as index:
            logits = w.reshape(-1, FEATURES) @ x[index].T
            logits = logits.reshape(*w.shape[:-2], number)
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y[index])

    guide = AutoFlow(model, realnvp)
    guide.initialize(x, y)
    objective = STL(PARTICLES, max_plate_nesting=1)
    svi = DistributedSVI(model, guide, GlobalOptim(1e-3), objective)
    for _ in range(3):
        svi.step(x, y)
    torch.distributed.barrier()
    start = time.perf_counter()
    loss = torch.stack([svi.step_async(x, y) for _ in range(steps)])[-1].item()
    torch.distributed.barrier()
    if svi.is_first:
        output.write_text(
            json.dumps({"step": (time.perf_counter() - start) / steps, "loss": loss})
        )
    torch.distributed.destroy_process_group()


def launch(processes: int, steps: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "time.json"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={processes}", __file__),
            *("--worker", str(output), "--steps", str(steps)),
        ]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return json.loads(output.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps")
    parser.add_argument("--steps", type=int, help="steps per run")
    parser.add_argument("--rounds", type=int, help="runs of each kind")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    steps = options.steps or (5 if options.quick else 40)
    if options.worker is not None:
        work(steps, options.worker)
        return
    found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    for _ in range(options.rounds or (1 if options.quick else 3)):
        for processes, runs in found.items():
            runs.append(launch(processes, steps))
    medians = {n: statistics.median(run["step"] for run in runs) for n, runs in found.items()}
    result = {
        **facts("torch", "pyro-ppl", "flowvi"),
        "clock": "wall time",
        "cores": os.cpu_count(),
        "rows_per_step": BATCH,
        "milliseconds_per_step": {n: round(1e3 * v, 2) for n, v in medians.items()},
        "last_loss": {n: [round(run["loss"], 3) for run in runs] for n, runs in found.items()},
        "speed_up": round(medians[1] / medians[2], 3),
    }
    default = Path(__file__).parent / "results" / "distributed.json"
    if options.output or not options.quick:
        write_json(options.output or default, result)
    rows = [
        [str(n), f"{1e3 * v:.1f}", f"{BATCH / v / 1e3:.0f}", f"{medians[1] / v:.2f}"]
        for n, v in medians.items()
    ]
    print(table(["processes", "ms per step", "thousand rows/s", "speed-up"], rows))
    print(f"\n{os.cpu_count()} cores in this machine.")


if __name__ == "__main__":
    main()
