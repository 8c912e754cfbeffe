"""One step of SVI: stock Pyro, compiled flowvi, NumPyro.

    python benchmarks/svi_step.py           # about twenty minutes, most of it compiling
    python benchmarks/svi_step.py --quick   # one model

Loss, gradient and Adam, one particle, float32, one thread, the same programs in all libraries:
eight schools (non-centred) and a logistic regression of 1000 rows and 50 features, each with a
mean-field normal, a full-rank normal and a chain of three inverse autoregressive maps (hidden
sizes: the dimension, twice), and an autoencoder 784-400-20 on batches of 128.

"pyro" is ``SVI.step`` without validation; "step" is ``CompiledSVI.step``, "numpyro update" a
jitted update, both called from Python with the loss read each time; "run" is ``CompiledSVI.run``,
"numpyro scan" a jitted ``lax.scan``. "torch" is the autoencoder's loss written by hand under
``torch.compile``, with torch's fused Adam. Times are medians of process CPU time per step over
rounds in which all take turns. A first compilation and a start from the cache in a new process
are in CPU seconds too, those of the C++ compiler included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch: it limits every library to one thread.
from _timing import facts, interleave, steady_allocator, table, write_json  # isort: skip
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO, autoguide
from torch import Tensor, nn
from torch.nn import functional as F

from flowvi.infer import CompiledSVI
from flowvi.infer.compiled import Native

LR = 1e-3
CASES = [
    *((model, guide) for model in ("eight schools", "logistic") for guide in
      ("mean field", "full rank", "iaf")),
    ("vae", "amortised"),
]  # fmt: skip
DIMS = {"eight schools": 10, "logistic": 51}
Steps = Callable[[int], object]


def data_of(model: str) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    if model == "eight schools":
        y = np.array([28, 8, -3, 7, -1, 1, 18, 12], np.float32)
        return y, np.array([15, 10, 16, 11, 9, 11, 10, 18], np.float32)
    if model == "logistic":
        x = rng.normal(size=(1000, 50)).astype(np.float32)
        chance = 1 / (1 + np.exp(-0.3 * x @ rng.normal(size=50)))
        return x, (rng.random(1000) < chance).astype(np.float32)
    return ((rng.random((128, 784)) < 0.3).astype(np.float32),)


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    spread = pyro.sample("spread", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mean + spread * effect, sigma), obs=y)


def logistic(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
    offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ slope + offset), obs=y)


class Autoencoder(nn.Module):
    """Networks of an autoencoder, as a Pyro program and as a loss written by hand."""

    def __init__(self, pixels: int = 784, hidden: int = 400, latent: int = 20) -> None:
        super().__init__()
        self.inward = nn.Linear(pixels, hidden)
        self.loc, self.log_scale = nn.Linear(hidden, latent), nn.Linear(hidden, latent)
        self.outward = nn.Sequential(
            nn.Linear(latent, hidden), nn.Softplus(), nn.Linear(hidden, pixels)
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.softplus(self.inward(x))
        return self.loc(hidden), self.log_scale(hidden).exp()

    def model(self, x: Tensor) -> None:
        pyro.module("autoencoder", self)
        with pyro.plate("image", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(20), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.outward(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("autoencoder", self)
        with pyro.plate("image", len(x)):
            pyro.sample("z", dist.Normal(*self.encode(x)).to_event(1))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        loc, scale = self.encode(x)
        z = loc + scale * noise
        fit = F.binary_cross_entropy_with_logits(self.outward(z), x, reduction="sum")
        return fit + 0.5 * (z.square() - noise.square()).sum() - scale.log().sum()


def programs(model: str, guide: str) -> tuple[Callable, Callable]:
    if model == "vae":
        networks = Autoencoder()
        return networks.model, networks.guide
    program = {"eight schools": eight_schools, "logistic": logistic}[model]
    if guide == "iaf":
        hidden = [DIMS[model]] * 2
        return program, autoguide.AutoIAFNormal(program, hidden_dim=hidden, num_transforms=3)
    kinds = {
        "mean field": autoguide.AutoNormal,
        "full rank": autoguide.AutoMultivariateNormal,
    }
    return program, kinds[guide](program)


def cpu_seconds() -> float:
    """CPU time of this process and of compilers that it has started."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def pyro_steps(model: str, guide: str, cache: Path | None) -> tuple[dict[str, Steps], float]:
    """Functions that take a number of steps, each in a parameter store of its own."""
    store = pyro.get_param_store()
    data = [torch.from_numpy(array) for array in data_of(model)]

    def make(compiled: bool) -> tuple[SVI, dict]:
        with store.scope() as state:
            program, made = programs(model, guide)
            optim = pyro.optim.Adam({"lr": LR})
            if not compiled:
                svi = SVI(program, made, optim, Trace_ELBO())
            else:
                svi = CompiledSVI(program, made, optim, Trace_ELBO(), backend=Native(cache))
            if isinstance(made, nn.Module):
                made(*data)
            began = cpu_seconds()
            svi.step(*data)
            seconds = cpu_seconds() - began
        return svi, state, seconds

    compiled, state, seconds = make(True)
    eager, eager_state, _ = make(False)

    def stepping(svi: SVI, state: dict) -> Steps:
        def steps(num_steps: int) -> None:
            with store.scope(state):
                for _ in range(num_steps):
                    svi.step(*data)

        return steps

    def run(num_steps: int) -> None:
        with store.scope(state):
            compiled.run(num_steps, *data)

    return {"pyro": stepping(eager, eager_state), "step": stepping(compiled, state), "run": run}, (
        seconds
    )


def torch_steps() -> dict[str, Steps]:
    (x,) = (torch.from_numpy(array) for array in data_of("vae"))
    networks = Autoencoder()
    loss_of = torch.compile(networks, fullgraph=True)
    optimizer = torch.optim.Adam(networks.parameters(), lr=LR, fused=True)

    def steps(num_steps: int) -> None:
        for _ in range(num_steps):
            loss = loss_of(x, torch.randn(len(x), 20))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()

    return {"torch": steps}


def measure(model: str, guide: str, repeats: int, cache: Path) -> dict[str, Any]:
    steps, first = pyro_steps(model, guide, cache)
    if model == "vae":
        steps |= torch_steps()
    try:
        from _svi_numpyro import numpyro_steps

        steps |= numpyro_steps(model, guide, data_of(model), LR)
    except ImportError:
        print("numpyro is not installed: left out")
    large = model == "vae"
    lengths = {"pyro": 10, "step": 300, "run": 1024, "numpyro update": 200, "numpyro scan": 1024}
    numbers = {name: 10 if large else lengths[name] for name in steps}
    cases = {name: (lambda f=f, n=numbers[name]: f(n)) for name, f in steps.items()}
    for case in cases.values():
        case()
    timings = interleave(cases, repeats, slow=60.0)
    done = {name: timing for name, timing in timings.items() if timing.samples}
    micros = {name: 1e6 * timing.median / numbers[name] for name, timing in done.items()}
    result = {
        "model": model,
        "guide": guide,
        "microseconds": {name: round(value, 2) for name, value in micros.items()},
        "least": {n: round(1e6 * min(t.samples) / numbers[n], 2) for n, t in done.items()},
        "first compilation, CPU s": round(first, 1),
        "start from the cache, CPU s": round(warm_start(model, guide, cache), 2),
    }
    ratios = {"pyro / step": ("pyro", "step"), "numpyro update / step": ("numpyro update", "step")}
    ratios |= {"run / numpyro scan": ("run", "numpyro scan"), "run / torch": ("run", "torch")}
    ratios |= {"step / torch": ("step", "torch"), "pyro / run": ("pyro", "run")}
    result["ratios"] = {
        name: round(micros[a] / micros[b], 3) for name, (a, b) in ratios.items()
        if a in micros and b in micros
    }  # fmt: skip
    return result


def warm_start(model: str, guide: str, cache: Path) -> float:
    """CPU seconds from the imports to the end of the first step, in a new process."""
    command = [sys.executable, __file__, "--warm", model, guide, "--cache", str(cache)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def print_warm_start(model: str, guide: str, cache: Path) -> None:
    began = cpu_seconds()
    data = [torch.from_numpy(array) for array in data_of(model)]
    program, made = programs(model, guide)
    optim = pyro.optim.Adam({"lr": LR})
    svi = CompiledSVI(program, made, optim, Trace_ELBO(), backend=Native(cache))
    if isinstance(made, nn.Module):
        made(*data)
    svi.step(*data)
    print(cpu_seconds() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="eight schools, mean field")
    parser.add_argument("--only", nargs="+", help="words that a case's name must contain")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--cache", type=Path, help="keep compiled steps here; a new folder if not")
    parser.add_argument("--warm", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pyro.enable_validation(False)
    warnings.filterwarnings("ignore")
    if args.warm:
        print_warm_start(*args.warm, args.cache)
        return
    steady_allocator()
    name = "svi_step-quick.json" if args.quick else "svi_step.json"
    out = args.out or Path(__file__).parent / "results" / name
    chosen = CASES[:1] if args.quick else CASES
    chosen = [c for c in chosen if all(word in " ".join(c) for word in args.only or ())]
    # Cases that are not measured now keep the numbers they have.
    old = json.loads(out.read_text())["results"] if args.only and out.exists() else []
    results = {(r["model"], r["guide"]): r for r in old}
    packages = ("torch", "pyro-ppl", "numpyro", "jax")
    with tempfile.TemporaryDirectory() as folder:
        for case in chosen:
            results[case] = measure(*case, args.repeats, args.cache or Path(folder))
            report(results[case])
            ordered = [results[known] for known in CASES if known in results]
            write_json(out, {"facts": facts(*packages), "lr": LR, "results": ordered})


def report(result: dict[str, Any]) -> None:
    micros, ratios = result["microseconds"], result["ratios"]
    print(f"\n{result['model']}, {result['guide']} (microseconds per step)\n")
    print(table(list(micros), [[f"{value:.1f}" for value in micros.values()]]))
    print(", ".join(f"{name} {value:.2f}" for name, value in ratios.items()))
    cold, warm = result["first compilation, CPU s"], result["start from the cache, CPU s"]
    print(f"CPU seconds: first compilation {cold}, start from the cache {warm}", flush=True)


if __name__ == "__main__":
    main()
