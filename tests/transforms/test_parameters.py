from __future__ import annotations

import torch

from flowvi.transforms._parameters import RawParameters

START = {"scalar": torch.tensor(0.5), "vector": torch.ones(3), "matrix": torch.randn(2, 3)}


def test_starts_at_the_given_values_for_every_context() -> None:
    for hidden_dims in ((), (4,)):
        raw = RawParameters(START, context_dim=2, hidden_dims=hidden_dims).double()
        for value, start in zip(raw(torch.randn(5, 2)), START.values(), strict=True):
            torch.testing.assert_close(value, start.double().expand(5, *start.shape))


def test_the_context_moves_every_entry_of_every_tensor() -> None:
    raw = RawParameters(START, context_dim=2, hidden_dims=(4,))
    with torch.no_grad():
        for parameter in raw.parameters():
            parameter.normal_()
    first, second = raw(torch.randn(2)), raw(torch.randn(2))
    for a, b, start in zip(first, second, START.values(), strict=True):
        assert a.shape == start.shape
        assert (a != b).all()


def test_without_a_context_the_parameters_come_back_themselves() -> None:
    raw = RawParameters(START)
    assert raw.network is None
    assert [id(v) for v in raw()] == [id(p) for p in raw.parameters()]
