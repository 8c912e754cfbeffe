"""Speed of discrete flows: flowvi, its peers and the bare arithmetic, interleaved.

    python benchmarks/flows.py            # dimensions 8 and 64; a few minutes, one thread
    python benchmarks/flows.py --quick    # dimension 8, few repeats
    python benchmarks/flows.py --dims 64 --kinds realnvp   # one of the cases anew

The same architecture in every library: 5 layers, conditioner with hidden layers (256, 256) and
ReLU, batch 1024, float32. Times are medians of process CPU time; a case whose first call takes
longer than a second is run once (every peer's slow direction at dimension 64). The floor is the
conditioners' matrix products alone, without masks, activations or the maps themselves.
"""

from __future__ import annotations

import argparse
import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

# Before torch: it limits every library to one thread.
from _timing import Timing, facts, interleave, steady_allocator, table, write_json  # isort: skip
import torch
from _flow_peers import (
    BATCH,
    BINS,
    BOUND,
    COLUMNS,
    HIDDEN,
    LAYERS,
    PEERS,
    Cases,
    alternating,
    cases,
)
from torch import nn

KINDS = ("realnvp", "maf", "iaf", "spline coupling", "spline autoregressive")
SLOW_COLUMNS = {"maf": COLUMNS[2:], "iaf": COLUMNS[:2], "spline autoregressive": COLUMNS[2:]}


def flowvi_cases(kind: str, dim: int, *, compiled: bool = False) -> Cases:
    from flowvi.distributions import Flow
    from flowvi.transforms import Affine, Autoregressive, Coupling, RationalQuadratic, compose

    elementwise = Affine()
    if kind.startswith("spline"):
        elementwise = RationalQuadratic(BINS, BOUND, compiled=compiled)
    elif compiled:
        return {}
    parts = []
    for layer in range(LAYERS):
        if kind in ("realnvp", "spline coupling"):
            mask = alternating(dim, layer)
            part = Coupling(dim, elementwise, mask=mask, hidden_dims=HIDDEN)
        else:
            order = range(dim)[:: -1 if layer % 2 else 1]
            part = Autoregressive(dim, elementwise, order=order, hidden_dims=HIDDEN)
            part = part if kind == "iaf" else part.inv
        parts.append(part)
    flow = Flow(compose(*parts))
    with torch.no_grad():
        # Away from the start, where the last layers are zero.
        for parameter in flow.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return cases(
        dim,
        flow.parameters(),
        lambda x: flow().log_prob(x),
        lambda: flow().sample((BATCH,)),
        lambda: flow().rsample_and_log_prob((BATCH,)),
    )


def floor_cases(kind: str, dim: int) -> Cases:
    """The matrix products of one pass through every conditioner, and of its backward."""
    num_in = dim // 2 if kind in ("realnvp", "spline coupling") else dim
    num_params = 3 * BINS - 1 if kind.startswith("spline") else 2
    sizes = (num_in, *HIDDEN, num_in * num_params)
    networks = nn.ModuleList(
        nn.Sequential(*(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)))
        for _ in range(LAYERS)
    )
    x = torch.randn(BATCH, num_in, requires_grad=True)
    cotangent = torch.randn(BATCH, sizes[-1])

    @torch.no_grad()
    def forward() -> None:
        for network in networks:
            network(x)

    def backward() -> None:
        networks.zero_grad()
        torch.autograd.backward([network(x) for network in networks], [cotangent] * LAYERS)

    return dict(zip(COLUMNS, (forward, backward) * 2, strict=True))


LIBRARIES = {
    "flowvi": flowvi_cases,
    "flowvi, compiled": partial(flowvi_cases, compiled=True),
    **PEERS,
    "matrix products": floor_cases,
}


def measure(kind: str, dim: int, repeats: int) -> dict[str, dict[str, Timing]]:
    """Timings of one kind of flow: column, then library."""
    made: dict[str, Cases] = {}
    for name, build in LIBRARIES.items():
        try:
            case = build(kind, dim)
            if case and "compiled" in name:
                for function in case.values():  # compiled outside the clock
                    function()
            made |= {name: case} if case else {}
        except ImportError:
            print(f"{name} is not installed: left out")
    timings = interleave(
        {(c, name): case[c] for c in COLUMNS for name, case in made.items() if c in case},
        repeats,
    )
    return {c: {n: timings[c, n] for n, case in made.items() if c in case} for c in COLUMNS}


def ratios(kind: str, timings: dict[str, dict[str, Timing]]) -> dict[str, dict[str, float]]:
    """Own time over the floor's, the best peer's and, where it is slow, a dense pass's."""
    out: dict[str, dict[str, float]] = {}
    own = {column: timings[column]["flowvi"].median for column in COLUMNS}
    dense = COLUMNS[2:] if kind == "iaf" else COLUMNS[:2]
    for position, column in enumerate(COLUMNS):
        peers = [timings[column][n].median for n in PEERS if n in timings[column]]
        peers = [median for median in peers if median]
        floor = timings[column]["matrix products"].median
        row = {"to matrix products": own[column] / floor}
        compiled = timings[column].get("flowvi, compiled")
        if compiled is not None:
            row["compiled, to matrix products"] = compiled.median / floor
        if peers:
            row["to best peer"] = own[column] / min(peers)
            if compiled is not None:
                row["compiled, to best peer"] = compiled.median / min(peers)
        if column in SLOW_COLUMNS.get(kind, ()):
            row["to dense forward"] = own[column] / own[dense[0]]
            row["to dense, same column"] = own[column] / own[dense[position % 2]]
        out[column] = {name: round(value, 3) for name, value in row.items()}
    return out


def report(kind: str, dim: int, timings: dict[str, dict[str, Timing]]) -> None:
    names = list(timings[COLUMNS[0]])
    rows = []
    for name in names:
        cells = []
        for column in COLUMNS:
            timing = timings[column].get(name, Timing(error="left out"))
            star = "*" if len(timing.samples) == 1 else ""
            cells.append(f"{1e3 * timing.median:.1f}{star}" if timing.samples else "-")
        rows.append([name, *cells])
    found = ratios(kind, timings)
    labels = (
        "to matrix products",
        "compiled, to matrix products",
        "to best peer",
        "compiled, to best peer",
        "to dense forward",
        "to dense, same column",
    )
    for label in (name for name in labels if any(name in row for row in found.values())):
        rows.append(
            [label, *(f"{found[c][label]:.2f}x" if label in found[c] else "" for c in COLUMNS)]
        )
    print(f"\n{kind}, dimension {dim} (ms; * is one run)\n")
    print(table(["", *COLUMNS], rows), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="+")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--quick", action="store_true", help="dimension 8, three repeats")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    args = parser.parse_args()
    dims = args.dims or ([8] if args.quick else [8, 64])
    repeats = args.repeats or (3 if args.quick else 9)
    default = (
        Path(__file__).parent / "results" / ("flows-quick.json" if args.quick else "flows.json")
    )
    steady_allocator()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    out = args.out or default
    # Cases that are not measured now keep the numbers they have.
    partial_run = (args.dims or args.kinds != list(KINDS)) and out.exists()
    old = json.loads(out.read_text())["results"] if partial_run else []
    results: dict[tuple[str, int], dict[str, Any]] = {(r["kind"], r["dim"]): r for r in old}
    for dim in dims:
        for kind in args.kinds:
            timings = measure(kind, dim, repeats)
            report(kind, dim, timings)
            records = {c: {n: t.record() for n, t in timings[c].items()} for c in COLUMNS}
            found = {"kind": kind, "dim": dim, "ms": records, "ratios": ratios(kind, timings)}
            results[kind, dim] = found | {"command": facts()["command"]}
            save(out, list(results.values()))


def save(out: Path, results: list[dict[str, Any]]) -> None:
    setting = {
        "layers": LAYERS,
        "hidden": HIDDEN,
        "batch": BATCH,
        "bins": BINS,
        "dtype": "float32",
    }
    packages = ("torch", "pyro-ppl", "zuko", "nflows", "normflows", "flowjax", "jax")
    results = sorted(results, key=lambda r: (r["dim"], KINDS.index(r["kind"])))
    write_json(out, {"facts": facts(*packages), "setting": setting, "results": results})


if __name__ == "__main__":
    main()
