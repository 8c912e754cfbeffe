"""Splines differentiated by hand and compiled, against autograd through plain operations."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from flowvi.flows import nsf
from flowvi.nn import _compiled
from flowvi.transforms import Coupling, RationalQuadratic
from flowvi.transforms._spline_bins import OneByOne, SideBySide
from flowvi.transforms._spline_pass import run

SPLINES = {
    "eight bins": RationalQuadratic(),
    "two bins": RationalQuadratic(num_bins=2, bound=2.0),
    "three bins": RationalQuadratic(num_bins=3, bound=1.0),
}
every = pytest.mark.parametrize("name", SPLINES)
both = pytest.mark.parametrize("inverse", [False, True])


def numbers(spline: RationalQuadratic, scale: float) -> tuple[Tensor, Tensor]:
    """Numbers in every bin, at both ends of the box and far beyond, with raw parameters."""
    value = torch.linspace(-1.5 * spline.bound, 1.5 * spline.bound, 400)
    edges = torch.tensor([-1e4, -spline.bound, 0.0, spline.bound, 1e4])
    value = torch.cat([value, edges]).reshape(-1, 3)
    return value, scale * torch.randn(*value.shape, spline.num_params)


def directions(spline: RationalQuadratic, inverse: bool) -> tuple:
    """The map, and the same by autograd."""

    def plain(value: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        bins = SideBySide(spline.num_bins, spline.bound)
        return run(bins, value, params.movedim(-1, 0), inverse)[:2]

    return (spline.inverse_and_ladj if inverse else spline.call_and_ladj), plain


def values_and_gradients(function, value: Tensor, params: Tensor) -> list[Tensor]:  # noqa: ANN001
    value, params = (t.clone().requires_grad_() for t in (value, params))
    result, ladj = function(value, params)
    loss = (result.sin() * torch.linspace(1, 2, len(result))[:, None]).sum() + ladj.square().sum()
    return [result.detach(), ladj.detach(), *torch.autograd.grad(loss, (value, params))]


@every
@both
@pytest.mark.parametrize("scale", [0.7, 5.0, 50.0])
def test_gradients_by_hand_equal_autograds(name: str, inverse: bool, scale: float) -> None:
    given = numbers(SPLINES[name], scale)
    found, expected = (values_and_gradients(f, *given) for f in directions(SPLINES[name], inverse))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@both
def test_second_derivatives_equal_autograds(inverse: bool) -> None:
    spline = SPLINES["three bins"]
    given = numbers(spline, 0.7)
    found = []
    for function in directions(spline, inverse):
        value, params = (t.clone().requires_grad_() for t in given)
        result, ladj = function(value, params)
        loss = result.square().sum() + ladj.sin().sum()
        first = torch.autograd.grad(loss, (value, params), create_graph=True)
        loss = first[0].square().mean() + first[1].square().mean()
        found.append(torch.autograd.grad(loss, (value, params)))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@both
def test_jacobians_in_every_mode_of_autograd(inverse: bool) -> None:
    spline = SPLINES["three bins"]
    value, params = torch.randn(2, 3), torch.randn(2, 3, spline.num_params)
    function, plain = directions(spline, inverse)
    expected = torch.func.jacrev(lambda x: plain(x, params)[1])(value)
    jacobian = partial(torch.autograd.functional.jacobian, lambda x: function(x, params)[1], value)
    for options in ({}, {"vectorize": True}, {"vectorize": True, "strategy": "forward-mode"}):
        torch.testing.assert_close(jacobian(**options), expected)


@both
def test_gradients_for_one_of_the_two(inverse: bool) -> None:
    spline = SPLINES["eight bins"]
    value, params = numbers(spline, 1.0)
    function, plain = directions(spline, inverse)
    for position in (0, 1):
        for second in (False, True):
            given = [
                t.clone().requires_grad_(i == position) for i, t in enumerate((value, params))
            ]
            found, expected = (
                torch.autograd.grad(f(*given)[1].sum(), given[position], create_graph=second)
                for f in (function, plain)
            )
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@every
@both
def test_gradients_in_single_precision(name: str, inverse: bool) -> None:
    spline = SPLINES[name]
    value, params = (t.float() for t in numbers(spline, 1.0))
    value = value[value.abs().amax(-1) < 100]
    params = params[: len(value)]
    function, plain = directions(spline, inverse)
    expected = values_and_gradients(plain, value.double(), params.double())
    for found, wanted in zip(values_and_gradients(function, value, params), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3)


@every
@both
@pytest.mark.parametrize("scale", [0.7, 50.0])
def test_bin_by_bin_is_the_same(name: str, inverse: bool, scale: float, pretended: list) -> None:
    spline = SPLINES[name]
    compiled = replace(spline, compiled=True)
    given = numbers(spline, scale)
    found = values_and_gradients(directions(compiled, inverse)[0], *given)
    expected = values_and_gradients(directions(spline, inverse)[0], *given)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    assert len(pretended) == 2


def test_what_is_not_compiled(pretended: list) -> None:
    spline = RationalQuadratic(4, compiled=True)
    x, params = torch.randn(5, 3), torch.randn(5, 3, spline.num_params)
    spline.call_and_ladj(x, params[0])
    torch.func.vmap(spline.call_and_ladj)(x, params)
    y, ladj = spline.call_and_ladj(x.to("meta"), params.to("meta"))
    assert y.shape == ladj.shape == x.shape
    assert pretended == []
    spline.call_and_ladj(x, params)
    spline.call_and_ladj(x[:2], params[:2])
    assert len(pretended) == 1
    assert "compiled=True" in repr(spline)


def test_recipe_passes_it_on(pretended: list) -> None:
    flow = nsf(4, num_layers=2, compiled=True)
    flow().log_prob(torch.randn(7, 4)).sum().backward()
    assert len(pretended) == 2


def test_without_a_compiler_it_warns_once_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compiled, "_FUNCTIONS", {})

    def fails(function, **options):  # noqa: ANN001, ANN003, ANN202
        def call(*args):  # noqa: ANN002, ANN202
            raise RuntimeError("no compiler")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    spline = RationalQuadratic(4, compiled=True)
    given = numbers(spline, 1.0)
    with pytest.warns(UserWarning, match="A spline cannot be compiled and runs as it is: no comp"):
        found = spline.call_and_ladj(*given)
    expected = RationalQuadratic(4).call_and_ladj(*given)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    # No second warning, which would be an error.
    values_and_gradients(spline.call_and_ladj, *given)
    values_and_gradients(spline.inverse_and_ladj, *given)


@pytest.mark.slow
def test_compiled_couplings_of_any_batch() -> None:
    torch._dynamo.reset()
    eager = Coupling(6, RationalQuadratic(3), hidden_dims=(8,))
    for parameter in eager.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    compiled = Coupling(6, RationalQuadratic(3, compiled=True), hidden_dims=(8,))
    compiled.load_state_dict(eager.state_dict())
    for batch in (64, 32):
        x = torch.randn(batch, 6)
        found = []
        for transform in (eager, compiled):
            parts = []
            for method in (transform.call_and_ladj, transform.inverse_and_ladj):
                y, ladj = method(x)
                loss = (y * x).sum() + ladj.sin().sum()
                parts += [y, ladj, *torch.autograd.grad(loss, list(transform.parameters()))]
            found.append(parts)
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_one_by_one_finds_what_side_by_side_finds() -> None:
    value, params = torch.linspace(-0.999, 0.999, 200), torch.randn(3 * 5 - 1, 200)
    for axis in (0, 1):
        cells = [kind(5, 1.0).find(value, params, axis)[0] for kind in (OneByOne, SideBySide)]
        for a, b in zip(*cells, strict=True):
            parts = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
            for one, other in parts:
                if one.dtype != torch.bool:
                    one = one.masked_fill(~(cells[0].inner[0] & cells[0].inner[1]), 0.0)
                    other = other.masked_fill(~(cells[0].inner[0] & cells[0].inner[1]), 0.0)
                torch.testing.assert_close(one, other)
