"""Speed and accuracy of continuous flows: flowvi, torchdiffeq and zuko, interleaved.

    python benchmarks/cnf.py            # dimensions 2 and 16; some minutes, one thread
    python benchmarks/cnf.py --quick    # dimension 2, few repeats, nothing compiled

The same field with the same weights everywhere: three frequencies of time, hidden layers (64, 64),
tanh; batch 512, float32. Times are medians of process CPU time. The error is the largest distance
of a log-density to a reference in float64 with 400 Dormand-Prince steps; evaluations are those of
the forward pass. torchdiffeq and zuko run dopri5 at tolerance 1e-5.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Before torch: it limits every library to one thread.
from _timing import facts, interleave, steady_allocator, table, write_json  # isort: skip
import torch
from torch import Tensor, nn

from flowvi.distributions import Flow
from flowvi.nn import MLPField
from flowvi.transforms import (
    RK4,
    Adaptive,
    ClosedFormDivergence,
    Continuous,
    DormandPrince,
    ExactDivergence,
    FixedStep,
    Hutchinson,
)

BATCH, HIDDEN, GAIN, TOLERANCE = 512, (64, 64), 1.5, 1e-5
COLUMNS = ("log_prob", "log_prob, backward", "sample")
LOOP, ZUKO = "torchdiffeq, trace loop", "zuko, exact"
FLOOR = "matrix products of RK4(20)"
COMPILED = {
    "flowvi, RK4(20), compiled": RK4(20),
    "flowvi, DormandPrince(8), compiled": DormandPrince(8),
}


@dataclass
class Entry:
    """One implementation of the flow.

    Args:
        log_prob: log-density of values ``(BATCH, dim)``.
        sample: a batch of draws.
        parameters: what the backward pass differentiates.
        evaluations: how many times the last ``log_prob`` evaluated the field; None if unknown.
    """

    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[], Tensor]
    parameters: list[nn.Parameter]
    evaluations: Callable[[], int | None] = lambda: None


def make_field(dim: int) -> MLPField:
    field = MLPField(dim, HIDDEN)
    # As if the features of time were further inputs of the first layer.
    first = GAIN / (dim + field.time.output_dim) ** 0.5
    with torch.no_grad():
        field.layers[0].weight.normal_(std=first)
        field.time_layer.weight.normal_(std=first)
        for layer in field.layers[1:]:
            layer.weight.normal_(std=GAIN / layer.in_features**0.5)
    return field


def flowvi_entry(field: MLPField, **options: object) -> Entry:
    # Time runs from the values to the noise, as it does in the other libraries.
    transform = Continuous(field, **options)
    flow = Flow(transform.inv)
    return Entry(
        lambda x: flow().log_prob(x),
        lambda: flow().sample((BATCH,)),
        list(field.parameters()),
        lambda: transform.last_solve.num_evaluations,
    )


def flowvi_entries(field: MLPField) -> dict[str, Entry]:
    closed, tolerance = ClosedFormDivergence(), {"rtol": TOLERANCE, "atol": TOLERANCE}
    options = {
        "RK4(20)": (closed, RK4(20)),
        "RK4(20), checkpointed": (closed, RK4(20, checkpointed=True)),
        "DormandPrince(8)": (closed, DormandPrince(8)),
        "DormandPrince(10)": (closed, DormandPrince(10)),
        "DormandPrince(16)": (closed, DormandPrince(16)),
        "DormandPrince(10), forward mode": (ExactDivergence(), DormandPrince(10)),
        "DormandPrince(10), Hutchinson": (Hutchinson(), DormandPrince(10)),
        "adaptive": (closed, Adaptive(**tolerance)),
        "adaptive, adjoint": (closed, Adaptive(**tolerance, adjoint=True)),
    }
    return {
        f"flowvi, {name}": flowvi_entry(field, divergence=divergence, solver=solver)
        for name, (divergence, solver) in options.items()
    }


def compiled_entry(field: MLPField, solver: FixedStep) -> tuple[Entry, float]:
    """A compiled solve, and the seconds that its first call and backward take."""
    entry = flowvi_entry(field, solver=replace(solver, compiled=True))
    start = time.perf_counter()
    entry.log_prob(torch.randn(BATCH, field.input_dim)).sum().backward()
    return entry, time.perf_counter() - start


def base_log_prob(z: Tensor) -> Tensor:
    return torch.distributions.Normal(z.new_zeros(()), 1.0).log_prob(z).sum(-1)


def torchdiffeq_entry(field: MLPField, *, loop: bool, adjoint: bool = False) -> Entry:
    import torchdiffeq

    integrate = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
    options: dict[str, Any] = {"rtol": TOLERANCE, "atol": TOLERANCE, "method": "dopri5"}
    count = [0]

    class Augmented(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.field = field
            self.noise = torch.randn(BATCH, field.input_dim)

        def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            count[0] += 1
            with torch.enable_grad():
                x = state[0].requires_grad_() if state[0].is_leaf else state[0]
                dx = self.field(t, x)
                if loop:
                    rows = (
                        torch.autograd.grad(dx[:, i].sum(), x, create_graph=True)[0][:, i]
                        for i in range(field.input_dim)
                    )
                    return dx, sum(rows)
                (product,) = torch.autograd.grad(dx, x, self.noise, create_graph=True)
            return dx, (product * self.noise).sum(-1)

    augmented, ends = Augmented(), torch.tensor([0.0, 1.0])

    def log_prob(x: Tensor) -> Tensor:
        count[0] = 0
        z, ladj = integrate(augmented, (x.clone(), x.new_zeros(len(x))), ends, **options)
        return base_log_prob(z[-1]) + ladj[-1]

    @torch.no_grad()
    def sample() -> Tensor:
        z = torch.randn(BATCH, field.input_dim)
        return torchdiffeq.odeint(field, z, ends.flip(0), **options)[-1]

    return Entry(log_prob, sample, list(field.parameters()), lambda: count[0])


def zuko_entry(field: MLPField, *, exact: bool) -> Entry:
    import zuko

    flow = zuko.flows.CNF(
        field.input_dim,
        hidden_features=HIDDEN,
        activation=nn.Tanh,
        freqs=field.time.frequencies.numel(),
        atol=TOLERANCE,
        rtol=TOLERANCE,
        exact=exact,
    )
    linear = [m for m in flow.modules() if isinstance(m, nn.Linear | zuko.nn.Linear)]
    first = torch.cat([field.time_layer.weight, field.layers[0].weight], 1)
    count = [0]
    with torch.no_grad():
        for layer, own in zip(linear, field.layers, strict=True):
            layer.weight.copy_(first if own is field.layers[0] else own.weight)
            layer.bias.copy_(own.bias)
        linear[0].bias.add_(field.time_layer.bias)
    linear[0].register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))

    def log_prob(x: Tensor) -> Tensor:
        count[0] = 0
        return flow().log_prob(x)

    return Entry(
        log_prob, lambda: flow().sample((BATCH,)), list(flow.parameters()), lambda: count[0]
    )


def products_entry(field: MLPField, evaluations: int) -> Entry:
    """The bare matrix products of so many evaluations of the field, without divergences."""
    weights = [layer.weight for layer in field.layers]

    def passes(x: Tensor) -> Tensor:
        ends = []
        for _ in range(evaluations):
            h = x
            for weight in weights:
                h = h @ weight.t()
            ends.append(h.sum(-1))
        return torch.stack(ends).sum(0)

    sample = torch.no_grad()(lambda: passes(torch.randn(BATCH, field.input_dim)))
    return Entry(passes, sample, list(weights), lambda: evaluations)


def make_entries(field: MLPField) -> dict[str, Entry]:
    entries = flowvi_entries(field)
    entries[LOOP] = torchdiffeq_entry(field, loop=True)
    entries["torchdiffeq, trace loop, adjoint"] = torchdiffeq_entry(field, loop=True, adjoint=True)
    entries["torchdiffeq, Hutchinson"] = torchdiffeq_entry(field, loop=False)
    try:
        entries[ZUKO] = zuko_entry(field, exact=True)
        entries["zuko, Hutchinson"] = zuko_entry(field, exact=False)
    except ImportError:
        print("zuko is not installed: left out")
    entries[FLOOR] = products_entry(field, 80)
    return entries


def reference(field: MLPField, data: Tensor) -> Tensor:
    transform = Continuous(copy.deepcopy(field).double(), solver=DormandPrince(400))
    with torch.no_grad():
        z, ladj = transform.call_and_ladj(data.double())
    return base_log_prob(z) + ladj


def timed(entry: Entry, data: Tensor) -> dict[str, Callable[[], object]]:
    def backward() -> None:
        for parameter in entry.parameters:
            parameter.grad = None
        entry.log_prob(data.clone()).mean().neg().backward()

    forward = torch.no_grad()(lambda: entry.log_prob(data.clone()))
    return dict(zip(COLUMNS, (forward, backward, entry.sample), strict=True))


def measure(
    dim: int, repeats: int, compiled: bool, only: list[str] | None
) -> dict[str, dict[str, Any]]:
    def wanted(name: str) -> bool:
        return only is None or any(part in name for part in only)

    field = make_field(dim)
    data = torch.randn(BATCH, dim)
    entries = {name: entry for name, entry in make_entries(field).items() if wanted(name)}
    extra = {}
    for name, solver in COMPILED.items():
        if compiled and wanted(name):
            entries[name], seconds = compiled_entry(field, solver)
            extra[name] = {"compile seconds": round(seconds, 1)}
    exact = reference(field, data)
    rows: dict[str, dict[str, Any]] = {}
    for name, entry in entries.items():
        with torch.no_grad():
            error = (entry.log_prob(data.clone()).double() - exact).abs().max()
        inexact = "Hutchinson" in name or name == FLOOR
        error = None if inexact else float(f"{float(error):.2e}")
        rows[name] = {"error": error, "evaluations": entry.evaluations(), **extra.get(name, {})}
    functions = {
        (column, name): function
        for name, entry in entries.items()
        for column, function in timed(entry, data).items()
    }
    timings = interleave(functions, repeats)
    for (column, name), timing in timings.items():
        rows[name][column] = timing.record()
    return rows


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Times of the peers' exact flows over those of each own entry, forward and backward."""
    column = COLUMNS[1]
    found: dict[str, dict[str, float]] = {}
    for name, row in rows.items():
        if name.startswith("flowvi"):
            others = [
                LOOP,
                ZUKO,
                *([name.removesuffix(", compiled")] if "compiled" in name else []),
            ]
            found[name] = {
                other: round(rows[other][column]["median"] / row[column]["median"], 2)
                for other in others
                if other in rows and "median" in rows[other][column]
            }
    return found


def report(dim: int, rows: dict[str, dict[str, Any]]) -> None:
    found, cells = ratios(rows), []
    for name, row in rows.items():
        times = [f"{row[c]['median']:.0f}" if "median" in row.get(c, {}) else "-" for c in COLUMNS]
        speed = [
            f"{found[name][p]:.1f}x" if p in found.get(name, {}) else "" for p in (LOOP, ZUKO)
        ]
        error = "-" if row["error"] is None else f"{row['error']:.0e}"
        cells.append([name, str(row["evaluations"] or "-"), error, *times, *speed])
    header = ["", "evaluations", "error", *COLUMNS, f"faster than {LOOP}", f"than {ZUKO}"]
    print(f"\ndimension {dim} (ms)\n")
    print(table(header, cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="+")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--quick", action="store_true", help="dimension 2, three repeats")
    parser.add_argument("--eager", action="store_true", help="nothing compiled")
    parser.add_argument("--only", nargs="+", help="entries with one of these in their name")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    args = parser.parse_args()
    name = "cnf-quick.json" if args.quick else "cnf.json"
    steady_allocator()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = []
    for dim in args.dims or ([2] if args.quick else [2, 16]):
        repeats = args.repeats or (3 if args.quick else 7)
        rows = measure(dim, repeats, not (args.quick or args.eager), args.only)
        report(dim, rows)
        results.append({"dim": dim, "entries": rows, "ratios": ratios(rows)})
    setting = {"hidden": HIDDEN, "batch": BATCH, "tolerance": TOLERANCE, "dtype": "float32"}
    packages = ("torch", "torchdiffeq", "zuko")
    write_json(
        args.out or Path(__file__).parent / "results" / name,
        {"facts": facts(*packages), "setting": setting, "results": results},
    )


if __name__ == "__main__":
    main()
