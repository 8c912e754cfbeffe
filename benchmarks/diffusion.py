"""Diffusion: VDM against DiffEnc on digits, and a training step against bare torch.

    python benchmarks/diffusion.py            # both parts; some minutes, one thread
    python benchmarks/diffusion.py --quick    # few steps and repeats
    python benchmarks/diffusion.py --only speed

Quality: scikit-learn's 8 x 8 digits with 17 grey levels, 1400 for training and 297 for testing.
VDM and DiffEnc have about as many parameters in all (DiffEnc's encoder counts), the same batches,
steps, learning rates, v-prediction and log signal-to-noise ratios from -5 to 9, and are evaluated
with a moving average of their weights at 100 random times per image. Finished runs are read
back from the results file, so the benchmark can be stopped and taken up again.

Speed: loss, gradient and Adam of one step, float32, one thread, the same network and batch. "bare"
is the loss written by hand with ``torch.optim.Adam``; "svi" is stock ``SVI`` with Pyro's Adam;
"flowvi" is ``FlowSVI``, the step of ``fit``; "compiled" is ``CompiledSVI`` (with ``--compiled``,
which takes minutes at the first run, and not for the U-Net). Times are medians of process CPU time
over rounds in which all take turns.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

# Before torch: it limits every library to one thread.
from _timing import facts, interleave, steady_allocator, table, write_json  # isort: skip
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from flowvi.infer import Average, CompiledSVI, FlowSVI, GlobalOptim
from flowvi.models import VDM, DiffEnc, DiffusionModel, LearnedEncoder, LevelEnd, RealEnd
from flowvi.nn import FourierFeatures, MLPDenoiser, ResidualDenoiser, UNet
from flowvi.objectives import ELBO
from flowvi.paths import LinearLogSNR, Prediction

RESULTS = Path(__file__).parent / "results" / "diffusion.json"
PARTS = ("prior", "reconstruction", "diffusion", "total")


def digits() -> tuple[Tensor, Tensor]:
    """Training and test images ``(N, 1, 8, 8)`` with whole levels 0 to 16."""
    from sklearn.datasets import load_digits

    levels = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1)
    return levels[:1400], levels[1500:]


def make(name: str) -> DiffusionModel:
    """One of the two models; widths are chosen for equal numbers of parameters."""
    schedule, end = LinearLogSNR(-5.0, 9.0), LevelEnd((1, 8, 8), 17)

    def network(width: int) -> nn.Module:
        return ResidualDenoiser(64, width, 2, fourier=FourierFeatures(0, 0))

    if name == "VDM":
        return VDM(end, network(160), schedule, prediction=Prediction.ANGULAR)
    return DiffEnc(end, network(146), LearnedEncoder(network(50), schedule), schedule)


def quality(name: str, seed: int, num_steps: int) -> dict[str, float]:
    """Train one model and give its terms on test data, in bits per dimension."""
    train, test = digits()
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model = make(name)
    size = sum(p.numel() for p in model.parameters())
    batches = torch.Generator().manual_seed(seed)
    objective = ELBO(max_plate_nesting=1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    average = Average(0.99)
    with pyro.validation_enabled(False):
        for _ in range(num_steps):
            optimizer.zero_grad()
            x = train[torch.randint(len(train), (64,), generator=batches)]
            objective.differentiable_loss(model.model, model.guide, x).div(64).backward()
            optimizer.step()
            decay.step()
            average.update(model.named_parameters())
    model.eval()
    with torch.no_grad(), average.swapped(model.named_parameters()):
        pyro.set_rng_seed(10_000)
        found = model.terms(test, num_times=100).bits_per_dim()
        on_train = model.terms(train, num_times=10).bits_per_dim()["total"]
    result = {name: round(float(value), 5) for name, value in found.items()}
    return {**result, "train total": round(float(on_train), 5), "parameters": size}


def compare(seeds: range, num_steps: int, known: dict) -> dict:
    """All runs, old and new, with means and standard errors over seeds."""
    settings = {"num_steps": num_steps, "batch_size": 64, "lr": 3e-3}
    runs = dict(known.get("runs", {})) if known.get("settings") == settings else {}
    for seed in seeds:
        for name in ("VDM", "DiffEnc"):
            key = f"{name}, seed {seed}"
            if key not in runs:
                runs[key] = quality(name, seed, num_steps)
                print(key, runs[key], flush=True)
    rows, means = [], {}
    for name in ("VDM", "DiffEnc"):
        own = [runs[f"{name}, seed {seed}"] for seed in seeds]
        means[name] = {part: mean_and_error([r[part] for r in own]) for part in PARTS}
        cells = [f"{m:.4f} +- {e:.4f}" for m, e in means[name].values()]
        rows.append([name, str(own[0]["parameters"]), *cells])
    pairs = [runs[f"DiffEnc, seed {s}"]["total"] - runs[f"VDM, seed {s}"]["total"] for s in seeds]
    print(table(["model", "parameters", *PARTS], rows))
    difference = mean_and_error(pairs)
    print(f"DiffEnc minus VDM, paired: {difference[0]:.4f} +- {difference[1]:.4f} bits per dim")
    return {"settings": settings, "runs": runs, "means": means, "difference": difference}


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def steps(
    network: Callable[[], nn.Module], end: RealEnd, batch: int, *, compiled: bool
) -> dict[str, Callable]:
    """One training step of each kind, on the same data."""
    x = torch.randn(batch, *end.event_shape)
    cases: dict[str, Callable] = {"bare": bare_step(network(), x.flatten(1))}
    kinds = ("svi", "flowvi", "compiled") if compiled else ("svi", "flowvi")
    for name in kinds:
        model = VDM(end, network(), LinearLogSNR(-5.0, 9.0))
        pair, objective = (model.model, model.guide), ELBO(max_plate_nesting=1)
        if name == "svi":
            svi = SVI(*pair, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        else:
            kind = FlowSVI if name == "flowvi" else CompiledSVI
            svi = kind(*pair, GlobalOptim(1e-3), objective)
        cases[name] = without_validation(svi, x)
    return cases


def without_validation(svi: SVI, x: Tensor) -> Callable[[], object]:
    """A step as ``fit`` takes it."""

    def step() -> object:
        with pyro.validation_enabled(False):
            return svi.step(x)

    return step


def bare_step(network: nn.Module, y: Tensor) -> Callable[[], float]:
    """The same loss written by hand: prior, reconstruction and one random time for each item."""
    low, high = -5.0, 9.0
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)

    def marginal(log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()

    def step() -> float:
        optimizer.zero_grad()
        batch = len(y)
        t = ((torch.arange(batch) / batch + torch.rand(())).frac()).unsqueeze(-1)
        alpha, sigma = marginal(low + (high - low) * t)
        eps = torch.randn_like(y)
        error = (network(alpha * y + sigma * eps, t) - eps).square().sum()
        first, last = marginal(torch.tensor(low)), marginal(torch.tensor(high))
        start, end = first[0] * y, last[0] * y + last[1] * torch.randn_like(y)
        scale = last[1] / last[0]
        data = torch.distributions.Normal(end / last[0], scale, validate_args=False).log_prob(y)
        prior = 0.5 * (start.square() + first[1] ** 2 - 1 - 2 * first[1].log()).sum()
        loss = (high - low) / 2 * error + prior - data.sum()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def speed(repeats: int, *, compiled: bool) -> dict:
    """Ratios to the bare step for three networks."""
    networks = {
        "MLP 2-128-128-2, batch 512": (lambda: MLPDenoiser(2, (128, 128)), (2,), 512),
        "residual 64-256x3, batch 128": (lambda: ResidualDenoiser(64, 256, 3), (64,), 128),
        "U-Net 8x8, width 32, batch 64": (lambda: UNet((1, 8, 8), 32), (1, 8, 8), 64),
    }
    rows, record = [], {}
    for label, (network, shape, batch) in networks.items():
        pyro.clear_param_store()
        torch.manual_seed(0)
        cases = steps(network, RealEnd(shape), batch, compiled=compiled and len(shape) == 1)
        timings = interleave(cases, repeats, slow=1e4)
        bare = timings["bare"].median
        record[label] = {name: timing.record() for name, timing in timings.items()}
        kinds = ("svi", "flowvi", "compiled")
        medians = [timings[name].median if name in timings else None for name in kinds]
        ratios = ["-" if m is None else f"{m / bare:.3f}" for m in medians]
        rows.append([label, f"{1e3 * bare:.2f} ms", *ratios])
    print(table(["network", "bare torch", *(f"{kind} / bare" for kind in kinds)], rows))
    return record


def main() -> None:
    """Run the parts that are asked for and keep the results of the others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps and repeats")
    parser.add_argument("--only", choices=["quality", "speed"], help="one of the two parts")
    parser.add_argument("--compiled", action="store_true", help="time the compiled step as well")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-steps", type=int, default=600)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    steady_allocator()
    torch.set_num_threads(1)
    content = json.loads(args.output.read_text()) if args.output.exists() else {}
    if args.only != "speed":
        num_steps = 20 if args.quick else args.num_steps
        for seeds in range(1, args.seeds + 1):
            content["quality"] = compare(range(seeds), num_steps, content.get("quality", {}))
            write_json(args.output, {**content, "facts": facts("torch", "pyro-ppl")})
    if args.only != "quality":
        content["speed"] = speed(5 if args.quick else 40, compiled=args.compiled)
    write_json(args.output, {**content, "facts": facts("torch", "pyro-ppl")})


if __name__ == "__main__":
    main()
