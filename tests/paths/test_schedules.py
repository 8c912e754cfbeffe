"""Schedules: derivatives, order, inverse."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from registry import SCHEDULES

from flowvi.paths import (
    AlphaSigma,
    LearnedMonotone,
    Linear,
    LinearLogSNR,
    SubVariancePreserving,
    VarianceExploding,
    VariancePreserving,
    VariancePreservingCosine,
)

NAMES = sorted(SCHEDULES)


@pytest.fixture(params=NAMES)
def schedule(request):
    made = SCHEDULES[request.param].make()
    # Away from the start.
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made


def times(number: int = 201) -> torch.Tensor:
    return torch.linspace(0.005, 0.995, number)


def test_derivatives_are_those_of_the_values(schedule):
    t = times()
    h = 1e-5
    values, above, below = schedule(t), schedule(t + h), schedule(t - h)
    for name in ("alpha", "sigma"):
        difference = (getattr(above, name) - getattr(below, name)) / (2 * h)
        got = getattr(values, f"d_{name}")
        torch.testing.assert_close(got, difference, rtol=1e-5, atol=1e-7)
    by_jvp = torch.func.jvp(
        lambda t: (schedule(t).alpha, schedule(t).sigma), (t,), (torch.ones_like(t),)
    )[1]
    torch.testing.assert_close(values.d_alpha, by_jvp[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(values.d_sigma, by_jvp[1], rtol=1e-9, atol=1e-12)


def test_log_snr_agrees_with_the_values_and_increases(schedule):
    t = times()
    values = schedule(t)
    torch.testing.assert_close(schedule.log_snr(t), (values.alpha / values.sigma).square().log())
    torch.testing.assert_close(values.log_snr, schedule.log_snr(t))
    slope = torch.func.jvp(schedule.log_snr, (t,), (torch.ones_like(t),))[1]
    torch.testing.assert_close(values.d_log_snr, slope, rtol=1e-8, atol=1e-8)
    assert (slope > 0).all()
    assert (schedule.log_snr(t).diff() > 0).all()


def test_time_of_inverts(schedule):
    t = times(37)
    torch.testing.assert_close(schedule.time_of(schedule.log_snr(t)), t, rtol=0, atol=1e-9)


def test_time_of_carries_the_gradient(schedule):
    level = schedule.log_snr(torch.tensor([0.2, 0.7])).detach().requires_grad_()
    t = schedule.time_of(level)
    torch.testing.assert_close(
        torch.autograd.grad(t.sum(), level, retain_graph=True)[0], 1 / schedule(t).d_log_snr
    )
    for p in schedule.parameters():
        (got,) = torch.autograd.grad(t[1], p, retain_graph=True)
        index = got.abs().argmax()
        h = 1e-6
        shifted = []
        for step in (h, -h):
            other = copy.deepcopy(schedule)
            with torch.no_grad():
                dict(zip(schedule.parameters(), other.parameters(), strict=True))[p].view(-1)[
                    index
                ] += step
                shifted.append(other.time_of(level)[1])
        want = (shifted[0] - shifted[1]) / (2 * h)
        torch.testing.assert_close(got.view(-1)[index], want, rtol=1e-4, atol=1e-7)


def test_shape_dtype_and_copies(schedule):
    single = copy.deepcopy(schedule).float()
    t = torch.rand(2, 3, 1, dtype=torch.float32) * 0.9 + 0.05
    values = single(t)
    for part in (values.alpha, values.sigma, values.d_alpha, values.d_sigma, single.log_snr(t)):
        assert part.shape == t.shape
        assert part.dtype == torch.float32
        assert part.isfinite().all()
    assert single.time_of(t).dtype == torch.float32
    torch.testing.assert_close(
        values.alpha.double(), schedule(t.double()).alpha, rtol=1e-4, atol=1e-5
    )
    if not isinstance(schedule, AlphaSigma):
        again = pickle.loads(pickle.dumps(schedule))
        torch.testing.assert_close(again.log_snr(times()), schedule.log_snr(times()))


def test_meta_device(schedule):
    schedule = schedule.to("meta")
    t = torch.empty(3, device="meta", requires_grad=True)
    (schedule(t).d_log_snr.sum() + schedule.time_of(t).sum()).backward()
    schedule.check()
    assert t.grad.is_meta


@pytest.mark.parametrize(
    ("make", "ends"),
    [
        (lambda: VariancePreservingCosine(-7.0, 9.0), (-7.0, 9.0)),
        (lambda: LinearLogSNR(-7.0, 9.0), (-7.0, 9.0)),
        (lambda: LearnedMonotone(8, -7.0, 9.0), (-7.0, 9.0)),
        (lambda: VarianceExploding(0.1, 20.0), (-5.991464547107982, 4.605170185988091)),
    ],
)
def test_ends(make, ends):
    torch.testing.assert_close(make().log_snr(torch.tensor([0.0, 1.0])), torch.tensor(ends))


def test_formulas_of_the_literature():
    t = torch.tensor([0.1, 0.6, 0.9])
    s = 1 - t
    rate = 0.1 + 19.9 * s
    # The signal decays at half the rate: d log(alpha) / ds = -rate / 2, by quadrature.
    grid = torch.linspace(0, 1, 2001).unsqueeze(-1) * s
    integral = torch.trapezoid(0.1 + 19.9 * grid, grid, dim=0)
    alpha = torch.exp(-integral / 2)
    vp, sub = VariancePreserving(), SubVariancePreserving()
    torch.testing.assert_close(vp(t).alpha, alpha)
    torch.testing.assert_close(vp(t).sigma, (1 - alpha**2).sqrt())
    torch.testing.assert_close(sub(t).alpha, alpha)
    torch.testing.assert_close(sub(t).sigma, 1 - alpha**2)
    torch.testing.assert_close(vp(t).d_alpha, alpha * rate / 2)
    values = LinearLogSNR(-6.0, 6.0)(t)
    torch.testing.assert_close(values.alpha**2, torch.sigmoid(12 * t - 6))
    cosine = VariancePreservingCosine(-60.0, 60.0)(t)
    torch.testing.assert_close(cosine.alpha, torch.sin(torch.pi * t / 2))
    linear = Linear()(t)
    torch.testing.assert_close(linear.alpha + linear.sigma, torch.ones(3))


def test_float32_keeps_both_ends_of_a_wide_range():
    schedule = LinearLogSNR(-40.0, 40.0).float()
    values = schedule(torch.tensor([0.0, 1.0], dtype=torch.float32))
    want = torch.tensor([-40.0, 40.0], dtype=torch.float32)
    torch.testing.assert_close(values.log_snr, want, rtol=1e-5, atol=1e-5)


def test_learned_starts_near_linear():
    t = times()
    gap = LearnedMonotone(32, -5.0, 5.0).log_snr(t) - LinearLogSNR(-5.0, 5.0).log_snr(t)
    assert gap.abs().max() < 0.1


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LinearLogSNR(3.0, 3.0), "`log_snr_max` must be above `log_snr_min`.*3.0 and 3.0"),
        (lambda: VariancePreservingCosine(1.0, 0.0), "`log_snr_max` must be above"),
        (lambda: LearnedMonotone(0), "`num_units` must be at least 1; got 0"),
        (lambda: VarianceExploding(1.0, 0.5), "`sigma_max` must be above `sigma_min`"),
        (lambda: VariancePreserving(0.0, 1.0), "`rate_max` must be above `rate_min`"),
        (lambda: SubVariancePreserving(2.0, 1.0), "`rate_max` must be above `rate_min`"),
        (lambda: AlphaSigma(lambda t: 1 - t, lambda t: t), "`schedule` must have an increasing"),
        (
            lambda: AlphaSigma(lambda t: 1 + (9 * t).sin(), lambda t: 1 - t / 2),
            "increasing log signal-to-noise ratio.*near t = ",
        ),
        (lambda: AlphaSigma(lambda t: t - 0.5, lambda t: 1 - t), "increasing.*got nan and then"),
    ],
)
def test_bad_schedules_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
