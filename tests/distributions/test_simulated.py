"""Simulated paths as Pyro sites: divergences against closed forms, bounds, errors."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor, nn

from flowvi.distributions import LogRatio, SimulatedPosterior, SimulatedPrior
from flowvi.infer import fit
from flowvi.objectives import ELBO, IWAE, STL, STLIWAE, DReG
from flowvi.paths import SDE, StateDiffusion
from flowvi.samplers import (
    Milstein,
    StochasticHeun,
    TorchSDE,
    draw_increments,
    simulate,
)

FORMS = list(LogRatio)
# Prior dx = -C x dt + S dW from N(0, 1), posterior dx = A (M - x) dt + S dW from N(LOC, SCALE).
C, S, A, M, LOC, SCALE = 0.5, 0.8, 1.2, 0.6, 0.4, 0.7


class Decay(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return -C * x


def prior_sde() -> SDE:
    return SDE(lambda x, t: -C * x, S)


def posterior_drift(x: Tensor, t: Tensor) -> Tensor:
    return A * (M - x)


def laws(
    log_ratio: LogRatio,
    times: Tensor,
    simulator: object = simulate,
    start: object = None,
    **options: object,
) -> tuple[SimulatedPosterior, SimulatedPrior]:
    if start is None:
        start = dist.Normal(torch.tensor([LOC]), SCALE).to_event(1)
    given = {"simulator": simulator, "log_ratio": log_ratio, **options}
    return (
        SimulatedPosterior(prior_sde(), posterior_drift, start, times, **given),
        SimulatedPrior(prior_sde(), dist.Normal(torch.zeros(1), 1.0).to_event(1), times, **given),
    )


def exact_path_divergence() -> float:
    """Girsanov's integral with the moments of the posterior in closed form."""
    nodes, weights = (torch.as_tensor(a) for a in numpy.polynomial.legendre.leggauss(40))
    t, weight = (nodes + 1) / 2, weights / 2
    mean = M + (LOC - M) * torch.exp(-A * t)
    stationary = S**2 / (2 * A)
    var = stationary + (SCALE**2 - stationary) * torch.exp(-2 * A * t)
    square = (A * M + (C - A) * mean).square() + (C - A) ** 2 * var
    return float((weight * square).sum() / (2 * S**2))


def exact_start_divergence() -> float:
    return -math.log(SCALE) + (SCALE**2 + LOC**2 - 1) / 2


def discrete_divergence(log_ratio: LogRatio, steps: int, solver: object = None) -> float:
    """Mean of the scored path term, exact over the noise.

    The term is a polynomial of second degree in the start's noise and the increments, whose mean
    under a standard normal law is its value at zero plus half of all second differences.
    """
    size = steps + 1
    points = torch.cat([torch.zeros(1, size), torch.eye(size), -torch.eye(size)])
    start = dist.Delta(LOC + SCALE * points[:, :1], event_dim=1)
    noise = points[:, 1:].t().unsqueeze(-1) / math.sqrt(steps)
    simulator = partial(simulate, increments=noise, solver=solver)
    q, p = laws(log_ratio, torch.linspace(0, 1, steps + 1), simulator, start)
    term = -p.log_prob_terms(q.rsample()).path
    return float(term[0] + ((term[1 : size + 1] + term[size + 1 :]) / 2 - term[0]).sum())


@pytest.mark.parametrize("solver", [None, Milstein(), StochasticHeun()])
@pytest.mark.parametrize("log_ratio", FORMS)
def test_divergence_converges_at_order_one(log_ratio: LogRatio, solver: object):
    exact = exact_path_divergence()
    errors = [abs(discrete_divergence(log_ratio, n, solver) - exact) for n in (16, 32, 64, 128)]
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert orders[-1] == pytest.approx(1.0, abs=0.1)
    assert errors[-1] < 0.01 * exact


@pytest.mark.parametrize("simulator", [simulate, partial(simulate, solver=TorchSDE())])
@pytest.mark.parametrize("log_ratio", FORMS)
def test_divergence_of_two_ornstein_uhlenbeck_processes(log_ratio: LogRatio, simulator: object):
    q, p = laws(log_ratio, torch.linspace(0, 1, 65), simulator)
    value = q.rsample((10_000,))
    ratio = q.log_prob(value) - p.log_prob(value)
    exact = exact_path_divergence() + exact_start_divergence()
    # 10,000 draws, 3 standard errors, and the bias of 64 steps measured above.
    bias = abs(discrete_divergence(log_ratio, 64) - exact_path_divergence())
    assert abs(float(ratio.mean()) - exact) < 3 * float(ratio.std()) / 100 + bias


def test_agrees_with_the_divergence_that_torchsde_integrates():
    import torchsde

    class Pair(nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def f(self, t: Tensor, y: Tensor) -> Tensor:
            return posterior_drift(y, t)

        def g(self, t: Tensor, y: Tensor) -> Tensor:
            return torch.full_like(y, S)

        def h(self, t: Tensor, y: Tensor) -> Tensor:
            return -C * y

    times, start = torch.linspace(0, 1, 17), torch.full((6, 1), LOC)
    noise = torchsde.BrownianInterval(0.0, 1.0, (6, 2), torch.float64)
    _, theirs = torchsde.sdeint(
        Pair(), start, times, bm=noise, method="euler", dt=1 / 16, logqp=True
    )
    pairs = zip(times, times[1:], strict=False)
    increments = torch.stack([noise(a, b)[:, :1] for a, b in pairs])
    law = dist.Delta(start, event_dim=1)
    q, p = laws(LogRatio.KL, times, partial(simulate, increments=increments), law)
    ours = -p.log_prob_terms(q.rsample()).path
    assert torch.allclose(ours, theirs.sum(0), rtol=1e-5)


@pytest.mark.parametrize("solver", [None, Milstein(), StochasticHeun()])
def test_pathwise_ratio_is_a_density_ratio(solver: object):
    """At any step size: mean of exp(-ratio) is 1; 20,000 draws, 4 standard errors."""
    q, p = laws(LogRatio.PATHWISE, torch.linspace(0, 1, 9), partial(simulate, solver=solver))
    value = q.rsample((20_000,))
    weight = (p.log_prob(value) - q.log_prob(value)).exp()
    assert abs(float(weight.mean()) - 1) < 4 * float(weight.std()) / 20_000**0.5


def test_pathwise_ratio_is_that_of_the_euler_transitions():
    diffusion = StateDiffusion(lambda x, t: 0.5 + 0.2 * torch.sin(x), elementwise=True)
    prior, times = SDE(lambda x, t: -x, diffusion), torch.linspace(0, 1, 6)
    start = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    given = {"simulator": simulate, "log_ratio": LogRatio.PATHWISE}
    q = SimulatedPosterior(prior, lambda x, t: t - 2 * x, start, times, **given)
    p = SimulatedPrior(prior, start, times, **given)
    value = q.rsample((7,))
    x = q.unpack(value).states

    def transitions(drift: object) -> Tensor:
        t = times[:-1, None]
        law = dist.Normal(
            x[:, :-1] + drift(x[:, :-1], t) * 0.2, diffusion(x[:, :-1], t) * 0.2**0.5
        )
        return law.log_prob(x[:, 1:]).sum((-1, -2))

    expected = transitions(lambda x, t: t - 2 * x) - transitions(lambda x, t: -x)
    assert torch.allclose(q.log_prob(value) - p.log_prob(value), expected, rtol=1e-9)


def test_prior_draws_from_itself():
    _, p = laws(LogRatio.PATHWISE, torch.linspace(0, 1, 101))
    value = p.sample((20_000,))
    end, start = p.unpack(value).end, p.unpack(value).start
    terms = p.log_prob_terms(value)
    assert torch.equal(terms.path, torch.zeros(20_000))
    assert torch.allclose(terms.start, p.start.log_prob(start))
    var = S**2 / (2 * C) + (1 - S**2 / (2 * C)) * math.exp(-2 * C)
    # 20,000 draws: 4 relative errors of 1 %, and the bias of 100 steps.
    assert float(end.var()) == pytest.approx(var, rel=0.045)


# As sites.

RESIDUAL = 0.5
OBSERVED = torch.tensor([0.5, 0.9, 0.1])
GRID = torch.linspace(0, 1, 13)


def state_space(log_ratio: LogRatio, num_copies: int = 1, slope: object = 0.5) -> tuple:
    """Model and guide of a linear-Gaussian state-space model seen at 3 of 13 times."""

    def prior() -> SimulatedPrior:
        return laws(log_ratio, GRID)[1]

    def model() -> None:
        with pyro.plate("copies", num_copies):
            value = pyro.sample("path", prior())
            states = prior().unpack(value).states[..., 4::4, 0]
            pyro.sample("y", dist.Normal(states, RESIDUAL).to_event(1), obs=OBSERVED)

    def guide() -> None:
        with pyro.plate("copies", num_copies):
            start = dist.Normal(torch.full((1,), 0.3), 0.8).to_event(1)
            drift = lambda x, t: slope * (1.0 - x)  # noqa: E731
            law = SimulatedPosterior(
                prior_sde(), drift, start, GRID, simulator=simulate, log_ratio=log_ratio
            )
            pyro.sample("path", law)

    return model, guide


def kalman_log_evidence() -> float:
    """Of the model above with Euler transitions, by the filter."""
    mean, var, total, dt = 0.0, 1.0, 0.0, 1 / 12
    for step in range(1, 13):
        mean, var = mean * (1 - C * dt), var * (1 - C * dt) ** 2 + S**2 * dt
        if step % 4 == 0:
            y, spread = float(OBSERVED[step // 4 - 1]), var + RESIDUAL**2
            total -= 0.5 * ((y - mean) ** 2 / spread + math.log(2 * math.pi * spread))
            mean, var = mean + var / spread * (y - mean), var * RESIDUAL**2 / spread
    return total


def test_importance_weighted_bound_closes_the_gap():
    exact, bounds = kalman_log_evidence(), []
    model, guide = state_space(LogRatio.PATHWISE, 1000)
    for num_particles in (1, 4, 16, 64, 256):
        bound = IWAE(num_particles, max_plate_nesting=2)
        bounds.append(-bound.loss(model, guide) / 1000)
    assert bounds == sorted(bounds)
    assert exact - bounds[0] > 0.5
    # 1000 copies; the standard error at K = 256 is below 0.004 nats.
    assert exact - 0.05 < bounds[-1] < exact + 0.012


def test_stock_elbo_and_ours_agree():
    values = []
    for log_ratio in FORMS:
        model, guide = state_space(log_ratio, 16_000)
        for loss in (
            Trace_ELBO(2, max_plate_nesting=1, vectorize_particles=True),
            ELBO(2, max_plate_nesting=2),
            STL(2, max_plate_nesting=2),
        ):
            values.append(loss.loss(model, guide) / 16_000)
    # 32,000 paths, standard error 0.03 nats: 4 errors of the difference of two.
    assert max(values) - min(values) < 0.17


@pytest.mark.parametrize("log_ratio", FORMS)
@pytest.mark.parametrize("objective", [ELBO, STL])
def test_gradient_is_that_of_the_bound(objective: type, log_ratio: LogRatio):
    """Against central differences of a long average with common noise."""

    def bound(slope: Tensor) -> Tensor:
        torch.manual_seed(1)
        model, guide = state_space(log_ratio, 40_000, slope)
        return objective(1).differentiable_loss(model, guide) / 40_000

    slope = torch.tensor(0.5, requires_grad=True)
    bound(slope).backward()
    step = 1e-4
    with torch.no_grad():
        numeric = (bound(torch.tensor(0.5 + step)) - bound(torch.tensor(0.5 - step))) / (2 * step)
    # Common noise: for the reparameterised bound the two agree to rounding.
    assert float(slope.grad) == pytest.approx(float(numeric), rel=1e-5)


def test_bounds_of_several_samples_refuse_the_divergence_form():
    with pytest.raises(NotImplementedError, match="only estimates the log-ratio"):
        IWAE(4).loss(*state_space(LogRatio.KL))


@pytest.mark.parametrize("objective", [DReG, STLIWAE])
def test_estimators_that_reweight_draws_refuse_it(objective: type):
    slope = torch.tensor(0.5, requires_grad=True)
    model, guide = state_space(LogRatio.PATHWISE, 3, slope)
    with pytest.raises(NotImplementedError, match="hold drifts as well. Use IWAE, or the grid"):
        objective(4, max_plate_nesting=2).differentiable_loss(model, guide)


def test_stock_svi_trains_it():
    net = nn.Linear(2, 1)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return net(torch.cat([x, t.expand_as(x)], -1))

    def guide() -> None:
        pyro.module("net", net)
        loc = pyro.param("loc", torch.zeros(1))
        scale = pyro.param("scale", torch.ones(1), constraint=dist.constraints.positive)
        law = SimulatedPosterior(
            prior_sde(),
            drift,
            dist.Normal(loc, scale).to_event(1),
            GRID,
            simulator=simulate,
            log_ratio=LogRatio.KL,
        )
        with pyro.plate("copies", 1):
            pyro.sample("path", law)

    model, _ = state_space(LogRatio.KL)
    loss = Trace_ELBO(32, max_plate_nesting=1, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss)
    before = sum(svi.evaluate_loss() for _ in range(10)) / 10
    for _ in range(60):
        svi.step()
    after = sum(svi.evaluate_loss() for _ in range(10)) / 10
    # 320 paths; the standard error of the bound is 0.1 nats after training.
    assert after < before - 1.0
    assert kalman_log_evidence() - 1.5 < -after < kalman_log_evidence() + 0.3


def test_fit_trains_it():
    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 1)
            self.loc = nn.Parameter(torch.zeros(1))

        def forward(self) -> None:
            pyro.module("guide", self)
            law = SimulatedPosterior(
                prior_sde(),
                lambda x, t: self.net(torch.cat([x, t.expand_as(x)], -1)),
                dist.Normal(self.loc, 0.6).to_event(1),
                GRID,
                simulator=simulate,
                log_ratio=LogRatio.KL,
            )
            with pyro.plate("copies", 1):
                pyro.sample("path", law)

    model, _ = state_space(LogRatio.KL)
    result = fit(
        model,
        Guide(),
        objective=ELBO(32),
        num_steps=100,
        lr=0.1,
        seed=0,
        start=False,
        progress_bar=False,
    )
    exact = kalman_log_evidence()
    assert exact - 1.5 < result.elbo < exact + 4 * result.elbo_se


def test_predictive_generates():
    model, guide = state_space(LogRatio.PATHWISE)
    assert Predictive(model, num_samples=5)()["path"].shape[0] == 5
    assert Predictive(model, guide=guide, num_samples=5)()["y"].shape[0] == 5


# Grids, copies, devices.


def test_grids_of_items_and_padding():
    times = torch.tensor([[0.0, 0.5, 1.0, 1.0], [0.0, 0.1, 0.2, 0.9]])
    noise = draw_increments(times.t(), torch.zeros(2, 1))
    start = dist.Delta(torch.ones(2, 1), event_dim=1)
    q, p = laws(LogRatio.PATHWISE, times, partial(simulate, increments=noise), start)
    together = -p.log_prob_terms(q.rsample()).path
    for i, length in ((0, 3), (1, 4)):
        alone = partial(simulate, increments=noise[: length - 1, i])
        start = dist.Delta(torch.ones(1), event_dim=1)
        q, p = laws(LogRatio.PATHWISE, times[i, :length], alone, start)
        # A step without length changes nothing and scores nothing.
        assert torch.allclose(together[i], -p.log_prob_terms(q.rsample()).path, rtol=1e-12)


def test_expand_and_shapes():
    q, p = laws(LogRatio.PATHWISE, torch.linspace(0, 1, 5))
    wide = q.expand((3, 2))
    value = wide.rsample((4,))
    assert value.shape == (4, 3, 2, *q.event_shape)
    assert wide.log_prob(value).shape == p.expand((3, 2)).log_prob(value).shape == (4, 3, 2)
    assert value[0, 0, 0].ne(value[0, 0, 1]).any()
    draw = wide.unpack(value)
    assert draw.states.shape == (4, 3, 2, 5, 1)
    assert draw.drift.shape == draw.diffusion.shape == draw.increments.shape == (4, 3, 2, 4, 1)
    assert torch.equal(draw.start, draw.states[..., 0, :])


def test_copies():
    prior = SDE(Decay(), S)
    start = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    p = SimulatedPrior(prior, start, GRID, simulator=simulate, log_ratio=LogRatio.KL)
    value = p.sample((3,))
    for other in (copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        assert torch.equal(other.log_prob(value), p.log_prob(value))


@pytest.mark.parametrize("log_ratio", FORMS)
def test_meta_device(log_ratio: LogRatio):
    with torch.device("meta"):
        net, times = nn.Linear(2, 2), torch.zeros(5)
        start = dist.Normal(torch.zeros(3, 2), torch.ones(2), validate_args=False).to_event(1)
        given = {"simulator": simulate, "log_ratio": log_ratio}
        prior = SDE(lambda x, t: net(x), 0.5)
        q = SimulatedPosterior(prior, lambda x, t: net(x) + t, start, times, **given)
        p = SimulatedPrior(prior, start, times, **given)
        value = q.rsample()
        (q.log_prob(value) - p.log_prob(value)).sum().backward()
    assert net.weight.grad.is_meta


def test_pieces_of_the_score_are_the_same():
    torch.manual_seed(0)
    q, p = laws(LogRatio.PATHWISE, torch.linspace(0, 1, 12))
    value = q.rsample((3,))
    _, other = laws(LogRatio.PATHWISE, torch.linspace(0, 1, 12))
    other.num_pieces = 4
    assert torch.equal(other.log_prob(value), p.log_prob(value))


# Errors.


def test_different_diffusions_are_refused():
    q, _ = laws(LogRatio.KL, GRID)
    start = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    other = SimulatedPrior(
        SDE(lambda x, t: -x, S + 0.1), start, GRID, simulator=simulate, log_ratio=LogRatio.KL
    )
    with pytest.raises(ValueError, match="`process` must be that of the posterior, with the same"):
        other.log_prob(q.rsample())


def test_forms_must_match():
    q, _ = laws(LogRatio.KL, GRID)
    _, p = laws(LogRatio.PATHWISE, GRID)
    with pytest.raises(ValueError, match="the same times and log_ratio"):
        p.log_prob(q.rsample())
    _, p = laws(LogRatio.KL, GRID[:-1])
    with pytest.raises(ValueError, match="`value` must end with size"):
        p.log_prob(q.rsample())


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (torch.tensor([0.0, 0.5, 0.4]), "`times` must be finite and not decrease"),
        (torch.tensor([0.0, torch.nan, 1.0]), "`times` must be finite and not decrease"),
        (torch.tensor([0.0]), "`times` must end with at least 2 times"),
        (torch.zeros(3, 4), "`times` must have a batch shape that broadcasts"),
    ],
)
def test_times_at_fault(times: Tensor, message: str):
    start = dist.Normal(torch.zeros(2, 1), 1.0).to_event(1)
    with pytest.raises(ValueError, match=message):
        laws(LogRatio.KL, times, start=start)


def test_kinds_of_arguments():
    start = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    given = {"simulator": simulate, "log_ratio": LogRatio.KL}
    with pytest.raises(TypeError, match="`process` must be an SDE; got float"):
        SimulatedPrior(1.0, start, GRID, **given)
    with pytest.raises(TypeError, match="`log_ratio` must be a LogRatio; got 'kl'"):
        SimulatedPrior(prior_sde(), start, GRID, simulator=simulate, log_ratio="kl")
    with pytest.raises(TypeError, match="`simulator` must be callable"):
        SimulatedPrior(prior_sde(), start, GRID, simulator=None, log_ratio=LogRatio.KL)
    with pytest.raises(ValueError, match="`start` must have an event shape of one dim"):
        SimulatedPrior(prior_sde(), dist.Normal(0.0, 1.0), GRID, **given)
    with pytest.raises(ValueError, match="`drift` must be given exactly where"):
        SimulatedPosterior(prior_sde(), None, start, GRID, **given)


def test_drift_that_is_not_finite():
    start = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    given = {"simulator": simulate, "log_ratio": LogRatio.KL}
    bad = lambda x, t: x / (t - t)  # noqa: E731
    q = SimulatedPosterior(prior_sde(), bad, start, GRID, **given)
    with pytest.raises(ValueError, match="`drift` must give finite states along the simulated"):
        q.rsample()
    q, _ = laws(LogRatio.KL, GRID)
    p = SimulatedPrior(SDE(bad, S), start, GRID, **given)
    with pytest.raises(ValueError, match="`drift` must give finite values"):
        p.log_prob(q.rsample())


@pytest.mark.parametrize("objective", [ELBO, STL, IWAE])
def test_one_bad_trajectory_makes_the_whole_loss_nan(objective: type):
    """Without validation there is no look at values; a NaN must still reach the loss."""
    form = LogRatio.PATHWISE
    with pyro.validation_enabled(False):
        model, _ = state_space(form, 50)

        def guide() -> None:
            def drift(x: Tensor, t: Tensor) -> Tensor:
                first = torch.arange(x.shape[-2]).unsqueeze(-1) == 0
                return torch.where(first & (t > 0.5), torch.nan, -x)

            start = dist.Normal(torch.zeros(1), 1.0).to_event(1)
            with pyro.plate("copies", 50):
                law = SimulatedPosterior(
                    prior_sde(), drift, start, GRID, simulator=simulate, log_ratio=form
                )
                pyro.sample("path", law)

        assert math.isnan(objective(4, max_plate_nesting=2).loss(model, guide))


def test_a_process_without_noise():
    sde = SDE(lambda x, t: -x, None)
    start = dist.Normal(torch.zeros(3, 2), 1.0).to_event(1)
    given = {"simulator": simulate, "log_ratio": LogRatio.KL}
    q = SimulatedPosterior(sde, None, start, GRID, **given)
    p = SimulatedPrior(sde, start, GRID, **given)
    value = q.rsample()
    assert torch.equal(q.log_prob(value), p.log_prob(value))
    assert not q.is_log_ratio_estimate
