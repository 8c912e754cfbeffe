"""Likelihoods: laws of images, what they ask of a decoder and of the data."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from registry import IMAGE, LIKELIHOODS
from torch import Tensor

from flowvi.models import (
    BernoulliLikelihood,
    CategoricalLikelihood,
    ContinuousBernoulliLikelihood,
    DiscretisedLogisticLikelihood,
    Likelihood,
    NormalLikelihood,
)


def images(likelihood: Likelihood, count: int = 4) -> Tensor:
    """Data that fit."""
    levels = getattr(likelihood, "num_levels", 2)
    if isinstance(likelihood, NormalLikelihood):
        return torch.randn(count, *IMAGE)
    if isinstance(likelihood, ContinuousBernoulliLikelihood):
        return torch.rand(count, *IMAGE)
    return torch.randint(0, levels, (count, *IMAGE)).double()


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_law_is_a_product_over_pixels(name: str):
    likelihood = LIKELIHOODS[name].make()
    params = torch.randn(3, 4, *likelihood.output_shape)
    law, x = likelihood(params), images(likelihood)
    assert (law.batch_shape, law.event_shape) == ((3, 4), IMAGE)
    assert law.mean.shape == law.sample().shape == (3, 4, *IMAGE)
    total = law.log_prob(x)
    assert total.shape == (3, 4)
    # Another value of one pixel changes the sum by that pixel's part alone.
    other = x.clone()
    other[:, 0, 1, 2] = images(likelihood)[:, 0, 1, 2]
    one = likelihood(params[..., 1:2, 2:3].expand(*params.shape))
    new, old = (one.log_prob(t[:, :, 1:2, 2:3].expand(*x.shape)) for t in (other, x))
    assert torch.allclose(law.log_prob(other) - total, (new - old) / likelihood.num_pixels)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_own_draws_pass_the_check(name: str):
    likelihood = LIKELIHOODS[name].make()
    x = likelihood(torch.randn(6, *likelihood.output_shape)).sample()
    likelihood.check(x, values=True)
    inputs = likelihood.inputs(x, torch.zeros((), dtype=torch.float32))
    assert inputs.dtype == torch.float32
    if not isinstance(likelihood, NormalLikelihood):
        assert 0 <= float(inputs.min()) <= float(inputs.max()) <= 1


def test_black_and_white_against_the_formula():
    logits, x = torch.randn(2, 1, *IMAGE), (torch.rand(2, *IMAGE) < 0.5).double()
    p = torch.sigmoid(logits.squeeze(1))
    exact = torch.where(x == 1, p, 1 - p).log().flatten(1).sum(1)
    assert torch.allclose(BernoulliLikelihood(IMAGE)(logits).log_prob(x), exact)


def test_levels_sum_to_one():
    for likelihood in (
        CategoricalLikelihood((1, 1, 1), 256),
        DiscretisedLogisticLikelihood((1, 1, 1), 256),
    ):
        x = torch.arange(256.0).reshape(-1, 1, 1, 1)
        law = likelihood(3 * torch.randn(likelihood.output_shape))
        assert float(law.log_prob(x).exp().sum()) == pytest.approx(1, abs=1e-12)


def test_parameters_per_pixel():
    sizes = {name: case.make().num_params for name, case in LIKELIHOODS.items()}
    assert sizes == {
        "bernoulli": 1,
        "categorical": 5,
        "continuous bernoulli": 1,
        "discretised logistic": 2,
        "normal": 1,
    }


BAD = [
    (BernoulliLikelihood, (), torch.full((2, *IMAGE), 0.5), "only 0 and 1 .* got 0.5. Binarise"),
    (BernoulliLikelihood, (), torch.full((2, *IMAGE), 255.0), "only 0 and 1 .* got 255"),
    (CategoricalLikelihood, (16,), torch.full((2, *IMAGE), 16), "from 0 to 15 .* from 16 to 16"),
    (CategoricalLikelihood, (16,), torch.full((2, *IMAGE), 0.25), "whole levels .* got 0.25"),
    (DiscretisedLogisticLikelihood, (), torch.full((2, *IMAGE), -1.0), "from 0 to 255 .* from -1"),
    (ContinuousBernoulliLikelihood, (), torch.full((2, *IMAGE), 1.2), "from 0 to 1 .* to 1.2"),
    (ContinuousBernoulliLikelihood, (), torch.full((2, *IMAGE), math.nan), "from 0 to 1"),
    (NormalLikelihood, (), torch.full((2, *IMAGE), math.inf), "finite; got 32 values"),
    (NormalLikelihood, (), torch.zeros(2, *IMAGE, dtype=torch.uint8), "floating dtype .*uint8"),
    (BernoulliLikelihood, (), torch.zeros(2, 16), r"shape \(B, 1, 4, 4\); got \(2, 16\)"),
    (BernoulliLikelihood, (), torch.zeros(IMAGE), r"shape \(B, 1, 4, 4\); got \(1, 4, 4\)"),
    (
        CategoricalLikelihood,
        (),
        torch.zeros(2, *IMAGE, dtype=torch.complex64),
        "real dtype .*complex64",
    ),
]


@pytest.mark.parametrize(("make", "args", "x", "message"), BAD)
def test_images_that_do_not_fit(make: type, args: tuple, x: Tensor, message: str):
    likelihood = make(IMAGE, *args)
    with pytest.raises(ValueError, match=message):
        likelihood.check(x, values=True)


def test_whole_numbers_of_any_dtype_will_do():
    x = torch.randint(0, 2, (2, *IMAGE))
    for likelihood in (BernoulliLikelihood(IMAGE), CategoricalLikelihood(IMAGE)):
        for dtype in (torch.uint8, torch.int64, torch.bool, torch.float32):
            likelihood.check(x.to(dtype), values=True)
            inputs = likelihood.inputs(x.to(dtype), torch.zeros(()))
            assert inputs.dtype == torch.float64


def test_nothing_looks_at_values_with_validation_off():
    with torch.device("meta"):
        likelihood, x = CategoricalLikelihood(IMAGE), torch.zeros(2, *IMAGE)
    likelihood.check(x, values=False)
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="shape"):
        likelihood.check(x[0], values=False)


def test_arguments():
    with pytest.raises(ValueError, match="`event_shape` must hold positive integers"):
        BernoulliLikelihood((1, 0, 3))
    with pytest.raises(ValueError, match="`num_levels` must be an integer of at least 2; got 1"):
        CategoricalLikelihood(IMAGE, 1)
    with pytest.raises(ValueError, match="`scale` must be positive; got 0"):
        NormalLikelihood(IMAGE, 0)
    with pytest.raises(ValueError, match=r"`params` must end with shape \(5, 1, 4, 4\)"):
        CategoricalLikelihood(IMAGE, 5)(torch.zeros(2, 1, *IMAGE))
