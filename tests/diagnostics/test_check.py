from __future__ import annotations

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from diagnostics_models import DIM, LOC, LOG_Z, SCALE_TRIL, exact_draws, guide_of, model, target
from pyro.infer.autoguide import AutoDelta, AutoNormal

from flowvi.diagnostics import Check, check, elbo_gradient, mode_coverage
from flowvi.diagnostics.shifts import Shifts
from flowvi.diagnostics.verdict import Limits, advice, judge_shifts, weights_usable
from flowvi.infer.draws import guide_draws
from flowvi.infer.modes import Mode
from flowvi.infer.target import Target


def _check(guide, **options):
    return check(model, guide, target=target(), search_modes=False, seed=3, **options)


@pytest.fixture(scope="module")
def good():
    torch.set_default_dtype(torch.float64)
    return _check(guide_of())


def test_posterior_itself_is_good(good):
    assert isinstance(good, Check)
    assert good.good
    assert not good.findings
    assert good.verdict.startswith("The fit looks good")
    assert good.elbo.value == pytest.approx(LOG_Z)
    assert good.ess == pytest.approx(4000)
    assert float(good.shifts.mean.abs().max()) < 0.05
    assert good.gradient is None


def test_table_and_text(good):
    text = str(good)
    for label in ("x[0]", "x[3]"):
        assert label in text
    assert "IW-ELBO, 100 draws" in text
    assert "Pareto k" in text
    assert len(good.table().splitlines()) == DIM + 1


@pytest.mark.parametrize("scale", [0.8, 1.25])
def test_wrong_scale_is_named(scale):
    result = _check(guide_of(scale))
    assert not result.good
    assert {"x[0]", "x[1]", "x[2]", "x[3]"} <= {f.subject for f in result.findings}
    side = "small" if scale < 1 else "large"
    assert f"% too {side}" in result.verdict
    assert result.findings[0].cause == ("narrow" if scale < 1 else "wide")
    assert float(result.shifts.log_sd.mean()) == pytest.approx(math.log(scale), abs=0.05)
    assert result.advice


def test_moved_mean_is_named_with_its_direction():
    def guide():
        loc = LOC - torch.tensor([0.0, 0.3, 0.0, 0.0])  # x[1] has sd 1
        pyro.sample("x", dist.MultivariateNormal(loc, scale_tril=SCALE_TRIL))

    result = _check(guide)
    assert not result.good
    finding = next(f for f in result.findings if f.subject == "x[1]")
    assert "too low" in finding.message
    assert float(result.shifts.mean[1]) == pytest.approx(-0.3, abs=0.05)
    # The parameters that are right are not accused by name.
    accused = {f.subject for f in result.findings}
    assert not accused & {"x[0]", "x[3]"}


def test_lost_correlation_is_found_by_the_gap():
    sd = SCALE_TRIL.square().sum(-1).sqrt()
    result = _check(lambda: pyro.sample("x", dist.Normal(LOC, sd).to_event(1)))
    assert not result.good
    assert "gap" in {f.cause for f in result.findings}
    correlation = SCALE_TRIL @ SCALE_TRIL.T / sd / sd[:, None]
    kl = 0.5 * (torch.trace(torch.linalg.inv(correlation)) - DIM + torch.logdet(correlation))
    assert result.elbo.value == pytest.approx(LOG_Z - float(kl), abs=5 * result.elbo.se)


def test_same_seed_same_check_and_global_state_is_kept():
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first, second = (_check(guide_of(), num_draws=500) for _ in range(2))
    torch.testing.assert_close(first.shifts.mean, second.shifts.mean, rtol=0, atol=0)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_an_error_must_be_clear_among_many():
    # One score of 2.5 in a hundred is noise, in two it is not, and ten of them are not either.
    quiet = [0.3, -1.2, 0.8, -0.4] * 24

    def findings(scores):
        z = torch.tensor(scores)
        none = torch.zeros_like(z)
        shifts = Shifts([f"x{i}" for i in range(len(z))], 0.15 * z, 0.15 + none, none, 1 + none)
        return {finding.subject for finding in judge_shifts(shifts, Limits())}

    assert findings([2.5]) == {"x0"}
    assert not findings([2.5, *quiet])
    assert findings([4.5, *quiet]) == {"x0"}
    assert findings([3.2] * 10 + quiet) == {f"x{i}" for i in range(10)}


def test_false_alarms_stay_at_their_rate():
    z = torch.randn(2000, 40)
    alarms = 0
    for row in z:
        none = torch.zeros(20)
        # Limits of nearly zero leave the test of the noise alone.
        shifts = Shifts(list(map(str, range(20))), row[:20], none + 1, row[20:], none + 1)
        alarms += bool(judge_shifts(shifts, Limits(mean=1e-9, sd=1e-9)))
    assert alarms / 2000 == pytest.approx(0.05, abs=0.02)


def _funnel(scale):
    def program():
        z0 = pyro.sample("z0", dist.Normal(torch.tensor(0.0), scale))
        with pyro.plate("rest", 3):
            pyro.sample("z", dist.Normal(torch.zeros_like(z0), (0.5 * z0).exp()))

    return program


def test_heavy_tails_are_compared_in_their_centre():
    result = check(_funnel(3.0), _funnel(2.97), seed=0, search_modes=False)
    # The sds of z differ by 4 %, in rare draws only, which 4000 draws do not show.
    assert result.heavy == ("z[0]", "z[1]", "z[2]")
    assert result.good
    assert "Tails of 3 parameters (z[0], z[1], z[2]) are too heavy" in result.verdict
    assert float(result.shifts.log_sd.abs().max()) < 0.05
    wide = check(_funnel(3.0), _funnel(3.6), seed=0, search_modes=False)
    assert not wide.good
    assert wide.heavy


def test_two_fits_that_disagree():
    result = _check(guide_of(), other=guide_of(shift=0.5))
    assert not result.good
    assert {f.cause for f in result.findings} == {"disagreement"}
    assert "Two fits disagree about x[0]" in result.verdict
    assert _check(guide_of(), other=guide_of()).good


def _bimodal(weight, distance=8.0):
    def two():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(False))
        left = dist.Normal(-distance / 2, 1.0).log_prob(x).sum(-1) + math.log(weight)
        right = dist.Normal(distance / 2, 1.0).log_prob(x).sum(-1) + math.log(1 - weight)
        pyro.factor("two", torch.logaddexp(left, right))

    return two


def _mixture(weight, distance=8.0):
    def guide():
        centres = torch.tensor([[-distance / 2] * 2, [distance / 2] * 2])
        parts = dist.Normal(centres, 1.0).to_event(1)
        mix = dist.Categorical(torch.tensor([weight, 1 - weight]))
        pyro.sample("x", dist.MixtureSameFamily(mix, parts))

    return guide


def test_missed_mode_is_found_by_the_search():
    two = _bimodal(0.7)
    result = check(two, _mixture(1.0), seed=0)
    assert not result.good
    assert result.findings[0].cause == "missed mode"
    assert "30 % of the posterior and 0 % of the guide" in result.verdict
    assert any("mixture guide" in line for line in result.advice)
    assert not any("resampled" in line for line in result.advice)
    # Neither chains nor weights can see it.
    assert float(result.shifts.mean.abs().max()) < 0.1


def test_covered_modes_are_fine_and_wrong_shares_are_not():
    two = _bimodal(0.7)
    right = check(two, _mixture(0.7), seed=0)
    assert right.good
    assert len(right.modes.modes) == 2
    wrong = check(two, _mixture(0.4), seed=0)
    assert "mode share" in {f.cause for f in wrong.findings}


def test_mode_coverage_against_known_masses():
    two = Target(_bimodal(0.8))
    draws = guide_draws(_mixture(0.5), two, 4000)
    modes = [Mode(torch.full((2,), c), torch.eye(2), 0.0, 0.5) for c in (-4.0, 4.0)]
    coverage = mode_coverage(draws, two, modes)
    torch.testing.assert_close(coverage.weights, torch.tensor([0.8, 0.2]), atol=0.01, rtol=0)
    torch.testing.assert_close(coverage.shares, torch.tensor([0.5, 0.5]), atol=0.03, rtol=0)
    assert coverage.log_evidence == pytest.approx(0.0, abs=0.02)
    assert float(coverage.shift[0]) == pytest.approx(-0.3 / 0.4, abs=0.1)
    # Overlapping modes share the mass between them; nothing is counted twice.
    near = Target(_bimodal(0.5, distance=1.0))
    modes = [Mode(torch.full((2,), c), torch.eye(2), 0.0, 0.5) for c in (-0.5, 0.5)]
    coverage = mode_coverage(guide_draws(_mixture(0.5, 1.0), near, 1000), near, modes)
    assert coverage.log_evidence == pytest.approx(0.0, abs=0.05)
    with pytest.raises(ValueError, match="`modes` must hold at least one mode"):
        mode_coverage(draws, two, [])


@pytest.mark.parametrize(
    ("k", "share", "usable", "text"),
    [
        (0.5, 0.1, True, None),
        (0.9, 0.3, False, "Do not use importance weights.*0.90"),
        (0.9, 0.99, True, "Pareto k 0.90 comes from a few draws in the tails.*99 %"),
    ],
)
def test_when_weights_are_trusted(k, share, usable, text):
    assert weights_usable(k, share) is usable
    lines = advice([], k, share, None)
    assert (not lines) if text is None else re.search(text, lines[0])


def test_minor_mode_found_although_the_guide_fits_it():
    # The search is told of the main mode only, and the guide sits in the other.
    two = _bimodal(0.9)
    mode = Mode(torch.full((2,), -4.0), torch.eye(2), 0.0, 1.0)
    result = check(two, _mixture(0.0), modes=[mode], seed=0)
    assert not result.good
    assert "sits in a minor mode" in result.verdict


def test_a_combination_of_parameters_is_named():
    # Half the spread along the difference of two strongly correlated parameters.
    tril = torch.tensor([[1.0, 0.0], [0.999, 0.0447]])

    def pair():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(False))
        law = dist.MultivariateNormal(torch.zeros(2), scale_tril=tril, validate_args=False)
        pyro.factor("density", law.log_prob(x))

    half = tril * torch.tensor([1.0, 0.5])
    guide = lambda: pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), scale_tril=half))  # noqa: E731
    result = check(pair, guide, search_modes=False, seed=0)
    finding = next(f for f in result.findings if ", " in f.subject)
    assert set(finding.subject.split(", ")) == {"x[0]", "x[1]"}
    assert finding.cause == "narrow"
    assert 47 <= int(re.search(r"(\d+) % too small", finding.message)[1]) <= 53


def test_draws_without_density_are_reported():
    def wall():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x > 2, torch.nan, 0.0))

    result = check(wall, lambda: pyro.sample("x", dist.Normal(0.0, 1.0)), seed=0)
    finding = next(f for f in result.findings if f.cause == "density")
    assert "no finite density at 2." in finding.message


def _normal_normal(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def test_gradient_of_a_started_and_of_an_optimal_guide():
    y = torch.randn(20)
    guide = AutoNormal(_normal_normal)
    guide(y)
    options = {"max_plate_nesting": 1, "num_batches": 10}
    begun = elbo_gradient(_normal_normal, guide, (y,), **options)
    assert not begun.is_noise
    with torch.no_grad():
        precision = 20 + 0.01
        guide.locs.loc.fill_(float(y.sum()) / precision)
        guide.scales.loc = torch.tensor(precision**-0.5)
    ended = elbo_gradient(_normal_normal, guide, (y,), **options)
    assert ended.norm < begun.norm / 3
    assert ended.is_noise
    with pytest.raises(ValueError, match="`num_batches` must be at least 2"):
        elbo_gradient(_normal_normal, guide, (y,), max_plate_nesting=1, num_batches=1)
    result = check(_normal_normal, guide, y, seed=0)
    assert result.good
    assert result.gradient is not None


def test_point_guide_is_not_good():
    y = torch.randn(20)
    guide = AutoDelta(_normal_normal)
    guide(y)
    result = check(_normal_normal, guide, y, seed=0)
    assert not result.good


def test_refusals():
    y = torch.randn(20)

    def subsampled(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=5) as index:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y[index])

    def discrete(y):
        pyro.sample("n", dist.Poisson(3.0))

    def guide(y):
        pyro.sample("loc", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="Plate `data` must not be subsampled"):
        check(subsampled, guide, y)
    with pytest.raises(NotImplementedError, match="`n` is discrete"):
        check(discrete, guide, y)
    with pytest.raises(ValueError, match="`guide` must sample every latent site.*loc"):
        check(_normal_normal, lambda y: None, y)


def test_guide_without_any_density():
    def wall():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x > 2, torch.nan, 0.0))

    with pytest.raises(ValueError, match="`guide` must have draws with a finite density.*got 0"):
        check(wall, lambda: pyro.sample("x", dist.Normal(50.0, 1.0)), search_modes=False)


def test_few_draws_still_give_a_check():
    result = _check(guide_of(), num_draws=30, num_chains=20)
    assert math.isfinite(result.elbo.value)
    assert str(result)
    assert len(exact_draws(5)) == 5
