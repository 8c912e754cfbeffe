"""Signal-to-noise of gradient estimators against the number of particles, as a picture.

    python benchmarks/signal_to_noise.py            # a few minutes, one thread
    python benchmarks/signal_to_noise.py --quick    # few gradients

The model of Rainforth et al. (2018), Tighter variational bounds are not necessarily better,
arXiv:1802.04537, section 4: z ~ N(0, I), x ~ N(z, I) in 20 dimensions, an encoder
q(z | x) = N(A x + b, 2/3 I) whose A and b are 0.01 N(0, 1) away from the optimum. The signal-to-
noise of IWAE's gradient falls like K^-1/2; that of DReG (Tucker et al. 2019) grows.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

# Before torch: it limits every library to one thread.
from _timing import facts, write_json  # isort: skip
import matplotlib
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from flowvi import plots
from flowvi.diagnostics import gradient_report
from flowvi.objectives import IWAE, STL, STLIWAE, VIMCO, DReG

DIM, NUM_DATA = 20, 64
PARTICLES = (1, 4, 16, 64, 256)


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(DIM), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def encoder(x: Tensor) -> None:
    matrix = pyro.param("A", lambda: 0.5 * torch.eye(DIM) + 0.01 * torch.randn(DIM, DIM))
    shift = pyro.param("b", lambda: 0.01 * torch.randn(DIM))
    with pyro.plate("data", len(x)):
        loc = x @ matrix.mT + shift
        pyro.sample("z", dist.Normal(loc, math.sqrt(2 / 3)).to_event(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few gradients")
    parser.add_argument("--out", type=Path, help="where to write JSON and picture, no suffix")
    args = parser.parse_args()
    name = "signal_to_noise-quick" if args.quick else "signal_to_noise"
    out = args.out or Path(__file__).parent / "results" / name
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    x = math.sqrt(2.0) * torch.randn(NUM_DATA, DIM)
    objectives = {f"STL {k}": STL(k) for k in PARTICLES}
    for kind in (IWAE, DReG, STLIWAE):
        objectives |= {f"{kind.__name__} {k}": kind(k) for k in PARTICLES}
    objectives |= {f"VIMCO {k}": VIMCO(k) for k in PARTICLES if k > 1}
    report = gradient_report(
        model, encoder, objectives, x,
        num_repeats=20 if args.quick else 60, num_reference=2, seed=0,
    )  # fmt: skip
    print(report)
    ax = plots.gradients(report)
    ax.set_title("Linear-Gaussian encoder, 20 dimensions, near its optimum", fontsize=10)
    matplotlib.use("Agg")
    ax.figure.savefig(out.with_suffix(".png"), dpi=110)
    rows = [
        {"objective": r.kind, "particles": r.num_particles, "signal to noise": r.signal_to_noise,
         "sd": r.sd, "norm": r.norm}
        for r in report
    ]  # fmt: skip
    write_json(out.with_suffix(".json"), {"facts": facts("torch", "pyro-ppl"), "rows": rows})


if __name__ == "__main__":
    main()
