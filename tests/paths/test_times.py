"""Random times: density, weights, even spread."""

from __future__ import annotations

import math

import pytest
import torch

from flowvi.paths import DensityTimes, LateTimes, UniformTimes

LAWS = {
    "uniform": lambda **kw: UniformTimes(0.5, 2.5, **kw),
    "late": lambda **kw: LateTimes(0.5, 2.5, **kw),
    "density": lambda **kw: DensityTimes(lambda t: 1 / t**2, 0.5, 2.5, num_bins=40, **kw),
}


def h(t: torch.Tensor) -> torch.Tensor:
    return 1 / t**2 + (5 * t).sin()


INTEGRAL = (1 / 0.5 - 1 / 2.5) + (math.cos(2.5) - math.cos(12.5)) / 5


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("name", LAWS)
def test_weighted_mean_is_the_integral(name, stratified):
    law = LAWS[name](stratified=stratified)
    means = torch.stack(
        [(h(t) * w).mean() for t, w in (law.draw((50,), torch.empty(0)) for _ in range(2000))]
    )
    # 4.5 standard errors of 2000 repetitions.
    assert abs(means.mean() - INTEGRAL) < 4.5 * means.std() / 2000**0.5
    assert (means.std() < 0.12) == stratified


@pytest.mark.parametrize("name", LAWS)
def test_each_item_alone_has_the_density(name):
    law = LAWS[name]()
    draws = [law.draw((4,), torch.empty(0)) for _ in range(4000)]
    t, w = (torch.stack(x) for x in zip(*draws, strict=True))
    for i in range(4):
        value = h(t[:, i]) * w[:, i]
        assert abs(value.mean() - INTEGRAL) < 4.5 * value.std() / 4000**0.5
    torch.testing.assert_close(1 / w[:, 0], density(name, t[:, 0]), rtol=0.1, atol=0)


def density(name: str, t: torch.Tensor) -> torch.Tensor:
    if name == "late":
        return 1 / (8 * (2.5 - t)).sqrt()
    return torch.full_like(t, 0.5) if name == "uniform" else 1 / (1.6 * t**2)


def test_times_of_one_item_are_spread_over_the_interval():
    t, _ = UniformTimes().draw((4, 3, 5), torch.empty(0))
    gaps = t.sort(0).values.diff(dim=0)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 0.25))
    flat = t.flatten().sort().values.diff()
    torch.testing.assert_close(flat, torch.full_like(flat, 1 / 60))


def test_sorted_items_have_all_times():
    draws = torch.stack([UniformTimes().draw((2, 200), torch.empty(0))[0] for _ in range(500)])
    # The first half of the items, which may be one class, as a random half of the grid would.
    means = draws[:, :, :100].mean((1, 2))
    assert means.mean() == pytest.approx(0.5, abs=0.01)
    assert means.std() < 0.03
    # Two times of one item stay half the interval apart.
    assert ((draws[:, 0] - draws[:, 1]).abs() - 0.5).abs().max() < 1e-6


def test_importance_lowers_the_variance_of_a_peaked_integrand():
    def peaked(t):
        return 1 / (0.01 + t) ** 2

    errors = []
    for law in (
        UniformTimes(stratified=False),
        DensityTimes(peaked, stratified=False, num_bins=2000),
    ):
        t, w = law.draw((20_000,), torch.empty(0))
        errors.append((peaked(t) * w).std() / (peaked(t) * w).mean())
    assert errors[1] < 0.05 * errors[0]


def test_dtype_range_and_meta():
    for law in (UniformTimes(), DensityTimes(lambda t: 1 + t)):
        t, w = law.float().draw((100_000,), torch.empty(0, dtype=torch.float32))
        assert t.dtype == w.dtype == torch.float32
        assert 0 <= t.min()
        assert t.max() <= 1
        assert law.to("meta").draw((3,), torch.empty(0, device="meta"))[0].is_meta


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: UniformTimes(1.0, 1.0), "`high` must be above `low`.*got 1.0 and 1.0"),
        (lambda: DensityTimes(lambda t: t - 0.5), "`density` must be positive and finite"),
        (lambda: DensityTimes(lambda t: 1.0 + t[:2]), r"one number for each time.*shape \(2,\)"),
        (lambda: DensityTimes(lambda t: t, num_bins=0), "`num_bins` must be at least 1; got 0"),
    ],
)
def test_bad_arguments_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_late_times_never_round_to_the_last():
    times, weights = LateTimes().place(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float32))
    assert times[0] == 0
    assert times[2] < 1
    assert (weights > 0).all()
