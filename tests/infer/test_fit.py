from __future__ import annotations

import math
import runpy
import subprocess
import sys
import textwrap

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

from flowvi.guides import AutoFlow
from flowvi.infer import Start, fit
from flowvi.objectives import ELBO, STL

Y = torch.tensor([1.2, -0.3, 0.8, 2.1, 0.4], dtype=torch.float64)
QUIET = {"progress_bar": False, "seed": 0}


def line(y):
    """Correlated Gaussian posterior, so mean-field and full-rank optima are known."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a + b, 0.5), obs=y)


def line_posterior(y):
    precision = torch.eye(2) + len(y) / 0.25 * torch.ones(2, 2)
    loc = torch.linalg.solve(precision, torch.ones(2) * y.sum() / 0.25)
    return loc, precision


def line_evidence(y):
    cov = 0.25 * torch.eye(len(y)) + 2 * torch.ones(len(y), len(y))
    return dist.MultivariateNormal(torch.zeros(len(y)), cov).log_prob(y).item()


def test_full_rank_guide_reaches_the_evidence():
    result = fit(line, AutoMultivariateNormal(line), Y, num_steps=150, **QUIET)
    assert result.elbo == pytest.approx(line_evidence(Y), abs=1e-3)
    assert result.skipped == 0
    loc, precision = line_posterior(Y)
    draws = result.sample(20_000)
    z = torch.stack([draws["a"], draws["b"]], -1)
    torch.testing.assert_close(z.mean(0), loc, atol=0.05, rtol=0)
    torch.testing.assert_close(z.T.cov(), precision.inverse(), atol=0.03, rtol=0)


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("make", [AutoNormal, AutoDiagonalNormal])
def test_mean_field_guide_lands_on_the_mean_field_optimum(make, start):
    result = fit(line, make(line), Y, start=start, num_steps=400, lr=0.03, **QUIET)
    _, precision = line_posterior(Y)
    # KL of the best factorised Gaussian: half the log-ratio of the diagonal to the determinant.
    gap = 0.5 * (precision.diagonal().log().sum() - precision.logdet()).item()
    assert result.elbo == pytest.approx(line_evidence(Y) - gap, abs=max(0.02, 4 * result.elbo_se))
    assert (result.start is None) is (not start)


@pytest.mark.parametrize("make", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal])
def test_stock_guide_starts_at_its_own_optimum(make):
    loc, precision = line_posterior(Y)
    start = Start.from_moments(loc, precision.inverse())
    result = fit(line, make(line), Y, start=start, num_steps=1, lr=1e-12, **QUIET)
    gap = 0.5 * (precision.diagonal().log().sum() - precision.logdet()).item()
    gap = 0.0 if make is AutoMultivariateNormal else gap
    assert result.elbo == pytest.approx(line_evidence(Y) - gap, abs=4 * result.elbo_se + 1e-8)


def test_hand_written_guide_with_pyro_param():
    def guide(y):
        loc = pyro.param("loc", torch.zeros(2))
        scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
        pyro.sample("a", dist.Normal(loc[0], scale[0]))
        pyro.sample("b", dist.Normal(loc[1], scale[1]))

    pyro.get_param_store()["loc"] = torch.full((2,), 77.0)
    result = fit(line, guide, Y, num_steps=300, lr=0.05, **QUIET)
    assert pyro.param("loc")[0] == 77.0
    with result.scope():
        assert abs(pyro.param("loc").sum() - line_posterior(Y)[0].sum()) < 0.1
        assert (pyro.param("scale") > 0).all()
    assert list(pyro.get_param_store()) == ["loc"]
    assert result.sample(7)["a"].shape == (7,)


def test_flow_guide_and_summary():
    result = fit(line, AutoFlow(line), Y, num_steps=60, **QUIET)
    assert result.elbo == pytest.approx(line_evidence(Y), abs=0.02)
    assert isinstance(result.start, Start)
    assert str(result).startswith(f"ELBO {result.elbo:.3f} +- ")
    assert result.losses.shape == (result.num_steps,)


def test_flow_guide_takes_a_given_start():
    loc, precision = line_posterior(Y)
    given = Start.from_moments(loc, precision.inverse())
    result = fit(line, AutoFlow(line), Y, start=given, num_steps=2, **QUIET)
    assert result.start is given
    # At the exact Gaussian the ELBO is the log-evidence with no noise.
    assert result.losses[0] == pytest.approx(-line_evidence(Y), abs=1e-8)


def test_subsampled_model_trains_without_a_start():
    y = torch.randn(20) + 2

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(y), subsample_size=5) as index:
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y[index])

    result = fit(model, AutoNormal(model), y, num_steps=300, lr=0.05, tolerance=None, **QUIET)
    assert any("subsampled" in note for note in result.notes)
    assert result.start is None
    assert result.sample(4000)["mean"].mean() == pytest.approx(y.mean().item(), abs=0.15)


def test_discrete_latent_gets_the_elbo_and_the_right_weights():
    def model():
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(k, 1.0), obs=torch.tensor(1.0))

    def guide():
        logit = pyro.param("logit", torch.tensor(0.0))
        pyro.sample("k", dist.Bernoulli(logits=logit))

    result = fit(model, guide, num_steps=300, lr=0.05, **QUIET)
    odds = 0.3 * math.exp(0) / (0.7 * math.exp(-0.5))
    with result.scope():
        assert pyro.param("logit").item() == pytest.approx(math.log(odds), abs=0.1)


def test_sites_in_plates_have_their_own_shape_in_samples():
    def model():
        scale = pyro.sample("scale", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("items", 4):
            pyro.sample("z", dist.Normal(torch.zeros(2), scale[..., :2] + 1).to_event(1))

    for guide in (AutoNormal(model), AutoFlow(model)):
        draws = fit(model, guide, num_steps=5, **QUIET).sample(6)
        assert draws["scale"].shape == (6, 3)
        assert draws["z"].shape == (6, 4, 2)


def without_mv(y):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(torch.eye(2).mv(z), 1.0).to_event(1), obs=y)


def with_an_extra_dim(y):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", 2):
        pyro.sample("y", dist.Normal(z[..., :1] * torch.ones(1, 1), 1.0), obs=y)


def with_a_batch_by_chance(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0).expand([3]).to_event(1), obs=torch.ones(3))


@pytest.mark.parametrize("model", [without_mv, with_an_extra_dim, with_a_batch_by_chance])
def test_model_that_does_not_broadcast_runs_in_a_loop_with_a_warning(model):
    options = {**QUIET, "num_steps": 30, "start": False}
    with pytest.warns(UserWarning, match="particles run one after the other"):
        result = fit(model, AutoMultivariateNormal(model), torch.ones(2), **options)
    assert "one after the other" in result.notes[0]


def test_given_objective_is_used_and_left_alone():
    objective = ELBO(4)
    result = fit(line, AutoNormal(line), Y, objective=objective, num_steps=5, **QUIET)
    assert objective.max_plate_nesting == float("inf")
    assert len(result.losses) == 5


def test_plateau_stops_early_and_says_so():
    result = fit(line, AutoMultivariateNormal(line), Y, num_steps=1000, **QUIET)
    assert result.num_steps < 1000
    assert result.stop_reason.startswith("plateau after")
    full = fit(line, AutoNormal(line), Y, num_steps=30, tolerance=None, **QUIET)
    assert full.stop_reason == "all 30 steps"


def test_module_local_parameters_are_trained_too():
    with pyro.settings.context(module_local_params=True):
        guide = AutoNormal(line)
        result = fit(line, guide, Y, start=False, num_steps=200, lr=0.05, **QUIET)
    assert -result.losses[-50:].mean() > -result.losses[0] + 1
    assert not pyro.get_param_store()


def test_max_seconds_and_callback():
    seen = []
    result = fit(
        line,
        AutoNormal(line),
        Y,
        start=False,
        max_seconds=0.3,
        callback=lambda step, loss: seen.append((step, float(loss))),
        **QUIET,
    )
    assert result.stop_reason == "max_seconds = 0.3"
    assert [step for step, _ in seen] == list(range(result.num_steps))
    assert torch.equal(torch.tensor([loss for _, loss in seen]), result.losses)


def test_progress_bar_shows_the_elbo_and_can_be_silenced(capfd):
    fit(line, AutoNormal(line), Y, num_steps=50, start=False, seed=0)
    assert "ELBO -" in capfd.readouterr().err
    fit(line, AutoNormal(line), Y, num_steps=50, start=False, **QUIET)
    captured = capfd.readouterr()
    assert captured.err == ""
    assert captured.out == ""


def test_seed_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    first = fit(line, AutoNormal(line), Y, num_steps=5, **QUIET)
    assert torch.equal(torch.get_rng_state(), before)
    second = fit(line, AutoNormal(line), Y, num_steps=5, **QUIET)
    assert torch.equal(first.losses, second.losses)


SCRIPT = """
import sys, torch, pyro
import pyro.distributions as dist
from pyro.infer.autoguide import AutoNormal
from flowvi.infer import fit

torch.set_default_dtype(torch.float64)

def model(y):
    z = pyro.sample("z", dist.Normal(0.0, 3.0))
    with pyro.plate("data", 2):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

for which in sys.argv[1]:
    y = torch.tensor([1.0, 2.0]) * (1 if which == "a" else -5)
    options = {"seed": 3, "num_steps": 20, "start": False, "progress_bar": False}
    result = fit(model, AutoNormal(model), y, **options)
    print([v.hex() for v in result.losses.tolist()], result.sample(1)["z"].shape)
"""


def test_two_fits_in_one_process_equal_two_processes(tmp_path, monkeypatch, capsys):
    path = tmp_path / "two.py"
    path.write_text(textwrap.dedent(SCRIPT))

    def alone(which):
        command = [sys.executable, str(path), which]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    monkeypatch.setattr(sys, "argv", [str(path), "ab"])
    runpy.run_path(str(path))
    assert capsys.readouterr().out == alone("a") + alone("b")


def test_two_guides_of_one_class_keep_their_own_parameters():
    other = Y - 4
    first = fit(line, AutoNormal(line), Y, num_steps=100, **QUIET)
    second = fit(line, AutoNormal(line), other, num_steps=100, **QUIET)
    sums = [sum(f.sample(3000).values()).mean().item() for f in (first, second, first)]
    for got, y in zip(sums, (Y, other, Y), strict=True):
        assert got == pytest.approx(line_posterior(y)[0].sum().item(), abs=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "`num_steps` must be an integer of at least 1; got 0"),
        ({"num_steps": 2.5}, "`num_steps` must be an integer of at least 1; got 2.5"),
        ({"num_particles": -1}, "`num_particles` must be an integer of at least 1; got -1"),
        ({"lr": 0.0}, "`lr` must be a positive number; got 0.0"),
        ({"lr": "fast"}, "`lr` must be a positive number; got 'fast'"),
        ({"average": 1.0}, r"`average` must lie in \[0, 1\); got 1.0"),
        ({"max_seconds": -1}, "`max_seconds` must be a positive number; got -1"),
        ({"checkpoint_every": 0}, "`checkpoint_every` must be an integer of at least 1; got 0"),
    ],
)
def test_bad_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        fit(line, AutoNormal(line), Y, **options)


def test_non_finite_data_is_named():
    bad = Y.clone()
    bad[1] = torch.nan

    with pytest.raises(ValueError, match=r"`args\[0\]` has 1 non-finite of 5 values"):
        fit(line, AutoNormal(line), bad, **QUIET)

    def regression(data):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(slope * data["x"], 1.0), obs=data["y"])

    data = {"x": bad, "y": Y}
    with pytest.raises(ValueError, match=r"`args\[0\]\['x'\]` has 1 non-finite of 5 values"):
        fit(regression, AutoNormal(regression), data, **QUIET)


def test_masked_missing_data_is_allowed():
    bad = Y.clone()
    bad[1] = torch.nan

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5), pyro.poutine.mask(mask=~y.isnan()):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y.nan_to_num())

    assert math.isfinite(fit(model, AutoNormal(model), bad, num_steps=3, **QUIET).elbo)


def test_empty_data_and_empty_plate_are_named():
    with pytest.raises(ValueError, match=r"`args\[0\]` must not be empty; got shape \(0,\)"):
        fit(line, AutoNormal(line), Y[:0], **QUIET)

    def model(n):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("items", n):
            pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(
        ValueError, match="(?i)plate `?items`? must h.* at least one item; got size 0"
    ):
        fit(model, AutoFlow(model), 0, **QUIET)


def test_devices_are_named():
    guide = AutoNormal(line)
    guide(Y)
    with pytest.raises(ValueError, match=r"`args\[0\]` must be on the device of the guide, cpu"):
        fit(line, guide, Y.to("meta"), **QUIET)


def test_mismatched_sites_are_named():
    def guide(y):
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("c", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"it lacks \['b'\] and has \['c'\] that the model lacks"):
        fit(line, guide, Y, **QUIET)


def test_a_site_to_be_summed_out_has_a_way_out() -> None:
    def model() -> None:
        side = pyro.sample("side", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(side, 1.0))

    guide = AutoNormal(poutine.block(model, hide=["side"]))
    with pytest.raises(
        ValueError, match=r"lacks \['side'\].*`side` is to be summed.*TraceEnum_ELBO"
    ):
        fit(model, guide, num_steps=2, progress_bar=False)


def test_no_latents_and_no_callable():
    def model(y):
        pyro.sample("y", dist.Normal(0.0, 1.0).expand([5]).to_event(1), obs=y)

    with pytest.raises(ValueError, match="`model` must have at least one latent sample site"):
        fit(model, lambda y: None, Y, **QUIET)
    with pytest.raises(TypeError, match="`guide` must be callable; got int"):
        fit(line, 3, Y, **QUIET)


def test_discrete_latent_with_a_flow_guide_is_refused_by_name():
    def model():
        pyro.sample("k", dist.Poisson(2.0))
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(NotImplementedError, match="`k`"):
        fit(model, AutoFlow(model), **QUIET)


def test_default_objective_depends_on_the_guide():
    from flowvi.infer._setup import default_objective, first_run

    def discrete(y):
        pyro.sample("a", dist.Bernoulli(0.5))
        pyro.sample("b", dist.Normal(0.0, 1.0))

    assert type(default_objective(*first_run(line, AutoFlow(line), (Y,), {}))) is STL
    assert type(default_objective(*first_run(discrete, discrete, (Y,), {}))) is ELBO


LEAN = """
import sys

import pyro
import pyro.distributions as dist
from flowvi.guides import AutoFlow
from flowvi.infer import fit

def model():
    with pyro.plate("items", 2):
        pyro.sample("x", dist.LogNormal(0.0, 1.0))

fit(model, AutoFlow(model), num_steps=2, progress_bar=False)
print([name for name in ("sympy", "torch._dynamo") if name in sys.modules])
"""


@pytest.mark.slow
def test_a_fit_does_not_import_the_compiler():
    """It would take a second, more than many a fit."""
    done = subprocess.run([sys.executable, "-c", LEAN], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
