"""SVI on ten million rows: memory that does not grow, and rows per second against NumPyro.

    python benchmarks/large_data.py           # 10^7 rows in a temporary file of 360 MB
    python benchmarks/large_data.py --quick   # 10^5 rows

Logistic regression of eight features with a mean-field normal guide and minibatches of 10,000,
float32, one thread. flowvi reads the rows from a memory-mapped file; stock Pyro has the same file
and permutes all indices in every step; NumPyro holds the rows in memory and its step is jitted.
Times are medians of process CPU time over rounds of ten steps, taken in turn. "Own memory" is
what the process holds itself, without pages of the file that the system keeps and may drop.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

# Before torch: it limits every library to one thread.
from _timing import facts, interleave, steady_allocator, table, write_json  # isort: skip
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from flowvi.infer import FlowSVI, GlobalOptim, StratifiedMinibatches
from flowvi.objectives import ELBO

FEATURES, BATCH, STEPS = 8, 10_000, 10
CHUNK = 1_000_000


def write_rows(path: Path, rows: int) -> None:
    """Features and label of simulated rows, piece by piece."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(FEATURES).astype(np.float32)
    with path.open("wb") as file:
        for start in range(0, rows, CHUNK):
            x = rng.standard_normal((min(CHUNK, rows - start), FEATURES), dtype=np.float32)
            y = rng.random(len(x)) < 1 / (1 + np.exp(-x @ weights))
            np.column_stack([x, y]).astype(np.float32).tofile(file)


def own_memory() -> float:
    """Memory of this process that is not a file's, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return float("nan")


def model(data: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(FEATURES), 1.0).to_event(1))
    with pyro.plate("rows", len(data), subsample_size=BATCH) as index:
        batch = data[index]
        logits = (batch[:, :FEATURES] * w).sum(-1)
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=batch[:, FEATURES])


def flowvi_steps(data: Tensor) -> Callable[[], None]:
    svi = FlowSVI(model, AutoNormal(model), GlobalOptim(0.01), ELBO(max_plate_nesting=1))

    def run() -> None:
        with StratifiedMinibatches():
            for _ in range(STEPS):
                svi.step(data)

    return run


def pyro_steps(data: Tensor) -> Callable[[], None]:
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())

    def run() -> None:
        for _ in range(STEPS):
            svi.step(data)

    return run


def numpyro_steps(rows: np.ndarray) -> dict[str, Callable[[], None]]:
    """A jitted step whose loss is read, and loops inside XLA; nothing without NumPyro."""
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ.setdefault("XLA_FLAGS", flags)
    try:
        import jax
        import numpyro
        from jax import numpy as jnp
        from numpyro import distributions as ndist
        from numpyro.infer import SVI as NumPyroSVI
        from numpyro.infer import Trace_ELBO as NumPyroELBO
        from numpyro.infer.autoguide import AutoNormal as NumPyroNormal
    except ImportError:
        return {}
    data = jnp.asarray(rows)

    def program(data: jax.Array, cheap: bool = False) -> None:
        w = numpyro.sample("w", ndist.Normal(jnp.zeros(FEATURES), 1.0).to_event(1))
        with numpyro.plate("rows", len(data), subsample_size=BATCH) as index:
            if cheap:
                # With replacement; XLA drops the plate's own indices, which nothing reads.
                index = jax.random.randint(numpyro.prng_key(), (BATCH,), 0, len(data))
            batch = data[index]
            logits = (batch[:, :FEATURES] * w).sum(-1)
            numpyro.sample("y", ndist.Bernoulli(logits=logits), obs=batch[:, FEATURES])

    svi = NumPyroSVI(program, NumPyroNormal(program), numpyro.optim.Adam(0.01), NumPyroELBO())
    update = jax.jit(svi.update, static_argnames="cheap")

    def one_by_one() -> Callable[[], None]:
        state = svi.init(jax.random.PRNGKey(0), data)

        def run() -> None:
            nonlocal state
            for _ in range(STEPS):
                state, loss = update(state, data)
                float(loss)

        return run

    def together(cheap: bool) -> Callable[[], None]:
        state = svi.init(jax.random.PRNGKey(0), data)

        @jax.jit
        def scan(state: object, data: jax.Array) -> tuple:
            step = lambda carry, _: svi.update(carry, data, cheap=cheap)  # noqa: E731
            return jax.lax.scan(step, state, None, length=STEPS)

        def run() -> None:
            nonlocal state
            state, losses = scan(state, data)
            losses.block_until_ready()

        return run

    return {
        "NumPyro, jitted step": one_by_one(),
        "NumPyro, lax.scan": together(False),
        "NumPyro, lax.scan, indices by randint": together(True),
    }


def memory_over(run: Callable[[], None], rounds: int) -> list[float]:
    """Own memory in MB before the first round and after each."""
    run()
    found = [own_memory()]
    for _ in range(rounds):
        run()
        found.append(own_memory())
    return [round(value, 1) for value in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="10^5 rows")
    parser.add_argument("--rows", type=int, help="number of rows")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    steady_allocator()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = options.rows or (100_000 if options.quick else 10_000_000)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.f4"
        write_rows(path, rows)
        mapped = np.memmap(path, dtype=np.float32, mode="r+", shape=(rows, FEATURES + 1))
        data = torch.from_numpy(mapped)
        flow_run = flowvi_steps(data)
        memory = memory_over(flow_run, 20)
        with pyro.get_param_store().scope():
            cases = {"flowvi": flow_run, "Pyro": pyro_steps(data), **numpyro_steps(mapped)}
            timings = interleave(cases, 5 if options.quick else 9, slow=30.0)
    per_second = {n: BATCH * STEPS / t.median for n, t in timings.items() if t.median}
    result = {
        **facts("torch", "pyro-ppl", "flowvi", "jax", "numpyro"),
        "rows": rows,
        "batch": BATCH,
        "steps_per_round": STEPS,
        "milliseconds_per_round": {n: t.record() for n, t in timings.items()},
        "rows_per_second": {n: round(v) for n, v in per_second.items()},
        "own_memory_mb_every_10_steps": memory,
        "data_mb": round(rows * (FEATURES + 1) * 4 / 2**20),
    }
    default = Path(__file__).parent / "results" / "large_data.json"
    if options.output or not options.quick:
        write_json(options.output or default, result)
    lines = [
        [n, f"{v / 1e6:.2f}", f"{per_second['flowvi'] / v:.2f}"] for n, v in per_second.items()
    ]
    print(table(["step", "million rows/s", "flowvi / this"], lines))
    first, last = memory[0], memory[-1]
    print(f"\nOwn memory of flowvi's steps: {first} MB at first, {last} MB after 200 steps;")
    print(f"the data are {result['data_mb']} MB.")


if __name__ == "__main__":
    main()
