"""Vector fields: divergence and gradient against autograd, start, shapes, errors."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from flowvi.nn import (
    ConcatSquashField,
    FourierTime,
    FunctionField,
    GatedField,
    MLPField,
    PotentialField,
    VectorField,
)

LAYERED = [MLPField, ConcatSquashField, GatedField]
OPTIONS = {
    "": (0, {}),
    ", softplus": (0, {"activation": nn.Softplus}),
    ", context": (2, {}),
    ", low rank": (2, {"low_rank": 2, "hyper_dims": (4,)}),
}
FIELDS = {
    f"{kind.__name__}, {len(hidden)} hidden{label}": partial(kind, 3, hidden, context, **options)
    for kind in LAYERED
    for hidden in ((), (5,), (5, 4), (5, 4, 6))
    for label, (context, options) in OPTIONS.items()
}
FIELDS["GatedField, 1 hidden, quadratic"] = partial(
    GatedField, 3, (5,), activation=nn.Identity, gate=nn.Identity
)
FIELDS["GatedField, 2 hidden, softplus gate"] = partial(GatedField, 3, (5, 4), gate=nn.Softplus)
FIELDS |= {
    f"PotentialField, {layers} layers, context {context}": partial(
        PotentialField, 3, 5, context, num_layers=layers, rank=2
    )
    for layers in (1, 2, 3)
    for context in (0, 2)
}
every = pytest.mark.parametrize("name", FIELDS)


def make(name: str, std: float = 1.0) -> VectorField:
    field = FIELDS[name]()
    with torch.no_grad():
        for p in field.parameters():
            p.add_(std * torch.randn_like(p))
    return field


def context_of(field: VectorField, *batch: int) -> Tensor | None:
    return torch.randn(*batch, field.context_dim) if field.context_dim else None


@every
def test_divergence_is_the_trace_of_the_jacobian(name):
    field = make(name)
    x, context = torch.randn(6, 3), context_of(field, 6)
    t = torch.rand(())
    velocity, divergence = field.value_and_divergence(t, x, context)
    for i in range(6):
        own = None if context is None else context[i]
        jacobian = torch.autograd.functional.jacobian(lambda x, own=own: field(t, x, own), x[i])
        torch.testing.assert_close(divergence[i], jacobian.trace(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(velocity, field(t, x, context), rtol=1e-12, atol=1e-12)


@every
def test_starts_at_rest_and_every_parameter_learns(name):
    field = FIELDS[name]()
    x, context = torch.randn(6, 3), context_of(field, 6)
    velocity, divergence = field.value_and_divergence(0.3, x, context)
    assert not velocity.any()
    assert not divergence.any()
    field = make(name, 0.3)
    velocity, divergence = field.value_and_divergence(0.3, x, context)
    (velocity.square().sum() + divergence.sum()).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in field.parameters())


@every
def test_batches_broadcast_and_times_may_differ_by_row(name):
    field = make(name)
    x, context, t = torch.randn(4, 5, 3), context_of(field, 5), torch.rand(4, 5)
    velocity, divergence = field.value_and_divergence(t, x, context)
    assert velocity.shape == (4, 5, 3)
    assert divergence.shape == (4, 5)
    for i, j in ((0, 0), (3, 4)):
        own = None if context is None else context[j]
        expected = field.value_and_divergence(t[i, j], x[i, j], own)
        torch.testing.assert_close((velocity[i, j], divergence[i, j]), expected)


@every
def test_depends_on_time_and_context(name):
    field = make(name)
    x, context = torch.randn(6, 3), context_of(field, 6)
    assert not torch.allclose(field(0.1, x, context), field(0.9, x, context))
    if field.context_dim:
        assert not torch.allclose(field(0.1, x, context), field(0.1, x, context + 1))


@every
def test_runs_on_meta_and_in_float32(name):
    field = make(name).float()
    context = context_of(field, 6)
    context = None if context is None else context.float()
    outputs = field.value_and_divergence(0.3, torch.randn(6, 3).float(), context)
    assert all(o.dtype == torch.float32 for o in outputs)
    field.to("meta")
    context = None if context is None else context.to("meta")
    x = torch.empty(6, 3, device="meta", dtype=torch.float32)
    outputs = field.value_and_divergence(0.3, x, context)
    sum(o.sum() for o in outputs).backward()
    assert all(o.is_meta for o in outputs)


@pytest.mark.parametrize("name", [n for n in FIELDS if n.startswith("Potential")])
def test_potential_fields_are_minus_the_gradient_of_their_potential(name):
    field = make(name)
    x, context = torch.randn(6, 3, requires_grad=True), context_of(field, 6)
    potential = field.potential(0.4, x, context)
    assert potential.shape == (6,)
    (gradient,) = torch.autograd.grad(potential.sum(), x)
    torch.testing.assert_close(field(0.4, x, context), -gradient, rtol=1e-10, atol=1e-10)


def test_low_rank_updates_are_those_of_one_matrix_per_context():
    field = MLPField(3, (5,), 2, low_rank=2)
    with torch.no_grad():
        for p in field.parameters():
            p.normal_()
    context, x = torch.randn(2), torch.randn(3)
    prepared = field.prepare(context)
    weights = [
        layer.weight + left @ right.t()
        for layer, (left, right) in zip(field.layers, prepared.updates, strict=True)
    ]
    shift = field.embed(torch.tensor(0.2)) + prepared.shift
    hidden = torch.tanh(weights[0] @ x + field.layers[0].bias + shift)
    expected = weights[1] @ hidden + field.layers[1].bias
    torch.testing.assert_close(field(0.2, x, context), expected)


def test_function_fields():
    field = FunctionField(2, lambda t, x, context: t * x + context, 2)
    x, context = torch.randn(5, 2), torch.randn(5, 2)
    torch.testing.assert_close(field(0.5, x, context), 0.5 * x + context)
    with pytest.raises(NotImplementedError, match="no divergence in closed form. Use Exact"):
        field.value_and_divergence(0.5, x, context)
    with pytest.raises(TypeError, match="`function` must be callable; got int"):
        FunctionField(2, 3)
    with pytest.raises(NotImplementedError, match="VectorField has no velocity"):
        VectorField(2)(0.5, x)


def test_features_of_time():
    t = torch.rand(4, 3)
    features = FourierTime(2)(t)
    expected = [f(k * math.pi * t) for f in (torch.cos, torch.sin) for k in (1, 2)]
    torch.testing.assert_close(features, torch.stack(expected, -1))
    with pytest.raises(ValueError, match="`num_frequencies` must be at least 1; got 0"):
        FourierTime(0)


@pytest.mark.parametrize("t", [-0.1, 1.5, math.nan])
def test_times_outside_are_refused(t):
    with pytest.raises(ValueError, match=r"`t` must be a time from 0 .* to 1 .*; got"):
        MLPField(2)(t, torch.zeros(2))


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="`input_dim` must be an integer of at least 1; got 0"):
        MLPField(0)
    with pytest.raises(ValueError, match="`context_dim` must be a non-negative integer; got -1"):
        GatedField(2, (4,), -1)
    with pytest.raises(ValueError, match="`hidden_dims` must all be at least 1"):
        ConcatSquashField(2, (4, 0))
    with pytest.raises(
        ValueError, match="`low_rank` must be 0, or positive with a context; got 2"
    ):
        MLPField(2, low_rank=2)
    with pytest.raises(ValueError, match="`rank` must be an integer of at least 1; got 0"):
        PotentialField(2, rank=0)
