from __future__ import annotations

import pytest
import torch
from torch import nn

from flowvi.nn import MLP


def randomise(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def test_equals_a_plain_stack_with_the_context_appended() -> None:
    mlp = randomise(MLP(3, (7, 5), 4, context_dim=2, activation=nn.Tanh))
    x, context = torch.randn(6, 3), torch.randn(6, 2)
    first = torch.cat([mlp.layers[0].weight, mlp.context_layer.weight], 1)
    h = torch.cat([x, context], 1) @ first.T + mlp.layers[0].bias
    h = h.tanh() @ mlp.layers[1].weight.T + mlp.layers[1].bias
    expected = h.tanh() @ mlp.layers[2].weight.T + mlp.layers[2].bias
    torch.testing.assert_close(mlp(x, context), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("context_batch", [(), (4,), (7, 1)])
def test_context_broadcasts(context_batch: tuple[int, ...]) -> None:
    mlp = randomise(MLP(3, (8,), 2, context_dim=2))
    x, context = torch.randn(7, 4, 3), torch.randn(*context_batch, 2)
    full = context.expand(7, 4, 2)
    torch.testing.assert_close(mlp(x, context), mlp(x, full), rtol=0, atol=1e-12)


def test_output_starts_at_zero_only_when_asked() -> None:
    x, context = torch.randn(5, 3), torch.randn(5, 2)
    for hidden in ((), (8,)):
        assert not MLP(3, hidden, 2, context_dim=2)(x, context).any()
        assert MLP(3, hidden, 2, context_dim=2, zero_last=False)(x, context).all()


@pytest.mark.parametrize("batch", [(), (0,), (5,), (2, 3)])
def test_by_columns_changes_only_the_storage(batch: tuple[int, ...]) -> None:
    rows = randomise(MLP(3, (8,), 6, context_dim=2))
    columns = MLP(3, (8,), 6, context_dim=2, by_columns=True)
    columns.load_state_dict(rows.state_dict())
    x, context = torch.randn(*batch, 3), torch.randn(*batch, 2)
    torch.testing.assert_close(columns(x, context), rows(x, context), rtol=0, atol=1e-12)
    assert columns(x, context).movedim(-1, 0).is_contiguous()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.SiLU])
@pytest.mark.parametrize("by_columns", [False, True])
def test_pullback_equals_autograd(activation: type[nn.Module], by_columns: bool) -> None:
    mlp = MLP(3, (8, 5), 4, context_dim=2, activation=activation, by_columns=by_columns)
    randomise(mlp)
    x, context = torch.randn(6, 3, requires_grad=True), torch.randn(6, 2)
    grad = torch.randn(6, 4)
    out, pull = mlp.forward_with_pullback(x, context)
    expected = torch.autograd.grad(mlp(x, context), x, grad)[0]
    torch.testing.assert_close(out, mlp(x, context), rtol=0, atol=0)
    torch.testing.assert_close(pull(grad), expected, rtol=0, atol=1e-12)
    assert not pull(grad).requires_grad


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, (4,), 2, 0), r"`input_dim` must be at least 1; got 0."),
        ((3, (4,), 0, 0), r"`output_dim` must be at least 1; got 0."),
        ((3, (4, 0), 2, 0), r"`hidden_dims` must all be at least 1; got \(4, 0\)."),
        ((3, (4,), 2, -1), r"`context_dim` must be a non-negative integer; got -1."),
    ],
)
def test_bad_sizes(sizes: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLP(*sizes)
