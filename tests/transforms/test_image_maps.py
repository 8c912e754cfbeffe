"""Maps of images beyond the properties of all maps: what moves where, and refusals."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from flowvi.nn import ConvConditioner
from flowvi.transforms import (
    ActNorm,
    Affine,
    Coupling,
    LULinear,
    OnChannels,
    Permutation,
    Pixelwise,
    Squeezed,
    ToInterval,
    checkerboard,
    compose,
)


def test_pixelwise_linear_map_is_a_convolution():
    linear = LULinear(3, permutation=(1, 2, 0))
    with torch.no_grad():
        for p in linear.parameters():
            p.normal_()
    x = torch.randn(5, 3, 4, 2)
    matrix = torch.func.jacrev(linear)(torch.zeros(3))
    expected = torch.nn.functional.conv2d(x, matrix[..., None, None], linear.raw.loc)
    y, ladj = Pixelwise(linear, 4, 2).call_and_ladj(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ladj, 8 * torch.linalg.slogdet(matrix).logabsdet.expand(5))


def test_pixelwise_activation_normalisation_is_by_channel():
    norm = Pixelwise(ActNorm(2, lazy=True), 3, 3)
    x = torch.randn(50, 2, 3, 3) * torch.tensor([3.0, 0.1]).reshape(2, 1, 1) + 5
    y = norm.inverse_and_ladj(x)[0].movedim(1, 0).flatten(1)
    torch.testing.assert_close(y.mean(1), torch.zeros(2), rtol=0, atol=1e-12)
    torch.testing.assert_close(y.std(1), torch.ones(2), rtol=0, atol=1e-12)


def test_squeezing_puts_four_pixels_into_channels():
    x = torch.arange(16.0).reshape(1, 4, 4)
    seen: list[Tensor] = []

    class Spy(Permutation):
        def _call_and_ladj(self, x, context):
            seen.append(x)
            return super()._call_and_ladj(x, context)

    Squeezed(Pixelwise(Spy([0, 1, 2, 3]), 2, 2))(x)
    assert seen[0][0, 0].tolist() == [0, 1, 4, 5]
    assert seen[0][1, 1].tolist() == [10, 11, 14, 15]


def test_other_channels_pass_by():
    x = torch.randn(5, 3, 2, 2)
    y = OnChannels(Pixelwise(Permutation([1, 0]), 2, 2), 3)(x)
    assert torch.equal(y, x[:, [1, 0, 2]])


def test_checkerboard():
    board = checkerboard(3, 4)
    assert board.shape == (1, 3, 4)
    assert board.dtype == torch.bool
    for i in range(3):
        for j in range(4):
            assert bool(board[0, i, j]) == ((i + j) % 2 == 1)


def test_the_network_of_a_checkerboard_sees_zeros_where_pixels_move():
    board = checkerboard(4, 4)
    coupling = Coupling((2, 4, 4), mask=board, hidden_dims=(3,))
    seen = []
    coupling.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(5, 2, 4, 4)
    y = coupling(x)
    assert torch.equal(seen[0], x * ~board)
    assert torch.equal(y[:, :, ~board[0]], x[:, :, ~board[0]])


def test_a_network_of_ones_own():
    """A coupling takes any conditioner, of vectors too, and keeps its score recursion."""
    made = []

    def network(size: int, num_outputs: int, context_dim: int) -> torch.nn.Module:
        made.append((size, num_outputs, context_dim))
        return _Cubic(size, num_outputs)

    coupling = Coupling(5, Affine(), network=network)
    assert made == [(2, 6, 0)]
    x = torch.randn(4, 5)
    y, ladj = coupling.call_and_ladj(x)
    jacobian = torch.func.vmap(torch.func.jacrev(coupling))(x)
    torch.testing.assert_close(ladj, torch.linalg.slogdet(jacobian).logabsdet)
    pushed = coupling.call_ladj_and_score(x, -x)[2]
    leaf = y.detach().requires_grad_()
    start, back = coupling.inverse_and_ladj(leaf)
    (expected,) = torch.autograd.grad((back - start.square().sum(-1) / 2).sum(), leaf)
    torch.testing.assert_close(pushed, expected)


class _Cubic(torch.nn.Module):
    def __init__(self, size: int, num_outputs: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(size, num_outputs)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.linear(x**3)


def test_interval_reaches_its_bounds_and_the_margin_beyond():
    cut = ToInterval(1, -2.0, 6.0, margin=0.1)
    far = torch.tensor([[-60.0], [0.0], [60.0]])
    torch.testing.assert_close(cut(far), torch.tensor([[-3.0], [2.0], [7.0]]))
    assert cut.codomain.check(cut(far[1]))
    assert not cut.codomain.check(torch.tensor([7.1]))
    # The logit transform of the reference, with data on [0, 1].
    data = torch.rand(20, 1)
    expected = torch.logit(0.05 + 0.9 * data)
    found, ladj = ToInterval(1, margin=0.05).inverse_and_ladj(data)
    torch.testing.assert_close(found, expected)
    slope = torch.func.vmap(torch.func.grad(lambda d: torch.logit(0.05 + 0.9 * d)))(data[:, 0])
    torch.testing.assert_close(ladj, slope.log())
    edge = ToInterval(2).inverse_and_ladj(torch.tensor([0.0, 1.0]))
    assert all(t.isfinite().all() for t in edge)


def test_context_image_is_squeezed_to_the_networks_size():
    net = ConvConditioner((2, 2, 2), (), 3, 32, context_shape=(2, 4, 4), zero_last=False)
    assert net.context_layer.in_channels == 8
    image = torch.zeros(2, 4, 4)
    image[1, 2, 3] = 1.0
    x = torch.zeros(2, 2, 2)
    change = net(x, image.flatten()) - net(x, torch.zeros(32))
    # A pixel in the last block of four: seen by all four places within reach of a 3 x 3 kernel.
    expected = net.context_layer.weight[:, 4 + 1].flip((-2, -1))[:, 0:2, 0:2]
    torch.testing.assert_close(change, expected, rtol=0, atol=1e-12)


def test_one_convolution_starts_at_zero_with_its_context():
    net = ConvConditioner((2, 2, 2), (), 3, 4)
    assert not net(torch.randn(5, 2, 2, 2), torch.randn(5, 4)).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Squeezed(Coupling((6, 2, 2))), "number of channels that 4 divides; got 6"),
        (lambda: Squeezed(LULinear(4)), "`transform` must be a map of images (channels, height"),
        (lambda: OnChannels(Coupling((2, 2, 2)), 2), "`num_channels` must be an integer above 2"),
        (lambda: OnChannels(LULinear(2), 3), "`transform` must be a map of images"),
        (
            lambda: Pixelwise(Coupling((2, 2, 2)), 2, 2),
            "`transform` must be of vectors",
        ),
        (lambda: Pixelwise(LULinear(2), 0, 2), "`input_dim` must hold integers of at least 1"),
        (lambda: Coupling((2, 2)), "must be a number of dimensions or (channels, height, width)"),
        (lambda: Coupling((1, 4, 4)), "One channel is divided by a checkerboard."),
        (lambda: Coupling((2, 4, 4), mask=[True]), "`mask` must have length 2 (channels); got 1"),
        (
            lambda: Coupling((2, 4, 4), mask=checkerboard(4, 3)),
            "`mask` must have a shape that broadcasts to (2, 4, 4); got (1, 4, 3)",
        ),
        (
            lambda: Coupling((2, 1, 1), mask=checkerboard(1, 1)),
            "`mask` must move some pixels and keep some; got 0 of 1",
        ),
        (lambda: ToInterval(2, 1.0, 1.0), "`high` must be above `low`; got 1.0 and 1.0"),
        (lambda: ToInterval(2, margin=0.5), "`margin` must be at least 0 and below 0.5; got 0.5"),
        (lambda: ConvConditioner((0, 2, 2), (), 3), "must be at least 1; got (0, 2, 2)"),
        (
            lambda: compose(Coupling((2, 4, 4)), Coupling((4, 2, 2))),
            "`parts` must agree in event shape; got [(2, 4, 4), (4, 2, 2)]",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
