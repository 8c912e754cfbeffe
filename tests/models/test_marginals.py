"""Marginals of a posterior process: derivatives in time, turns, starting scales, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from flowvi.models import Marginals, MLPMarginals, RhythmicMarginals

MAKERS = {
    "network": lambda **kind: MLPMarginals(3, 2, (8, 8), **kind),
    "network, tanh": lambda **kind: MLPMarginals(3, 2, (8,), activation=nn.Tanh, **kind),
    "network, silu": lambda **kind: MLPMarginals(3, 2, (8,), activation=nn.SiLU, **kind),
    "rhythm": lambda **kind: RhythmicMarginals(3, 2, 0.7, (8, 8), **kind),
    "rhythm, one harmonic": lambda **kind: RhythmicMarginals(3, 2, 0.7, num_harmonics=1, **kind),
}


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_rates_are_the_derivatives_in_time(name: str, moving: bool):
    """Against central differences, at contexts that stay or that move in a straight line."""
    marginals = MAKERS[name]()
    for parameter in marginals.parameters():
        nn.init.normal_(parameter, std=0.5)
    context, t, step = torch.randn(5, 3), torch.rand(4, 5, 1), 1e-5
    rate = torch.randn(4, 5, 3) if moving else None

    def at(moment: Tensor) -> tuple[Tensor, Tensor]:
        return marginals(context + rate * (moment - t) if moving else context, moment)

    given = (context.expand(4, -1, -1), rate) if moving else (context, None)
    values, rates = marginals.with_rate(*given, t)
    for value, slope, now, late, early in zip(
        values, rates, at(t), at(t + step), at(t - step), strict=True
    ):
        torch.testing.assert_close(value, now)
        torch.testing.assert_close(slope, (late - early) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MAKERS)
def test_every_parameter_gets_a_gradient_from_the_rates(name: str):
    marginals = MAKERS[name]()
    for parameter in marginals.parameters():
        nn.init.normal_(parameter, std=0.5)
    _, (d_mean, d_scale) = marginals.with_rate(torch.randn(5, 3), None, torch.rand(4, 5, 1))
    (d_mean.square().sum() + d_scale.square().sum()).backward()
    # The last bias of a mean has no rate.
    lost = [n for n, p in marginals.named_parameters() if not bool(p.grad.abs().sum() > 0)]
    assert lost == []


def test_a_rhythm_comes_again_and_a_context_sets_its_pace():
    marginals, context = RhythmicMarginals(3, 2, 0.7), torch.randn(50, 3)
    assert torch.allclose(marginals.turn(context), torch.tensor(0.7))
    nn.init.normal_(marginals.pace.weight, std=100.0)
    turn = marginals.turn(context)
    # tanh is at its ends: from exp(-1/2) to exp(1/2) of the first period.
    torch.testing.assert_close(turn.amax(), torch.tensor(0.7 * math.exp(0.5)), rtol=1e-3, atol=0.0)
    torch.testing.assert_close(turn.amin(), torch.tensor(0.7 * math.exp(-0.5)), rtol=1e-3, atol=0)
    t = torch.rand(50, 1)
    for now, later in zip(marginals(context, t), marginals(context, t + 3 * turn), strict=True):
        torch.testing.assert_close(now, later, rtol=1e-6, atol=1e-8)
    half = marginals(context, t + turn / 2)[0]
    assert not torch.allclose(half, marginals(context, t)[0])


def test_the_phase_is_the_angle_of_the_context():
    """One harmonic: cosine and sine of the angle of the phase layer's output plus time."""
    marginals = RhythmicMarginals(3, 2, 2 * math.pi, num_harmonics=3)
    context, t = torch.randn(6, 3), torch.rand(6, 1)
    u, v = marginals.phase(context).unbind(-1)
    angle = torch.atan2(v, u) + t.squeeze(-1)
    waves = marginals._rhythm(context, t)
    for k in range(3):
        torch.testing.assert_close(waves[2 * k].squeeze(-1), torch.cos((k + 1) * angle))
        torch.testing.assert_close(waves[2 * k + 1].squeeze(-1), torch.sin((k + 1) * angle))


@pytest.mark.parametrize("name", MAKERS)
def test_scales_begin_where_they_are_told(name: str):
    scale = MAKERS[name](scale=0.02)(torch.zeros(5, 3), torch.rand(5, 1))[1]
    # The last layer's weights start at random and move them.
    assert bool(((scale > 0.004) & (scale < 0.1)).all())


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="`period` must be positive and finite; got 0"):
        RhythmicMarginals(3, 2, 0.0)
    with pytest.raises(ValueError, match="`num_harmonics` must be an integer of at least 1"):
        RhythmicMarginals(3, 2, 1.0, num_harmonics=0)
    with pytest.raises(ValueError, match="`scale` must be above 0.0001 and finite; got 0"):
        MLPMarginals(3, 2, scale=0.0)


def test_a_new_kind_writes_one_method():
    class Line(Marginals):
        def raw(self, context: Tensor, t: Tensor) -> Tensor:
            return torch.cat([context * t, -t], -1)

    (mean, _), (d_mean, _) = Line(1, 1).with_rate(torch.full((3, 1), 2.0), None, torch.ones(3, 1))
    assert torch.equal(mean, d_mean)
