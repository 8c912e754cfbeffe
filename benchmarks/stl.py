"""Path gradients (STL): one-pass recursion against scoring the draws by the inverse.

    python benchmarks/stl.py            # dimensions 8 and 64; a few minutes, one thread
    python benchmarks/stl.py --quick    # dimension 8, few repeats

Every number is one gradient of STL for a flow guide of the recipe's own size: draw, score with
stopped parameters, backward. By recursion, the score comes with the draw. By inversion, the draw
is scored by the inverse of the flow with detached parameters, which is what STL does in general.
For autoregressive flows that inverse is timed twice: flowvi's own, which computes each hidden unit
once, and the usual one, a full pass of the network for each dimension. ``zuko`` is the same by
hand in that library: draw, then ``log_prob`` with detached parameters. Times are medians of
process CPU time, interleaved; the gradients of the two ways are compared in float64.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# Before torch: it limits every library to one thread.
from _timing import Timing, facts, interleave, steady_allocator, table, write_json  # isort: skip
import torch
from torch import Tensor, nn

from flowvi import flows
from flowvi.distributions import Flow
from flowvi.transforms import Autoregressive, RationalQuadratic

KINDS: dict[str, Callable[[int], Flow]] = {
    "realnvp": flows.realnvp,
    "nice": flows.nice,
    "glow": flows.glow,
    "nsf": flows.nsf,
    "iaf": flows.iaf,
    "iaf, spline": partial(flows.iaf, elementwise=RationalQuadratic()),
    "maf": flows.maf,
    "planar": flows.planar,
}
PLAIN, RECURSION, INVERSION, PASSES, ZUKO = (
    "plain ELBO",
    "STL, recursion",
    "STL, inversion",
    "STL, inversion by D passes",
    "zuko, inversion",
)
BATCHES = (32, 256)


def build(kind: str, dim: int) -> Flow:
    flow = KINDS[kind](dim)
    with torch.no_grad():
        # Away from the start, where the last layers are zero.
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return flow


def loss(z: Tensor, log_q: Tensor) -> Tensor:
    return (log_q + (1 + z.square()).log().sum(-1)).mean()


def plain(flow: Flow, batch: int) -> Tensor:
    return loss(*flow().rsample_and_log_prob((batch,)))


def by_recursion(flow: Flow, batch: int) -> Tensor:
    return loss(*flow().path_derivative().rsample_and_log_prob((batch,)))


def by_inversion(flow: Flow, batch: int) -> Tensor:
    z = flow().rsample((batch,))
    return loss(z, flow().log_prob_stopped(z))


def by_passes(flow: Flow, batch: int) -> Tensor:
    steps = Autoregressive._inverse_by_steps
    Autoregressive._inverse_by_steps = Autoregressive._inverse_by_passes
    try:
        return by_inversion(flow, batch)
    finally:
        Autoregressive._inverse_by_steps = steps


def by_zuko(flow: nn.Module, batch: int) -> Tensor:
    z = flow().rsample((batch,))
    frozen = {name: p.detach() for name, p in flow.named_parameters()}
    return loss(z, torch.func.functional_call(flow, frozen, ()).log_prob(z))


def zuko_flow(kind: str, dim: int) -> nn.Module | None:
    """The flow of the same size, without flowvi's affine head, or None."""
    try:
        from zuko.flows import MAF, RealNVP
        from zuko.lazy import Flow as ZukoFlow
    except ImportError:
        print("zuko is not installed: left out")
        return None
    activation = {"activation": nn.Tanh}
    if kind == "realnvp":
        return RealNVP(dim, transforms=6, hidden_features=(32, 32), **activation)
    if kind == "iaf":
        flow = MAF(dim, transforms=3, hidden_features=(64, 64), **activation)
        return ZukoFlow(flow.transform.inv, flow.base)
    return None


def gradient(of: Callable[[Flow, int], Tensor], flow: nn.Module, batch: int) -> None:
    for parameter in flow.parameters():
        parameter.grad = None
    of(flow, batch).backward()


def measure(kind: str, dim: int, batch: int, repeats: int) -> dict[str, Timing]:
    flow = build(kind, dim)
    ways = {PLAIN: plain, RECURSION: by_recursion, INVERSION: by_inversion}
    if kind.startswith("iaf"):
        ways[PASSES] = by_passes
    cases = {name: partial(gradient, way, flow, batch) for name, way in ways.items()}
    peer = zuko_flow(kind, dim)
    if peer is not None:
        cases[ZUKO] = partial(gradient, by_zuko, peer, batch)
    return interleave(cases, repeats, slow=2.0)


def difference(kind: str, dim: int) -> float:
    """Largest difference of a parameter's gradient between the two ways, in float64.

    Relative to the parameter's largest entry, or absolute where that is below 1.
    """
    flow = build(kind, dim).double()
    grads = []
    for way in (by_recursion, by_inversion):
        torch.manual_seed(1)
        gradient(way, flow, 64)
        grads.append([p.grad.clone() for p in flow.parameters() if p.grad is not None])
    return max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1.0))
        for a, b in zip(*grads, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="+")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--quick", action="store_true", help="dimension 8, three repeats")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    args = parser.parse_args()
    dims = args.dims or ([8] if args.quick else [8, 64])
    repeats = args.repeats or (3 if args.quick else 25)
    name = "stl-quick.json" if args.quick else "stl.json"
    steady_allocator()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results: list[dict[str, Any]] = []
    ways = (PLAIN, RECURSION, INVERSION, PASSES, ZUKO)
    for dim in dims:
        rows = []
        for kind in args.kinds:
            apart = difference(kind, dim)
            for batch in BATCHES:
                timings = measure(kind, dim, batch, repeats)
                own = timings[RECURSION].median
                ratios = {w: t.median / own for w, t in timings.items() if t.median}
                records = {w: t.record() for w, t in timings.items()}
                cells = [
                    f"{1e3 * timings[w].median:.2f} ({ratios[w]:.2f}x)" if w in ratios else ""
                    for w in ways
                ]
                rows.append([kind, str(batch), *cells, f"{apart:.0e}"])
                results.append(
                    {
                        "kind": kind,
                        "dim": dim,
                        "batch": batch,
                        "ms": records,
                        "ratio to recursion": {w: round(r, 3) for w, r in ratios.items()},
                        "largest difference, float64": apart,
                    }
                )
        print(f"\ndimension {dim}: ms per gradient (ratio to the recursion)\n")
        print(table(["flow", "batch", *ways, "difference"], rows), flush=True)
    path = args.out or Path(__file__).parent / "results" / name
    write_json(path, {"facts": facts("torch", "pyro-ppl", "zuko"), "results": results})


if __name__ == "__main__":
    main()
