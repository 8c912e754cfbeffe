"""Encoders and decoders: shapes for every size of image, batch dimensions, errors."""

from __future__ import annotations

import pytest
import torch

from flowvi.models import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder


@pytest.mark.parametrize("height", range(4, 10))
def test_convolutional_decoder_gives_the_size_of_the_image(height: int):
    shape = (2, height, 13 - height)
    features = ConvEncoder(shape, (2, 3), 5)(torch.randn(2, 3, *shape))
    assert features.shape == (2, 3, 5)
    params = ConvDecoder(5, (2, 3), (4, *shape))(features)
    assert params.shape == (2, 3, 4, *shape)


def test_numbers_of_a_pixel_come_from_its_features():
    decoder = ConvDecoder(5, (2, 3), (4, 2, 6, 6))
    z = torch.randn(1, 5)
    maps = decoder.network(z)
    weight, bias = (t.unflatten(0, (2, 4)) for t in decoder.last.parameters())
    exact = torch.einsum("cpf,bfhw->bpchw", weight, maps) + bias.T[:, :, None, None]
    assert torch.allclose(decoder(z), exact)


def test_fully_connected_ones_flatten_in_order():
    encoder = MLPEncoder((2, 3), (4,))
    x = torch.randn(5, 7, 2, 3)
    weight, bias = encoder.network.layers[0].parameters()
    assert torch.allclose(encoder(x), torch.relu(x.flatten(2) @ weight.T + bias))
    decoder = MLPDecoder(4, (), (1, 2, 3))
    weight, bias = decoder.network.layers[0].parameters()
    z = torch.randn(5, 4)
    assert torch.allclose(decoder(z).flatten(1), z @ weight.T + bias)


def test_errors():
    with pytest.raises(ValueError, match="`hidden_dims` must hold at least one width"):
        MLPEncoder((3,), ())
    with pytest.raises(ValueError, match=r"`event_shape` must be \(C, H, W\); got \(8, 8\)"):
        ConvEncoder((8, 8))
