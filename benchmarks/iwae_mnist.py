"""Importance-weighted autoencoders on dynamically binarised digits, against published differences.

    python benchmarks/iwae_mnist.py                           # scikit-learn's digits, two minutes
    python benchmarks/iwae_mnist.py --data FOLDER --epochs 35  # MNIST from its four idx.gz files

One stochastic layer of 50 units, encoder and decoder 200-200 tanh, pixels binarised anew in
every epoch (Burda, Grosse and Salakhutdinov 2016, arXiv:1509.00519). An ordinary Pyro model and
guide are trained with stock SVI: IWAE at K = 1, 5, 50 and DReG at K = 50, all on the same
minibatches and schedule. The test log-likelihood comes from many importance samples, by code
that shares nothing with the objectives. A run that was cut off goes on from its checkpoint.

Published for the full schedule of 3280 epochs: K = 5 beats K = 1 by 1.2 and K = 50 by 2.0 nats;
DReG beats IWAE at K = 50 by 0.27 (Tucker et al. 2019, arXiv:1810.04152, and a reproduction).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

# Before torch: it limits every library to one thread.
from _timing import facts, steady_allocator, table, write_json  # isort: skip
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from torch import Tensor, nn

from flowvi.infer import GlobalOptim, Schedule
from flowvi.infer.checkpoint import save_checkpoint
from flowvi.objectives import IWAE, DReG, Objective

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from images import read_idx  # noqa: E402

LATENT, HIDDEN = 50, 200
PUBLISHED = {"IWAE 5": (1.2, 0.4), "IWAE 50": (2.0, 0.4), "DReG 50 - IWAE 50": (0.27, 0.2)}
ROWS = 2500


def objectives() -> dict[str, Objective]:
    return {
        "IWAE 1": IWAE(1, max_plate_nesting=1),
        "IWAE 5": IWAE(5, max_plate_nesting=2),
        "IWAE 50": IWAE(50, max_plate_nesting=2),
        "DReG 50": DReG(50, max_plate_nesting=2),
    }


class Autoencoder(nn.Module):
    """Decoder and encoder with Pyro's model and guide as methods."""

    def __init__(self, name: str, pixel_mean: Tensor) -> None:
        super().__init__()
        pixels = len(pixel_mean)
        self.name = name
        self.decoder = mlp(LATENT, pixels)
        self.encoder = mlp(pixels, 2 * LATENT)
        with torch.no_grad():
            self.decoder[-1].bias.copy_(pixel_mean.clamp(0.001, 0.999).logit())

    def model(self, x: Tensor) -> None:
        # A store holds modules by name; one name for all four would tie them together.
        pyro.module(f"{self.name}.decoder", self.decoder)
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module(f"{self.name}.encoder", self.encoder)
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("images", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    @torch.no_grad()
    def log_likelihood(self, x: Tensor, num_samples: int) -> Tensor:
        """Importance-sampling estimate of log p(x) per image, in nats."""
        loc, log_scale = self.encoder(x).chunk(2, -1)
        per_chunk = max(1, ROWS // len(x))
        chunks = []
        for start in range(0, num_samples, per_chunk):
            size = min(per_chunk, num_samples - start)
            eps = torch.randn(size, *loc.shape)
            z = loc + log_scale.exp() * eps
            logits = self.decoder(z)
            log_p = (logits * x).sum(-1) - nn.functional.softplus(logits).sum(-1)
            log_prior_ratio = (log_scale - 0.5 * z**2 + 0.5 * eps**2).sum(-1)
            chunks.append((log_p + log_prior_ratio).logsumexp(0))
        return torch.stack(chunks).logsumexp(0) - math.log(num_samples)


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    layers = [nn.Linear(inputs, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh()]
    for layer in layers[::2]:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers, nn.Linear(HIDDEN, outputs))


def load(folder: Path | None) -> tuple[Tensor, Tensor]:
    """Training and test intensities in [0, 1], one row per image."""
    if folder is None:
        from sklearn.datasets import load_digits

        images = torch.tensor(load_digits().data / 16, dtype=torch.float32)
        return images[:1500], images[1500:]
    names = ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz")
    return tuple(read_idx(folder / name).flatten(1) / 255 for name in names)


class Cycles:
    """Cosine cycles of the learning rate, one after another."""

    def __init__(self, lengths: list[int]) -> None:
        self.cycles = [Schedule(length, final=0.1) for length in lengths]

    def __call__(self, step: int) -> float:
        for cycle in self.cycles[:-1]:
            if step < cycle.num_steps:
                return cycle(step)
            step -= cycle.num_steps
        return self.cycles[-1](step)


class Training:
    """The four runs, epoch by epoch in turn, so that a cut leaves them equally far."""

    def __init__(self, train: Tensor, epochs: list[int], batch: int, lr: float) -> None:
        self.train, self.batch = train, batch
        self.objectives = objectives()
        self.epoch = dict.fromkeys(self.objectives, 0)
        self.nets: dict[str, Autoencoder] = {}
        self.optims: dict[str, GlobalOptim] = {}
        self.seconds = dict.fromkeys(self.objectives, 0.0)
        self.losses: dict[str, list[float]] = {name: [] for name in self.objectives}
        lengths = [count * math.ceil(len(train) / batch) for count in epochs]
        for name in self.objectives:
            torch.manual_seed(0)
            self.nets[name] = Autoencoder(name, train.mean(0))
            schedule = Cycles(lengths)
            self.optims[name] = GlobalOptim(lr, betas=(0.9, 0.999), schedule=schedule)
            self.optims[name].admit(self.nets[name].named_parameters())

    def run_epoch(self, epoch: int, names: list[str]) -> None:
        """Train those of ``names`` that have done ``epoch`` epochs for one more."""
        for name in names:
            if self.epoch[name] != epoch:
                continue
            net = self.nets[name]
            svi = SVI(net.model, net.guide, self.optims[name], self.objectives[name])
            start, total = time.perf_counter(), 0.0
            # One seed for all: the same order and the same binarisation.
            draws = torch.Generator().manual_seed(1000 + epoch)
            torch.manual_seed(2000 + epoch)
            order = torch.randperm(len(self.train), generator=draws)
            for index in order.split(self.batch):
                images = self.train[index]
                x = (torch.rand(images.shape, generator=draws) < images).float()
                total += svi.step(x)
            self.seconds[name] += time.perf_counter() - start
            self.losses[name].append(round(total / len(self.train), 3))
            self.epoch[name] += 1

    def save(self, path: Path) -> None:
        state = {
            "epoch": self.epoch,
            "seconds": self.seconds,
            "losses": self.losses,
            "nets": {n: net.state_dict() for n, net in self.nets.items()},
            "optims": {n: o.get_state() for n, o in self.optims.items()},
        }
        save_checkpoint(path, state)

    def resume(self, path: Path) -> None:
        state = torch.load(path, weights_only=False)
        epoch = state["epoch"]
        self.epoch = epoch if isinstance(epoch, dict) else dict.fromkeys(self.objectives, epoch)
        self.seconds, self.losses = state["seconds"], state["losses"]
        for name, net in self.nets.items():
            net.load_state_dict(state["nets"][name])
            self.optims[name].set_state(state["optims"][name])


def evaluate(nets: dict[str, Autoencoder], test: Tensor, samples: int) -> dict[str, Tensor]:
    """Log-likelihood per test image under each network, on one fixed binarisation."""
    draws = torch.Generator().manual_seed(7)
    x = (torch.rand(test.shape, generator=draws) < test).float()
    result = {}
    for name, net in nets.items():
        torch.manual_seed(11)
        result[name] = torch.cat([net.log_likelihood(part, samples) for part in x.split(10)])
    return result


def summary(log_p: dict[str, Tensor]) -> dict[str, Any]:
    """Means with standard errors, and paired differences beside the published ones."""

    def mean(values: Tensor) -> dict[str, float]:
        error = values.std() / math.sqrt(len(values))
        return {"nats": round(float(values.mean()), 3), "standard_error": round(float(error), 3)}

    pairs = {
        "IWAE 5": log_p["IWAE 5"] - log_p["IWAE 1"],
        "IWAE 50": log_p["IWAE 50"] - log_p["IWAE 1"],
        "DReG 50 - IWAE 50": log_p["DReG 50"] - log_p["IWAE 50"],
    }
    gains = {}
    for name, values in pairs.items():
        published, tolerance = PUBLISHED[name]
        gains[name] = {**mean(values), "published": published, "tolerance": tolerance}
    return {"test_negative_log_p": {n: mean(-v) for n, v in log_p.items()}, "gain": gains}


def record(
    training: Training, options: argparse.Namespace, log_p: dict[str, Tensor], **more: object
) -> dict[str, Any]:
    return {
        **facts("torch", "pyro-ppl", "flowvi"),
        "clock": "wall time",
        "command": _command(options),
        "data": "scikit-learn digits" if options.data is None else "MNIST",
        "setting": {
            "latent": LATENT,
            "hidden": [HIDDEN, HIDDEN],
            "dtype": "float32",
            "device": "CPU",
            "epochs": options.epochs,
            "batch": options.batch,
            "lr": [options.lr, 0.1 * options.lr],
            "schedule": "cosine cycles, shortened from the published 3280 epochs",
        },
        "epochs_done": training.epoch,
        "train_seconds": {n: round(s, 1) for n, s in training.seconds.items()},
        "train_loss": training.losses,
        **more,
        **summary(log_p),
    }


def _command(options: argparse.Namespace) -> str:
    """What repeats the run; folders of the machine it ran on are left out."""
    names = ("epochs", "batch", "lr", "samples", "images")
    numbers = " ".join(f"--{name} {_words(getattr(options, name))}" for name in names)
    data = "" if options.data is None else "--data FOLDER "
    return f"python benchmarks/iwae_mnist.py {data}{numbers}"


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with MNIST's idx.gz files")
    parser.add_argument(
        "--epochs", type=int, nargs="+", default=[30], help="length of each learning-rate cycle"
    )
    parser.add_argument("--only", nargs="+", choices=list(objectives()), help="runs to train")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--samples", type=int, default=1000, help="importance samples per image")
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    parser.add_argument("--max-epochs-now", type=int, help="stop early; go on with a checkpoint")
    parser.add_argument("--checkpoint", type=Path, help="file to save to and to resume from")
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args()


def main() -> None:
    options = parse()
    steady_allocator()
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    train, test = load(options.data)
    name = "iwae_digits.json" if options.data is None else "iwae_mnist.json"
    output = options.output or Path(__file__).parent / "results" / name
    training = Training(train, options.epochs, options.batch, options.lr)
    if options.checkpoint is not None and options.checkpoint.exists():
        training.resume(options.checkpoint)
    names = options.only or list(training.objectives)
    last = min(sum(options.epochs), options.max_epochs_now or sum(options.epochs))
    for epoch in range(min(training.epoch[name] for name in names), last):
        training.run_epoch(epoch, names)
        losses = "  ".join(f"{n} {training.losses[n][-1]:.2f}" for n in names)
        print(f"epoch {epoch + 1}: loss {losses}", flush=True)
        if options.checkpoint is not None:
            training.save(options.checkpoint)
        if (epoch + 1) % 5 == 0 and epoch + 1 < last:
            quick = evaluate(training.nets, test[:500], 200)
            more = {"test_images": 500, "importance_samples": 200}
            write_json(output, record(training, options, quick, **more))
    images = test[: options.images]
    log_p = evaluate(training.nets, images, options.samples)
    more = {"test_images": len(images), "importance_samples": options.samples}
    result = record(training, options, log_p, **more)
    write_json(output, result)
    rows = [[n, f"{v['nats']} +- {v['standard_error']}"] for n, v in _lines(result)]
    print(table(["quantity (nats)", "value"], rows))


def _lines(result: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    costs = [(f"-log p, {n}", v) for n, v in result["test_negative_log_p"].items()]
    gains = [(f"gain, {n}, published {v['published']}", v) for n, v in result["gain"].items()]
    return costs + gains


if __name__ == "__main__":
    main()
