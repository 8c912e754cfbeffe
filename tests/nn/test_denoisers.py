"""Denoisers and features: shapes, broadcasting, rows apart, gradients, errors."""

from __future__ import annotations

import math

import pytest
import torch

from flowvi.nn import (
    Denoiser,
    FourierFeatures,
    MLPDenoiser,
    ResidualDenoiser,
    SinusoidalTime,
    UNet,
)

NETWORKS = {
    "mlp": lambda context: MLPDenoiser(16, (8, 8), context),
    "residual": lambda context: ResidualDenoiser(16, 8, 2, context),
    "residual, fourier": lambda context: ResidualDenoiser(
        16, 8, 2, context, fourier=FourierFeatures(0, 1)
    ),
    "unet": lambda context: UNet((1, 4, 4), 4, (1, 2), 1, context),
    "unet, attention, fourier": lambda context: UNet(
        (1, 4, 4), 4, (1, 2), 2, context, attention=True, fourier=FourierFeatures(1, 2)
    ),
}


def moved(network):
    """Away from the start, where the last layers are zero."""
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return network


@pytest.mark.parametrize(
    "make",
    [
        lambda **options: MLPDenoiser(16, (8,), **options),
        lambda **options: ResidualDenoiser(16, 8, 1, **options),
        lambda **options: UNet((1, 4, 4), 4, (1,), **options),
    ],
)
def test_low_frequencies_make_slow_networks(make):
    rates = []
    for max_frequency in (4.0, 1000.0):
        torch.manual_seed(0)
        network = moved(make(max_frequency=max_frequency))
        x, t = torch.randn(50, 16), torch.rand(50, 1)
        change = torch.func.jvp(lambda t, f=network, x=x: f(x, t), (t,), (torch.ones(50, 1),))[1]
        rates.append(change.square().mean().sqrt())
    assert rates[1] > 20 * rates[0]


@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_rows_and_broadcasting(name, context_dim):
    network = NETWORKS[name](context_dim)
    x, t = torch.randn(2, 5, 16), torch.rand(2, 5, 1)
    given = (torch.randn(5, context_dim),) if context_dim else ()
    assert not network(x, t, *given).any()
    moved(network)
    out = network(x, t, *given)
    assert out.shape == x.shape
    row = network(x[1, 3], t[1, 3], *(c[3] for c in given))
    torch.testing.assert_close(row, out[1, 3])
    one = network(x, t[0, 0], *given)
    torch.testing.assert_close(one, network(x, t[0, 0].expand(2, 5, 1), *given))
    later = network(x, t + 0.1, *given)
    assert not torch.allclose(later, out)
    if given:
        assert not torch.allclose(network(x, t, given[0] + 1), out)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_has_a_gradient(name):
    network = moved(NETWORKS[name](2))
    network(torch.randn(5, 16), torch.rand(5, 1), torch.randn(5, 2)).square().sum().backward()
    for key, p in network.named_parameters():
        assert p.grad.isfinite().all(), key
        assert p.grad.any(), key


@pytest.mark.parametrize("name", NETWORKS)
def test_many_times_of_the_same_states(name):
    """Times may have dims that states lack, as for an encoder of the data."""
    network = moved(NETWORKS[name](0))
    x, t = torch.randn(5, 16), torch.rand(3, 5, 1)
    torch.testing.assert_close(network(x, t), network(x.expand(3, 5, 16), t))


@pytest.mark.parametrize("name", NETWORKS)
def test_meta_device_and_float32(name):
    network = NETWORKS[name](0).to("meta")
    x, t = torch.empty(5, 16, device="meta"), torch.empty(5, 1, device="meta")
    network(x, t).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    single = NETWORKS[name](0).float()
    assert single(torch.randn(3, 16).float(), torch.rand(3, 1).float()).dtype == torch.float32


def test_features_of_time_and_of_coordinates():
    """The formulas, written out for single entries."""
    t = torch.tensor([0.0, 0.3])
    features = SinusoidalTime(3, 100.0)(t)
    want = [f(0.3 * w) for f in (math.sin, math.cos) for w in (1.0, 10.0, 100.0)]
    torch.testing.assert_close(features[1], torch.tensor(want))
    x = torch.tensor([[0.3, -0.2]])
    out = FourierFeatures(1, 2)(x)
    angles = [2 * math.pi * 0.3, 4 * math.pi * 0.3]
    want = [math.sin(angles[0]), math.cos(angles[0]), math.sin(angles[1]), math.cos(angles[1])]
    torch.testing.assert_close(out[0, 2::2], torch.tensor(want))
    images = torch.randn(2, 1, 3, 3)
    assert FourierFeatures(0, 0)(images, dim=1).shape == (2, 3, 3, 3)


def test_pixels_far_apart_see_each_other_at_the_coarsest_level():
    """Attention: a change of the first pixel reaches the last one in a large image."""
    plain, attending = (
        moved(UNet((1, 96, 96), 4, (1, 1), attention=attention)) for attention in (False, True)
    )
    for network, reaches in ((plain, False), (attending, True)):
        for block in network.modules():
            # Statistics over all pixels would carry the change anyway.
            if isinstance(block, torch.nn.GroupNorm):
                block.forward = lambda x: x
        x = torch.zeros(1, 96 * 96)
        changed = x.clone()
        changed[0, 0] = 1.0
        t = torch.full((1, 1), 0.5)
        difference = (network(changed, t) - network(x, t)).abs()
        assert bool(difference[0, 0] > 0)
        assert bool(difference[0, -1] > 0) is reaches


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SinusoidalTime(1), "`num_frequencies` must be at least 2; got 1"),
        (lambda: SinusoidalTime(4, 1.0), "`max_frequency` must be above 1"),
        (lambda: FourierFeatures(2, 1), "`max_exponent` must not be below `min_exponent`"),
        (lambda: ResidualDenoiser(2, 8, 0), "`num_blocks` must be at least 1; got 0"),
        (lambda: UNet((1, 7, 8)), r"`image_shape` must be .* sides divisible by 2; got"),
        (lambda: UNet((1, 8)), "`image_shape` must be"),
        (lambda: UNet((1, 8, 8), 0), "`width` and `num_blocks` must be at least 1"),
        (lambda: MLPDenoiser(0), "`input_dim` must be at least 1; got 0"),
        (
            lambda: MLPDenoiser(2, (4,), 3)(torch.zeros(2), torch.zeros(1)),
            r"`context` must end with size 3 \(context_dim\); got 0",
        ),
        (
            lambda: MLPDenoiser(2, (4,))(torch.zeros(2), torch.zeros(1), torch.zeros(3)),
            r"`context` must end with size 0 \(context_dim\); got 3",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_denoiser_without_a_prediction_says_so():
    with pytest.raises(NotImplementedError, match="Denoiser predicts nothing. Write `predict`"):
        Denoiser(2)(torch.zeros(2), torch.zeros(1))
