"""Rectified flow against closed forms: bound, Schroedinger bridge, residual, straightness."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from bridge_forms import LinearCase, full_covariance
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from flowvi.distributions import Flow
from flowvi.models import (
    LearnedCoupling,
    PairedCoupling,
    RectifiedFlow,
)
from flowvi.nn import MLPField, VectorField
from flowvi.paths import (
    BrownianBridge,
    GaussianPath,
    StochasticInterpolant,
    UniformTimes,
    matched,
)
from flowvi.samplers import DDIM, ProbabilityFlow, ReverseSDE, sample
from flowvi.transforms import RK4, Hutchinson, Midpoint, TriangularAffine

WIDE = torch.tensor([[4.0]])
DATA = {"1-D": WIDE, "5-D": full_covariance(5)}


def straight(dim: int, sigma: float = 0.5) -> StochasticInterpolant:
    return StochasticInterpolant(dim, None, sigma)


def exact(case: LinearCase, **options: object) -> RectifiedFlow:
    """Best field and the case's own coupling."""
    path = BrownianBridge(case.dim, case.sigma) if case.sigma else straight(case.dim)
    return RectifiedFlow(case.field(), path, LearnedCoupling(case.posterior()), **options)


# The bound.


def test_published_numbers_of_the_closed_forms():
    assert LinearCase.bridge(WIDE, 0.7).bound == pytest.approx(-2.1121, abs=1e-4)
    assert LinearCase.independent(WIDE, 0.7).bound == pytest.approx(-4.2970, abs=1e-4)
    assert LinearCase.bridge(WIDE, 0.7).entropy == pytest.approx(2.1121, abs=1e-4)


@pytest.mark.parametrize("name", DATA)
def test_bound_is_tight_for_every_item_at_the_schroedinger_bridge(name: str):
    case = LinearCase.bridge(DATA[name], 0.7)
    x = case.items(3)
    with torch.no_grad():
        flow = exact(case, num_times=4)
        draws = torch.stack([flow.terms(x, num_particles=500).elbo for _ in range(20)])
    want = dist.MultivariateNormal(torch.zeros(case.dim), case.data).log_prob(x)
    error = draws.std(0) / 20**0.5
    # 4.5 standard errors of 10,000 draws at four times each.
    assert (error < 0.06).all()
    assert ((draws.mean(0) - want).abs() < 4.5 * error).all()


@pytest.mark.parametrize("name", DATA)
def test_mean_bound_of_the_independent_coupling(name: str):
    case = LinearCase.independent(DATA[name], 0.7)
    flow = RectifiedFlow(case.field(), BrownianBridge(case.dim, 0.7))
    with torch.no_grad():
        terms = flow.terms(case.items(40_000))
    error = float(terms.elbo.std()) / 200
    # 4.5 standard errors of 40,000 items.
    assert error < 0.06
    assert abs(float(terms.elbo.mean()) - case.bound) < 4.5 * error
    assert float(terms.coupling.abs().max()) == 0
    assert case.bound < -case.entropy


def test_terms_are_what_they_are_called():
    case = LinearCase.bridge(WIDE, 0.7)
    with torch.no_grad():
        terms = exact(case).terms(case.items(40_000))
    assert float(terms.coupling.mean()) == pytest.approx(case.divergence, abs=0.03)
    shift = float((1 - case.slope) ** 2 * case.data + case.noise)
    reference = -0.5 * math.log(2 * math.pi * 0.49) - shift / 0.98
    assert float(terms.reference.mean()) == pytest.approx(reference, abs=0.06)
    torch.testing.assert_close(terms.elbo, terms.reference - terms.coupling - terms.path)


def test_loss_of_stock_svi_is_the_sum_of_the_terms():
    case = LinearCase.bridge(DATA["5-D"], 0.7)
    x = case.items(200)
    flow = exact(case, num_total=600)
    stock = Trace_ELBO(100, max_plate_nesting=1, vectorize_particles=True)
    with torch.no_grad():
        loss = stock.loss(flow.model, flow.guide, x) / 600
        terms = flow.terms(x, num_particles=100)
    # Two means over 20,000 draws with an sd of about 1.6 nats.
    assert loss == pytest.approx(float(terms.loss.mean()), abs=0.07)


def test_late_times_keep_the_noise_of_the_bound_down():
    case = LinearCase.bridge(WIDE, 0.7)
    x = case.items(50_000)
    with torch.no_grad():
        late, even = (exact(case, times=t).terms(x).elbo.var() for t in (None, UniformTimes()))
    assert late < even / 2


# The limit of vanishing noise.


@pytest.mark.parametrize("s", [0.5, 2.0])
def test_residual_and_straightness_of_the_independent_coupling(s: float):
    case = LinearCase.independent(torch.eye(2) * s**2, 0.0)
    assert case.residual == pytest.approx(2 * math.pi * s / 2, rel=1e-4)
    flow = RectifiedFlow(case.field(), straight(2, 0.5))
    with torch.no_grad():
        terms = flow.terms(case.items(40_000))
        cost = flow.transport(4_000)
    residual = 2 * 0.5**2 * terms.path
    # 4.5 standard errors of 40,000 draws.
    assert abs(float(residual.mean()) - case.residual) < 4.5 * float(residual.std()) / 200
    want = 2 * s * (2 - math.pi / 2)
    assert abs(float(cost.straightness.mean()) - want) < 4.5 * float(cost.straightness.std()) / 63


def best_linear(s: float, sigma: float) -> LinearCase:
    """Coupling in one dimension that makes the loss least, by gradient descent on its formula."""
    raw = torch.tensor([0.0, 0.0], requires_grad=True)
    optimizer = torch.optim.LBFGS([raw], max_iter=200, line_search_fn="strong_wolfe")
    t = (torch.arange(400) + 0.5) / 400

    def loss() -> Tensor:
        optimizer.zero_grad()
        a, v = raw[0], raw[1].exp()
        start, cross = a**2 * s**2 + v, a * s**2
        var = (1 - t) ** 2 * start + t**2 * s**2 + 2 * t * (1 - t) * cross
        lag = t * s**2 - (1 - t) * start + (1 - 2 * t) * cross
        residual = (s**2 + start - 2 * cross - lag**2 / var).mean()
        value = 0.5 * (start - 1 - v.log()) + residual / (2 * sigma**2)
        value.backward()
        return value

    optimizer.step(loss)
    a, v = raw[0].detach(), raw[1].detach().exp()
    return LinearCase(torch.tensor([[s**2]]), a.reshape(1, 1), v.reshape(1, 1), 0.0)


def test_residual_and_straightness_of_the_best_coupling_vanish_with_the_noise():
    residuals, lengths, slopes = [], [], []
    for sigma in (1.0, 0.3, 0.1):
        case = best_linear(2.0, sigma)
        flow = RectifiedFlow(case.field(), straight(1, sigma), LearnedCoupling(case.posterior()))
        with torch.no_grad():
            terms = flow.terms(case.items(20_000))
            cost = flow.transport(1000)
        residual = 2 * sigma**2 * terms.path
        error = float(residual.std()) / 20_000**0.5
        assert abs(float(residual.mean()) - case.residual) < 4.5 * error
        residuals.append(case.residual)
        lengths.append(float(cost.straightness.mean()))
        slopes.append(float(case.slope))
    assert all(a > 1.5 * b for a, b in zip(residuals, residuals[1:], strict=False))
    assert all(a > 1.5 * b for a, b in zip(lengths, lengths[1:], strict=False))
    assert residuals[-1] < 0.05 * math.pi
    assert lengths[-1] < 0.05 * 2 * (2 - math.pi / 2)
    # The starts are drawn in: s^2 slope^2 tends to 1/2, not to the prior's 1.
    assert 4 * slopes[-1] ** 2 == pytest.approx(0.5, abs=0.01)


# The likelihood by the ODE.


@pytest.mark.parametrize("name", DATA)
def test_log_density_by_the_flow_is_exact(name: str):
    case = LinearCase.independent(DATA[name], 0.0)
    flow = RectifiedFlow(case.field(), straight(case.dim))
    x = case.items(20)
    want = dist.MultivariateNormal(torch.zeros(case.dim), case.data).log_prob(x)
    torch.testing.assert_close(flow.log_likelihood(x).value, want, rtol=0, atol=1e-5)
    found = flow.log_likelihood(x, solver=RK4(2))
    error = (found.value - want).abs()
    assert ((error - found.solver_error).abs() < 0.5 * error + 1e-4).all()
    assert error.max() > 1e-3
    assert torch.equal(found.se, torch.zeros(20))
    flow.log_prob(x).sum().backward()
    assert float(flow.field.scale.grad.abs()) > 0


def test_estimated_divergence_is_right_in_the_mean_and_says_how_far_off():
    case = LinearCase.independent(DATA["5-D"], 0.0)
    flow = RectifiedFlow(case.field(), straight(5))
    x = case.items(10)
    want = dist.MultivariateNormal(torch.zeros(5), case.data.double()).log_prob(x)
    found = flow.log_likelihood(x, 200, divergence=Hutchinson(), max_rows=4, solver=RK4(4))
    # 5 standard errors of 200 probes for each of ten items.
    assert ((found.value - want).abs() < 5 * found.se + found.solver_error).all()
    assert (found.se > 1e-3).all()
    assert (found.solver_error < 1e-3).all()
    assert flow.log_likelihood(x, divergence=Hutchinson()).se.isnan().all()


# What it is trained on, and what it generates.


def moments_are(x: Tensor, cov: Tensor, tolerance: float) -> bool:
    return bool(((x.T.cov() - cov).abs() < tolerance * cov.diagonal().max()).all())


@pytest.mark.parametrize("conditioning", ["start", "item", "both"])
def test_flow_matching_has_the_velocity_of_the_marginals(conditioning: str):
    """Whatever the path is conditioned on, the least loss is at the same field."""
    case = LinearCase.independent(torch.eye(2) * 4.0, 0.0)
    n, t_low = 20_000, 1e-2
    ends, starts = case.items(n), torch.randn(n, 2)
    # Start and item are both normal here, so either may be the noise of the path.
    path, y = {
        "start": (GaussianPath(2, lambda y, t: (1 - t) * y, lambda y, t: 2 * t, 1.0), starts),
        "item": (
            GaussianPath(2, lambda y, t: t * y, lambda y, t: 1 - t + 0 * y[:, :1], 1.0),
            ends,
        ),
        "both": (StochasticInterpolant(2, None, 1.0), torch.cat([starts, ends], -1)),
    }[conditioning]
    t = t_low + (0.99 - t_low) * torch.rand(n, 1)
    point = matched(path).point(torch.randn(n, 2), t, y)
    field = case.field()
    with torch.no_grad():
        gap = field(t.squeeze(-1), point.state) - point.drift
        # Any direction of change leaves the loss level to first order.
        for change in (point.state, torch.ones(n, 2), point.state * t, (3 * point.state).sin()):
            slope = (gap * change).sum(-1)
            assert abs(float(slope.mean())) < 4.5 * float(slope.std()) / n**0.5


@pytest.mark.parametrize("name", ["matched interpolant", "matched gaussian"])
def test_matched_paths_train_a_pair(name: str):
    inner = {
        "matched interpolant": StochasticInterpolant(2, lambda t: t * (1 - t), 1.0),
        "matched gaussian": GaussianPath(2, lambda y, t: t * y, lambda y, t: 1 - 0.99 * t, 1.0),
    }[name]
    flow = RectifiedFlow(MLPField(2, (8,)), matched(inner, 0.5))
    x = 2 + 0.1 * torch.randn(50, 2)
    terms = flow.terms(x)
    assert float(terms.coupling.abs().max()) < 1e-9
    with pytest.raises(NotImplementedError, match="The loss is no bound without a BrownianBridge"):
        _ = terms.elbo
    svi = SVI(flow.model, flow.guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert flow.is_deterministic


def test_noisy_interpolant_generates_with_its_noise():
    """Best drift of an interpolant with noise, closed form, run by the SDE sampler."""
    # x_t = (1 - t) x_0 + t x_1 + gamma eps, gamma = t (1 - t), b^2 = 2 gamma, data N(0, 4 I).
    inner = StochasticInterpolant(2, lambda t: t * (1 - t), lambda t: (2 * t * (1 - t)).sqrt())

    class Best(VectorField):
        def velocity(self, time: Tensor, x: Tensor, prepared: None) -> Tensor:
            t = time.unsqueeze(-1)
            gamma, rate = t * (1 - t), 1 - 2 * t
            var = (1 - t) ** 2 + 4 * t**2 + gamma**2
            # E[x_1 - x_0 + (gamma' - 1) eps | x].
            return (4 * t - (1 - t) + (rate - 1) * gamma) / var * x

    flow = RectifiedFlow(Best(2), matched(inner, noisy=True))
    x = sample(flow, ReverseSDE(), (10_000,), 100)
    assert moments_are(x, torch.eye(2) * 4, 0.08)
    with pytest.raises(NotImplementedError, match="The drift of a process with noise is not"):
        flow.density()


def test_samples_of_the_bridge_and_of_the_flow():
    case = LinearCase.bridge(DATA["5-D"], 0.7)
    flow = exact(case, num_steps=40)
    # 2000 draws: an entry's standard error is at most 3.2 % of the largest variance.
    assert moments_are(flow.sample(2000), case.data, 0.16)
    assert moments_are(sample(flow, ReverseSDE(), (2000,), 40), case.data, 0.16)
    case = LinearCase.independent(DATA["5-D"], 0.0)
    # The diffusion of straight paths is a weight; as noise it would add 4 to every variance.
    flow = RectifiedFlow(case.field(), straight(5, 2.0), num_steps=10)
    assert moments_are(flow.sample(2000), case.data, 0.16)
    by_sampler = sample(flow, ProbabilityFlow(Midpoint), (2000,), 10)
    assert moments_are(by_sampler, case.data, 0.16)
    with pytest.raises(NotImplementedError, match="DDIM needs"):
        sample(flow, DDIM(), (5,))


def test_reflow_keeps_the_ends_and_straightens():
    case = LinearCase.independent(torch.eye(2) * 4.0, 0.0)
    first = RectifiedFlow(case.field(), straight(2), num_steps=40)
    pairs = first.pairs(2000)
    # The flow of the independent coupling takes z_0 to 2 z_0 here, so pairs are straight.
    torch.testing.assert_close(pairs[:, 2:], 2 * pairs[:, :2], rtol=2e-3, atol=2e-3)
    second = first.reflow()
    assert isinstance(second.coupling, PairedCoupling)
    assert second.field is not first.field

    class Straight(VectorField):
        def velocity(self, time: Tensor, x: Tensor, prepared: None) -> Tensor:
            return x / (1 + time).unsqueeze(-1)

    second.field = Straight(2)
    second.field.scale = nn.Parameter(torch.ones(()))
    terms = second.terms(pairs)
    assert float(terms.path.mean()) < 1e-4
    assert torch.equal(terms.coupling, torch.zeros(2000))
    assert float(second.transport(500).straightness.abs().max()) < 1e-6
    with pytest.raises(NotImplementedError, match="The loss is no bound"):
        _ = terms.elbo
    with pytest.raises(ValueError, match=r"`x` must have shape \(B, 4\)"):
        second.terms(pairs[:, :2])


# Training by stock SVI.


class _Polynomial(VectorField):
    """f = (A_0 + A_1 t + ... + A_k t^k) x."""

    def __init__(self, dim: int, degree: int = 6) -> None:
        super().__init__(dim)
        self.coefficients = nn.Parameter(torch.zeros(degree + 1, dim, dim))

    def velocity(self, time: Tensor, x: Tensor, prepared: None) -> Tensor:
        powers = (2 * time.unsqueeze(-1) - 1) ** torch.arange(len(self.coefficients)).to(x)
        terms = torch.einsum("kij,...j->...ki", self.coefficients, x)
        return (powers.unsqueeze(-1) * terms).sum(-2)


def train(flow: RectifiedFlow, case: LinearCase, num_steps: int, lr: float) -> None:
    # The likeliest failure of a step is one late time; clipping keeps it small.
    settings = {"lr": lr, "lrd": 0.02 ** (1 / num_steps), "clip_norm": 10.0}
    optimizer = pyro.optim.ClippedAdam(settings)
    model, guide = (pyro.poutine.scale(p, 1 / 256) for p in (flow.model, flow.guide))
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    for _ in range(num_steps):
        svi.step(case.items(256))


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA)
def test_svi_reaches_the_schroedinger_bridge(name: str):
    case = LinearCase.bridge(DATA[name], 0.7)
    coupling = LearnedCoupling(Flow(TriangularAffine(case.dim, case.dim)))
    path = BrownianBridge(case.dim, 0.7)
    flow = RectifiedFlow(_Polynomial(case.dim), path, coupling, num_times=2)
    train(flow, case, 3000, 0.02)
    with torch.no_grad():
        x = case.items(200_000)
        bound = torch.cat([flow.terms(part).elbo for part in x.split(20_000)])
        mean = coupling(x[:20_000], flow.start(), None).expand((50, 20_000)).sample().mean(0)
    found = float(bound.mean())
    assert abs(found + case.entropy) < 0.02 + 4.5 * float(bound.std()) / 200_000**0.5
    # Least squares of the start on the item, and with it the covariance of the two.
    slope = torch.linalg.lstsq(x[:20_000], mean).solution.T
    cross, want = slope @ case.data, case.slope @ case.data
    assert (cross - want).norm() < 0.03 * want.norm()


@pytest.mark.slow
def test_svi_with_the_independent_coupling_stays_at_its_own_value():
    case = LinearCase.independent(WIDE, 0.7)
    flow = RectifiedFlow(_Polynomial(1), BrownianBridge(1, 0.7), num_times=2)
    train(flow, case, 1500, 0.02)
    with torch.no_grad():
        bound = flow.terms(case.items(400_000)).elbo
    error = float(bound.std()) / 400_000**0.5
    assert abs(float(bound.mean()) + 4.2970) < 0.02 + 4.5 * error


@pytest.mark.slow
def test_svi_with_vanishing_noise_straightens():
    residuals, lengths = [], []
    for sigma in (1.0, 0.3):
        case = LinearCase.independent(WIDE, 0.0)
        coupling = LearnedCoupling(Flow(TriangularAffine(1, 1)))
        flow = RectifiedFlow(_Polynomial(1), straight(1, sigma), coupling)
        train(flow, case, 1500, 0.02)
        with torch.no_grad():
            terms = flow.terms(case.items(100_000))
            lengths.append(float(flow.transport(2000).straightness.mean()))
        best = best_linear(2.0, sigma)
        residual = 2 * sigma**2 * float(terms.path.mean())
        residuals.append(residual)
        assert residual == pytest.approx(best.residual, rel=0.1)
    assert residuals[1] < 0.25 * math.pi
    assert residuals[1] < residuals[0] / 2
    assert lengths[1] < lengths[0] / 2
