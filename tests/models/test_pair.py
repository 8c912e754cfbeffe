"""What every model-and-guide pair of images does."""

from __future__ import annotations

import copy
import io
import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from registry import IMAGE, PAIRS
from torch import Tensor, nn

from flowvi.infer import fit
from flowvi.models import VAE, BernoulliLikelihood, ImagePair, ModelGuidePair
from flowvi.nn import one_hot
from flowvi.objectives import ELBO, IWAE, STL, BetaELBO, FreeBits


def arguments(pair: ImagePair, count: int = 4) -> tuple[Tensor, ...]:
    levels = getattr(pair.likelihood, "num_levels", 2)
    x = torch.randint(0, levels, (count, *IMAGE)).to(next(pair.parameters()).dtype)
    if pair.context_dim == 0:
        return (x,)
    return x, one_hot(torch.arange(count) % pair.context_dim, pair.context_dim)


def build(name: str) -> ImagePair:
    """A pair away from its start, where zeros of last layers would hide what is below."""
    pair = PAIRS[name].make()
    for parameter in pair.parameters():
        if parameter.dim() > 0:
            nn.init.normal_(parameter, std=0.4)
    return pair


def step(pair: ModelGuidePair, args: tuple, lr: float = 0.01) -> float:
    optim = pyro.optim.Adam({"lr": lr})
    return SVI(pair.model, pair.guide, optim, Trace_ELBO(max_plate_nesting=1)).step(*args)


@pytest.mark.parametrize("name", PAIRS)
def test_every_parameter_gets_a_gradient(name: str):
    pair = build(name)
    args = arguments(pair)
    loss = ELBO(2, max_plate_nesting=2).differentiable_loss(pair.model, pair.guide, *args)
    loss.backward()
    assert loss.isfinite()
    named = dict(pair.named_parameters())
    assert [n for n, p in named.items() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert all(p.grad.isfinite().all() for p in named.values())


@pytest.mark.parametrize("name", PAIRS)
def test_terms_and_weights_against_stock_pyro(name: str):
    pair = build(name).eval()
    args = arguments(pair)
    torch.manual_seed(3)
    terms = pair.terms(*args, num_particles=5)
    torch.manual_seed(3)
    stock = Trace_ELBO(5, max_plate_nesting=1, vectorize_particles=True)
    loss = stock.loss(pair.model, pair.guide, *args)
    assert float(terms.elbo.detach().sum()) == pytest.approx(-loss, rel=1e-9)
    torch.manual_seed(3)
    context = args[1] if len(args) > 1 else None
    estimate = pair.log_likelihood(args[0], 5, context)
    torch.manual_seed(3)
    objective = IWAE(5, max_plate_nesting=1)
    bound = -objective.loss(pair.model, pair.guide, *args)
    assert float(estimate.value.sum()) == pytest.approx(bound, rel=1e-9)


@pytest.mark.parametrize("name", PAIRS)
def test_shapes_of_what_it_makes(name: str):
    pair = build(name)
    x, *context = arguments(pair)
    context = context[0] if context else None
    assert pair.training
    assert pair.sample(4, context).shape == pair.sample_mean(4, context).shape == x.shape
    assert pair.reconstruct(x, context).shape == x.shape
    pair.likelihood.check(pair.sample(4, context), values=True)
    assert all(module.training for module in pair.modules())
    made = Predictive(pair.model, num_samples=3)(None, context, num_items=4)
    assert made["x"].shape == (3, *x.shape)


@pytest.mark.parametrize("name", PAIRS)
def test_seeds_are_respected(name: str):
    results = []
    for _ in range(2):
        pyro.clear_param_store()
        torch.manual_seed(5)
        pair = PAIRS[name].make()
        args = arguments(pair)
        results.append([step(pair, args), *pair.sample(4, *args[1:]).flatten().tolist()])
    assert results[0] == results[1]


@pytest.mark.parametrize("name", PAIRS)
def test_meta_device(name: str):
    with torch.device("meta"), pyro.validation_enabled(False):
        pair = PAIRS[name].make()
        args = [torch.empty(4, *IMAGE)]
        if pair.context_dim:
            args.append(torch.empty(4, pair.context_dim))
        for objective in (ELBO, IWAE):
            loss = objective(2, max_plate_nesting=2).differentiable_loss(
                pair.model, pair.guide, *args
            )
            loss.backward()
            assert loss.is_meta


@pytest.mark.gpu
@pytest.mark.parametrize("name", PAIRS)
def test_gpu(name: str):
    pair = build(name).to("cuda")
    args = [a.to("cuda") for a in arguments(pair)]
    loss = ELBO(2, max_plate_nesting=2).differentiable_loss(pair.model, pair.guide, *args)
    loss.backward()
    assert bool(loss.isfinite())


@pytest.mark.parametrize("name", PAIRS)
def test_float32_stays_float32(name: str):
    pair = build(name).float()
    x, *context = arguments(pair)
    terms = pair.terms(x.double(), *(c.float() for c in context))
    assert terms.elbo.dtype == torch.float32
    assert pair.sample(4, *(c.float() for c in context)).dtype == torch.float32


@pytest.mark.parametrize("name", PAIRS)
def test_saved_whole_or_by_state(name: str):
    pair = build(name)
    args = arguments(pair)
    step(pair, args)
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    other = PAIRS[name].make()
    other.load_state_dict(pair.state_dict())
    values = []
    for made in (pair, loaded, other, copy.deepcopy(pair)):
        torch.manual_seed(1)
        values.append(made.eval().terms(*args).elbo.detach())
    assert all(torch.equal(value, values[0]) for value in values)


# The parameter store.


def test_two_pairs_of_one_class_share_nothing():
    pairs = [build("vae") for _ in range(2)]
    before = [copy.deepcopy(pair.state_dict()) for pair in pairs]
    args = arguments(pairs[0])
    step(pairs[0], args)
    step(pairs[1], args)
    for pair, old in zip(pairs, before, strict=True):
        assert all((pair.state_dict()[k] != v).any() for k, v in old.items())
    names = set(pyro.get_param_store().keys())
    assert len(names) == 2 * len(before[0])
    assert {n.split(".")[0] for n in names} == {"vae", "vae_1"}


def test_a_store_from_a_file_is_taken_over(tmp_path):
    pair = build("vae")
    args = arguments(pair)
    step(pair, args)
    pyro.get_param_store().save(str(tmp_path / "store"))
    pyro.clear_param_store()
    other = PAIRS["vae"].make()
    pyro.get_param_store().load(str(tmp_path / "store"))
    step(other, args, lr=1e-12)
    for ours, theirs in zip(pair.parameters(), other.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_frozen_parameters_stay():
    pair = build("vae")
    frozen = pair.decoder.requires_grad_(False)
    before = [p.clone() for p in frozen.parameters()]
    step(pair, arguments(pair))
    assert all(torch.equal(a, b) for a, b in zip(before, frozen.parameters(), strict=True))
    assert not any("decoder" in name for name in pyro.get_param_store().keys())  # noqa: SIM118


# Minibatches and objectives.


@pytest.mark.parametrize("name", ["vae", "vae, context", "ladder", "residual"])
def test_minibatches_are_scaled(name: str):
    whole = PAIRS[name].make().eval()
    x, *context = arguments(whole, 12)
    part = copy.deepcopy(whole)
    part.num_total = 12
    batches = [(t[:4], *(c[:4] for c in context)) for t in (x, x.roll(4, 0), x.roll(8, 0))]
    if context:
        batches = [(x[k : k + 4], context[0][k : k + 4]) for k in (0, 4, 8)]
    for program in (part.guide, part.model):
        sites = poutine.trace(program).get_trace(*batches[0]).nodes.values()
        scales = {s["name"]: s["scale"] for s in sites if s["type"] == "sample"}
        assert {scale for name, scale in scales.items() if name != "items"} == {3.0}
    loss = Trace_ELBO(200, max_plate_nesting=1, vectorize_particles=True).loss
    exact = loss(whole.model, whole.guide, x, *context)
    # 200 draws of 12 images, each of which varies by less than a tenth of its bound.
    estimate = sum(loss(part.model, part.guide, *batch) for batch in batches) / 3
    assert estimate == pytest.approx(exact, rel=0.03)
    # What is said of an image does not depend on how many there are.
    torch.manual_seed(1)
    value = whole.log_likelihood(x, 5, *context).value
    torch.manual_seed(1)
    assert torch.equal(part.log_likelihood(x, 5, *context).value, value)


@pytest.mark.parametrize("name", ["vae, flow prior", "ladder", "hierarchical", "residual"])
def test_other_objectives(name: str):
    pair = build(name)
    args = arguments(pair)
    beta = 0.5 if name == "vae, flow prior" else {"z1": 0.5}
    for objective in (
        STL(2, max_plate_nesting=1),
        BetaELBO(2, beta=beta, max_plate_nesting=1),
        BetaELBO(2, free_bits=FreeBits(0.1), max_plate_nesting=1),
    ):
        loss = objective.differentiable_loss(pair.model, pair.guide, *args)
        loss.backward()
        assert loss.isfinite()


def test_fit_trains_it():
    pair = PAIRS["vae"].make()
    (x,) = arguments(pair, 8)
    before = float(pair.terms(x, num_particles=50).elbo.detach().mean())
    fit(pair.model, pair.guide, x, num_steps=60, seed=0, progress_bar=False)
    assert float(pair.terms(x, num_particles=50).elbo.detach().mean()) > before + 0.3


# log p(x).


def test_chunks_do_not_matter():
    pair = build("vae")
    (x,) = arguments(pair, 5)
    many = pair.log_likelihood(x, 150)
    few = pair.log_likelihood(x, 150, max_rows=4)
    gap = (many.value - few.value).abs()
    # Two independent estimates: five standard errors of the difference.
    assert bool((gap < 5 * (many.se**2 + few.se**2).sqrt()).all())
    assert bool((many.se > 0).all())
    assert math.isnan(float(pair.log_likelihood(x, 1).se[0]))


def test_standard_error_is_that_of_repeats():
    pair = build("vae")
    (x,) = arguments(pair, 1)
    repeated = pair.log_likelihood(x.expand(400, *IMAGE), 200)
    # 400 repeats know their spread to 4 %.
    assert float(repeated.value.std()) == pytest.approx(float(repeated.se.mean()), rel=0.25)
    assert float(repeated.mean_se) == pytest.approx(float(repeated.value.std()) / 20)


# Errors.


def test_errors():
    pair = PAIRS["vae"].make()
    (x,) = arguments(pair)
    with pytest.raises(ValueError, match="`x` must hold only 0 and 1"):
        pair.model(0.5 * x + 0.1)
    with pytest.raises(ValueError, match=r"`x` must have shape \(B, 1, 4, 4\)"):
        pair.guide(x.flatten(1))
    with pytest.raises(ValueError, match="`x` must be given to the guide"):
        pair.guide(None)
    with pytest.raises(ValueError, match="`context` must be None without a context_dim"):
        pair.model(x, torch.zeros(4, 2))
    with pytest.raises(ValueError, match="`num_particles` must be at least 1; got 0"):
        pair.log_likelihood(x, 0)
    conditional = PAIRS["vae, context"].make()
    with pytest.raises(ValueError, match=r"`context` must have shape \(4, 2\); got None"):
        conditional.guide(x)
    with pytest.raises(ValueError, match=r"`context` must have shape \(4, 2\); got \(3, 2\)"):
        conditional.model(x, torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"`context` must have shape \(B, 2\); got \(3,\)"):
        conditional.sample(3, torch.zeros(3))
    with pytest.raises(ValueError, match="`num_total` must be a positive integer or None; got 0"):
        VAE(pair.encoder, pair.decoder, pair.likelihood, pair.posterior, num_total=0)


def test_parts_that_do_not_fit():
    pair = PAIRS["vae"].make()
    parts = [pair.encoder, pair.decoder, pair.likelihood, pair.posterior]
    with pytest.raises(ValueError, match="`posterior` must have feature_dim 10"):
        VAE(*parts, context_dim=2)
    other = BernoulliLikelihood((1, 5, 5))
    with pytest.raises(ValueError, match=r"`decoder` must have output_shape \(1, 1, 5, 5\)"):
        VAE(parts[0], parts[1], other, parts[3])
    with pytest.raises(TypeError, match="`likelihood` must be a module; got str"):
        ImagePair.__init__(pair, "bernoulli")


def test_labels_out_of_range():
    with pytest.raises(ValueError, match="`labels` must be from 0 to 9; got values from 0 to 10"):
        one_hot(torch.tensor([0, 10]), 10)
    with pytest.raises(ValueError, match="`labels` must have an integer dtype; got torch.float64"):
        one_hot(torch.tensor([1.0]), 10)
    assert one_hot(torch.tensor([1]), 3).tolist() == [[0, 1, 0]]
