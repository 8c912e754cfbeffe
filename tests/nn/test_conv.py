"""Gated convolutions and inputs with any number of batch dimensions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flowvi.nn import GatedConv2d, GatedConvTranspose2d
from flowvi.nn.conv import batched


def test_gated_convolution_against_two_convolutions():
    layer = GatedConv2d(2, 3, 3, stride=2, padding=1, activation=nn.Tanh)
    x = torch.randn(4, 2, 7, 6)
    value, gate = (
        F.conv2d(x, w, b, stride=2, padding=1)
        for w, b in zip(layer.conv.weight.chunk(2), layer.conv.bias.chunk(2), strict=True)
    )
    assert torch.allclose(layer(x), value.tanh() / (1 + (-gate).exp()))


def test_transposed_one_doubles_the_picture():
    layer = GatedConvTranspose2d(2, 3, 5, stride=2, padding=2, output_padding=(1, 0))
    x = torch.randn(4, 2, 7, 6)
    value, gate = (
        F.conv_transpose2d(x, w, b, stride=2, padding=2, output_padding=(1, 0))
        for w, b in zip(layer.conv.weight.chunk(2, 1), layer.conv.bias.chunk(2), strict=True)
    )
    assert torch.allclose(layer(x), value * gate.sigmoid())
    assert layer(x).shape == (4, 3, 14, 11)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_batches_of_any_number_of_dimensions(batch: tuple[int, ...]):
    layer = nn.Conv2d(2, 3, 3)
    x = torch.randn(*batch, 2, 5, 5)
    made = batched(layer, x)
    rows = torch.stack([layer(row.unsqueeze(0))[0] for row in x.reshape(-1, 2, 5, 5)])
    assert torch.allclose(made, rows.reshape(*batch, 3, 3, 3))
