from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoNormal,
)

from flowvi.infer.draws import guide_draws
from flowvi.infer.target import Target

Y = torch.tensor([0.3, -1.0, 2.0, 0.7])


def model(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("J", len(y)):
        x = pyro.sample("x", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(x + share[..., :1], 1.0), obs=y)


def simple(y):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("J", len(y)):
        pyro.sample("x", dist.Normal(rate, 1.0))


def simple_guide(y):
    rate = pyro.sample("rate", dist.LogNormal(0.2, 0.7))
    with pyro.plate("J", len(y)):
        pyro.sample("x", dist.Normal(rate, 2.0))


def test_hand_written_guide_matches_closed_form():
    draws = guide_draws(simple_guide, Target(simple, (Y,)), 50, (Y,))
    rate, x = draws.values["rate"], draws.values["x"]
    assert draws.vectorized
    assert len(draws) == 50
    assert rate.shape == (50,)
    assert x.shape == (50, 4)
    # In z = log(rate) the guide is Normal(0.2, 0.7).
    log_q = dist.Normal(0.2, 0.7).log_prob(rate.log())
    log_q = log_q + dist.Normal(rate[:, None], 2.0).log_prob(x).sum(-1)
    torch.testing.assert_close(draws.log_q, log_q)
    log_p = dist.Gamma(2.0, 1.0).log_prob(rate) + rate.log()
    log_p = log_p + dist.Normal(rate[:, None], 1.0).log_prob(x).sum(-1)
    torch.testing.assert_close(draws.log_p, log_p)
    torch.testing.assert_close(draws.z[:, 0], rate.log())
    torch.testing.assert_close(draws.log_weights, log_p - log_q)


def test_autoguide_density_in_unconstrained_coordinates():
    guide = AutoDiagonalNormal(model, init_scale=0.4)
    guide(Y)
    draws = guide_draws(guide, Target(model, (Y,)), 30, (Y,))
    torch.testing.assert_close(draws.log_q, guide.get_posterior().log_prob(draws.z))
    assert draws.values["share"].shape == (30, 3)


@pytest.mark.parametrize("kind", ["iaf", "normal", "list"])
def test_vectorised_equals_loop(kind, monkeypatch):
    def parts():
        guide = AutoGuideList(model)
        guide.append(AutoIAFNormal(pyro.poutine.block(model, expose=["scale", "share"])))
        guide.append(AutoNormal(pyro.poutine.block(model, expose=["x"])))
        return guide

    guide = {"iaf": lambda: AutoIAFNormal(model), "normal": lambda: AutoNormal(model)}.get(
        kind, parts
    )()
    guide(Y)
    target = Target(model, (Y,))
    fast = guide_draws(guide, target, 2000, (Y,))
    monkeypatch.setattr("flowvi.infer.draws._run_vectorized", lambda *a: None)
    slow = guide_draws(guide, target, 120, (Y,))
    assert fast.vectorized
    assert not slow.vectorized
    assert slow.z.shape == (120, target.dim)
    for a, b in ((fast.log_q, slow.log_q), (fast.log_p, slow.log_p)):
        error = math.sqrt(float(b.var()) / 120)
        assert abs(float(a.mean() - b.mean())) < 5 * error


def test_guide_that_ignores_the_plate_falls_back_to_the_loop():
    def guide(y):
        # Drawn by hand: one value whatever the plates are, so rows of a plate would be equal.
        noise = torch.randn(())
        pyro.sample(
            "rate",
            dist.Delta(noise.exp(), log_density=dist.Normal(0.0, 1.0).log_prob(noise) - noise),
        )
        with pyro.plate("J", len(y)):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    draws = guide_draws(guide, Target(simple, (Y,)), 20, (Y,))
    assert draws.values["rate"].shape == (20,)
    assert len(draws.values["rate"].unique()) == 20


def test_guide_with_a_branch_on_its_value_falls_back_to_the_loop():
    def guide(y):
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        shift = 1.0 if rate > 1 else 0.0
        with pyro.plate("J", len(y)):
            pyro.sample("x", dist.Normal(shift, 1.0))

    draws = guide_draws(guide, Target(simple, (Y,)), 15, (Y,))
    assert not draws.vectorized
    shift = (draws.values["rate"] > 1).double()[:, None]
    x = draws.values["x"]
    expected = dist.Normal(0.0, 1.0).log_prob(draws.z[:, 0]) + dist.Normal(shift, 1.0).log_prob(
        x
    ).sum(-1)
    torch.testing.assert_close(draws.log_q, expected)


def test_chunks_and_indexing():
    draws = guide_draws(simple_guide, Target(simple, (Y,)), 25, (Y,), chunk_size=10)
    assert draws.z.shape == (25, 5)
    part = draws[draws.log_p > draws.log_p.median()]
    assert len(part) == 12
    torch.testing.assert_close(
        part.values["x"], draws.values["x"][draws.log_p > draws.log_p.median()]
    )


def test_rows_on_which_the_model_fails_have_no_density():
    def fragile():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("f", torch.where(x[..., 0] > 1, torch.nan, 0.0))

    def guide():
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    draws = guide_draws(guide, Target(fragile), 200)
    bad = draws.values["x"][:, 0] > 1
    assert bad.any()
    assert bool((draws.log_p[bad] == -math.inf).all())
    assert bool(torch.isfinite(draws.log_weights[~bad]).all())


def test_keyword_arguments_and_global_validation_are_left_alone():
    def keyed(*, loc):
        pyro.sample("x", dist.Normal(loc, 1.0))

    before = torch.distributions.Distribution._validate_args
    draws = guide_draws(keyed, Target(keyed, (), {"loc": 3.0}), 10, (), {"loc": 3.0})
    torch.testing.assert_close(draws.log_p, draws.log_q)
    assert torch.distributions.Distribution._validate_args == before


def test_messages():
    target = Target(simple, (Y,))
    with pytest.raises(ValueError, match="`num_draws` must be at least 1; got 0"):
        guide_draws(simple_guide, target, 0, (Y,))
    with pytest.raises(ValueError, match="`guide` must sample every latent site.*got no x"):
        guide_draws(lambda y: pyro.sample("rate", dist.LogNormal(0.0, 1.0)), target, 5, (Y,))


def test_no_warning_from_a_point_guide():
    guide = AutoDelta(model)
    guide(Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draws = guide_draws(guide, Target(model, (Y,)), 5, (Y,))
    assert bool((draws.z == draws.z[0]).all())
