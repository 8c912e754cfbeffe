"""Speed of discrete flows: flowvi, its peers and the bare arithmetic, interleaved.

    python benchmarks/flows.py            # dimensions 8 and 64; a few minutes, one thread
    python benchmarks/flows.py --quick    # dimension 8, few repeats

The same architecture in every library: 5 layers, conditioner with hidden layers (256, 256) and
ReLU, batch 1024, float32. Times are medians of process CPU time; a case whose first call takes
longer than a second is run once (every peer's slow direction at dimension 64). The floor is the
conditioners' matrix products alone, without masks, activations or the maps themselves.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

# Before torch: it limits every library to one thread.
from _timing import Timing, facts, interleave, steady_allocator, table, write_json  # isort: skip
import torch
from torch import Tensor, nn

LAYERS, HIDDEN, BATCH, BINS, BOUND = 5, (256, 256), 1024, 8, 5.0
KINDS = ("realnvp", "maf", "iaf", "spline coupling", "spline autoregressive")
COLUMNS = ("log_prob", "log_prob, backward", "sample", "sample and log_prob, backward")
SLOW_COLUMNS = {"maf": COLUMNS[2:], "iaf": COLUMNS[:2], "spline autoregressive": COLUMNS[2:]}
# nflows and normflows: two hidden layers.
MADE = {"hidden_features": HIDDEN[0], "num_blocks": 1, "use_residual_blocks": False}

Cases = dict[str, Callable[[], object]]


def cases(
    dim: int,
    parameters: Iterable[nn.Parameter],
    log_prob: Callable[[Tensor], Tensor],
    sample: Callable[[], Tensor],
    sample_and_log_prob: Callable[[], tuple[Tensor, Tensor]],
) -> Cases:
    """The four timed functions of a flow, from three of its methods."""
    parameters = [p for p in parameters if p.requires_grad]
    data = torch.randn(BATCH, dim)

    def clear() -> None:
        for parameter in parameters:
            parameter.grad = None

    def score_backward() -> None:
        clear()
        log_prob(data).mean().backward()

    def sample_backward() -> None:
        clear()
        x, log_q = sample_and_log_prob()
        (log_q + 0.5 * x.square().sum(-1)).mean().backward()

    quiet = torch.no_grad()
    return dict(
        zip(
            COLUMNS,
            (quiet(lambda: log_prob(data)), score_backward, quiet(sample), sample_backward),
            strict=True,
        )
    )


def alternating(dim: int, layer: int) -> Tensor:
    return torch.arange(dim) % 2 == layer % 2


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


def zuko_cases(kind: str, dim: int) -> Cases:
    import zuko
    from zuko.flows import MAF, NSF, RealNVP
    from zuko.flows.coupling import GeneralCouplingTransform
    from zuko.lazy import Flow

    common = {"transforms": LAYERS, "hidden_features": HIDDEN}
    if kind == "realnvp":
        flow = RealNVP(dim, **common)
    elif kind == "spline autoregressive":
        flow = NSF(dim, bins=BINS, **common)
    elif kind == "spline coupling":
        spline = {
            "univariate": zuko.transforms.MonotonicRQSTransform,
            "shapes": [(BINS,), (BINS,), (BINS - 1,)],
            "hidden_features": HIDDEN,
        }
        parts = [
            GeneralCouplingTransform(dim, mask=alternating(dim, i), **spline)
            for i in range(LAYERS)
        ]
        flow = Flow(parts, MAF(dim).base)
    else:
        flow = MAF(dim, **common)
        flow = Flow(flow.transform.inv, flow.base) if kind == "iaf" else flow
    return cases(
        dim,
        flow.parameters(),
        lambda x: flow().log_prob(x),
        lambda: flow().rsample((BATCH,)),
        lambda: flow().rsample_and_log_prob((BATCH,)),
    )


def nflows_cases(kind: str, dim: int) -> Cases:
    from nflows import transforms as T
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow

    spline = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
    made = {**MADE, "features": dim}
    layers = []
    for i in range(LAYERS):
        mask = alternating(dim, i).int()
        if kind == "realnvp":
            layers.append(T.AffineCouplingTransform(mask, _plain_network))
        elif kind == "spline coupling":
            layers.append(
                T.PiecewiseRationalQuadraticCouplingTransform(mask, _plain_network, **spline)
            )
        else:
            layers.append(T.ReversePermutation(dim))
            if kind == "spline autoregressive":
                layer = T.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(**made, **spline)
            else:
                layer = T.MaskedAffineAutoregressiveTransform(**made)
            layers.append(layer)
    transform = T.CompositeTransform(layers)
    transform = T.InverseTransform(transform) if kind == "iaf" else transform
    flow = Flow(transform, StandardNormal([dim]))
    return cases(
        dim,
        flow.parameters(),
        flow.log_prob,
        lambda: flow.sample(BATCH),
        lambda: flow.sample_and_log_prob(BATCH),
    )


class _plain_network(nn.Sequential):  # noqa: N801 - a factory in the eyes of nflows
    def __init__(self, num_in: int, num_out: int) -> None:
        first, second = HIDDEN
        super().__init__(
            *(nn.Linear(num_in, first), nn.ReLU()),
            *(nn.Linear(first, second), nn.ReLU()),
            nn.Linear(second, num_out),
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(x)


def normflows_cases(kind: str, dim: int) -> Cases:
    import normflows as nf
    from normflows.flows.base import Reverse
    from normflows.flows.neural_spline import autoregressive, coupling

    made = {**MADE, "features": dim}
    spline = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
    layers = []
    for i in range(LAYERS):
        if kind == "realnvp":
            layers.append(nf.flows.AffineCouplingBlock(_plain_network(dim // 2, dim)))
        elif kind == "spline coupling":
            mask = alternating(dim, i).int()
            layers.append(
                Reverse(
                    coupling.PiecewiseRationalQuadraticCoupling(mask, _plain_network, **spline)
                )
            )
            continue
        elif kind == "spline autoregressive":
            layer = autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive(**made, **spline)
            layers.append(Reverse(layer))
        else:
            layer = nf.flows.MaskedAffineAutoregressive(**made)
            layers.append(layer if kind == "iaf" else Reverse(layer))
        layers.append(nf.flows.Permute(dim, mode="swap"))
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(dim, trainable=False), layers)
    return cases(
        dim,
        flow.parameters(),
        flow.log_prob,
        lambda: flow.sample(BATCH)[0],
        lambda: flow.sample(BATCH),
    )


def pyro_cases(kind: str, dim: int) -> Cases:
    import pyro
    import pyro.distributions as dist
    from pyro.distributions import transforms as T
    from pyro.nn import AutoRegressiveNN, DenseNN

    pyro.enable_validation(False)
    half, hidden = dim // 2, list(HIDDEN)
    modules, layers = [], []
    for _ in range(LAYERS):
        if kind == "realnvp":
            layer = T.AffineCoupling(half, DenseNN(half, hidden, [dim - half, dim - half]))
        elif kind == "spline coupling":
            sizes = [(dim - half) * n for n in (BINS, BINS, BINS - 1)]
            network = DenseNN(half, hidden, sizes)
            layer = T.SplineCoupling(
                dim, half, network, BINS, BOUND, order="quadratic", identity=True
            )
        elif kind == "spline autoregressive":
            network = AutoRegressiveNN(dim, hidden, param_dims=[BINS, BINS, BINS - 1])
            layer = T.SplineAutoregressive(dim, network, BINS, BOUND, order="quadratic")
        else:
            layer = T.AffineAutoregressive(AutoRegressiveNN(dim, hidden))
        modules.append(layer)
        layers.append(layer.inv if kind in ("maf", "spline autoregressive") else layer)
        if kind in ("realnvp", "spline coupling"):
            layers.append(T.Permute(torch.arange(dim).flip(0)))
    flow = dist.TransformedDistribution(
        dist.Normal(torch.zeros(dim), torch.ones(dim)).to_event(1), layers
    )

    def sample_and_log_prob() -> tuple[Tensor, Tensor]:
        x = flow.rsample((BATCH,))
        return x, flow.log_prob(x)

    return cases(
        dim,
        (p for module in modules for p in module.parameters()),
        # A new tensor object: the transforms remember the last one.
        lambda x: flow.log_prob(x.clone()),
        lambda: flow.rsample((BATCH,)),
        sample_and_log_prob,
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
    "zuko": zuko_cases,
    "nflows": nflows_cases,
    "normflows": normflows_cases,
    "pyro": pyro_cases,
    "matrix products": floor_cases,
}

PEERS = ("zuko", "nflows", "normflows", "pyro")


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
        {(column, name): case[column] for column in COLUMNS for name, case in made.items()},
        repeats,
    )
    return {column: {name: timings[column, name] for name in made} for column in COLUMNS}


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
        if "flowvi, compiled" in timings[column]:
            row["compiled, to matrix products"] = (
                timings[column]["flowvi, compiled"].median / floor
            )
        if peers:
            row["to best peer"] = own[column] / min(peers)
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
            timing = timings[column][name]
            star = "*" if len(timing.samples) == 1 else ""
            cells.append(f"{1e3 * timing.median:.1f}{star}" if timing.samples else "failed")
        rows.append([name, *cells])
    found = ratios(kind, timings)
    labels = (
        "to matrix products",
        "compiled, to matrix products",
        "to best peer",
        "to dense forward",
        "to dense, same column",
    )
    for label in labels:
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
    results: list[dict[str, Any]] = []
    for dim in dims:
        for kind in args.kinds:
            timings = measure(kind, dim, repeats)
            report(kind, dim, timings)
            records = {c: {n: t.record() for n, t in timings[c].items()} for c in COLUMNS}
            results.append(
                {"kind": kind, "dim": dim, "ms": records, "ratios": ratios(kind, timings)}
            )
    setting = {
        "layers": LAYERS,
        "hidden": HIDDEN,
        "batch": BATCH,
        "bins": BINS,
        "dtype": "float32",
    }
    packages = ("torch", "pyro-ppl", "zuko", "nflows", "normflows")
    write_json(
        args.out or default, {"facts": facts(*packages), "setting": setting, "results": results}
    )


if __name__ == "__main__":
    main()
