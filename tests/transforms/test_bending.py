"""Planar, radial and Sylvester maps, against stock Pyro, each other and closed forms."""

from __future__ import annotations

import math

import pyro.distributions.transforms as stock
import pytest
import torch

from flowvi.transforms import (
    FlowTransform,
    HouseholderSylvester,
    OrthogonalSylvester,
    Planar,
    Radial,
    TriangularSylvester,
)

BENDING = {
    "planar": lambda: Planar(3),
    "radial": lambda: Radial(3),
    "orthogonal": lambda: OrthogonalSylvester(3, 2),
    "householder": lambda: HouseholderSylvester(3),
    "triangular": lambda: TriangularSylvester(3),
}


def drawn(transform: FlowTransform) -> FlowTransform:
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.normal_()
    return transform


def stock_call(transform: object, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = transform(x)
    return y, transform.log_abs_det_jacobian(x, y)


def softplus_inverse(value: torch.Tensor) -> torch.Tensor:
    return value + torch.log(-torch.expm1(-value))


@pytest.mark.parametrize("seed", range(5))
def test_planar_equals_stock(seed: int) -> None:
    torch.manual_seed(seed)
    ours, theirs = drawn(Planar(4)), stock.Planar(4)
    w = ours.raw.direction.detach()
    x = torch.randn(10, 4)
    y, ladj = ours.call_and_ladj(x)
    # The constrained shift is what the map adds where tanh has saturated.
    far = 1e6 * w / w.square().sum()
    shift = (ours(far) - far).detach()
    product = shift @ w
    free = shift + (softplus_inverse(1 + product) - product) * w / w.square().sum()
    theirs.w.data, theirs.u.data = w, free
    theirs.bias.data = ours.raw.bias.detach().reshape(1)
    torch.testing.assert_close((y, ladj), stock_call(theirs, x), rtol=1e-7, atol=1e-8)


def test_planar_keeps_a_shift_that_needs_no_constraint() -> None:
    transform = drawn(Planar(3))
    with torch.no_grad():
        if transform.raw.direction @ transform.raw.shift < 0:
            transform.raw.shift.neg_()
    far = 1e6 * transform.raw.direction.detach() / transform.raw.direction.detach().square().sum()
    torch.testing.assert_close(transform(far) - far, transform.raw.shift, rtol=0, atol=1e-9)


def test_planar_survives_a_vanishing_direction() -> None:
    transform = drawn(Planar(3))
    transform.raw.direction.data.zero_()
    x = torch.randn(5, 3)
    y, ladj = transform.call_and_ladj(x)
    torch.testing.assert_close(y, x + transform.raw.shift * torch.tanh(transform.raw.bias))
    (y.sum() + ladj.sum()).backward()
    assert all(p.grad.isfinite().all() for p in transform.parameters())


@pytest.mark.parametrize("seed", range(5))
def test_radial_equals_stock(seed: int) -> None:
    torch.manual_seed(seed)
    ours, theirs = drawn(Radial(4)), stock.Radial(4)
    width = ours.raw.log_width.detach().exp()
    strength = ours.raw.strength.detach()
    floor = 0.999
    m = torch.where(strength > 0, strength, floor * torch.expm1(strength / floor))
    theirs.x0.data = ours.raw.centre.detach()
    theirs.alpha_prime.data = softplus_inverse(width)
    theirs.beta_prime.data = softplus_inverse(width * (1 + m))
    x = torch.randn(10, 4)
    torch.testing.assert_close(ours.call_and_ladj(x), stock_call(theirs, x))


def test_radial_at_its_centre() -> None:
    transform = drawn(Radial(3))
    centre = transform.raw.centre.detach().clone().requires_grad_()
    y, ladj = transform.call_and_ladj(centre)
    x, _ = transform.inverse_and_ladj(y)
    torch.testing.assert_close(x, centre)
    (y.sum() + ladj + x.sum()).backward()
    assert centre.grad.isfinite().all()
    pushed = transform.call_ladj_and_score(centre.detach(), torch.ones(3))[2]
    assert pushed.isfinite().all()


@pytest.mark.parametrize("seed", range(3))
def test_sylvester_with_one_direction_is_planar(seed: int) -> None:
    torch.manual_seed(seed)
    sylvester, planar = drawn(OrthogonalSylvester(4, 1)), Planar(4)
    q = sylvester.raw.basis.detach()[:, 0]
    q = q / q.norm()
    outer = 0.999 * torch.tanh(sylvester.raw.outer.detach())[0, 0]
    inner = torch.tanh(sylvester.raw.inner.detach())[0, 0]
    if outer * inner < 0:
        # Only a positive product leaves the planar constraint out of play.
        sylvester.raw.inner.data.neg_()
        inner = -inner
    planar.raw.direction.data, planar.raw.shift.data = inner * q, outer * q
    planar.raw.bias.data = sylvester.raw.bias.detach()[0]
    x = torch.randn(10, 4)
    torch.testing.assert_close(sylvester.call_and_ladj(x), planar.call_and_ladj(x))


def test_orthogonal_basis_has_orthonormal_columns() -> None:
    transform = drawn(OrthogonalSylvester(5, 3, 2))
    basis = transform._parts(torch.randn(7, 2))[-1]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(3).expand(7, 3, 3))


def test_orthogonal_map_is_smooth_in_its_basis() -> None:
    # Without a fixed sign a column of the basis would flip somewhere on this circle.
    transform = drawn(OrthogonalSylvester(2, 1))
    x, values = torch.randn(2), []
    for angle in torch.linspace(0, 2 * math.pi, 2001):
        transform.raw.basis.data = torch.stack([angle.cos(), angle.sin()]).unsqueeze(-1)
        values.append(transform(x).detach())
    jumps = torch.stack(values).diff(dim=0).norm(dim=-1)
    assert jumps.max() < 0.02


@pytest.mark.parametrize("name", BENDING)
def test_starts_near_the_identity(name: str) -> None:
    transform = BENDING[name]()
    x = torch.randn(100, 3)
    y, ladj = transform.call_and_ladj(x)
    assert 0 < (y - x).abs().max() < 0.2
    assert 0 < ladj.abs().max() < 0.2


@pytest.mark.parametrize("name", BENDING)
def test_extreme_parameters_stay_invertible(name: str) -> None:
    for sign in (-1.0, 1.0):
        transform = BENDING[name]()
        with torch.no_grad():
            for parameter in transform.parameters():
                parameter.normal_().mul_(20 * sign)
            if name == "planar":
                transform.raw.shift.copy_(sign * 30 * transform.raw.direction)
            if name in ("orthogonal", "householder", "triangular"):
                transform.raw.outer.copy_(torch.diag(transform.raw.outer.diagonal()))
                transform.raw.inner.copy_(torch.diag(-transform.raw.outer.diagonal()))
        x = torch.randn(50, 3)
        y, ladj = transform.call_and_ladj(x)
        assert ladj.isfinite().all()
        again, back = transform.inverse_and_ladj(y)
        torch.testing.assert_close(again, x, rtol=0, atol=1e-6)
        torch.testing.assert_close(back, -ladj, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bottleneck_dim", [0, 4, 1.5])
def test_bottleneck_is_checked(bottleneck_dim: object) -> None:
    with pytest.raises(ValueError, match=r"`bottleneck_dim` must be an integer from 1 to 3"):
        OrthogonalSylvester(3, bottleneck_dim)
    with pytest.raises(ValueError, match="`num_reflections` must be an integer of at least 1"):
        HouseholderSylvester(3, 0)
