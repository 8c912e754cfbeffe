from __future__ import annotations

import copy
import math

import pytest
import torch

from flowvi.distributions import Flow
from flowvi.transforms import ActNorm, Direction


def assert_standardised(rows: torch.Tensor) -> None:
    torch.testing.assert_close(rows.mean(0), torch.zeros(rows.shape[-1]), rtol=0, atol=1e-12)
    torch.testing.assert_close(rows.std(0), torch.ones(rows.shape[-1]), rtol=0, atol=1e-12)


def batch() -> torch.Tensor:
    return torch.randn(200, 3) * torch.tensor([0.1, 1.0, 30.0]) + torch.tensor([5.0, 0.0, -2.0])


@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.INVERSE])
def test_explicit_initialisation(direction: Direction) -> None:
    norm, data = ActNorm(3), batch()
    assert torch.equal(norm(data), data)
    norm.initialize(data, direction)
    assert_standardised(norm(data) if direction is Direction.FORWARD else norm.inv(data))


@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.INVERSE])
def test_lazy_initialisation_happens_once_and_in_training_mode(direction: Direction) -> None:
    norm, data = ActNorm(3, lazy=True), batch()
    go = norm.call_and_ladj if direction is Direction.FORWARD else norm.inverse_and_ladj
    norm.eval()
    assert torch.equal(go(data)[0], data)
    norm.train()
    assert not norm.initialized
    value, ladj = go(data)
    assert_standardised(value)
    assert norm.initialized
    scales = data.std(0).log().sum()
    torch.testing.assert_close(ladj[0], -scales)
    before = copy.deepcopy(norm.state_dict())
    go(2 * data + 1)
    torch.testing.assert_close(dict(norm.state_dict()), dict(before), rtol=0, atol=0)


def test_initialisation_is_saved_and_restored() -> None:
    norm, data = ActNorm(3), batch()
    norm.initialize(data)
    loaded = ActNorm(3, lazy=True)
    loaded.load_state_dict(norm.state_dict())
    expected = norm(data)
    assert loaded.initialized
    assert torch.equal(loaded(data), expected)
    assert torch.equal(copy.deepcopy(loaded)(data), expected)


def test_an_untouched_state_leaves_the_lazy_call_pending() -> None:
    loaded = ActNorm(3, lazy=True)
    loaded.load_state_dict(ActNorm(3).state_dict())
    assert_standardised(loaded(batch()))


def test_lazy_flow_scores_what_it_drew() -> None:
    q = Flow(ActNorm(2, lazy=True))()
    y = q.rsample((50,))
    assert_standardised(y.detach())
    torch.testing.assert_close(q.log_prob(y), Flow(q.transform)().log_prob(y.detach().clone()))


def test_a_constant_dimension_keeps_its_scale() -> None:
    norm = ActNorm(1)
    norm.initialize(torch.full((4, 1), 7.0))
    assert norm.loc.tolist() == [7.0]
    assert norm.log_scale.tolist() == [0.0]


def test_bad_batches_are_refused() -> None:
    norm = ActNorm(2)
    with pytest.raises(ValueError, match=r"`batch` must end with size 2 \(input_dim\)"):
        norm.initialize(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="`batch` must have at least 2 rows; got 1"):
        norm.initialize(torch.zeros(2))
    with pytest.raises(ValueError, match="`batch` must be finite; got 2 entries"):
        norm.initialize(torch.tensor([[0.0, math.nan], [math.inf, 1.0]]))
    with pytest.raises(ValueError, match="`direction` must be FORWARD or INVERSE; got BOTH"):
        norm.initialize(torch.randn(5, 2), Direction.BOTH)
    assert not norm.initialized
    with pytest.raises(ValueError, match="`batch` must have at least 2 rows; got 1"):
        ActNorm(2, lazy=True)(torch.zeros(2))
