"""A training step of a variational autoencoder against the same one in bare torch.

    python benchmarks/vae.py               # eager steps
    python benchmarks/vae.py --compiled    # CompiledSVI as well; compiling takes a minute each

Two networks on random black and white images of 784 pixels, batch 128, one thread: 784-400-20
and 784-256-256-128. Bare torch is a module with a loss written out, its own backward pass and the
same fused Adam; flowvi is the pair's model and guide with ``pyro.infer.SVI``. Steps of both are
interleaved in one process; the ratio of each pair of neighbours is formed, and the median and the
quartiles of these ratios are reported. Both are first checked to give the same loss for the same
parameters and noise.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Before torch: it limits every library to one thread.
from _timing import facts, steady_allocator, table, write_json  # isort: skip
import pyro
import torch
from pyro.infer import SVI
from torch import Tensor, nn
from torch.nn import functional as F

from flowvi.infer import GlobalOptim
from flowvi.models import VAE, BernoulliLikelihood, DiagonalPosterior, MLPDecoder, MLPEncoder
from flowvi.objectives import ELBO

PIXELS, BATCH = 784, 128
NETWORKS = {"784-400-20": ((400,), 20), "784-256-256-128": ((256, 256), 128)}


class Bare(nn.Module):
    """The same autoencoder without Pyro: its loss is minus the ELBO of a batch."""

    def __init__(self, hidden: Sequence[int], latent: int) -> None:
        super().__init__()
        self.encoder = _perceptron((PIXELS, *hidden), last=True)
        self.head = nn.Linear(hidden[-1], 2 * latent)
        self.decoder = _perceptron((latent, *hidden, PIXELS), last=False)

    def forward(self, x: Tensor) -> Tensor:
        loc, raw = self.head(self.encoder(x)).chunk(2, -1)
        scale = F.softplus(raw + 0.5413) + 1e-4
        eps = torch.randn_like(loc)
        z = loc + scale * eps
        fit = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        # log q - log p of the draw, as flowvi scores it.
        return fit + (0.5 * (z * z - eps * eps) - scale.log()).sum()


def _perceptron(sizes: Sequence[int], *, last: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(n_in, n_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*(layers if last else layers[:-1]))


def pair_of(hidden: Sequence[int], latent: int) -> VAE:
    likelihood = BernoulliLikelihood((PIXELS,))
    return VAE(
        MLPEncoder((PIXELS,), hidden),
        MLPDecoder(latent, hidden[::-1], likelihood.output_shape),
        likelihood,
        DiagonalPosterior(hidden[-1], latent),
    )


@torch.no_grad()
def copy_parameters(bare: Bare, pair: VAE) -> None:
    """Parameters come in the same order in both."""
    groups = [
        (bare.encoder, pair.encoder),
        (bare.head, pair.posterior),
        (bare.decoder, pair.decoder),
    ]
    for theirs, ours in groups:
        for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
            a.copy_(b)


def difference(bare: Bare, pair: VAE, x: Tensor) -> float:
    """Relative difference of both losses for the same noise."""
    torch.manual_seed(0)
    theirs = bare(x)
    torch.manual_seed(0)
    ours = ELBO(max_plate_nesting=1).differentiable_loss(pair.model, pair.guide, x)
    return float(((theirs - ours) / theirs).detach().abs())


def steps(hidden: Sequence[int], latent: int, *, compiled: bool) -> dict[str, Callable[[], Any]]:
    """What to time, by name."""
    torch.manual_seed(0)
    x = (torch.rand(BATCH, PIXELS) < 0.3).float()
    pair, bare = pair_of(hidden, latent), Bare(hidden, latent)
    copy_parameters(bare, pair)
    gap = difference(bare, pair, x)
    if gap > 1e-5:
        raise RuntimeError(f"The losses must agree; got a relative difference of {gap:g}.")
    optimizer = torch.optim.Adam(bare.parameters(), lr=1e-3, fused=True)

    def bare_step() -> float:
        optimizer.zero_grad()
        loss = bare(x)
        loss.backward()
        optimizer.step()
        return loss.item()

    svi = SVI(pair.model, pair.guide, _adam(), ELBO(max_plate_nesting=1))
    made = {"bare torch": bare_step, "flowvi": lambda: svi.step(x)}
    if compiled:
        from flowvi.infer.compiled import CompiledSVI

        other = pair_of(hidden, latent)
        fast = CompiledSVI(other.model, other.guide, _adam(), ELBO(max_plate_nesting=1))
        made["flowvi, compiled"] = lambda: fast.step(x)
    return made


def _adam() -> GlobalOptim:
    return GlobalOptim(1e-3, betas=(0.9, 0.999))


def compare(made: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Times of interleaved steps, and ratios of neighbours."""
    times: dict[str, list[float]] = {name: [] for name in made}
    for function in made.values():
        for _ in range(5):
            function()
    names = list(made)
    for turn in range(rounds):
        # The order turns, so that none is always behind the same one.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.process_time()
            made[name]()
            times[name].append(time.process_time() - start)
    base = torch.tensor(times["bare torch"])
    result = {}
    for name, values in times.items():
        own = torch.tensor(values)
        low, middle, high = (own / base).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        result[name] = {
            "milliseconds": round(1000 * float(own.median()), 3),
            "ratio": round(middle, 3),
            "ratio_quartiles": [round(low, 3), round(high, 3)],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=300, help="steps of each")
    parser.add_argument("--compiled", action="store_true", help="CompiledSVI as well")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    steady_allocator()
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    results, rows = {}, []
    for name, (hidden, latent) in NETWORKS.items():
        results[name] = compare(steps(hidden, latent, compiled=options.compiled), options.rounds)
        for label, row in results[name].items():
            low, high = row["ratio_quartiles"]
            rows.append([name, label, f"{row['milliseconds']:.2f}", f"{row['ratio']:.2f}"])
            rows[-1].append(f"{low:.2f} to {high:.2f}")
    print(table(["network", "step", "ms", "ratio", "quartiles"], rows))
    output = options.output or Path(__file__).parent / "results" / "vae.json"
    write_json(output, {**facts("torch", "pyro-ppl", "flowvi"), "results": results})


if __name__ == "__main__":
    main()
