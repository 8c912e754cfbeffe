"""Networks of diffusion; those of drift are tested with the latent SDEs that use them."""

from __future__ import annotations

import pytest
import torch
from torch.func import jacrev

from flowvi.models import DiffusionMLP
from flowvi.models.drifts import pick


def test_each_coordinate_has_its_own_network():
    b, x, t = DiffusionMLP(3, 8, scale=0.7), torch.randn(3), torch.zeros(1)
    jacobian = jacrev(lambda x: b(x, t))(x)
    assert torch.equal(jacobian, torch.diag(jacobian.diagonal()))
    assert bool((jacobian.diagonal() != 0).all())


def test_diffusion_is_bounded_and_its_divergence_right():
    b, t = DiffusionMLP(3, 8, scale=0.7), torch.zeros(1)
    far = b(torch.tensor([-1e6, 0.0, 1e6]), t)
    assert bool((far > 1e-3).all())
    assert bool((far < 0.7 + 1e-3).all())
    x = torch.randn(3)
    slopes = jacrev(lambda x: b(x, t).square() / 2)(x).diagonal()
    torch.testing.assert_close(b.divergence(x, t), slopes)


def test_sizes_and_scale_are_checked():
    with pytest.raises(ValueError, match="`hidden_dims` must"):
        DiffusionMLP(3, 0)
    with pytest.raises(ValueError, match="`scale` must be positive"):
        DiffusionMLP(3, scale=0.0)


@pytest.mark.parametrize("lead", [(), (6,), (4, 6)])
@pytest.mark.parametrize("ones", [False, True], ids=["own", "shared"])
def test_rows_are_picked_as_in_a_loop(lead: tuple[int, ...], ones: bool):
    """Values and gradients against one row after the other."""
    rows = torch.randn(2, 5, 3, requires_grad=True)
    index = torch.randint(5, (*lead, 1 if ones else 2))
    got = pick(rows, index)
    every = index.expand(*lead, 2)
    wanted = torch.stack([rows[i, every[..., i]] for i in range(2)], -2)
    assert torch.equal(got, wanted)
    weight = torch.randn_like(wanted)
    slopes = [torch.autograd.grad((out * weight).sum(), rows)[0] for out in (got, wanted)]
    torch.testing.assert_close(*slopes)
