from __future__ import annotations

import math

import pytest
import torch

from flowvi.objectives import CyclicalSchedule, GeometricSchedule, LinearSchedule
from flowvi.objectives.schedules import value_at

STEPS = torch.arange(0, 130)


def test_linear_values():
    values = LinearSchedule(100, start=0.2, end=0.7)(STEPS)
    for step, value in enumerate(values.tolist()):
        assert value == pytest.approx(0.2 + 0.5 * min(step / 100, 1.0), abs=1e-14)
    assert values[100] == 0.7


def test_geometric_values():
    values = GeometricSchedule(100, start=0.01)(STEPS)
    for step, value in enumerate(values.tolist()):
        assert math.log10(value) == pytest.approx(-2 + 2 * min(step / 100, 1.0), abs=1e-13)
    assert values[100] == 1.0


def test_cyclical_values():
    # Four cycles of 25 steps, of which the first 10 rise.
    values = CyclicalSchedule(100, num_cycles=4, proportion=0.4)(STEPS)
    for step, value in enumerate(values.tolist()):
        expected = min(step % 25 / 10, 1.0) if step < 100 else 1.0
        assert value == pytest.approx(expected, abs=1e-13)


def test_cyclical_values_where_cycles_do_not_divide_the_steps():
    values = CyclicalSchedule(10, num_cycles=3, proportion=1.0)(torch.arange(10))
    expected = [(3 * t / 10) % 1 for t in range(10)]
    torch.testing.assert_close(values, torch.tensor(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_follows_the_dtype_and_device_of_the_loss(dtype):
    like = torch.zeros((), dtype=dtype)
    value = value_at(LinearSchedule(10), torch.tensor(5), like)
    assert value.dtype == dtype
    assert value_at(0.3, torch.tensor(5), like) == 0.3
    meta = value_at(CyclicalSchedule(10), torch.zeros((), device="meta"), like.to("meta"))
    assert meta.device.type == "meta"


@pytest.mark.parametrize("schedule", [LinearSchedule, GeometricSchedule, CyclicalSchedule])
@pytest.mark.parametrize("num_steps", [0, -3, 2.5, True])
def test_bad_length(schedule, num_steps):
    message = f"`num_steps` must be an integer of at least 1; got {num_steps!r}"
    with pytest.raises(ValueError, match=message):
        schedule(num_steps)


def test_bad_arguments():
    with pytest.raises(ValueError, match="`start` must be a finite number of at least 0; got -1"):
        LinearSchedule(10, start=-1)
    with pytest.raises(ValueError, match="`end` must be a finite number of at least 0; got nan"):
        LinearSchedule(10, end=math.nan)
    with pytest.raises(ValueError, match="`start` must be positive; got 0"):
        GeometricSchedule(10, start=0)
    with pytest.raises(ValueError, match="`num_cycles` must be an integer from 1 to `num_steps`"):
        CyclicalSchedule(10, num_cycles=11)
    with pytest.raises(ValueError, match=r"`proportion` must be in \(0, 1\]; got 0"):
        CyclicalSchedule(10, proportion=0)
