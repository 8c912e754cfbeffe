"""Glow against RealNVP of equal size: bits per dimension on digits and on MNIST.

    python benchmarks/glow.py                    # scikit-learn's digits, three seeds
    python benchmarks/glow.py --data FOLDER      # MNIST from its four idx.gz files, one seed

Both are multi-scale flows with two levels, the same kind of conditioner and of activation
normalisation, uniform dequantisation, a logit of the pixels, and the same minibatches. Most pixels
of a digit are black, and without the logit both flows are busy narrowing the law of those: 1000
steps on the 8 x 8 digits then end above what 300 steps with it reach on the validation set.
RealNVP has three couplings of each kind at each level, as in its paper; Glow is deep and narrow,
``--layers`` steps at each level with the hidden width that brings its number of parameters closest
to RealNVP's from below. The model-and-guide pair is trained by stock SVI. The parameters kept are
those with the best bound on the validation set, looked at ten times. A run that was cut off goes
on from its checkpoint; ``--max-seconds`` cuts.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

# Before torch: it limits every library to one thread.
from _timing import facts, steady_allocator, table, write_json  # isort: skip
import sys

import pyro
import torch
from pyro.infer import SVI
from torch import Tensor

from flowvi.distributions import Flow
from flowvi.flows import glow_image, realnvp_image
from flowvi.infer import GlobalOptim, Schedule
from flowvi.infer.checkpoint import save_checkpoint
from flowvi.models import ImageFlow, bits_per_dim
from flowvi.objectives import ELBO
from flowvi.transforms import ToInterval

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from images import Images, load_images  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "glow.json"
LOOKS = 10


def flows(shape: tuple[int, ...], levels: int, width: int, num_layers: int) -> dict[str, Flow]:
    """A Glow with as many parameters as RealNVP or slightly fewer, and the RealNVP."""
    pixels = ToInterval(shape, 0.0, float(levels), margin=1e-6)
    realnvp = realnvp_image(shape, num_layers=3, hidden_dims=(width, width))
    glow = partial(glow_image, shape, num_layers=num_layers)
    most = size_of(realnvp)
    too_wide = next(w for w in range(5, 999) if size_of(glow(hidden_dims=(w, w))) > most)
    made = {"Glow": glow(hidden_dims=(too_wide - 1,) * 2), "RealNVP": realnvp}
    return {name: flow.then(pixels) for name, flow in made.items()}


def size_of(flow: Flow) -> int:
    return sum(p.numel() for p in flow.parameters())


class Training:
    """One run, which can stop and go on."""

    def __init__(self, flow: Flow, images: Images, seed: int, args: argparse.Namespace) -> None:
        self.images, self.args, self.seed = images, args, seed
        self.pair = ImageFlow(flow, images.num_levels)
        schedule = Schedule(args.steps, warmup_steps=args.steps // 20)
        self.optim = GlobalOptim(args.lr, betas=(0.9, 0.999), clip_norm=50.0, schedule=schedule)
        self.optim.admit(self.pair.named_parameters())
        self.step, self.seconds, self.curve = 0, 0.0, []
        self.best: dict[str, Tensor] = {}

    def go_on(self, until: float, file: Path | None) -> None:
        if file is not None and file.exists():
            self.resume(file)
        if self.step == 0:
            torch.manual_seed(1000 + self.seed)
            self.pair.initialize(self.images.train[:512])
        svi = SVI(self.pair.model, self.pair.guide, self.optim, ELBO(max_plate_nesting=1))
        draws = torch.Generator()
        while self.step < self.args.steps and time.monotonic() < until:
            start = time.perf_counter()
            # Step by step, so that a run that goes on sees what it would have seen.
            draws.manual_seed(10_000 * self.seed + self.step)
            torch.manual_seed(10_000 * self.seed + self.step)
            rows = torch.randint(len(self.images.train), (self.args.batch,), generator=draws)
            svi.step(self.images.train[rows])
            self.step += 1
            self.seconds += time.perf_counter() - start
            if self.step % (self.args.steps // LOOKS) == 0:
                self.look()
                if file is not None:
                    self.save(file)

    def look(self) -> None:
        """Keep the parameters if they are the best so far on the validation set."""
        torch.manual_seed(0)
        bits = self.bits(self.images.validation[:1000], 1)[0]
        if not self.curve or bits < min(self.curve):
            self.best = copy.deepcopy(self.pair.state_dict())
        self.curve.append(round(bits, 4))
        print(f"  step {self.step}: validation {bits:.4f} bits per dimension", flush=True)

    @torch.no_grad()
    def bits(self, x: Tensor, num_particles: int) -> tuple[float, float]:
        """Bits per dimension by so many importance samples, and their standard error."""
        found = self.pair.log_likelihood(x, num_particles)
        return (
            float(bits_per_dim(found.mean, x.shape[1:])),
            float(-bits_per_dim(found.mean_se, x.shape[1:])),
        )

    def measure(self) -> dict[str, Any]:
        self.pair.load_state_dict(self.best)
        torch.manual_seed(0)
        test = self.images.test[: self.args.test_images]
        (bound, error), (weighted, _) = self.bits(test, 1), self.bits(test, self.args.particles)
        return {
            "bits_bound": round(bound, 4),
            "bits_weighted": round(weighted, 4),
            "standard_error": round(error, 4),
            "parameters": size_of(self.pair.likelihood.flow),
            "steps": self.step,
            "seconds": round(self.seconds, 1),
            "validation": self.curve,
        }

    def save(self, file: Path) -> None:
        state = {
            "pair": self.pair.state_dict(),
            "optim": self.optim.get_state(),
            "progress": (self.step, self.seconds, self.curve, self.best),
        }
        save_checkpoint(file, state)

    def resume(self, file: Path) -> None:
        state = torch.load(file, weights_only=False)
        self.pair.load_state_dict(state["pair"])
        self.optim.set_state(state["optim"])
        self.step, self.seconds, self.curve, self.best = state["progress"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with MNIST's idx.gz files")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--width", type=int, default=32, help="hidden channels of RealNVP")
    parser.add_argument("--layers", type=int, default=8, help="steps of each level of Glow")
    parser.add_argument("--seeds", type=int, nargs="+", help="0 1 2 for digits, 0 for MNIST")
    parser.add_argument("--only", choices=("Glow", "RealNVP"), help="one of the two")
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--particles", type=int, default=20, help="importance samples per image")
    parser.add_argument("--max-seconds", type=float, default=float("inf"))
    parser.add_argument("--checkpoints", type=Path, help="folder to save to and go on from")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file")
    return parser.parse_args()


def main() -> None:
    args = parse()
    steady_allocator()
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    until = time.monotonic() + args.max_seconds
    images = load_images(args.data)
    data = "digits" if args.data is None else "mnist"
    results: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    shape = tuple(images.train.shape[1:])
    for seed in args.seeds or ([0, 1, 2] if args.data is None else [0]):
        torch.manual_seed(seed)
        for name, flow in flows(shape, images.num_levels, args.width, args.layers).items():
            if args.only not in (None, name):
                continue
            print(f"{data}, {name}, seed {seed}", flush=True)
            training = Training(flow, images, seed, args)
            file = args.checkpoints and args.checkpoints / f"{data}-{name}-{seed}.pt"
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
            training.go_on(until, file)
            if not training.best:
                continue
            setting = {"batch": args.batch, "lr": args.lr, "planned_steps": args.steps}
            row = {**training.measure(), **setting, "test_images": args.test_images}
            results.setdefault(data, {}).setdefault(name, {})[str(seed)] = row
            results["facts"] = {
                **facts("torch", "pyro-ppl", "flowvi"),
                "clock": "wall time",
                "command": "python benchmarks/glow.py",
            }
            write_json(args.output, results)
    print(report(results))


def report(results: dict[str, Any]) -> str:
    header = ["data", "flow", "parameters", "steps", "bits (bound)", "bits (weighted)", "seeds"]
    rows = []
    for data, part in results.items():
        for name, runs in part.items() if data != "facts" else ():
            means = [
                f"{statistics.mean(run[key] for run in runs.values()):.3f}"
                for key in ("bits_bound", "bits_weighted")
            ]
            run = next(iter(runs.values()))
            sizes = [str(run["parameters"]), str(run["steps"])]
            rows.append([data, name, *sizes, *means, str(len(runs))])
    return table(header, rows)


if __name__ == "__main__":
    main()
