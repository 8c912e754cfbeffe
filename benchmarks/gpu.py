"""Steps in one CUDA graph against eager Pyro, on a GPU.

    python benchmarks/gpu.py              # needs a CUDA device; some minutes
    python benchmarks/gpu.py --dry-run    # anywhere: shapes and operations on the meta device

Three programs, each trained with Adam in float32 with TF32 products: "flow guide" is a RealNVP
guide (10 layers, hidden sizes 256, 256) of 100 latents with 1,024 particles, "vae" an autoencoder
784-2048-2048-64 on batches of 8,192, "unet" a diffusion model of 32 x 32 colour images with a
U-Net of width 128 on batches of 64.

"pyro" is the stock ``SVI.step`` without validation, on the same GPU, "step" ``CompiledSVI.step``
with its loss read, "run" ``CompiledSVI.run``, which replays one CUDA graph. Times are wall-clock
medians, the device waited for before and after. The floor is the number of floating-point
operations of the step's matrix products and convolutions over the rate of one product of 8,192
squared, in TF32 and in bf16. A profile of one ``run`` counts calls that wait for the device; its
trace is kept for chrome://tracing.

The dry run records the same step on the meta device, where no operation can read a number, counts
its operations, parameters and floating-point operations, and takes two steps at a small size on
the CPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from _timing import facts, table, write_json  # isort: skip
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flowvi.flows import realnvp
from flowvi.guides import AutoFlow
from flowvi.infer import CompiledSVI
from flowvi.infer.compiled import CudaGraph, Interpreter
from flowvi.infer.compiled.optimizers import state_of
from flowvi.infer.compiled.step import Buffers, Layout, build_step
from flowvi.infer.compiled.tracing import Program, trace_program, used_parameters
from flowvi.models import (
    VAE,
    VDM,
    BernoulliLikelihood,
    DiagonalPosterior,
    MLPDecoder,
    MLPEncoder,
    RealEnd,
)
from flowvi.nn import UNet
from flowvi.paths import LinearLogSNR, Prediction

RESULTS = Path(__file__).parent / "results"
# Calls of the CUDA runtime that wait for the device, and copies to the host.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH")
Task = tuple[Callable, Callable, Trace_ELBO, Tensor, list[nn.Module]]


def flow_guide(tiny: bool, device: str) -> Task:
    dim, layers, hidden, particles = (4, 2, (8,), 3) if tiny else (100, 10, (256, 256), 1024)

    def model(y: Tensor) -> None:
        scale = y.new_ones(dim).cumsum(0).rsqrt()
        z = pyro.sample("z", dist.Normal(y.new_zeros(dim), scale).to_event(1))
        pyro.sample("y", dist.Normal(z.square().sum(-1), 1.0), obs=y)

    guide = AutoFlow(model, partial(realnvp, num_layers=layers, hidden_dims=hidden))
    y = torch.tensor(2.0)
    guide(y)
    guide.to(device)
    objective = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=0)
    return model, guide, objective, y.to(device), [guide]


def vae(tiny: bool, device: str) -> Task:
    hidden, latent, batch = ((8, 8), 2, 4) if tiny else ((2048, 2048), 64, 8192)
    likelihood = BernoulliLikelihood((784,))
    pair = VAE(
        MLPEncoder((784,), hidden),
        MLPDecoder(latent, hidden, likelihood.output_shape),
        likelihood,
        DiagonalPosterior(hidden[-1], latent),
    ).to(device)
    x = (torch.rand(batch, 784) < 0.3).float().to(device)
    return pair.model, pair.guide, Trace_ELBO(max_plate_nesting=1), x, [pair]


def unet(tiny: bool, device: str) -> Task:
    width, size, batch = (8, 8, 2) if tiny else (128, 32, 64)
    network = UNet((3, size, size), width)
    end = RealEnd((3, size, size))
    pair = VDM(end, network, LinearLogSNR(-5.0, 9.0), prediction=Prediction.NOISE).to(device)
    x = torch.randn(batch, 3, size, size).to(device)
    return pair.model, pair.guide, Trace_ELBO(max_plate_nesting=1), x, [pair]


TASKS = {"flow guide": flow_guide, "vae": vae, "unet": unet}


def adam() -> pyro.optim.PyroOptim:
    return pyro.optim.Adam({"lr": 1e-3})


def recorded(name: str) -> dict[str, Any]:
    """The step of a task as one graph on the meta device, where nothing can read a number."""
    pyro.clear_param_store()
    model, guide, objective, data, _ = TASKS[name](False, "meta")
    program = Program(model, guide, objective, (data,))
    named = used_parameters(program)
    traced = trace_program(program, [param for _, param in named])
    state = state_of(adam(), named)
    layout = Layout(tuple(param.shape for _, param in named))
    moments = state.update.num_moments
    buffers = Buffers(layout, named[0][1].detach(), moments, 8, len(traced.reports))
    step = build_step(traced, state.update, buffers, [data], 8)
    with FlopCounterMode(display=False) as counter:
        step.graph(*step.inputs)
    operations = [n for n in step.graph.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    waits = [str(n.target) for n in operations if torch.Tag.data_dependent_output in n.target.tags]
    numbers = {"operations": len(operations), "draws": len(step.draws)}
    numbers |= {"parameters": layout.numel, "flop": counter.get_total_flops()}
    return {**numbers, "waits for the host": waits}


def dry_run(names: list[str]) -> None:
    rows = []
    for name in names:
        found = recorded(name)
        pyro.clear_param_store()
        model, guide, objective, data, _ = TASKS[name](True, "cpu")
        svi = CompiledSVI(model, guide, adam(), objective, backend=Interpreter(), check=1)
        losses = svi.run(2, data)
        if found["waits for the host"] or not losses.isfinite().all():
            raise SystemExit(f"{name}: waits {found['waits for the host']}, losses {losses}")
        numbers = (found["operations"], found["draws"], found["parameters"])
        rows.append([name, *map(str, numbers), f"{found['flop'] / 1e9:.1f}", "0"])
    header = ["", "operations", "draws", "parameters", "10^9 flop", "waits for the host"]
    print(table(header, rows))
    print("Every step is one graph that never waits for the host. Run without --dry-run on a GPU.")


def seconds(function: Callable[[], object], repeats: int) -> float:
    function()
    samples = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        torch.cuda.synchronize()
        samples.append(time.perf_counter() - began)
    return statistics.median(samples)


def product_rate(dtype: torch.dtype) -> float:
    """Floating-point operations per second of one large product."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, 20)


def calls_in(run: Callable[[], object], trace: Path | None = None) -> Counter[str]:
    """What a profile of ``run`` saw, by name; the trace goes to a file."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        run()
    if trace is not None:
        profile.export_chrome_trace(str(trace))
    return Counter({event.key: event.count for event in profile.key_averages()})


def waits_in(run: Callable[[], object], trace: Path) -> dict[str, int]:
    """Calls that wait for the device, beyond those of the profiler itself."""
    calls = calls_in(run, trace) - calls_in(lambda: None)
    return {name: count for name, count in calls.items() if name.startswith(WAITS)}


def measure(name: str, repeats: int, num_steps: int) -> dict[str, Any]:
    made = {}
    for kind in ("pyro", "compiled"):
        pyro.clear_param_store()
        model, guide, objective, data, kept = TASKS[name](False, "cuda")
        if kind == "pyro":
            svi = SVI(model, guide, adam(), objective)
        else:
            svi = CompiledSVI(model, guide, adam(), objective, backend=CudaGraph())
        svi.step(data)
        made[kind] = (svi, data, kept, pyro.get_param_store().get_state())

    def use(kind: str) -> tuple[SVI, Tensor]:
        svi, data, _, state = made[kind]
        pyro.get_param_store().set_state(state)
        return svi, data

    def stepping(kind: str, number: int) -> float:
        svi, data = use(kind)
        return seconds(lambda: [svi.step(data) for _ in range(number)], repeats) / number

    result = {"pyro": stepping("pyro", 5), "step": stepping("compiled", 20)}
    svi, data = use("compiled")
    result["run"] = seconds(lambda: svi.run(num_steps, data), repeats) / num_steps
    trace = RESULTS / f"gpu-{name.replace(' ', '-')}.json.gz"
    waits = waits_in(lambda: svi.run(num_steps, data), trace)
    flops = recorded(name)["flop"]
    floors = {str(d): flops / rate for d, rate in RATES.items()}
    return {
        "task": name,
        "microseconds": {key: round(1e6 * value, 1) for key, value in result.items()},
        "10^9 flop": round(flops / 1e9, 2),
        "waits of the host in a run": waits,
        "pyro / step": round(result["pyro"] / result["step"], 2),
        "pyro / run": round(result["pyro"] / result["run"], 2),
        "share of the floor": {key: round(v / result["run"], 3) for key, v in floors.items()},
    }


RATES: dict[str, float] = {}


def report(result: dict[str, Any]) -> None:
    micros, share = result["microseconds"], result["share of the floor"]
    print(f"\n{result['task']} (microseconds per step)\n")
    print(table(list(micros), [[f"{value:.1f}" for value in micros.values()]]))
    print(
        f"pyro / step {result['pyro / step']}, pyro / run {result['pyro / run']}, share of the "
        f"floor {share}, waits {result['waits of the host in a run'] or 'none'}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="without a GPU, see above")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--steps", type=int, default=200, help="steps of a run")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    pyro.enable_validation(False)
    if args.dry_run:
        dry_run(args.tasks)
        return
    if not torch.cuda.is_available():
        parser.error("a CUDA device must be present; got none. Use --dry-run to check the steps.")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    RATES.update(TF32=product_rate(torch.float32), bf16=product_rate(torch.bfloat16))
    results = []
    for name in args.tasks:
        results.append(measure(name, args.repeats, args.steps))
        report(results[-1])
        about = {
            "device": torch.cuda.get_device_name(),
            "clock": "wall",
            "cuda": torch.version.cuda,
        }
        rates = {name: round(rate / 1e12, 1) for name, rate in RATES.items()}
        content = {"facts": facts("torch", "pyro-ppl") | about, "10^12 flop per second": rates}
        write_json(args.out, content | {"results": results})


if __name__ == "__main__":
    main()
