"""The step of annealed objectives: when it advances, how it is saved, what fit makes of it."""

from __future__ import annotations

import copy

import pyro
import pytest
import torch
from ladder_models import (
    LadderGuide,
    ladder,
)
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal

from flowvi.infer import fit
from flowvi.objectives import ELBO, BetaELBO, CyclicalSchedule, LinearSchedule


def test_step_advances_in_training_only():
    x, guide = torch.randn(3), LadderGuide(3)
    objective = BetaELBO(4, beta=LinearSchedule(10))
    svi = SVI(ladder, guide, pyro.optim.Adam({"lr": 0.01}), objective)
    for step in range(3):
        svi.evaluate_loss(x)
        assert float(objective.report["beta/latent"]) == pytest.approx(step / 10)
        svi.step(x)
        assert float(objective.report["beta/latent"]) == pytest.approx(step / 10)
        with torch.no_grad():
            objective.differentiable_loss(ladder, guide, x)
    assert int(objective.step) == 3
    new = copy.copy(objective)
    new.differentiable_loss(ladder, guide, x)
    assert (int(objective.step), int(new.step)) == (3, 4)


def test_state_is_restored():
    objective, other = BetaELBO(beta=LinearSchedule(10)), BetaELBO(beta=LinearSchedule(10))
    objective.step.fill_(7)
    other.load_state_dict(objective.state_dict())
    assert int(other.step) == 7
    with pytest.raises(ValueError, match="`state` must hold exactly `step`; got"):
        other.load_state_dict({})
    with pytest.raises(ValueError, match="`state` must be empty for ELBO; got"):
        ELBO().load_state_dict(objective.state_dict())


class Killed(Exception):
    pass


def test_resumed_run_is_bit_equal(tmp_path):
    x = torch.randn(3)
    objective = BetaELBO(4, beta=CyclicalSchedule(30, num_cycles=2))
    options = {"objective": objective, "num_steps": 40, "start": False, "checkpoint_every": 10}
    options["progress_bar"] = False

    def kill(step, loss):
        if step == 23:
            raise Killed

    whole = fit(ladder, AutoNormal(ladder), x, seed=1, **options)
    path = tmp_path / "run.pt"
    with pytest.raises(Killed):
        fit(ladder, AutoNormal(ladder), x, seed=1, checkpoint=path, callback=kill, **options)
    resumed = fit(ladder, AutoNormal(ladder), x, seed=9, checkpoint=path, **options)
    assert int(objective.step) == 0
    assert torch.equal(whole.losses, resumed.losses)
    assert whole.history.keys() == resumed.history.keys()
    for name, values in whole.history.items():
        assert torch.equal(values, resumed.history[name])
    expected = CyclicalSchedule(30, num_cycles=2)(torch.arange(40))
    torch.testing.assert_close(whole.history["beta/latent"], expected)


def test_fit_does_not_stop_before_the_schedule_ends():
    x = torch.randn(3)
    options = {"num_steps": 240, "start": False, "progress_bar": False, "seed": 0}
    objective = BetaELBO(2, beta=LinearSchedule(80))
    result = fit(ladder, AutoNormal(ladder), x, objective=objective, tolerance=10.0, **options)
    assert 140 <= result.num_steps < 240
    assert "plateau" in result.stop_reason
    never = BetaELBO(2, beta=lambda step: 1.0)
    result = fit(ladder, AutoNormal(ladder), x, objective=never, tolerance=10.0, **options)
    assert result.num_steps == 240
    assert not result.notes


def test_fit_says_that_it_ended_before_the_schedule():
    x = torch.randn(3)
    objective = BetaELBO(2, beta=LinearSchedule(120))
    options = {"num_steps": 5, "start": False, "progress_bar": False, "seed": 0}
    result = fit(ladder, AutoNormal(ladder), x, objective=objective, **options)
    assert "schedules of the objective last 120 steps and the run 5" in result.notes[-1]
