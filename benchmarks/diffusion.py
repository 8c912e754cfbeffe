"""Diffusion: VDM against DiffEnc on digits and MNIST, and a training step against bare torch.

    python benchmarks/diffusion.py                # digits and steps; some minutes, one thread
    python benchmarks/diffusion.py --quick        # few steps and repeats
    python benchmarks/diffusion.py --only speed --compiled
    python benchmarks/diffusion.py --only quality --data FOLDER --num-steps 2500

Quality: scikit-learn's 8 x 8 digits with 17 grey levels, 1400 for training and 297 for testing, or
with ``--data`` MNIST, 50,000 for training and the first 2000 test images. Weights of two trainings
differ by more than the models do, so both go on from one: for the first half of the steps a VDM is
trained, then a small network that gives zero at first is added, for VDM to what the denoiser
gives, for DiffEnc as its encoder, and all weights are trained for the other half. Thus the two
have equal numbers of parameters, batches, steps and learning rates. Both predict the velocity
(of angles) and are evaluated with a moving average of their weights at the same random times and
noises. Settings were chosen on validation images. An encoder does not always pay: with residual
networks in place of U-Nets the small network served the denoiser better (digits, DiffEnc .022 +-
.011 bits behind). Finished runs are read back from the results file, so the benchmark can be
stopped and taken up again.

Speed: loss, gradient and Adam of one step, float32, one thread, the same network and batch. "bare"
is the loss written by hand with ``torch.optim.Adam``; "svi" is stock ``SVI`` with Pyro's Adam;
"flowvi" is ``FlowSVI``, the step of ``fit``; "compiled" is ``CompiledSVI`` (with ``--compiled``,
which takes a minute at the first run, and not for the U-Net). Times are medians of process CPU
time over rounds in which all take turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

# Before torch: it limits every library to one thread.
from _timing import facts, interleave, steady_allocator, table, write_json  # isort: skip
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from flowvi.infer import Average, CompiledSVI, FlowSVI, GlobalOptim
from flowvi.infer.optim import Schedule
from flowvi.models import VDM, DiffEnc, DiffusionModel, LearnedEncoder, LevelEnd, RealEnd
from flowvi.nn import FourierFeatures, MLPDenoiser, ResidualDenoiser, UNet
from flowvi.objectives import ELBO
from flowvi.paths import LinearLogSNR, Prediction

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from images import Images, digits, mnist  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "diffusion.json"
PARTS = ("prior", "reconstruction", "diffusion", "total")


@dataclass(frozen=True)
class Task:
    """Images, the two models of them, and how both are trained.

    Args:
        images: training, validation and test sets.
        high: log signal-to-noise ratio at the data end.
        network: makes a denoiser.
        addition: makes the small network that is added after half of the steps.
        batch_size: images of a step.
        lr: learning rate, which falls to 0 along a cosine, twice; the second time from half of it.
        decay: largest decay of the moving average of the weights.
    """

    images: Images
    high: float
    network: Callable[[], nn.Module]
    addition: Callable[..., nn.Module]
    batch_size: int
    lr: float
    decay: float

    def make(self, name: str, network: nn.Module) -> DiffusionModel:
        """A model with a denoiser: "first" of the first half, or one of those compared."""
        shape = self.images.train.shape[1:]
        schedule, end = LinearLogSNR(-5.0, self.high), LevelEnd(shape, self.images.num_levels)
        if name == "DiffEnc":
            # An encoder's derivative in time enters the bound: low frequencies suit it.
            encoder = LearnedEncoder(self.addition(max_frequency=10.0), schedule)
            return DiffEnc(end, network, encoder, schedule)
        network = Sum(network, self.addition()) if name == "VDM" else network
        return VDM(end, network, schedule, prediction=Prediction.ANGULAR)

    def average(self, num_steps: int) -> Average:
        """Average of the weights that takes in every fourth step."""
        return Average.over(len(range(0, num_steps, 4)), self.decay)

    def settings(self, num_steps: int) -> dict[str, float]:
        """What a run depends on besides its seed."""
        return {
            "num_steps": num_steps,
            "shared steps": num_steps // 2,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "decay": self.decay,
            "log_snr": [-5.0, self.high],
            "test images": len(self.images.test),
        }


class Sum(nn.Module):
    """Two networks with the same inputs."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.first(z, t) + self.second(z, t)


def digits_task() -> Task:
    """Small U-Nets; the two frequencies tell neighbouring levels of 17 apart."""
    return images_task(digits(), 5.0, (1, 2), FourierFeatures(3, 4), batch_size=64, lr=8e-3)


def mnist_task(folder: Path) -> Task:
    """Small U-Nets; the two frequencies tell neighbouring levels of 256 apart."""
    images = mnist(folder)
    images = replace(images, test=images.test[:2000])
    return images_task(images, 13.3, (1, 2, 2), FourierFeatures(6, 7), batch_size=16, lr=2e-2)


def images_task(
    images: Images,
    high: float,
    widths: tuple[int, ...],
    fourier: FourierFeatures,
    *,
    batch_size: int,
    lr: float,
) -> Task:
    """Denoisers of width 8 times ``widths``, and an addition of width 2 at full size."""
    shape = tuple(images.train.shape[1:])
    network = partial(UNet, shape, 8, widths, attention=True, time_dim=64, fourier=fourier)
    addition = partial(UNet, shape, 2, (1,), time_dim=16)
    return Task(images, high, network, addition, batch_size, lr, decay=0.99)


def train(task: Task, model: DiffusionModel, seed: int, num_steps: int, lr: float) -> Average:
    """Compiled steps of Adam; gives the moving average of the weights."""
    # Whole numbers, which the comparison of a compiled step leaves as they are.
    images, batches = task.images.train.long(), torch.Generator().manual_seed(seed)
    optim = GlobalOptim(lr, schedule=Schedule(num_steps, warmup_steps=100))
    svi = CompiledSVI(model.model, model.guide, optim, ELBO(max_plate_nesting=1), fallback=True)
    average = task.average(num_steps)
    with pyro.validation_enabled(False):
        for step in range(num_steps):
            index = torch.randint(len(images), (task.batch_size,), generator=batches)
            svi.step(images[index])
            if step % 4 == 0:
                average.update(model.named_parameters())
    return average


def first_half(task: Task, seed: int, num_steps: int) -> nn.Module:
    """Denoiser that both models go on from, with the average of its weights."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    network = task.network()
    model = task.make("first", network)
    average = train(task, model, seed, num_steps // 2, task.lr)
    with average.swapped(model.named_parameters()):
        return copy.deepcopy(network)


def quality(
    task: Task, name: str, network: nn.Module, seed: int, num_steps: int
) -> dict[str, float]:
    """Train one model for the second half; its terms on test data, in bits per dimension."""
    pyro.clear_param_store()
    pyro.set_rng_seed(100 + seed)
    model = task.make(name, copy.deepcopy(network))
    began = time.process_time()
    average = train(task, model, 100 + seed, num_steps - num_steps // 2, task.lr / 2)
    seconds = time.process_time() - began
    size = sum(p.numel() for p in model.parameters())
    model.eval()
    with torch.no_grad(), average.swapped(model.named_parameters()):
        found = bits(model, task.images.test)
        on_train = bits(model, task.images.train[:1000])["total"]
    return {**found, "train total": on_train, "parameters": size, "seconds": round(seconds)}


def bits(model: DiffusionModel, images: Tensor) -> dict[str, float]:
    """Terms in bits per dimension at the same times and noises for every model."""
    pyro.set_rng_seed(10_000)
    num_times = max(1, min(100, 6_400_000 // images.numel()))
    parts = [model.terms(part, num_times=num_times).bits_per_dim() for part in images.split(100)]
    weights = torch.tensor([len(part) / len(images) for part in images.split(100)])
    means = {n: (torch.stack([p[n] for p in parts]) * weights).sum() for n in parts[0]}
    return {name: round(float(value), 5) for name, value in means.items()}


def compare(task: Task, seeds: range, num_steps: int, known: dict, keep: Callable) -> None:
    """All runs, old and new, with means and standard errors over seeds."""
    settings = task.settings(num_steps)
    runs = dict(known.get("runs", {})) if known.get("settings") == settings else {}
    found = {"command": facts()["command"], "settings": settings, "runs": runs}
    for seed in seeds:
        missing = [name for name in ("VDM", "DiffEnc") if f"{name}, seed {seed}" not in runs]
        if missing:
            network = first_half(task, seed, num_steps)
        for name in missing:
            key = f"{name}, seed {seed}"
            runs[key] = quality(task, name, network, seed, num_steps)
            print(key, runs[key], flush=True)
            keep(found)
        keep({**found, **summary(runs)})


def summary(runs: dict[str, dict[str, float]]) -> dict[str, dict]:
    """Means and standard errors over the seeds that both models have; prints them."""
    names, rows, means = ("VDM", "DiffEnc"), [], {}
    seeds = sorted({int(key.split()[-1]) for key in runs})
    seeds = [s for s in seeds if all(f"{name}, seed {s}" in runs for name in names)]
    for name in names:
        own = [runs[f"{name}, seed {seed}"] for seed in seeds]
        means[name] = {part: mean_and_error([r[part] for r in own]) for part in PARTS}
        cells = [f"{m:.4f} +- {e:.4f}" for m, e in means[name].values()]
        rows.append([name, str(own[0]["parameters"]), *cells])
    pairs = [
        [runs[f"DiffEnc, seed {s}"][part] - runs[f"VDM, seed {s}"][part] for s in seeds]
        for part in PARTS
    ]
    difference = {p: mean_and_error(v) for p, v in zip(PARTS, pairs, strict=True)}
    cells = [f"{m:.4f} +- {e:.4f}" for m, e in difference.values()]
    rows.append(["DiffEnc - VDM", "", *cells])
    print(table(["model", "parameters", *PARTS], rows))
    return {"means": means, "difference": difference}


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
    parser.add_argument("--data", type=Path, help="folder with MNIST; digits without it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-steps", type=int, default=4000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    steady_allocator()
    torch.set_num_threads(1)
    content = json.loads(args.output.read_text()) if args.output.exists() else {}
    if args.only != "speed":
        tasks = (
            {"digits": digits_task()} if args.data is None else {"MNIST": mnist_task(args.data)}
        )
        for name, task in tasks.items():

            def keep(found: dict, name: str = name) -> None:
                content.setdefault("quality", {})[name] = found
                write_json(args.output, {**content, "facts": facts("torch", "pyro-ppl")})

            num_steps = 20 if args.quick else args.num_steps
            known = content.get("quality", {}).get(name, {})
            compare(task, range(args.seeds), num_steps, known, keep)
    if args.only != "quality":
        content["speed"] = speed(5 if args.quick else 40, compiled=args.compiled)
    write_json(args.output, {**content, "facts": facts("torch", "pyro-ppl")})


if __name__ == "__main__":
    main()
