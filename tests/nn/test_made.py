from __future__ import annotations

import pytest
import torch
from torch import nn

from flowvi.nn import MADE

CASES = {
    "natural": (5, (16, 16), 2, 0, None),
    "ordered": (5, (16, 16), 3, 0, (3, 1, 4, 0, 2)),
    "context": (4, (13,), 2, 3, (3, 2, 1, 0)),
    "linear": (4, (), 2, 0, (1, 0, 3, 2)),
    "two": (2, (7, 5, 6), 1, 0, None),
    "one": (1, (6, 6), 3, 2, None),
    "narrow": (6, (3, 2), 2, 0, None),
}


def build(name: str) -> MADE:
    input_dim, hidden, params, context_dim, order = CASES[name]
    made = MADE(input_dim, hidden, params, context_dim, order=order, activation=nn.Tanh)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def context_for(made: MADE, *batch: int) -> torch.Tensor | None:
    return torch.randn(*batch, made.context_dim) if made.context_dim else None


@pytest.mark.parametrize("name", CASES)
def test_jacobian_has_the_order_of_the_variables(name: str) -> None:
    made = build(name)
    context = context_for(made)
    jacobian = torch.func.jacrev(lambda x: made(x, context))(torch.randn(made.input_dim))
    depends = (jacobian != 0).any(1)
    earlier = torch.zeros_like(depends)
    for place, variable in enumerate(made.order):
        earlier[variable, list(made.order[:place])] = True
    if name == "narrow":
        # Fewer units than variables: some dependences are missing, none is added.
        assert not (depends & ~earlier).any()
    else:
        assert torch.equal(depends, earlier)


def test_first_variable_sees_the_context_through_hidden_units() -> None:
    made = build("context")
    context = torch.randn(3, requires_grad=True)
    first = made(torch.randn(4), context)[made.order[0]].sum()
    assert torch.autograd.grad(first, context)[0].all()


def test_single_variable_ignores_its_value() -> None:
    made = build("one")
    context = torch.randn(5, 2)
    torch.testing.assert_close(made(torch.randn(5, 1), context), made(torch.zeros(5, 1), context))


@pytest.mark.parametrize("name", CASES)
def test_sorted_layers_give_the_same_output(name: str) -> None:
    made = build(name)
    x, context = torch.randn(9, made.input_dim), context_for(made, 9)
    h = made.sort(x, 1).T
    for level, (weight, bias) in enumerate(made.sorted_layers(context)):
        h = weight @ (h.tanh() if level else h) + bias
    got = made.unsort(h.unflatten(0, (made.input_dim, made.param_dim)), 0).permute(2, 0, 1)
    torch.testing.assert_close(got, made(x, context), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_starts_mark_what_each_variable_makes_known(name: str) -> None:
    made = build(name)
    layers = made.sorted_layers(context_for(made, 1))
    for level, (weight, _) in enumerate(layers):
        rows, columns = made.starts[level + 1], made.starts[level]
        assert rows[-1] == weight.shape[0]
        for i in range(made.input_dim):
            known = columns[i] if level == 0 else columns[i + 1]
            assert not weight[rows[i] : rows[i + 1], known:].any()


def test_by_columns_changes_only_the_storage() -> None:
    made = MADE(4, (9,), 5, by_columns=True, zero_last=False)
    rows = MADE(4, (9,), 5)
    rows.load_state_dict(made.state_dict())
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(made(x), rows(x), rtol=0, atol=1e-12)


def test_bad_order() -> None:
    with pytest.raises(ValueError, match=r"`order` must be a permutation of range\(3\); got \["):
        MADE(3, (8,), 2, order=(0, 1, 1))


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="`input_dim` must be at least 1; got 0."):
        MADE(0, (8,), 2)
