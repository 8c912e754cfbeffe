from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from flowvi.infer._gaussian import Gaussian
from flowvi.infer._searches import together
from flowvi.infer.modes import _piece, modes_are_separated
from flowvi.infer.start import warm_start
from flowvi.infer.target import Target


def two_normals(separation: float, weight: float, dim: int = 2, scale: float = 1.0) -> Target:
    """Weight at the origin with unit scale, the rest ``separation`` along the first axis."""
    far = torch.zeros(dim)
    far[0] = separation

    def log_p(x: Tensor) -> Tensor:
        near = math.log(weight) + dist.Normal(0.0, 1.0).log_prob(x).sum(-1)
        return torch.logaddexp(
            near, math.log1p(-weight) + dist.Normal(far, scale).log_prob(x).sum(-1)
        )

    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(dim), 1.0).to_event(1).mask(False))
        pyro.factor("mixture", log_p(x))

    return Target(model)


@pytest.mark.parametrize("weight", [0.5, 0.3])
@pytest.mark.parametrize("separation", [4.0, 7.0, 12.0])
def test_both_modes_of_a_mixture_are_found(separation: float, weight: float) -> None:
    target = two_normals(separation, weight)
    for seed in range(3):
        modes = warm_start(target, seed=seed).modes
        assert len(modes) == 2
        modes = sorted(modes, key=lambda mode: float(mode.loc[0]))
        assert modes[0].weight == pytest.approx(weight, abs=0.02)
        assert sum(mode.weight for mode in modes) == pytest.approx(1.0)
        for mode, centre in zip(modes, (0.0, separation), strict=True):
            # The cut between the pieces takes a little of the tails at separation 4.
            torch.testing.assert_close(mode.loc, torch.tensor([centre, 0.0]), rtol=0, atol=0.15)
            torch.testing.assert_close(mode.scale_tril, torch.eye(2), rtol=0, atol=0.15)
        assert modes[1].log_prob == pytest.approx(
            math.log(1 - weight) - math.log(2 * math.pi), abs=0.01
        )


def test_modes_of_unlike_width_have_the_right_weights() -> None:
    modes = warm_start(two_normals(10.0, 0.6, dim=3, scale=0.4), seed=0).modes
    assert [mode.weight for mode in modes] == pytest.approx([0.6, 0.4], abs=0.01)


def test_a_skewed_or_flat_topped_density_has_one_mode() -> None:
    gamma = Target(lambda: pyro.sample("x", dist.Gamma(torch.full((3,), 0.7), 1.0).to_event(1)))
    student = Target(lambda: pyro.sample("x", dist.StudentT(torch.full((2,), 3.0)).to_event(1)))
    for target in (gamma, student, two_normals(2.0, 0.5)):
        for seed in range(2):
            modes = warm_start(target, seed=seed).modes
            assert len(modes) == 1
            assert modes[0].weight == pytest.approx(1.0)


def test_the_search_can_be_left_out() -> None:
    assert warm_start(two_normals(7.0, 0.5), seed=0, num_mode_starts=0).modes == []


def test_separation_rule() -> None:
    """Distance alone does not make two modes, nor does a dip between near summits."""

    def mixture(separation: float) -> object:
        def density(z: Tensor) -> tuple[Tensor, Tensor]:
            left, right = -0.5 * z[:, 0] ** 2, -0.5 * (z[:, 0] - separation) ** 2
            return torch.logaddexp(left, right), torch.zeros_like(z)

        return density

    unit = torch.eye(1)

    def pair(separation: float) -> tuple[Gaussian, Gaussian]:
        return Gaussian(torch.zeros(1), unit), Gaussian(torch.tensor([separation]), unit)

    assert together(mixture(4.0), modes_are_separated(*pair(4.0))) == [True]
    assert together(mixture(2.5), modes_are_separated(*pair(2.5))) == [False]
    flat = lambda z: (torch.zeros(len(z)), torch.zeros_like(z))  # noqa: E731
    assert together(flat, modes_are_separated(*pair(9.0))) == [False]


def test_pieces_sum_to_the_density_and_have_its_gradients() -> None:
    def density(z: Tensor) -> tuple[Tensor, Tensor]:
        return -(z**2).sum(-1), -2 * z

    gaussians = [
        Gaussian(torch.zeros(2), torch.tensor([[1.0, 0.0], [0.5, 2.0]])),
        Gaussian(torch.tensor([1.0, -1.0]), torch.tensor([[0.3, 0.0], [0.1, 0.5]])),
    ]
    log_mass = torch.tensor([0.2, -0.4])
    z = torch.randn(7, 2)
    pieces = [_piece(z, density(z), gaussians, log_mass, k) for k in range(2)]
    total = torch.logsumexp(torch.stack([log_p for log_p, _ in pieces]), 0)
    torch.testing.assert_close(total, density(z)[0])
    laws = [dist.MultivariateNormal(g.loc, scale_tril=g.scale_tril) for g in gaussians]

    def by_hand(z: Tensor, k: int) -> Tensor:
        terms = torch.stack([m + q.log_prob(z) for m, q in zip(log_mass, laws, strict=True)])
        return -(z**2).sum(-1) + terms[k] - torch.logsumexp(terms, 0)

    for k, (log_p, grad) in enumerate(pieces):
        torch.testing.assert_close(log_p, by_hand(z, k))
        expected = torch.autograd.functional.jacobian(lambda u, k=k: by_hand(u, k).sum(), z)
        torch.testing.assert_close(grad, expected)
