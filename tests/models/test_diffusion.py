"""Diffusion models: pairs for stock SVI, devices, samples, likelihoods, labels, errors."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from diffusion_cases import MODELS, ExactDenoiser, faded_path, mixture, schedule, small
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.optim import Adam
from torch import nn

from flowvi.models import (
    VDM,
    DiffEnc,
    DiffusionTerms,
    FadingEncoder,
    LearnedEncoder,
    LevelEnd,
    NeuralFlowDiffusion,
    RealEnd,
    ScoreModel,
)
from flowvi.nn import MLPDenoiser, UNet
from flowvi.objectives import ELBO, IWAE
from flowvi.paths import (
    AlphaSigma,
    LearnedMonotone,
    Linear,
    LinearLogSNR,
    Prediction,
    UniformTimes,
    VarianceTrained,
)
from flowvi.samplers import (
    DDIM,
    AnnealedLangevin,
    DPMSolver,
    Parallel,
    ProbabilityFlow,
    ReverseSDE,
    sample,
)
from flowvi.transforms import RK4


def items(name: str, number: int = 6):
    """Items and, where wanted, contexts."""
    context_dim, _ = MODELS[name]
    if "levels" in name:
        return (torch.randint(4, (number, 1, 1, 2)),)
    x = torch.randn(number, 2)
    return (x, torch.eye(context_dim)[torch.arange(number) % 3]) if context_dim else (x,)


@pytest.mark.parametrize("name", MODELS)
def test_stock_svi_and_terms(name):
    """Every parameter that a step can train has a gradient; the terms add up to the loss."""
    model, args = MODELS[name][1](), items(name)
    svi = SVI(model.model, model.guide, Adam({"lr": 1e-3}), Trace_ELBO(num_particles=2))
    assert math.isfinite(svi.step(*args))
    loss = Trace_ELBO(
        num_particles=3, vectorize_particles=True, max_plate_nesting=1
    ).differentiable_loss(model.model, model.guide, *args)
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    for (key, _), grad in zip(model.named_parameters(), grads, strict=True):
        assert grad is not None, key
        assert grad.isfinite().all(), key
    terms = model.eval().terms(*args, num_particles=2)
    assert isinstance(terms, DiffusionTerms)
    assert terms.elbo.shape == (6,)
    parts = terms.bits_per_dim()
    total = parts["prior"] + parts["reconstruction"] + parts["diffusion"]
    torch.testing.assert_close(total, parts["total"])
    torch.testing.assert_close(parts["total"], -terms.elbo.mean() / (2 * math.log(2)))


SLOW = [pytest.param("neural flow", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", ["diffenc", "vdm, chain", "vdm, context", "vdm, levels", *SLOW])
def test_mean_loss_is_the_sum_of_the_terms(name):
    """Stock ELBO of many draws against the terms of many draws; 4.5 standard errors."""
    model, args = MODELS[name][1]().eval(), items(name, 2)
    with torch.no_grad():
        draws = [ELBO(1000).log_weight_draws(model.model, model.guide, *args) for _ in range(2)]
        draws = torch.cat([d.flatten() for d in draws])
        terms = [model.terms(*args, num_particles=200).elbo.sum() for _ in range(10)]
    terms = torch.stack(terms)
    error = (draws.var() / len(draws) + terms.var() / 10).sqrt()
    assert abs(draws.mean() - terms.mean()) < 4.5 * error + 1e-3 * abs(terms.mean())


def slow_unless(*names: str) -> list:
    """All models, of which only the named ones run by default."""
    return [n if n in names else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]


@pytest.mark.parametrize(
    "name",
    slow_unless(
        "diffenc", "neural flow", "score, ve", "vdm, chain", "vdm, levels", "vdm, variance"
    ),
)
def test_meta_device(name):
    model = MODELS[name][1]().to("meta")
    args = [a.to("meta") for a in items(name)]
    with pyro.validation_enabled(False):
        loss = ELBO().differentiable_loss(model.model, model.guide, *args)
    loss.backward()
    assert loss.is_meta
    model.terms(*args).elbo.sum().backward()


@pytest.mark.parametrize(
    "name", slow_unless("diffenc, chain", "score, sub-vp", "vdm, context", "vdm, levels")
)
def test_samples(name):
    context_dim, make = MODELS[name]
    model = make()
    shape = (1, 1, 2) if "levels" in name else (2,)
    context = torch.eye(3) if context_dim else None
    args = (3, context) if context_dim else (3,)
    x = model.sample(*args, num_steps=4)
    assert x.shape == (3, *shape)
    assert x.isfinite().all()
    assert model.training
    if name == "neural flow":
        return
    drawn = Predictive(model.model, num_samples=2)(None, context, num_items=3)
    assert drawn["x"].shape[-len(shape) :] == shape
    assert drawn["x"].isfinite().all()
    assert model.sample(*args, sampler=ReverseSDE(), num_steps=4).shape == (3, *shape)


def exact_model(**options):
    own = LinearLogSNR(-7.0, 9.0)
    return VDM(RealEnd((1,)), ExactDenoiser(own), own, prediction=Prediction.DATA, **options)


def test_mean_bound_of_an_exact_denoiser_is_the_mean_log_density():
    """40,000 items, 20 times; 3.5 standard errors, below 0.012 nats each, plus the cut ends."""
    y = mixture().sample((40_000,))
    terms = exact_model().terms(y, num_times=20)
    gap = terms.elbo - mixture().log_prob(y)
    error = gap.std() / len(y) ** 0.5
    assert error < 0.012
    assert abs(gap.mean()) < 3.5 * error + 2e-3


@pytest.mark.slow
def test_layers_of_an_exact_denoiser_cost_what_they_should():
    """Mean gap of T layers: sum over layers minus integral of the posterior variance."""
    layers, y = 20, mixture().sample((4000,))
    terms = exact_model(num_layers=layers).terms(y)
    own = exact_model().path.schedule
    gap = float((mixture().log_prob(y) - terms.elbo).mean())
    error = float((mixture().log_prob(y) - terms.elbo).std()) / 4000**0.5
    # Posterior variance by quadrature over data and noise at every time.
    grid = torch.linspace(-4.0, 4.0, 201)
    p = mixture().log_prob(grid.unsqueeze(-1)).exp() * (grid[1] - grid[0])
    eps = torch.linspace(-6.0, 6.0, 61)
    p_eps = torch.exp(-(eps**2) / 2) / math.sqrt(2 * math.pi) * (eps[1] - eps[0])

    def variance(t):
        values = own(t)
        x = values.alpha * grid.unsqueeze(-1) + values.sigma * eps
        guess = ExactDenoiser(own)(x.unsqueeze(-1), t).squeeze(-1)
        return ((grid.unsqueeze(-1) - guess) ** 2 * p_eps * p.unsqueeze(-1)).sum()

    fine = torch.linspace(0, 1, 101)
    v = torch.stack([variance(t.reshape(1)) for t in fine])
    snr = own.log_snr(fine).exp()
    integral = torch.trapezoid(v * snr, own.log_snr(fine)) / 2
    steps = (v[:-1:5] * snr[::5].diff()).sum() / 2
    assert abs(gap - float(steps - integral)) < 4.5 * error + 0.01
    assert gap > 0.3


@pytest.mark.parametrize("num_layers", [None, 7])
@pytest.mark.parametrize("prediction", [Prediction.NOISE, Prediction.ANGULAR])
def test_identity_encoder_is_a_plain_diffusion(num_layers, prediction):
    network, x = small(), torch.randn(5, 2)
    identity = LearnedEncoder(MLPDenoiser(2, (8,)), schedule())
    options = {"prediction": prediction, "num_layers": num_layers}
    plain = VDM(RealEnd((2,)), network, schedule(), **options)
    encoded = DiffEnc(RealEnd((2,)), network, identity, schedule(), **options)
    found = []
    for model in (plain, encoded):
        torch.manual_seed(1)
        terms = model.terms(x, num_particles=3, num_times=4)
        found.append((terms.log_likelihood, terms.prior, terms.diffusion))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)


def test_learned_encoder_has_the_modified_target():
    """Integrand of DiffEnc by hand: 1/2 SNR' |d - F - dF/dL|^2, derivative by differences."""
    own = schedule()
    encoder = LearnedEncoder(small(), own)
    guess = torch.randn(1, 2)
    model = DiffEnc(RealEnd((2,)), _Constant(guess), encoder, own, prediction=Prediction.DATA)
    x = torch.randn(1, 2)
    q = model.posterior(x)
    value = q.sample()
    t = q.unpack(value).time[0]
    h = 1e-5
    rate = (encoder(x, t + h) - encoder(x, t - h)) / (own.log_snr(t + h) - own.log_snr(t - h))
    snr_rate = (own.log_snr(t + h).exp() - own.log_snr(t - h).exp()) / (2 * h)
    want = snr_rate / 2 * (guess - encoder(x, t) - rate).square().sum(-1, keepdim=True)
    got = -model.prior().log_prob_terms(value).path
    torch.testing.assert_close(got, want.reshape(1), rtol=1e-5, atol=1e-6)
    end = torch.ones(1, 1)
    torch.testing.assert_close(encoder(x, end), x)
    assert not torch.allclose(encoder(x, 0 * end), x)


class _Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, x, t):
        return self.value.expand_as(x)


def plain_and_unbent() -> tuple[VDM, NeuralFlowDiffusion]:
    """A plain diffusion, and one with a flow that does nothing, around the same network."""
    network, path = small(), faded_path()
    with torch.no_grad():
        for p in path.map.parameters():
            p.zero_()
    plain = VDM(RealEnd((2,)), network, schedule(), prediction=Prediction.DATA)
    bent = NeuralFlowDiffusion(RealEnd((2,)), network, path)
    return plain, bent


def test_flow_without_a_bend_is_a_plain_diffusion():
    plain, bent = plain_and_unbent()
    x = torch.randn(5, 2)
    found = []
    for model in (plain, bent):
        torch.manual_seed(1)
        found.append(model.terms(x, num_times=3).diffusion)
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-8)


@pytest.mark.slow
def test_likelihood_of_a_flow_without_a_bend():
    plain, bent = plain_and_unbent()
    x = torch.randn(1, 2)
    found = [model.log_likelihood(x, solver=RK4(1)).value for model in (bent, plain)]
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)


def test_noise_weighting_is_score_matching():
    """Training then sees |n_hat - n|^2 at the drawn time, times nothing."""
    guess = torch.randn(2)
    model = ScoreModel(RealEnd((2,)), _Constant(guess), schedule(), times=UniformTimes(0.0, 0.5))
    x = torch.randn(4, 2)
    q = model.posterior(x)
    value = q.sample()
    draw = q.unpack(value)
    loss = -model._prior(model.trained_drift(None), None).log_prob_terms(value).path
    want = 0.5 * (guess - draw.noise.squeeze(-2)).square().sum(-1)
    torch.testing.assert_close(loss, want)
    plain = ScoreModel(RealEnd((2,)), _Constant(guess), schedule(), weighting=None)
    bound = VDM(RealEnd((2,)), _Constant(guess), schedule(), times=plain.times)
    args = [m._prior(m.trained_drift(None), None).log_prob(value) for m in (plain, bound)]
    torch.testing.assert_close(args[0], args[1])


def test_interior_of_a_schedule_is_trained_by_the_variance():
    """Gradients against those of the sum of squared losses, taken apart by autograd."""
    model = VDM(RealEnd((2,)), small(), VarianceTrained(4, -4.0, 6.0, learn_ends=True))
    own, x = model.path.schedule, torch.randn(6, 2)
    interior = [own.middle, own.raw_rate, own.raw_weight]

    def losses():
        torch.manual_seed(2)
        q, p = model.posterior(x), model._prior(model.trained_drift(None), None)
        value = q.rsample()
        score = p.log_prob_terms(value)
        data = model.law_at_end(q.unpack(value).end).log_prob(x)
        return -score.path, q.log_prob(value) - score.start - data

    path, rest = losses()
    ends = [own.raw_ends, *model.network.parameters()]
    got = torch.autograd.grad((path + rest).sum(), [*interior, *ends])
    path, rest = losses()
    own._losses = None
    want = torch.autograd.grad(path.square().sum() / (2 * path.detach().mean()), interior)
    path, rest = losses()
    own._losses = None
    want += torch.autograd.grad((path + rest).sum(), ends)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_variance_falls_where_the_schedule_is_trained():
    """90 steps on the schedule alone, of an exact denoiser: variance falls, the bound stays."""
    own = VarianceTrained(8, -12.0, 6.0)
    network = ExactDenoiser(LinearLogSNR(-12.0, 6.0))
    model = VDM(RealEnd((1,)), network, own, prediction=Prediction.DATA)
    y = mixture().sample((4000,))

    def moments():
        with torch.no_grad():
            found = model.terms(y, num_particles=4).diffusion
        return float(found.mean()), float(found.std())

    before = moments()
    optim = torch.optim.Adam(own.parameters(), 0.05)
    for _ in range(90):
        optim.zero_grad()
        batch = y[torch.randint(len(y), (128,))]
        loss = Trace_ELBO().differentiable_loss(model.model, model.guide, batch)
        loss.backward()
        optim.step()
    after = moments()
    assert after[1] < 0.93 * before[1]
    assert abs(after[0] - before[0]) < 4.5 * (before[1] + after[1]) / 4000**0.5


def test_likelihood_by_the_flow_is_the_density():
    """Exact denoiser: to 2e-3 nats, of which the cut ends of the schedule are a part."""
    model, y = exact_model(), mixture().sample((50,))
    found = model.log_likelihood(y, solver=RK4(14))
    exact = mixture().log_prob(y)
    assert (found.value - exact).abs().max() < 0.02
    assert found.solver_error.max() < 0.02
    assert (found.se == 0).all()


def test_likelihood_counts_the_factor_of_the_last_state():
    """Gaussian data, stopped where noise is large: density of alpha y, and its volume, by hand."""
    own = LinearLogSNR(-14.0, 1.0)

    class Exact(nn.Module):
        def forward(self, x, t):
            values = own(t)
            gain = 0.25 * values.alpha / (0.25 * values.alpha**2 + values.sigma**2)
            return 0.4 + gain * (x - 0.4 * values.alpha)

    model = VDM(RealEnd((1,)), Exact(), own, prediction=Prediction.DATA)
    y = torch.linspace(-1.0, 2.0, 5).unsqueeze(-1)
    alpha, sigma = own(torch.ones(())).alpha, own(torch.ones(())).sigma
    law = torch.distributions.Normal(0.4 * alpha, (0.25 * alpha**2 + sigma**2).sqrt())
    want = law.log_prob(alpha * y[:, 0]) + alpha.log()
    found = model.log_likelihood(y, solver=RK4(12))
    torch.testing.assert_close(found.value, want, rtol=0.0, atol=2e-3)


def test_start_has_the_variance_of_unit_data_in_noise():
    exploding, preserving = MODELS["score, ve"][1](), MODELS["vdm"][1]()
    scale = exploding.start().base_dist.scale
    torch.testing.assert_close(scale, torch.full((2,), math.sqrt(101.0)))
    assert (preserving.start().base_dist.scale == 1).all()


def test_likelihood_of_levels_is_a_bound():
    """Uniform noise within cells: below the log-probability of the cells, by Jensen, a little."""
    own = LinearLogSNR(-7.0, 9.0)
    end = LevelEnd((1,), 9)
    model = VDM(end, ExactDenoiser(own), own, prediction=Prediction.DATA)
    x = torch.arange(9.0).unsqueeze(-1)
    found = model.log_likelihood(x, 40, solver=RK4(8))
    grid = torch.linspace(-1.125, 1.125, 9001).unsqueeze(-1)
    p = mixture().log_prob(grid).exp().reshape(-1)[:-1].unflatten(0, (9, 1000)).mean(1) * 0.25
    gap = p.log() - found.value
    assert (gap > -4.5 * found.se - 0.02).all()
    assert (gap < 0.1 + 4.5 * found.se).all()


def test_samples_of_an_exact_denoiser_have_its_law():
    """Distribution function at 9 points; 2000 draws, 4.5 standard errors plus 0.02 of bias."""
    model = exact_model()
    points = torch.linspace(-2.0, 2.0, 9).unsqueeze(-1)
    truth = sum(
        w * torch.distributions.Normal(m, s).cdf(points[:, 0])
        for w, m, s in zip((0.35, 0.65), (-1.5, 1.0), (0.3, 0.5), strict=True)
    )
    for sampler, steps in ((None, 100), (DPMSolver(2), 30), (ProbabilityFlow(), 20)):
        x = model.sample(2000, sampler=sampler, num_steps=steps)
        share = (x.T <= points).double().mean(1)
        assert (share - truth).abs().max() < 4.5 * 0.5 / 2000**0.5 + 0.02


def test_guidance_and_contexts():
    model = MODELS["vdm, context"][1]().eval()
    context = torch.eye(3)
    x, t = torch.randn(3, 2), torch.rand(3, 1)
    with_label, without = (model.network(x, t, c) for c in (context, torch.zeros_like(context)))
    guided = model.process(context, guidance=1.5).network(x, t)
    torch.testing.assert_close(guided, 2.5 * with_label - 1.5 * without)
    torch.testing.assert_close(model.process(context).network(x, t), with_label)
    torch.testing.assert_close(model.process().network(x, t), without)
    assert model.sample(3, context, guidance=2.0, num_steps=3).shape == (3, 2)
    many = torch.ones(10_000, 3)
    assert model._dropped(many) is many
    dropped = model.train()._dropped(many)
    share = (dropped == 0).all(-1).double().mean()
    # 4.5 standard errors.
    assert abs(share - 0.1) < 4.5 * 0.3 / 100
    assert ((dropped == 0).all(-1) | (dropped == 1).all(-1)).all()


def test_levels_are_found_again():
    end = LevelEnd((1, 1, 2), 5)
    x = torch.randint(5, (20, 1, 1, 2))
    y = end.encode(x, torch.empty(0))
    law = end.at(y, torch.ones(1), torch.full((1,), 0.05))
    torch.testing.assert_close(law.mean, x.double(), rtol=0.0, atol=1e-3)
    total = sum(
        end.at(y[0], torch.ones(1), torch.full((1,), 0.3))
        .log_prob(torch.tensor([[[i, j]]]).double())
        .exp()
        for i in range(5)
        for j in range(5)
    )
    torch.testing.assert_close(total, torch.ones(()))
    # By hand: a softmax of squared distances in units of the noise.
    state = torch.tensor([0.1, -0.4])
    law = end.at(state, torch.full((1,), 0.8), torch.full((1,), 0.3))
    levels = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    logits = -((state[:, None] / 0.8 - levels) ** 2) / (2 * (0.3 / 0.8) ** 2)
    want = logits.log_softmax(-1)[[0, 1], [2, 1]].sum()
    torch.testing.assert_close(law.log_prob(torch.tensor([[[2.0, 1.0]]])), want)


@pytest.mark.slow
def test_unet_of_images_trains():
    model = VDM(LevelEnd((1, 4, 4), 17), UNet((1, 4, 4), 4), schedule(), num_total=100)
    x = torch.randint(17, (6, 1, 4, 4))
    svi = SVI(model.model, model.guide, Adam({"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(25)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_estimates_of_a_ratio_refuse_importance_weights():
    model = MODELS["vdm"][1]()
    with pytest.raises((ValueError, NotImplementedError), match="PathP"):
        IWAE(5).loss(model.model, model.guide, torch.randn(4, 2))


def test_what_an_encoded_diffusion_cannot_serve():
    model = MODELS["diffenc"][1]()
    assert model.sample(3, sampler=Parallel(ReverseSDE()), num_steps=4).shape == (3, 2)
    for sampler in (DDIM(), DPMSolver(2), ProbabilityFlow()):
        with pytest.raises(NotImplementedError, match=r"needs a velocity.*DiffEnc does not have"):
            model.sample(3, sampler=sampler)
    with pytest.raises(NotImplementedError, match="needs a score"):
        model.sample(3, sampler=AnnealedLangevin())
    with pytest.raises(NotImplementedError, match="FlowField needs a velocity"):
        model.log_likelihood(torch.zeros(2, 2))
    neural = MODELS["neural flow"][1]()
    with pytest.raises(NotImplementedError, match="DDIM needs predictions.*NeuralFlowDiffusion"):
        neural.sample(3, sampler=DDIM())


def test_models_are_sources_of_samples():
    model = MODELS["vdm"][1]()
    assert sample(model, DPMSolver(3), (4,), 5).shape == (4, 2)


END = RealEnd((2,))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: VDM(END, small(), AlphaSigma(lambda t: 1 - t, lambda t: t)), ValueError,
         "`schedule` must have an increasing log signal-to-noise ratio"),
        (lambda: VDM(END, small(), num_layers=0), ValueError,
         "`num_layers` must be an integer of at least 1; got 0"),
        (lambda: VDM(END, small(), "cosine"), TypeError, "`schedule` must be a Schedule"),
        (lambda: VDM(END, small(), Linear()), ValueError,
         "`schedule` must have a finite log signal-to-noise ratio at both ends"),
        (lambda: VDM(END, small(), prediction="noise"), TypeError,
         "`prediction` must be a Prediction; got 'noise'"),
        (lambda: VDM(END, small(0, 3)), ValueError, "`network` must have input_dim 2"),
        (lambda: VDM(END, small(), num_layers=3, times=UniformTimes()), ValueError,
         "`times` must not be given with `num_layers`"),
        (lambda: VDM(END, small(), VarianceTrained(4), num_layers=3), ValueError,
         "`schedule` must not be VarianceTrained.*Use LearnedMonotone"),
        (lambda: VDM(END, small(), drop_context=1.5), ValueError,
         r"`drop_context` must lie in \[0, 1\]; got 1.5"),
        (lambda: DiffEnc(END, small(), 3), TypeError, "`encoder` must be callable; got int"),
        (lambda: DiffEnc(END, small(), lambda y, t: 2 * y), ValueError,
         "`encoder` must be the identity at the data end"),
        (lambda: NeuralFlowDiffusion(END, small(), schedule()), TypeError,
         "`path` must be a FadedFlowPath; got LinearLogSNR"),
        (lambda: NeuralFlowDiffusion(RealEnd((3,)), small(0, 3), faded_path()), ValueError,
         "`path` must have dim 3"),
        (lambda: VDM(END, small()).terms(torch.zeros(2, 3)), ValueError,
         r"`x` must have shape \(B, 2\); got \(2, 3\)"),
        (lambda: VDM(END, small()).terms(torch.full((2, 2), torch.nan)), ValueError,
         "`x` must be finite"),
        (lambda: VDM(LevelEnd((2,), 4), small()).terms(torch.full((3, 2), 4.0)), ValueError,
         "`x` must be from 0 to 3 for LevelEnd; got values from 4 to 4"),
        (lambda: VDM(LevelEnd((2,), 4), small()).terms(torch.full((3, 2), 0.5)), ValueError,
         "`x` must hold whole levels"),
        (lambda: VDM(END, small(3)).terms(torch.zeros(2, 2)), ValueError,
         r"`context` must have shape \(2, 3\); got None"),
        (lambda: VDM(END, small()).log_likelihood(torch.zeros(2, 2), 0), ValueError,
         "`num_particles` must be at least 1"),
    ],
)  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.slow
def test_trained_model_reaches_the_likelihood_of_gaussian_data():
    """Correlated 2-D data: bound of the trained model equal to the exact density within error."""
    law = torch.distributions.MultivariateNormal(
        torch.tensor([0.5, -0.3]), torch.tensor([[1.0, 0.6], [0.6, 0.7]])
    )
    model = VDM(
        END,
        MLPDenoiser(2, (64, 64), time_dim=16),
        LinearLogSNR(-8.0, 10.0),
        prediction=Prediction.ANGULAR,
    )
    optim = torch.optim.Adam(model.parameters(), 3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optim, 3000)
    pyro.set_rng_seed(0)
    for _ in range(3000):
        optim.zero_grad()
        Trace_ELBO().differentiable_loss(model.model, model.guide, law.sample((256,))).backward()
        optim.step()
        decay.step()
    x = law.sample((20_000,))
    with torch.no_grad():
        gap = law.log_prob(x) - model.terms(x, num_times=64).elbo
    error = float(gap.std()) / len(x) ** 0.5
    assert error < 0.015
    assert abs(float(gap.mean())) < 3.5 * error
    # What training leaves at single items, 0.03 to 0.1 by seed, cancels in the mean.
    wrong = model.log_likelihood(x[:500]).value - law.log_prob(x[:500])
    assert abs(float(wrong.mean())) < 0.02
    assert wrong.abs().mean() < 0.15


def test_a_learned_schedule_trains_through_the_bound_of_a_chain():
    model = MODELS["vdm, chain"][1]()
    assert isinstance(model.path.schedule, LearnedMonotone)
    before = [p.clone() for p in model.path.schedule.parameters()]
    svi = SVI(model.model, model.guide, Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(3):
        svi.step(torch.randn(8, 2))
    for old, new in zip(before, model.path.schedule.parameters(), strict=True):
        assert not torch.equal(old, new)


def test_fading_encoder_shrinks_towards_the_noise():
    encoder = FadingEncoder(schedule())
    t = torch.tensor([[0.0], [0.5], [1.0]])
    shares = encoder(torch.ones(3, 1), t)
    sigma = schedule()(t).sigma
    torch.testing.assert_close(shares, 1 - sigma**2 + sigma[-1] ** 2)
