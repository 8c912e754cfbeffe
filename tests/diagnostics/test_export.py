from __future__ import annotations

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal

from flowvi.diagnostics import to_arviz
from flowvi.diagnostics.arviz_adapter import import_arviz, pareto_smooth
from flowvi.infer.target import Target

Y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
SIGMA = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)


def schools(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.LogNormal(1.0, 0.5))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu + share[..., 0], tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


@pytest.fixture(scope="module")
def exported():
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    guide = AutoMultivariateNormal(schools, init_scale=0.5)
    guide(SIGMA, Y)
    return guide, to_arviz(schools, guide, SIGMA, Y, num_draws=400, seed=1)


def test_groups_dimensions_and_coordinates(exported):
    _, data = exported
    posterior = data["posterior"]
    assert posterior["theta"].dims == ("chain", "draw", "school")
    assert posterior["theta"].shape == (4, 100, 8)
    assert posterior["share"].dims == ("chain", "draw", "share_dim_0")
    assert posterior["mu"].dims == ("chain", "draw")
    np.testing.assert_array_equal(posterior["school"].values, np.arange(8))
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "school")
    assert data["observed_data"]["y"].dims == ("school",)
    np.testing.assert_array_equal(data["observed_data"]["y"].values, Y.numpy())
    assert posterior.attrs["inference_library"] == "flowvi"


def test_statistics_agree_with_the_model(exported):
    _, data = exported
    values = {
        name: torch.as_tensor(data["posterior"][name].values.reshape(400, *shape).copy())
        for name, shape in (("mu", ()), ("tau", ()), ("share", (3,)), ("theta", (8,)))
    }
    target = Target(schools, (SIGMA, Y))
    z = target.unconstrain(values)
    stats = {n: data["sample_stats"][n].values.reshape(-1) for n in ("lp", "log_q", "log_weight")}
    np.testing.assert_allclose(stats["lp"], target.log_prob(z).numpy(), rtol=1e-6)
    np.testing.assert_allclose(stats["log_weight"], stats["lp"] - stats["log_q"], rtol=1e-6)
    expected = dist.Normal(values["theta"], SIGMA).log_prob(Y)
    found = data["log_likelihood"]["y"].values.reshape(400, 8)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)
    smoothed = data["sample_stats"]["smoothed_log_weight"].values
    assert np.exp(smoothed).sum() == pytest.approx(1)


def test_summary_and_loo(exported):
    _, data = exported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ warns of large Pareto k of single observations
        arviz = import_arviz()
        summary = arviz.summary(data, round_to="none")
        loo = arviz.loo(data)
    assert "theta[3]" in summary.index
    mean = float(data["posterior"]["mu"].values.mean())
    assert float(summary.loc["mu", "mean"]) == pytest.approx(mean)
    assert -40 < float(loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd) < -25


def test_resampled_draws_repeat_guide_draws(exported):
    guide, data = exported
    again = to_arviz(schools, guide, SIGMA, Y, num_draws=400, resampled=True, seed=1)
    before = data["posterior"]["mu"].values.reshape(-1)
    after = again["posterior"]["mu"].values.reshape(-1)
    assert np.isin(after, before).all()
    assert len(np.unique(after)) < 400
    assert again["posterior"].attrs["resampled"] == 1


def test_nested_plates_event_dimensions_and_broadcast_plates():
    def model(y):
        with pyro.plate("column", 2, dim=-1), pyro.plate("row", 3, dim=-2):
            x = pyro.sample("x", dist.Normal(torch.zeros(3, 2, 4), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=y)
        with pyro.plate("row_only", 3, dim=-2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    data = to_arviz(model, _prior_of(model), torch.randn(3, 2), num_draws=20, num_chains=2)
    assert data["posterior"]["x"].dims == ("chain", "draw", "row", "column", "x_dim_2")
    assert data["posterior"]["z"].dims == ("chain", "draw", "row_only", "z_dim_1")
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "row", "column")
    assert data["observed_data"]["y"].dims == ("row", "column")


def _prior_of(model):
    def guide(*args):
        with pyro.poutine.block(hide=["y"]):
            pyro.poutine.uncondition(model)(*args)

    return guide


def test_likelihood_by_factor_has_no_log_likelihood_group():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", -x.square())

    def guide():
        pyro.sample("x", dist.Normal(0.0, 0.6))

    data = to_arviz(model, guide, num_draws=100)
    groups = data.groups() if callable(data.groups) else data.groups
    assert not any("log_likelihood" in group for group in groups)
    assert data["posterior"].attrs["pareto_k"] < 0.7


def test_smoothed_weights_of_the_adapter():
    log_w = np.random.default_rng(0).exponential(0.6, 5000)
    smoothed, k = pareto_smooth(log_w)
    assert k == pytest.approx(0.6, abs=0.2)
    assert np.exp(smoothed).sum() == pytest.approx(1)
    # The large weights are those that are smoothed: the order of the rest is kept.
    assert np.corrcoef(smoothed, log_w)[0, 1] > 0.99


def test_messages():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="`num_chains` must be at least 1; got 0"):
        to_arviz(model, model, num_chains=0)
    with pytest.raises(ValueError, match=r"multiple of num_chains \(4\); got 30"):
        to_arviz(model, model, num_draws=30)
