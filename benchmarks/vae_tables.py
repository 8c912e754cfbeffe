"""Published tables of variational autoencoders, run again: posteriors and depth.

    python benchmarks/vae_tables.py --data FOLDER --tables mnist  # four idx.gz files
    python benchmarks/vae_tables.py --data FOLDER --tables frey   # freyfaces.npz
    python benchmarks/vae_tables.py --data FOLDER --tables depth
    python benchmarks/vae_tables.py --quick                               # digits, a minute

- mnist: static binarisation with a fixed seed, 128 latents, 256-256 ReLU, batch 128, centred
  RMSprop at a constant rate, stopped by the validation bound. Published (65,000 and 150,000
  steps): mean-field ELBO -103.31, log p -97.10; IAF -101.64, -95.33.
- mnist-cosine: the same data and networks with Adam and 30,000 steps of a cosine.
- frey: Frey Faces, 256 grey levels, 64 latents, gated convolutions, KL warm-up. Published in bits
  per dimension: no flow 4.53, planar 4.40, IAF 4.47, Sylvester 4.45, continuous 4.39 (Grathwohl et
  al. 2019, arXiv:1810.01367, table 4).
- depth: five stochastic layers on dynamically binarised MNIST; a plain hierarchical VAE without
  warm-up against a ladder VAE with it. Published log p of the ladder: -81.74 (Sonderby et al.
  2016, arXiv:1602.02282, table 1), and no active unit above layer 2 in the plain one. In short
  runs warm-up alone leaves the top two layers of the ladder unused, so a third row adds half a
  free nat to each layer.

The defaults are the published settings, mnist-cosine apart; ``--steps`` shortens them. Each run
keeps a checkpoint in ``--checkpoints`` and goes on from it; ``--max-seconds`` stops early, and a
run that has not ended is not measured. Results are merged into one JSON file.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

# Before torch: it limits every library to one thread.
from _timing import facts, steady_allocator, table, write_json  # isort: skip
import pyro
import torch
from _vae_rows import Run, Table, tables
from pyro.infer import SVI
from torch import Tensor

from flowvi.diagnostics import active_units
from flowvi.infer.checkpoint import save_checkpoint
from flowvi.infer.compiled import CompiledSVI
from flowvi.models import ModelGuidePair
from flowvi.objectives import BetaELBO, FreeBits, LinearSchedule

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from images import Images, digits, frey_faces, mnist, static_binarisation  # noqa: E402

RESULTS = Path(__file__).parent / "results"


class Training:
    """One run: its pair, its optimiser, where it stands, and how to go on from a file."""

    def __init__(self, run: Run, data: Images, settings: Table, steps: int, lr: float) -> None:
        torch.manual_seed(0)
        self.data, self.settings, self.num_steps = data, settings, steps
        self.pair = run.build(tuple(data.train.shape[1:]), data.num_levels)
        warmup = int(run.warmup * steps)
        beta = LinearSchedule(warmup) if warmup else 1.0
        floors = {"group_of": str, "free_bits": FreeBits(run.free_bits)} if run.free_bits else {}
        self.objective = BetaELBO(1, beta=beta, max_plate_nesting=1, **floors)
        self.optim = settings.optimizer(self.pair, lr, steps)
        self.step, self.seconds = 0, 0.0
        self.validation: dict[str, float] = {}
        self.best: dict[str, Tensor] | None = None
        self.waited = 0

    @property
    def is_over(self) -> bool:
        patience = self.settings.patience
        return self.step == self.num_steps or (patience is not None and self.waited > patience)

    def batches(self) -> Iterator[Tensor]:
        """The batches that are still to come."""
        size = self.settings.batch
        per_epoch = len(self.data.train) // size
        while not self.is_over:
            epoch, place = divmod(self.step, per_epoch)
            draws = torch.Generator().manual_seed(epoch)
            order = torch.randperm(len(self.data.train), generator=draws)
            for index in order[: per_epoch * size].split(size)[place:]:
                if self.is_over:
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
            if self.step % look_every == 0 or self.step == self.num_steps:
                self.look()
                self.save(file)
            elif stop:
                self.save(file)
            if stop:
                return

    def look(self) -> None:
        """Note the validation bound; with a patience keep the best parameters."""
        draws, images = (4, 10_000) if self.settings.patience else (1, 2000)
        x = self.data.validation[:images]
        values = [bounds(self.pair, self.prepared(x)).mean() for _ in range(draws)]
        value = float(torch.stack(values).mean())
        print(f"  step {self.step}: validation ELBO {value:.2f}, {self.seconds:.0f} s", flush=True)
        self.waited += 1
        if value > max(self.validation.values(), default=-math.inf):
            self.waited = 0
            if self.settings.patience:
                self.best = copy.deepcopy(self.pair.state_dict())
        self.validation[str(self.step)] = round(value, 3)

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
            "best": (self.best, self.waited),
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
        self.best, self.waited = state.get("best", (None, 0))


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
    if training.best is not None:
        pair.load_state_dict(training.best)
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
    parser.add_argument("--warmup", type=float, help="share of the steps, of rows with a warm-up")
    parser.add_argument("--images", type=int, default=10_000, help="test images for log p")
    parser.add_argument("--particles", type=int, default=1000, help="draws per image for log p")
    parser.add_argument("--look-every", type=int, help="steps between looks")
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
    return static_binarisation(data) if name.startswith("mnist") else data


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
            skipped = options.only is not None and label not in options.only
            if skipped or time.monotonic() > until:
                continue
            if options.warmup is not None and run.warmup:
                run = replace(run, warmup=options.warmup)
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
            training.go_on(svi, until, file, options.look_every or run.look_every)
            if not training.is_over:
                continue
            row = measure(training, run.published, options)
            row |= {
                "lr": lr,
                "batch": settings.batch,
                "warmup": run.warmup,
                "free_bits": run.free_bits,
                "compiled": options.compiled,
            }
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
