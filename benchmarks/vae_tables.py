"""Published tables of variational autoencoders, run again: posteriors and depth.

    python benchmarks/vae_tables.py --data FOLDER --tables mnist  # four idx.gz files
    python benchmarks/vae_tables.py --data FOLDER --tables frey   # freyfaces.npz
    python benchmarks/vae_tables.py --data FOLDER --tables depth
    python benchmarks/vae_tables.py --quick                               # digits, a minute

- mnist: static binarisation with a fixed seed, 128 latents, 256-256 ReLU, batch 128. Published
  (65,000 and 150,000 steps): mean-field ELBO -103.31, log p -97.10; IAF -101.64, -95.33.
- frey: Frey Faces, 256 grey levels, 64 latents, gated convolutions, KL warm-up. Published in bits
  per dimension: no flow 4.53, planar 4.40, IAF 4.47, Sylvester 4.45, continuous 4.39 (Grathwohl et
  al. 2019, arXiv:1810.01367, table 4).
- depth: five stochastic layers on dynamically binarised MNIST; a plain hierarchical VAE without
  warm-up against a ladder VAE with it. Published log p of the ladder: -81.74 (Sonderby et al.
  2016, arXiv:1602.02282, table 1), and no active unit above layer 2 in the plain one.

The defaults are the published settings; ``--steps`` shortens them. Each run keeps a checkpoint in
``--checkpoints`` and goes on from it; ``--max-seconds`` stops early. Results of every run that has
been measured are merged into one JSON file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Before torch: it limits every library to one thread.
from _timing import facts, steady_allocator, table, write_json  # isort: skip
import pyro
import torch
from pyro.infer import SVI
from torch import Tensor, nn

from flowvi.diagnostics import active_units
from flowvi.infer import GlobalOptim, Schedule
from flowvi.infer.checkpoint import save_checkpoint
from flowvi.infer.compiled import CompiledSVI
from flowvi.models import (
    VAE,
    BernoulliLikelihood,
    CategoricalLikelihood,
    ConvDecoder,
    ConvEncoder,
    DiagonalPosterior,
    HierarchicalVAE,
    LadderVAE,
    MLPDecoder,
    MLPEncoder,
    ModelGuidePair,
    cnf_posterior,
    iaf_posterior,
    orthogonal_sylvester_posterior,
    planar_posterior,
)
from flowvi.objectives import BetaELBO, LinearSchedule

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from images import Images, digits, frey_faces, mnist, static_binarisation  # noqa: E402

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Run:
    """One row of a table.

    Args:
        build: makes the pair from the shape of an image and the number of grey levels.
        steps: published number of steps.
        warmup: share of the steps over which the divergences are weighed in.
        published: published numbers, as they are printed.
    """

    build: Callable[[tuple[int, ...], int], ModelGuidePair]
    steps: int
    warmup: float
    published: dict[str, float]


@dataclass(frozen=True)
class Table:
    """Runs on the same data with the same optimiser."""

    runs: dict[str, Run]
    batch: int
    lr: float
    dynamic: bool = False


def perceptron(
    shape: tuple[int, ...], levels: int, *, posterior: Callable, width: int = 256
) -> VAE:
    likelihood = BernoulliLikelihood(shape)
    latent = width // 2
    return VAE(
        MLPEncoder(shape, (width, width)),
        MLPDecoder(latent, (width, width), likelihood.output_shape),
        likelihood,
        posterior(width, latent),
    )


def convolutional(
    shape: tuple[int, ...], levels: int, *, posterior: Callable, channels: tuple[int, int]
) -> VAE:
    likelihood = CategoricalLikelihood(shape, levels)
    return VAE(
        ConvEncoder(shape, channels, 256),
        ConvDecoder(64, channels, likelihood.output_shape),
        likelihood,
        posterior(256, 64),
    )


def deep(shape: tuple[int, ...], levels: int, *, make: type, factor: int = 1) -> ModelGuidePair:
    return make(
        BernoulliLikelihood(shape),
        tuple(max(n // factor, 1) for n in (64, 32, 16, 8, 4)),
        tuple(max(n // factor, 4) for n in (512, 256, 128, 64, 32)),
        activation=partial(nn.LeakyReLU, 0.1),
    )


def tables(small: bool, channels: tuple[int, int]) -> dict[str, Table]:
    """All tables; small networks for a quick look."""
    mlp = partial(perceptron, width=32 if small else 256)
    conv = partial(convolutional, channels=(4, 4) if small else channels)
    stack = partial(deep, factor=16 if small else 1)
    frey = {
        "none": (DiagonalPosterior, 4.53),
        "planar": (planar_posterior, 4.40),
        "IAF": (partial(iaf_posterior, num_layers=4, hidden_dims=(160,)), 4.47),
        "Sylvester": (orthogonal_sylvester_posterior, 4.45),
        "continuous": (cnf_posterior, 4.39),
    }
    return {
        "mnist": Table(
            {
                "mean-field": Run(
                    partial(mlp, posterior=DiagonalPosterior),
                    65_000,
                    0.0,
                    {"elbo": -103.31, "log_p": -97.10},
                ),
                "IAF": Run(
                    partial(mlp, posterior=iaf_posterior),
                    150_000,
                    0.0,
                    {"elbo": -101.64, "log_p": -95.33},
                ),
            },
            batch=128,
            lr=1e-3,
        ),
        "frey": Table(
            {
                name: Run(partial(conv, posterior=make), 32_000, 0.05, {"bits": bits})
                for name, (make, bits) in frey.items()
            },
            batch=100,
            lr=5e-4,
        ),
        "depth": Table(
            {
                "plain": Run(partial(stack, make=HierarchicalVAE), 400_000, 0.0, {}),
                "ladder": Run(partial(stack, make=LadderVAE), 400_000, 0.12, {"log_p": -81.74}),
            },
            batch=256,
            lr=1e-3,
            dynamic=True,
        ),
    }


class Training:
    """One run: its pair, its optimiser, where it stands, and how to go on from a file."""

    def __init__(self, run: Run, data: Images, settings: Table, steps: int, lr: float) -> None:
        torch.manual_seed(0)
        self.data, self.settings, self.num_steps = data, settings, steps
        self.pair = run.build(tuple(data.train.shape[1:]), data.num_levels)
        warmup = int(run.warmup * steps)
        beta = LinearSchedule(warmup) if warmup else 1.0
        self.objective = BetaELBO(1, beta=beta, max_plate_nesting=1)
        schedule = Schedule(steps, final=0.02)
        self.optim = GlobalOptim(lr, betas=(0.9, 0.999), clip_norm=None, schedule=schedule)
        self.optim.admit(self.pair.named_parameters())
        self.step, self.seconds = 0, 0.0
        self.validation: dict[str, float] = {}

    def batches(self) -> Iterator[Tensor]:
        """The batches that are still to come."""
        size = self.settings.batch
        per_epoch = len(self.data.train) // size
        while self.step < self.num_steps:
            epoch, place = divmod(self.step, per_epoch)
            draws = torch.Generator().manual_seed(epoch)
            order = torch.randperm(len(self.data.train), generator=draws)
            for index in order[: per_epoch * size].split(size)[place:]:
                if self.step == self.num_steps:
                    return
                yield self.prepared(self.data.train[index])

    def prepared(self, levels: Tensor) -> Tensor:
        """Binarised anew where the table says so."""
        if not self.settings.dynamic:
            return levels
        return (torch.rand_like(levels) < levels / (self.data.num_levels - 1)).float()

    def go_on(self, svi: SVI, until: float, file: Path | None, look_every: int) -> None:
        """Train until the end or a time, looking at the validation set now and then."""
        for x in self.batches():
            began = time.perf_counter()
            svi.step(x)
            self.seconds += time.perf_counter() - began
            self.step += 1
            stop = time.monotonic() > until
            if self.step % look_every == 0 or self.step == self.num_steps or stop:
                value = float(bounds(self.pair, self.prepared(self.data.validation[:2000])).mean())
                self.validation[str(self.step)] = round(value, 3)
                print(f"  step {self.step}: validation ELBO {value:.2f}", flush=True)
                self.save(file)
            if stop:
                return

    def save(self, file: Path | None) -> None:
        if file is None:
            return
        state = {
            "pair": self.pair.state_dict(),
            "optim": self.optim.get_state(),
            "objective": self.objective.state_dict(),
            "random": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
            "validation": self.validation,
        }
        save_checkpoint(file, state)

    def resume(self, file: Path) -> None:
        state = torch.load(file, weights_only=False)
        self.pair.load_state_dict(state["pair"])
        self.optim.set_state(state["optim"])
        self.objective.load_state_dict(state["objective"])
        torch.set_rng_state(state["random"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.validation = state["validation"]


@torch.no_grad()
def bounds(pair: ModelGuidePair, x: Tensor) -> Tensor:
    """One-draw evidence lower bound of each image, nats, in evaluation mode."""
    pair.eval()
    values = torch.cat([pair.terms(part).elbo for part in x.split(500)])
    pair.train()
    return values


def measure(training: Training, published: dict[str, float], options: argparse.Namespace) -> dict:
    """Test bounds, test log-likelihood and active units of one run."""
    torch.manual_seed(1)
    pair, data = training.pair, training.data
    test = training.prepared(data.test)
    values = torch.cat([bounds(pair, test) for _ in range(3)]).unflatten(0, (3, -1)).mean(0)
    images = test[: options.images]
    estimate = pair.log_likelihood(images, options.particles)
    per_bit = pair.likelihood.num_pixels * math.log(2)
    units = active_units(pair, test[:1000])
    return {
        "steps": training.step,
        "planned_steps": training.num_steps,
        "train_seconds": round(training.seconds, 1),
        "parameters": sum(p.numel() for p in pair.parameters()),
        "validation_elbo": training.validation,
        "elbo": round(float(values.mean()), 3),
        "elbo_se": round(float(values.std()) / math.sqrt(len(values)), 3),
        "bits": round(-float(values.mean()) / per_bit, 4),
        "log_p": round(float(estimate.mean), 3),
        "log_p_images": len(images),
        "log_p_particles": options.particles,
        "elbo_same_images": round(float(values[: len(images)].mean()), 3),
        "active_units": {name: f"{n} of {units.sizes[name]}" for name, n in units.counts.items()},
        "published": published,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with the files; digits without it")
    parser.add_argument("--tables", nargs="+", default=["mnist", "frey", "depth"])
    parser.add_argument("--only", nargs="+", help="rows to run")
    parser.add_argument(
        "--steps", type=int, help="steps of every run; the published number if not"
    )
    parser.add_argument("--lr", type=float, help="learning rate at the start of a cosine")
    parser.add_argument("--channels", type=int, nargs=2, default=(32, 64), help="of convolutions")
    parser.add_argument("--images", type=int, default=10_000, help="test images for log p")
    parser.add_argument("--particles", type=int, default=1000, help="draws per image for log p")
    parser.add_argument("--look-every", type=int, default=1000, help="steps between checkpoints")
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="stop training then")
    parser.add_argument("--checkpoints", type=Path, help="folder to save to and to resume from")
    parser.add_argument("--compiled", action="store_true", help="steps as one compiled graph")
    parser.add_argument("--quick", action="store_true", help="small networks, few steps")
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args()


def load(name: str, folder: Path | None) -> Images:
    if folder is None:
        data = digits()
    else:
        data = frey_faces(folder) if name == "frey" else mnist(folder)
    return static_binarisation(data) if name == "mnist" else data


def main() -> None:
    options = parse()
    if options.quick:
        options.steps, options.images, options.particles = options.steps or 20, 20, 20
    steady_allocator()
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    output = options.output or RESULTS / (
        "vae_digits.json" if options.data is None else "vae_tables.json"
    )
    results: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    until = time.monotonic() + options.max_seconds
    for name in options.tables:
        settings = tables(options.quick, tuple(options.channels))[name]
        data = load(name, options.data)
        for label, run in settings.runs.items():
            if options.only is not None and label not in options.only:
                continue
            print(f"{name}, {label}", flush=True)
            lr = options.lr or settings.lr
            training = Training(run, data, settings, options.steps or run.steps, lr)
            file = options.checkpoints and options.checkpoints / f"{name} {label}.pt"
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                if file.exists():
                    training.resume(file)
            program = (training.pair.model, training.pair.guide, training.optim)
            make = CompiledSVI if options.compiled else SVI
            svi = make(*program, training.objective)
            training.go_on(svi, until, file, options.look_every)
            row = measure(training, run.published, options)
            row |= {"lr": lr, "batch": settings.batch, "compiled": options.compiled}
            if name == "frey":
                row["channels"] = list(options.channels)
            results.setdefault(name, {})[label] = row
            results["facts"] = {**facts("torch", "pyro-ppl", "flowvi"), "clock": "wall time"}
            results["facts"]["command"] = "python benchmarks/vae_tables.py"
            write_json(output, results)
    print(report(results))


def report(results: dict[str, Any]) -> str:
    header = ["table", "row", "steps", "ELBO", "bits", "log p", "active units", "published"]
    rows = [
        [name, label]
        + [str(row[key]) for key in ("steps", "elbo", "bits", "log_p")]
        + [", ".join(row["active_units"].values()), str(row["published"])]
        for name, part in results.items()
        if name != "facts"
        for label, row in part.items()
    ]
    return table(header, rows)


if __name__ == "__main__":
    main()
