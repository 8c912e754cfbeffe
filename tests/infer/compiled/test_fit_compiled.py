"""``fit(..., compile=...)``: the same run, step by step."""

from __future__ import annotations

from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from step_programs import DATA, model
from torch import Tensor

from flowvi.flows import realnvp
from flowvi.guides import AutoFlow
from flowvi.infer import Fit, fit
from flowvi.infer.compiled import Backend, Interpreter
from flowvi.objectives import BetaELBO, LinearSchedule


def run(compile: bool | Backend, **options: object) -> Fit:
    torch.manual_seed(0)
    guide = AutoFlow(model, lambda *sizes: realnvp(*sizes, num_layers=2, hidden_dims=(4,)))
    options = {"num_steps": 20, "start": False, "progress_bar": False, "seed": 0, **options}
    return fit(model, guide, DATA, compile=compile, **options)


def test_a_compiled_fit_is_the_eager_fit():
    objective = BetaELBO(4, beta=LinearSchedule(10))
    eager = run(False, objective=objective)
    compiled = run(Interpreter(), objective=objective)
    torch.testing.assert_close(compiled.losses, eager.losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(compiled.history["elbo"], eager.history["elbo"], rtol=1e-6, atol=0)
    assert compiled.elbo == pytest.approx(eager.elbo, rel=1e-6)
    assert "one graph of" in compiled.notes[-1]
    assert not any("graph" in note for note in eager.notes)


@pytest.mark.parametrize("first", [True, False])
def test_compiled_and_eager_fits_take_up_each_others_checkpoints(tmp_path: Path, first: bool):
    expected = run(False)
    order = [Interpreter(), False] if first else [False, Interpreter()]
    file = tmp_path / "run.pt"

    class Stop(Exception):
        pass

    def stop(step: int, loss: Tensor) -> None:
        if step == 13:
            raise Stop

    with pytest.raises(Stop):
        run(order[0], checkpoint=file, checkpoint_every=10, callback=stop)
    later = run(order[1], checkpoint=file, checkpoint_every=10)
    torch.testing.assert_close(later.losses, expected.losses, rtol=1e-6, atol=0)


def test_a_fit_that_cannot_be_compiled_is_eager_and_says_why():
    def branching(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            shift = 0.0 if mean.isfinite().all() else 1.0
            pyro.sample("y", dist.Normal(mean + shift, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("mean", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 0.1))

    options = {"start": False, "num_steps": 3, "progress_bar": False, "num_particles": 1}
    with pytest.warns(UserWarning, match="Steps are eager: .*value of a tensor"):
        result = fit(branching, guide, DATA, compile=Interpreter(), **options)
    assert any("Steps are eager" in note for note in result.notes)
