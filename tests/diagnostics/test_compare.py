from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal

from flowvi.diagnostics import Comparison, ComparisonRow, compare
from flowvi.diagnostics._table import number, text_table, with_error
from flowvi.diagnostics.importance import Bound
from flowvi.guides import AutoPlateFlow
from flowvi.objectives import CUBO, ELBO, IWAE, STL, LinearSchedule, Tempered

QUICK = {"num_gradients": 4, "num_draws": 200, "iw_particles": (10,), "progress_bar": False}


def model(y):
    """Conjugate: z ~ N(0, 1), y ~ N(z, 1), so log p(y) is N(0, 2)."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=y)


Y = torch.tensor(1.5, dtype=torch.float64)
LOG_EVIDENCE = -0.5 * math.log(4 * math.pi) - 1.5**2 / 4


def exact(_):
    def guide(y):
        pyro.param("unused", torch.ones(()))
        pyro.sample("z", dist.Normal(y / 2, math.sqrt(0.5)))

    return guide


@pytest.fixture(scope="module")
def result():
    torch.set_default_dtype(torch.float64)
    guides = {"normal": AutoNormal, "point": AutoDelta, "broken": lambda m: m.nothing}
    objectives = {"ELBO": ELBO(8), "STL": STL(8), "CUBO": CUBO(8)}
    return compare(
        model, guides, objectives, Y, num_evaluations=320, log_evidence=LOG_EVIDENCE, **QUICK
    )


def test_every_pair_is_a_row_and_refused_ones_say_why(result):
    assert [(r.guide, r.objective) for r in result][3:6] == [
        ("point", "ELBO"),
        ("point", "STL"),
        ("point", "CUBO"),
    ]
    assert len(result.rows) == 9
    assert all("AutoDelta is a point" in r.failure for r in result.rows[3:6])
    assert all(r.failure.startswith("AttributeError") for r in result.rows[6:])
    assert not any(r.failure for r in result.rows[:3])


def test_trained_guides_are_measured_against_the_exact_evidence(result):
    for row in result.rows[:3]:
        assert row.num_steps == 40
        assert row.milliseconds > 0
        # A warm start at the exact posterior: the bounds are the evidence, k says trust.
        assert row.elbo.value == pytest.approx(LOG_EVIDENCE, abs=0.02)
        assert row.iw_elbo[10].value == pytest.approx(LOG_EVIDENCE, abs=0.02)
        assert row.bound.value == pytest.approx(LOG_EVIDENCE, abs=0.05)
        assert row.trusted
    elbo, stl, cubo = result.rows[:3]
    assert stl.gradient_sd < 0.2 * elbo.gradient_sd
    assert cubo.is_upper_bound
    assert not elbo.is_upper_bound
    assert result.reference == (LOG_EVIDENCE, "log p(x)")


def test_text_and_frame(result):
    text = str(result)
    assert "320 evaluations of the model (particles x steps)" in text
    assert f"log p(x) = {LOG_EVIDENCE:.3f}" in text
    assert "- point with ELBO, STL, CUBO: NotImplementedError: A comparison needs" in text
    assert max(map(len, text.split("\nRefused")[0].splitlines())) < 140
    frame = result.to_dataframe()
    assert frame.index.names == ["guide", "objective"]
    assert frame.loc[("normal", "STL"), "num_steps"] == 40
    assert {"elbo", "elbo_se", "iw_elbo_10", "pareto_k", "gradient_sd"} <= set(frame.columns)
    assert frame.loc[("broken", "ELBO"), "failure"].startswith("AttributeError")


def test_join_puts_parts_together(result):
    parts = [Comparison((row,), result.budget, result.log_evidence) for row in result.rows]
    assert Comparison.join(parts) == result
    with pytest.raises(ValueError, match="`parts` must agree in budget and evidence"):
        Comparison.join([result, Comparison((), "5 steps")])
    with pytest.raises(ValueError, match="`parts` must hold at least one comparison"):
        Comparison.join([])


def test_same_seed_gives_the_same_numbers_and_leaves_the_random_state():
    state = torch.get_rng_state()
    found = [
        compare(model, {"normal": AutoNormal}, {"ELBO": ELBO(4)}, Y, num_steps=3, **QUICK).rows[0]
        for _ in range(2)
    ]
    assert found[0].elbo == found[1].elbo
    assert found[0].gradient_sd == found[1].gradient_sd
    assert torch.equal(state, torch.get_rng_state())
    assert not dict(pyro.get_param_store().items())


def test_without_training_guides_are_taken_as_they_are():
    row = compare(model, {"exact": exact}, {"IWAE": IWAE(4)}, Y, train=False, **QUICK).rows[0]
    assert not row.failure
    assert row.num_steps == 0
    # Every draw of the exact posterior has the weight p(y).
    assert row.elbo.value == pytest.approx(LOG_EVIDENCE, abs=1e-10)
    assert row.bound.value == pytest.approx(LOG_EVIDENCE, abs=1e-10)


def test_subsampled_model_has_bounds_but_no_pareto_k():
    def grouped(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        with pyro.plate("item", len(x), subsample_size=5) as index:
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[index])

    objectives = {"ELBO": ELBO(2), "tempered": Tempered(2, beta=LinearSchedule(2, start=0.5))}
    rows = compare(
        grouped,
        {"plates": AutoPlateFlow},
        objectives,
        torch.randn(20),
        num_steps=2,
        **{**QUICK, "num_draws": 20},
    ).rows
    for row in rows:
        assert not row.failure
        assert math.isnan(row.pareto_k)
        assert math.isfinite(row.elbo.value)
        assert "must have one scale" in row.notes[-1]


def test_time_budget():
    row = compare(
        model, {"normal": AutoNormal}, {"ELBO": ELBO(4)}, Y, max_seconds=0.2, start=False, **QUICK
    ).rows[0]
    assert not row.failure
    assert row.num_steps >= 1


def test_messages():
    one = ({"normal": AutoNormal}, {"ELBO": ELBO(4)}, Y)
    with pytest.raises(ValueError, match="`num_steps` or `max_seconds` must be given alone"):
        compare(model, *one, num_steps=3, max_seconds=1.0)
    with pytest.raises(ValueError, match="`num_steps` must be positive; got 0"):
        compare(model, *one, num_steps=0)
    with pytest.raises(ValueError, match="`guides` must be a mapping with at least one entry"):
        compare(model, {}, {"ELBO": ELBO()}, Y)
    with pytest.raises(ValueError, match="`iw_particles` must be integers from 1 to half of"):
        compare(model, *one, num_draws=100, iw_particles=(60,))
    with pytest.raises(ValueError, match="`num_gradients` must be at least 2; got 1"):
        compare(model, *one, num_gradients=1)


def test_reference_without_evidence_is_the_highest_trusted_bound():
    rows = (
        ComparisonRow("a", "x", 1, elbo=Bound(-3.0, 0.1), trusted=True),
        ComparisonRow("a", "y", 1, elbo=Bound(-1.0, 0.1)),
    )
    assert Comparison(rows, "").reference == (-3.0, "highest bound")


def test_numbers_in_text():
    assert [number(v) for v in (1.23456, 123456.0, 0.00012, 0.0, math.nan, math.inf)] == [
        "1.23", "1.23e+05", "1.20e-04", "0", "-", "inf"
    ]  # fmt: skip
    assert with_error(-531.3017, 0.0123) == "-531.302±0.012"
    assert with_error(-531.3017, 0.3) == "-531.3±0.3"
    assert with_error(-5.7e9, 3.0) == "-5.70e+09"
    assert with_error(-3.0, math.nan) == "-3.000"
    assert text_table(["a", "b"], [["x", "1"]]) == "a  b\n-  -\nx  1"
