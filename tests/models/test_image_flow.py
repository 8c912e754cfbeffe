"""Flows of images with whole levels: dequantisation, bounds, sampling, f-VAE, refusals."""

from __future__ import annotations

import io
import itertools
import math
import pickle
import re
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor

from flowvi.distributions import Flow, Quantised
from flowvi.flows import glow_image, realnvp_image
from flowvi.models import (
    FVAE,
    BernoulliLikelihood,
    DiagonalPosterior,
    ImageFlow,
    ImageFlowLikelihood,
    MLPDecoder,
    MLPEncoder,
    ModelGuidePair,
    UniformDequantizer,
    VariationalDequantizer,
    bits_per_dim,
)
from flowvi.nn import one_hot
from flowvi.objectives import ELBO, IWAE, STL
from flowvi.transforms import Affine, ElementwiseTransform

SMALL = {"num_layers": 2, "hidden_dims": (4,)}


def normal_pixels(shape: tuple[int, ...], loc: float, scale: float) -> Flow:
    """Independent normal pixels, whose cells have a closed form."""
    flow = Flow(ElementwiseTransform(shape, Affine()))
    size = math.prod(shape)
    with torch.no_grad():
        flow.transform.params[:size] = loc
        flow.transform.params[size:] = 4 * math.atanh(math.log(scale) / 4)
    return flow


def cell(x: Tensor, loc: Tensor | float, scale: float) -> Tensor:
    """Log-probability that a normal pixel lies between ``x`` and ``x + 1``."""
    law = dist.Normal(loc, scale)
    return (law.cdf(x + 1) - law.cdf(x)).log()


def image_flow(dequantizer: object = None, context_dim: int = 2) -> ImageFlow:
    return ImageFlow(glow_image((1, 4, 4), context_dim, **SMALL), 17, dequantizer)


def f_vae() -> FVAE:
    """Latents of two dimensions, two labels, a Glow that reads feature maps."""
    flow = glow_image((1, 4, 4), 32, context_shape=(2, 4, 4), **SMALL)
    likelihood = ImageFlowLikelihood(flow, 17, context_shape=(2, 4, 4))
    encoder = MLPEncoder((1, 4, 4), (8,))
    decoder = MLPDecoder(2 + 2, (8,), likelihood.output_shape)
    return FVAE(encoder, decoder, likelihood, DiagonalPosterior(10, 2), context_dim=2)


PAIRS: dict[str, Callable[[], ModelGuidePair]] = {
    "flow": image_flow,
    "flow, variational": lambda: image_flow(
        VariationalDequantizer((1, 4, 4), 17, num_layers=2, hidden_dims=(4,), num_features=2)
    ),
    "f-vae": f_vae,
}
every = pytest.mark.parametrize("name", PAIRS)


def batch(rows: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randint(0, 17, (rows, 1, 4, 4)).double(), one_hot(torch.arange(rows) % 2, 2)


def moved(module: torch.nn.Module, std: float = 0.2) -> torch.nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(std * torch.randn_like(p))
    return module


# Whole levels and dequantisation.


def test_whole_levels_are_floors():
    v = torch.tensor([-3.2, 0.0, 2.999, 3.0, 7.0])
    law = Quantised(v, 5)
    assert law.mean.tolist() == [0, 0, 2, 3, 4]
    assert law.sample((2,)).shape == (2, 5)
    levels = torch.arange(5.0)
    table = law.expand((5, 5)).log_prob(levels.unsqueeze(-1).expand(5, 5))
    assert torch.equal(table.exp().sum(0), torch.ones(5))
    assert table[2].tolist() == [-math.inf, -math.inf, 0, -math.inf, -math.inf]
    with pytest.raises(ValueError, match="`num_levels` must be an integer of at least 2; got 1"):
        Quantised(v, 1)
    with pytest.raises(ValueError, match="within the support"):
        Quantised(v, 5, validate_args=True).log_prob(torch.full((5,), 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dequantised_images_keep_their_levels(dtype):
    x = torch.full((300, 1, 8, 8), 255, dtype=dtype)
    shape = (1, 8, 8)
    learned = VariationalDequantizer(shape, hidden_dims=(4,), num_features=2).to(dtype)
    for dequantizer in (UniformDequantizer(shape), learned, moved(learned, 1.0)):
        law = dequantizer(x)
        v, log_q = law.rsample_and_log_prob((3,))
        assert v.dtype == dtype
        assert torch.equal(v.floor(), x.expand_as(v))
        assert log_q.isfinite().all()


def test_noise_that_rounds_to_one_has_a_finite_score():
    dequantizer = UniformDequantizer((1, 1, 2)).float()
    x = torch.zeros(1, 1, 1, 2, dtype=torch.float32)
    assert dequantizer(x).unchecked().log_prob(x + 1).tolist() == [0.0]


def test_variational_dequantisation_starts_uniform():
    x = torch.randint(0, 5, (7, 1, 4, 4)).double()
    law = VariationalDequantizer((1, 4, 4), 5, hidden_dims=(4,))(x)
    v, log_q = law.rsample_and_log_prob()
    torch.testing.assert_close(log_q, torch.zeros(7), rtol=0, atol=1e-9)
    torch.testing.assert_close(law.log_prob(v.detach().clone()), log_q, rtol=0, atol=1e-8)


def test_variational_dequantisation_integrates_to_one_over_the_cell():
    dequantizer = VariationalDequantizer((1, 1, 2), 5, hidden_dims=(4,), num_features=2)
    x = torch.tensor([[[[3.0, 1.0]]]])
    law = moved(dequantizer, 0.15)(x).unchecked()
    middles = (torch.arange(250) + 0.5) / 250
    u = torch.cartesian_prod(middles, middles).reshape(-1, 1, 1, 1, 2)
    with torch.no_grad():
        density = law.log_prob(x + u).exp()
        other = dequantizer(x - 1).unchecked().log_prob(x - 1 + u[::100]).exp()
    assert density.std() > 0.1
    assert abs(density.mean() - 1) < 1e-3
    assert (other - density[::100]).abs().max() > 1e-2


# The bound against enumeration.


def test_bound_of_uniform_dequantisation_against_closed_forms():
    pair = ImageFlow(normal_pixels((1, 1, 2), 1.3, 0.6), 3)
    levels = torch.tensor(list(itertools.product(range(3), repeat=2))).double()
    images = levels.reshape(9, 1, 1, 2)
    exact = cell(images, 1.3, 0.6).sum((1, 2, 3))
    found = pair.log_likelihood(images, 4000)
    # 4000 weights per image, 5 of their standard errors.
    assert ((found.value - exact).abs() < 5 * found.se).all()
    assert found.se.max() < 0.05
    u = (torch.arange(2000) + 0.5) / 2000
    slices = dist.Normal(1.3, 0.6).log_prob(images.unsqueeze(-1) + u).mean(-1).sum((1, 2, 3))
    draws = torch.stack([pair.terms(images).elbo for _ in range(200)])
    error = draws.std(0) / 200**0.5
    # 200 draws, 5 standard errors.
    assert ((draws.mean(0) - slices).abs() < 5 * error).all()
    assert (slices < exact).all()
    assert slices.exp().sum() < exact.exp().sum() < 1


def test_learned_dequantisation_closes_the_bound():
    loc, scale = 1.45, 0.15
    flow = normal_pixels((1, 1, 2), loc, scale)
    for p in flow.parameters():
        p.requires_grad_(False)
    dequantizer = VariationalDequantizer(
        (1, 1, 2), 3, num_layers=2, hidden_dims=(4,), num_features=2
    )
    pair = ImageFlow(flow, 3, dequantizer)
    x = torch.ones(32, 1, 1, 2)
    exact = cell(x[0], loc, scale).sum()
    with torch.no_grad():
        before = pair.terms(x, num_particles=20).elbo.mean()
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(60):
        svi.step(x)
    with torch.no_grad():
        terms = pair.terms(x, num_particles=20).elbo
    # 640 draws, 5 standard errors; uniform noise is far away.
    assert terms.mean() < exact + 5 * terms.std() / len(terms) ** 0.5
    assert before < exact - 1.5
    assert terms.mean() > exact - 0.2


def test_bits_per_dimension():
    log_p = torch.tensor([-16 * math.log(2.0), 0.0])
    assert bits_per_dim(log_p, (1, 4, 4)).tolist() == [1.0, 0.0]


# The pair.


@every
def test_trains_samples_and_reconstructs(name):
    pair, (x, labels) = PAIRS[name](), batch()
    pair.initialize(x, labels)
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-2}), ELBO(max_plate_nesting=1))
    first = svi.evaluate_loss(x, labels)
    for _ in range(30):
        svi.step(x, labels)
    assert svi.evaluate_loss(x, labels) < first - 6
    shape = (6, 1, 4, 4)
    drawn = pair.sample(context=labels, temperature=0.7)
    assert drawn.shape == pair.reconstruct(x, labels).shape == shape
    assert torch.equal(drawn, drawn.round().clamp(0, 16))
    predicted = Predictive(pair.model, num_samples=1)(None, labels)["x"]
    assert torch.equal(predicted, predicted.round().clamp(0, 16))
    torch.manual_seed(3)
    again = pair.sample(context=labels)
    torch.manual_seed(3)
    assert torch.equal(pair.sample(context=labels), again)
    estimate = pair.log_likelihood(x, 10, labels)
    assert estimate.value.isfinite().all()


@every
def test_path_gradients_and_importance_weighted_bounds_train_it_too(name):
    pair, (x, labels) = moved(PAIRS[name](), 0.05), batch()
    pair.initialize(x, labels)
    values = {}
    for objective in (STL(4, max_plate_nesting=1), IWAE(4, max_plate_nesting=1)):
        torch.manual_seed(0)
        loss = objective.differentiable_loss(pair.model, pair.guide, x, labels)
        pair.zero_grad()
        loss.backward()
        grads = [p.grad for p in pair.likelihood.flow.parameters()]
        assert all(g is not None and g.isfinite().all() for g in grads)
        values[type(objective)] = float(loss.detach())
    # The same draws: an average of weights is above one of their logarithms.
    assert values[IWAE] < values[STL]


@every
def test_cold_draws_vary_less(name):
    pair, (x, labels) = PAIRS[name](), batch()
    pair.initialize(x, labels)
    context = labels[:1].expand(200, 2)
    cold, warm = (pair.sample(context=context, temperature=t).std(0).mean() for t in (0.1, 1.0))
    assert cold < 0.3 * warm


@every
def test_interpolation_begins_and_ends_at_the_images(name):
    pair, (x, labels) = moved(PAIRS[name]()), batch()
    pair.initialize(x, labels)
    way = pair.interpolate(x[:2], 5, labels[:2])
    assert way.shape == (5, 1, 4, 4)
    assert torch.equal(way[0], x[0])
    assert torch.equal(way[-1], x[1])
    assert not torch.equal(way[2], x[0])


@every
def test_saving_keeps_the_start_from_data_bit_by_bit(name):
    pair, (x, labels) = moved(PAIRS[name]()), batch()
    pair.initialize(x, labels)
    file = io.BytesIO()
    torch.save(pair.state_dict(), file)
    file.seek(0)
    loaded = PAIRS[name]()
    loaded.load_state_dict(torch.load(file))
    results = []
    for each in (pair, loaded, pickle.loads(pickle.dumps(pair))):
        torch.manual_seed(1)
        results.append(each.log_likelihood(x, 2, labels).value)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "name", ["f-vae", *(pytest.param(n, marks=pytest.mark.slow) for n in list(PAIRS)[:2])]
)
def test_runs_on_meta(name):
    pair = PAIRS[name]().to("meta")
    x, labels = (t.to("meta") for t in batch())
    with pyro.validation_enabled(False):
        loss = ELBO(max_plate_nesting=1).differentiable_loss(pair.model, pair.guide, x, labels)
        loss.backward()
        assert pair.sample(context=labels).is_meta
    assert all(p.grad is not None and p.grad.is_meta for p in pair.parameters())


def test_unconditional_flow_draws_as_many_as_asked():
    pair = image_flow(context_dim=0)
    assert pair.sample(7).shape == (7, 1, 4, 4)
    assert pair.sample_mean(7).shape == (7, 1, 4, 4)
    images = batch()[0]
    assert torch.equal(pair.reconstruct(images), images)


def test_a_flow_without_normalisations_needs_no_start():
    pair = ImageFlow(normal_pixels((1, 4, 4), 1.0, 1.0), 17)
    before = {k: v.clone() for k, v in pair.state_dict().items()}
    pair.initialize(batch()[0])
    assert all(torch.equal(before[k], v) for k, v in pair.state_dict().items())


# f-VAE.


def linear_f_vae(loadings: Tensor, loc: Tensor, scale: float, num_levels: int) -> FVAE:
    """v = A z + loc + s eps, for two pixels."""
    flow = Flow(ElementwiseTransform((1, 1, 2), Affine(), 2, hidden_dims=()))
    layer = flow.transform.network.layers[0]
    decoder = MLPDecoder(2, (), (2,))
    with torch.no_grad():
        layer.weight[:2] = torch.eye(2)
        layer.bias[:2] = loc
        layer.bias[2:] = 4 * math.atanh(math.log(scale) / 4)
        decoder.network.layers[0].weight.copy_(loadings)
        decoder.network.layers[0].bias.zero_()
    likelihood = ImageFlowLikelihood(flow, num_levels)
    return FVAE(MLPEncoder((1, 1, 2), (4,)), decoder, likelihood, DiagonalPosterior(4, 2))


def test_f_vae_of_a_linear_decoder_against_the_exact_law():
    """The law of v is normal; its cells are integrated on a grid."""
    scale, loadings = 0.8, torch.tensor([[0.9, 0.3], [-0.4, 0.7]])
    loc = torch.tensor([1.2, 2.0])
    pair = linear_f_vae(loadings, loc, scale, 5)
    x = torch.tensor([[1.0, 2.0], [0.0, 3.0], [2.0, 1.0]]).reshape(3, 1, 1, 2)
    middles = (torch.arange(200) + 0.5) / 200
    u = torch.cartesian_prod(middles, middles)
    cover = loadings @ loadings.T + scale**2 * torch.eye(2)
    law = dist.MultivariateNormal(loc, cover)
    exact = law.log_prob(x.reshape(3, 1, 2) + u).exp().mean(-1).log()
    found = pair.log_likelihood(x, 20_000)
    # 20000 weights per image, 5 of their standard errors.
    assert found.se.max() < 0.03
    assert ((found.value - exact).abs() < 5 * found.se).all()
    bound = pair.terms(x, num_particles=2000)
    assert set(bound.divergences) == {"z", "v"}
    assert (bound.elbo < exact).all()


def test_draws_of_an_f_vae_have_the_spread_of_its_latents():
    loadings = torch.tensor([[9.0, 3.0], [-4.0, 7.0]])
    pair = linear_f_vae(loadings, torch.full((2,), 100.0), 2.0, 200)
    drawn = pair.sample(4000).flatten(1)
    # Cutting to whole levels adds 1/12; 4000 draws, 5 standard errors of a covariance.
    exact = loadings @ loadings.T + (4 + 1 / 12) * torch.eye(2)
    variances = exact.diagonal()
    error = ((variances[:, None] * variances + exact**2) / 4000).sqrt()
    assert ((drawn.T.cov() - exact).abs() < 5 * error).all()
    # Cold images are floors of the decoder's means, at latents near 0 or at those of the image.
    x = drawn[:5].reshape(5, 1, 1, 2)
    torch.manual_seed(0)
    z = pair.latent_posterior(x).sample()
    torch.manual_seed(0)
    cold = pair.reconstruct(x, temperature=1e-6).flatten(1)
    assert torch.equal(cold, (z @ loadings.T + 100).floor())


def test_f_vae_reads_its_latents():
    pair, (x, labels) = moved(f_vae(), 0.5), batch()
    flow = pair.likelihood.flow
    features = pair.decoder(torch.randn(6, 4)).flatten(-3)
    one, other = flow(features).log_prob(x), flow(features.flip(0)).log_prob(x)
    assert (one - other).abs().min() > 1e-3
    assert pair.latent_posterior(x, labels).event_shape == (2,)


# Refusals.


@every
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, c: (x[:, :, :3], c), "`x` must have shape (B, 1, 4, 4); got (6, 1, 3, 4)"),
        (lambda x, c: (x / 2, c), "`x` must hold whole levels for"),
        (lambda x, c: (x + 17, c), "`x` must be from 0 to 16"),
        (lambda x, c: (x - 1, c), "`x` must be from 0 to 16"),
        (lambda x, c: (x * 1j, c), "`x` must have a real dtype for"),
        (lambda x, c: (x, c[:5]), "`context` must have shape (6, 2); got (5, 2)"),
        (lambda x, c: (x, None), "`context` must have shape (6, 2); got None"),
    ],
)
def test_wrong_images_and_contexts_are_refused(name, change, message):
    pair = PAIRS[name]()
    x, context = change(*batch())
    if message.startswith("`x` must be from"):
        x[0, 0, 0, 0] = -1 if x.min() < 0 else 30
    for program in (pair.model, pair.guide):
        with pytest.raises(ValueError, match=re.escape(message)):
            program(x, context)


def test_other_refusals():
    pair, (x, labels) = image_flow(), batch()
    with pytest.raises(ValueError, match="`labels` must be from 0 to 1; got values from 0 to 2"):
        one_hot(torch.tensor([0, 2]), 2)
    with pytest.raises(ValueError, match="`num_steps` must be an integer of at least 2; got 1"):
        pair.interpolate(x[:2], 1, labels[:2])
    with pytest.raises(ValueError, match="`x` must hold 2 images; got 6"):
        pair.interpolate(x, 5, labels)
    with pytest.raises(ValueError, match="`temperature` must be positive; got 0"):
        pair.sample(context=labels, temperature=0)
    flow = realnvp_image((1, 4, 4), 2, **SMALL)
    with pytest.raises(ValueError, match=re.escape("`context_shape` must have size 2")):
        ImageFlowLikelihood(flow, context_shape=(3,))
    with pytest.raises(ValueError, match=re.escape("must have event shape (1, 4, 4)")):
        ImageFlow(flow, 17, UniformDequantizer((1, 4, 2)))
    with pytest.raises(ValueError, match="`num_levels` must be an integer of at least 2; got 1"):
        ImageFlow(flow, 1)
    with pytest.raises(ValueError, match="`num_layers` must be an integer of at least 2; got 1"):
        VariationalDequantizer((1, 4, 4), num_layers=1)
    with pytest.raises(ValueError, match="`event_shape` must be \\(channels, height, width\\)"):
        VariationalDequantizer((4, 4))
    encoder, plain = MLPEncoder((1, 4, 4), (8,)), BernoulliLikelihood((1, 4, 4))
    decoder = MLPDecoder(2, (8,), plain.output_shape)
    with pytest.raises(TypeError, match="`likelihood` must be an ImageFlowLikelihood; got Bern"):
        FVAE(encoder, decoder, plain, DiagonalPosterior(8, 2))
