from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from flowvi.infer import GlobalOptim, Schedule, fit
from flowvi.infer._plateau import Plateau
from flowvi.infer.averaging import Average
from flowvi.objectives import ELBO

QUIET = {"progress_bar": False, "seed": 0, "start": False}


class Faulty:
    """A model with a NaN in the log-density of site ``bad`` at chosen calls."""

    def __init__(self, calls, where="value"):
        self.calls, self.where, self.count, self.armed = set(calls), where, 0, False

    def __call__(self):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        bad = self.armed and self.count in self.calls
        term = z * 0.0
        if bad and self.where == "value":
            term = term + torch.nan
        if bad and self.where == "gradient":
            # Finite value, infinite slope.
            term = (z - z.detach()).abs().sqrt()
        if bad and self.where == "raise":
            raise ValueError("outside the support")
        pyro.factor("bad", term)


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("value", "log-density of model site `bad` (128 of 128)"),
        ("gradient", "gradient of model site `bad`"),
        ("raise", "ValueError: outside the support"),
    ],
)
def test_bad_steps_are_skipped_counted_and_named(where, named):
    model = Faulty({3, 4}, where)
    params = []

    def callback(step, loss):
        model.count = step + 1
        params.append(guide.locs.z.detach().clone())

    guide = AutoNormal(model)
    guide()
    model.armed = True
    result = fit(model, guide, objective=ELBO(128), num_steps=8, callback=callback, **QUIET)
    assert result.skipped == 2
    assert result.skipped_sites == {named: 2}
    assert params[2] == params[3] == params[4]
    assert params[5] != params[4]
    assert params[5].isfinite()
    assert f"2 x {named}" in str(result)


def test_a_few_bad_draws_do_not_cost_the_step():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("edge", torch.where(z > 0.25, torch.nan, 0.0) * z)

    result = fit(model, AutoNormal(model), num_steps=60, **QUIET)
    assert result.skipped == 0
    assert result.losses.isfinite().all()
    # What is left out in training is not left out of the verdict.
    assert result.elbo == -float("inf")
    assert "reaches where the model has no density" in str(result)


def test_a_model_that_stays_broken_is_given_up_by_name():
    model = Faulty(range(1000))
    model.armed = False
    guide = AutoNormal(model)
    guide()

    def callback(step, loss):
        model.armed = True

    with pytest.raises(RuntimeError, match="non-finite: log-density of model site `bad`"):
        fit(model, guide, num_particles=4, callback=callback, **QUIET)


def test_clipping_is_global():
    params = [torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)]
    optim = GlobalOptim(1.0, betas=(0.0, 0.5), clip_norm=1.0)
    for p, g in zip(params, (torch.tensor([3.0, 0.0]), torch.tensor([4.0])), strict=True):
        p.grad = g
    optim(params)
    # Adam's second moment shows the gradient that arrived: (0.6, 0, 0.8).
    moments = [optim.moments[name]["exp_avg_sq"] for name, _ in optim.named_parameters()]
    torch.testing.assert_close(moments[0], 0.5 * torch.tensor([0.36, 0.0]), rtol=1e-6, atol=0)
    torch.testing.assert_close(moments[1], 0.5 * torch.tensor([0.64]), rtol=1e-6, atol=0)


def test_optimiser_equals_plain_adam_and_grows():
    ours, theirs = (torch.ones(3, requires_grad=True) for _ in range(2))
    late = torch.ones(2, requires_grad=True)
    optim = GlobalOptim(0.1)
    plain = torch.optim.Adam([theirs], lr=0.1, betas=(0.9, 0.99))
    for step in range(4):
        for p in (ours, theirs):
            p.grad = torch.cos(p.detach() + step)
        plain.step()
        late.grad = torch.ones(2)
        optim([ours] if step < 2 else [ours, late])
    torch.testing.assert_close(ours, theirs)
    assert [m["step"].item() for m in optim.moments.values()] == [4, 2]
    torch.testing.assert_close(late, torch.full((2,), 0.8), atol=1e-6, rtol=0)


def test_schedule():
    schedule = Schedule(120, warmup_steps=20)
    assert schedule(0) == pytest.approx(1 / 20)
    assert schedule(20) == 1.0
    assert schedule(70) == pytest.approx(0.5)
    assert schedule(119) < 1e-3
    schedule.finish(70, 10)
    assert schedule.num_steps == 80
    assert schedule(70) == pytest.approx(0.5)
    assert schedule(75) == pytest.approx(0.25)
    schedule.finish(75, 100)
    assert schedule.num_steps == 80


def test_plateau_rule_for_a_sure_end():
    rule = Plateau(window=10, tolerance=0.1)
    falling = torch.linspace(100, 0, 40)
    assert not any(rule.update(falling[:n]) for n in (10, 20, 30, 40))
    flat = torch.cat([falling, torch.zeros(30)])
    assert rule.update(flat[:50]) is None, "the last window still fell"
    assert rule.update(flat[:55]) is None, "between windows nothing is looked at"
    assert rule.update(flat[:60]) is None
    assert "2 windows of 10 steps gained less than 0.1" in rule.update(flat[:70])


def test_plateau_rule_for_noise():
    rule = Plateau(window=10, tolerance=0.1)
    noise = 10 * torch.randn(1000)
    ends = [n for n in range(10, 1001, 10) if rule.update(noise[:n])]
    assert ends
    assert ends[0] >= 70
    rule = Plateau(window=100, tolerance=0.1)
    falling = noise - 0.2 * torch.arange(1000)
    assert not any(rule.update(falling[:n]) for n in range(100, 1001, 100))


@pytest.mark.parametrize("num_updates", [1, 5, 125, 250, 1000])
def test_average_over_few_updates_forgets_its_first_value(num_updates):
    average = Average.over(num_updates)
    assert average.decay**num_updates < 0.002
    assert average.decay <= 0.99
    assert Average.over(10**6, 0.98).decay == 0.98


def test_average_is_the_recursion():
    p = torch.zeros(2)
    average = Average(0.9)
    expected = p.clone()
    average.update([("p", p)])
    for step in range(5):
        p += step
        expected = 0.9 * expected + 0.1 * p
        average.update([("p", p)])
    torch.testing.assert_close(average.values["p"], expected)
    raw = p.clone()
    with average.swapped([("p", p)]):
        torch.testing.assert_close(p, expected)
    assert torch.equal(p, raw)


def test_bad_arguments():
    with pytest.raises(ValueError, match="`lr` must be positive; got 0"):
        GlobalOptim(0)
    with pytest.raises(ValueError, match="`clip_norm` must be positive; got -1"):
        GlobalOptim(clip_norm=-1)
