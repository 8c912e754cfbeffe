"""Run by torchrun in the tests of distributed SVI; every process writes down what it did."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import torch.distributed
from pyro.infer.autoguide import AutoNormal

from flowvi.infer import DistributedSVI, Fit, FlowSVI, GlobalOptim, Spread, fit
from flowvi.objectives import ELBO, IWAE

N, BATCH, STEPS = 64, 8, 100


def regression(size: int) -> Callable:
    """Logistic regression with a minibatch of ``size`` rows; its latents are global."""
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(N, 3, generator=draws, dtype=torch.float64)
    y = (torch.rand(N, generator=draws) < 0.5).double()

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", N, subsample_size=size) as index:
            pyro.sample("y", dist.Bernoulli(logits=(x[index] * w).sum(-1)), obs=y[index])

    return model


def train(svi: FlowSVI, steps: int = STEPS) -> dict:
    """Loss of every step and the parameters at the end."""
    losses = [svi.step() for _ in range(steps)]
    params = {n: p.detach().clone() for n, p in svi.optim.named_parameters()}
    return {"losses": losses, "params": params, "skipped": int(svi.optim.skipped)}


def started(model: Callable) -> AutoNormal:
    """A guide that has its parameters already, since making them takes random numbers."""
    guide = AutoNormal(model)
    guide()
    return guide


def optimizer() -> GlobalOptim:
    return GlobalOptim(0.02, clip_norm=5.0)


def whole() -> dict:
    """One process with the minibatch of two."""
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    model = regression(2 * BATCH)
    return train(FlowSVI(model, started(model), optimizer(), ELBO(2)))


def split(rank: int) -> dict:
    # The seeds differ: those of the first process must win.
    pyro.set_rng_seed(3 + rank)
    model = regression(BATCH)
    return train(DistributedSVI(model, started(model), optimizer(), ELBO(2)))


def local(rank: int) -> dict:
    """Local latents; the draws of both kinds are written down."""
    loc = torch.nn.Parameter(torch.zeros(N))
    seen: dict[str, list] = {"mean": [], "z": [], "index": []}

    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N, subsample_size=BATCH) as index:
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.ones(BATCH))
        for name, value in (("mean", mean), ("z", z), ("index", index)):
            seen[name].append(value.detach().clone())

    def guide() -> None:
        pyro.sample("mean", dist.Normal(pyro.param("m", torch.tensor(float(rank))), 1.0))
        with pyro.plate("data", N, subsample_size=BATCH) as index:
            pyro.sample("z", dist.Normal(pyro.param("loc", loc)[index], 1.0))

    svi = DistributedSVI(model, guide, optimizer(), ELBO(max_plate_nesting=1))
    return {**train(svi, 5), **{name: torch.stack(v[1:]) for name, v in seen.items()}}


def particles() -> dict:
    model = regression(BATCH)
    seen = []

    def noted() -> None:
        with pyro.poutine.trace() as trace:
            model()
        nodes = trace.trace.nodes
        seen.append((nodes["w"]["value"].detach(), nodes["data"]["value"]))

    objective = ELBO(4, max_plate_nesting=1)
    svi = DistributedSVI(noted, AutoNormal(model), optimizer(), objective, spread=Spread.PARTICLES)
    result = train(svi, 3)
    w, index = zip(*seen[-3:], strict=True)
    return {**result, "w": torch.stack(w), "index": torch.stack(index)}


def one_fails(rank: int) -> dict:
    """The second process meets an error in the third step."""
    model = regression(BATCH)
    count = 0

    def failing() -> None:
        nonlocal count
        count += 1
        if rank == 1 and count == 4:
            raise ValueError("no such number")
        model()

    svi = DistributedSVI(failing, AutoNormal(model), optimizer(), ELBO(max_plate_nesting=1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = train(svi, 5)
    return {**result, "warnings": [str(w.message) for w in caught]}


def messages(rank: int) -> list[str]:
    """What is refused, and how."""
    model = regression(40)
    guide = AutoNormal(model)
    bound = IWAE(2)
    number = 2 + rank
    tries = [
        lambda: DistributedSVI(model, guide, optimizer(), ELBO()).step(),
        lambda: DistributedSVI(model, guide, optimizer(), bound, spread=Spread.PARTICLES),
        lambda: DistributedSVI(model, guide, optimizer(), ELBO(), spread="particles"),
        lambda: DistributedSVI(
            lambda: pyro.sample("z", dist.Normal(torch.zeros(number), 1.0).to_event(1)),
            lambda: pyro.sample(
                "z", dist.Normal(pyro.param("l", torch.zeros(number)), 1.0).to_event(1)
            ),
            optimizer(),
            ELBO(),
        ).step(),
    ]
    found = []
    for attempt in tries:
        pyro.clear_param_store()
        try:
            attempt()
        except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
            found.append(f"{type(error).__name__}: {error}".splitlines()[0])
    return found


def fitted(rank: int, folder: Path) -> dict:
    """A fit that is cut off and taken up again, beside one that is not."""
    model = regression(BATCH)

    def run(checkpoint: Path | None, stop: int) -> Fit:
        def callback(step: int, loss: torch.Tensor) -> None:
            if step == stop:
                raise KeyboardInterrupt

        return fit(
            model, AutoNormal(model), objective=ELBO(2), num_steps=30, seed=5 + rank, start=False,
            spread=Spread.MINIBATCH, checkpoint=checkpoint, checkpoint_every=10,
            callback=callback, progress_bar=False,
        )  # fmt: skip

    path = folder / "run.pt"
    try:
        run(path, 17)
    except KeyboardInterrupt:
        written = path.exists()
    # The other process might otherwise still be about to write.
    torch.distributed.barrier()
    whole, resumed = run(None, -1), run(path, -1)
    return {"written": written, "whole": whole.losses, "resumed": resumed.losses,
            "elbo": (whole.elbo, resumed.elbo)}  # fmt: skip


def main() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    result, folder = {}, Path(sys.argv[1])
    for name, part in {
        "split": lambda: split(rank),
        "local": lambda: local(rank),
        "particles": particles,
        "one_fails": lambda: one_fails(rank),
        "fitted": lambda: fitted(rank, folder),
        "messages": lambda: messages(rank),
    }.items():
        pyro.clear_param_store()
        result[name] = part()
    torch.save(result, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
