from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from flowvi.diagnostics import gradient_report
from flowvi.diagnostics._moments import gradient_moments, guide_parameters
from flowvi.objectives import ELBO, EUBO, IWAE, STL, DReG

QUIET = {"seed": 0, "progress_bar": False}


def model():
    pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def guide():
    loc = pyro.param("loc", torch.tensor([0.5, -0.5]))
    pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))


def test_moments_are_those_of_the_closed_form():
    # The loss is log q - log p with z = loc + eps. Its gradient for loc is z - eps = loc for STL
    # and z for the full estimator, whose log q is free of loc: variance 1 per coordinate.
    guide()
    params = list(guide_parameters(guide, (), {}).values())
    pyro.set_rng_seed(1)
    full = gradient_moments(ELBO(max_plate_nesting=0), model, guide, (), {}, params, 1000)
    path = gradient_moments(STL(max_plate_nesting=0), model, guide, (), {}, params, 10)
    # 1000 draws: standard error of the variance 2 / sqrt(1000) = 0.063, taken four times.
    assert full.variance == pytest.approx(2.0, abs=0.25)
    torch.testing.assert_close(full.mean, torch.tensor([0.5, -0.5]), rtol=0, atol=0.13)
    assert path.variance < 1e-25
    torch.testing.assert_close(path.mean, torch.tensor([0.5, -0.5]))
    assert full.signal_to_noise == pytest.approx(math.sqrt(0.5) / math.sqrt(2.0), abs=0.1)
    assert path.norm == pytest.approx(math.sqrt(0.5))
    # KL between unit normals at distance |loc|.
    assert full.value == pytest.approx(0.25, abs=5 * full.value_se)


def test_report_rows():
    report = gradient_report(
        model, guide, {"ELBO": ELBO(4), "STL": STL(4), "EUBO": EUBO(4)}, num_repeats=50, **QUIET
    )
    elbo, stl, eubo = report
    assert math.isnan(elbo.bias)
    assert stl.bias == pytest.approx(0.0, abs=0.05)
    assert stl.bias_z < 2.5
    assert stl.sd < 1e-10 < elbo.sd
    assert elbo.cost == 1.0
    assert eubo.milliseconds > 0
    assert report.num_parameters == 2
    assert report.num_reference == 200
    assert list(report.to_dataframe().index) == ["ELBO", "STL", "EUBO"]
    text = str(report)
    assert "Gradients of 2 parameters, 50 of each estimator, 200 of each reference." in text
    assert "signal/noise" in text


def test_a_biased_estimator_is_found_out():
    # Self-normalised weights of two draws against many.
    report = gradient_report(
        model,
        guide,
        {"EUBO": EUBO(2)},
        num_repeats=200,
        num_reference=100,
        reference=EUBO(500),
        **QUIET,
    )
    assert report.rows[0].bias_z > 3
    assert report.rows[0].bias > 0.05


def test_refused_objectives_are_rows():
    def discrete():
        probs = pyro.param("probs", torch.ones(3) / 3)
        pyro.sample("k", dist.Categorical(probs))

    report = gradient_report(
        discrete, discrete, {"ELBO": ELBO(2), "STL": STL(2)}, num_repeats=3, **QUIET
    )
    assert not report.rows[0].failure
    assert "STL needs reparameterised guide sites; site `k`" in report.rows[1].failure
    assert "STL: NotImplementedError: STL needs" in str(report)


def test_parameters_and_random_state_stay_as_they_are():
    guide()
    before, state = pyro.param("loc").detach().clone(), torch.get_rng_state()
    gradient_report(model, guide, {"ELBO": ELBO(2)}, num_repeats=3, **QUIET)
    assert torch.equal(before, pyro.param("loc").detach())
    assert torch.equal(state, torch.get_rng_state())
    with poutine.trace(param_only=True) as trace:
        guide()
    assert all(s["value"].grad is None for s in trace.trace.nodes.values())


def test_signal_grows_with_particles_for_dreg_and_falls_for_iwae():
    # The linear-Gaussian model and the perturbed optimum of Rainforth et al. (2018), section 4.
    dim = 5
    x = torch.randn(8, dim)

    def gaussian(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def encoder(x):
        shift = pyro.param("shift", 0.1 * torch.ones(dim))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + shift, math.sqrt(2 / 3)).to_event(1))

    objectives = {f"{kind.__name__} {k}": kind(k) for kind in (IWAE, DReG) for k in (1, 64)}
    rows = gradient_report(
        gaussian, encoder, objectives, x, num_repeats=120, num_reference=2, **QUIET
    ).rows
    snr = {row.objective: row.signal_to_noise for row in rows}
    assert snr["IWAE 64"] < 0.7 * snr["IWAE 1"]
    assert snr["DReG 64"] > 2 * snr["DReG 1"]


def test_messages():
    with pytest.raises(ValueError, match="`objectives` must hold at least one objective"):
        gradient_report(model, guide, {})
    with pytest.raises(ValueError, match="`num_repeats` must be an integer of at least 2; got 1"):
        gradient_report(model, guide, {"ELBO": ELBO()}, num_repeats=1)
    with pytest.raises(ValueError, match=r"`reference` must name given objectives; got \['x'\]"):
        gradient_report(model, guide, {"ELBO": ELBO()}, reference={"x": ELBO()})
    with pytest.raises(ValueError, match="`guide` must have at least one trainable parameter"):
        gradient_report(model, model, {"ELBO": ELBO()}, progress_bar=False)
