"""Samplers of generative models on exact Gaussian scores: orders, moments, abilities."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian_processes import COVARIANCE, MEAN, denoiser, marginal, moments, process
from pyro.distributions import Normal
from registry import SAMPLERS_OF_MODELS

from flowvi.paths import (
    DiffusionPath,
    LinearLogSNR,
    PredictedDrift,
    Prediction,
    ProcessFamily,
    StateDiffusion,
    SubVariancePreserving,
    VarianceExploding,
    VariancePreservingCosine,
    prediction_family,
)
from flowvi.samplers import (
    DDIM,
    Ability,
    Ancestral,
    AnnealedLangevin,
    DPMSolver,
    DriftProcess,
    ExponentialIntegrator,
    FieldProcess,
    FlowField,
    Parallel,
    PredictorCorrector,
    ProbabilityFlow,
    ReverseSDE,
    Span,
    StochasticHeun,
    log_snr_times,
    sample,
    sample_path,
    uniform_times,
)
from flowvi.transforms import RK4, Adaptive, Continuous, Euler

SCHEDULE = LinearLogSNR(-3.0, 2.0).double()


def error_of(sampler, source, num_steps, grid=uniform_times):
    """Largest error of a moment of the last state."""
    times = grid(source, num_steps, MEAN)
    mean, covariance = moments(sampler, source, times)
    true_mean, true_covariance = marginal(source.schedule, source.high)
    return float(
        torch.maximum((mean - true_mean).abs().max(), (covariance - true_covariance).abs().max())
    )


def slope(errors):
    """Order of convergence from errors at steps halved each time, by least squares."""
    x = -torch.arange(len(errors)) * math.log(2.0)
    y = torch.tensor(errors).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


ORDERED = {name: case for name, case in SAMPLERS_OF_MODELS.items() if case.make().order}


@pytest.mark.parametrize("name", ORDERED)
def test_measured_order(name):
    """Of the exact moments of the last state, at 12, 24 and 48 steps."""
    sampler = ORDERED[name].make()
    errors = [error_of(sampler, process(SCHEDULE), 12 * 2**k) for k in range(3)]
    assert slope(errors) == pytest.approx(sampler.order, abs=0.4), errors
    assert errors[-1] < 0.04


@pytest.mark.parametrize("name", SAMPLERS_OF_MODELS)
def test_law_of_draws(name):
    """Moments of 4000 draws after 30 steps (adaptive: 1); 4.5 standard errors plus the bias."""
    sampler, source, num = SAMPLERS_OF_MODELS[name].make(), process(SCHEDULE), 4000
    adaptive = isinstance(sampler, ProbabilityFlow) and sampler.is_adaptive
    x = sample(source, sampler, (num,), 1 if adaptive else 30)
    mean, covariance = marginal(SCHEDULE, 1.0)
    sd = covariance.diagonal().sqrt()
    # Above the first-order errors of the test before; Langevin steps lag behind.
    bias = 0.1 if isinstance(sampler, AnnealedLangevin) else 0.06
    assert ((x.mean(0) - mean).abs() < 4.5 * sd / num**0.5 + bias).all()
    widths = (sd[:, None] * sd) * (2 / num) ** 0.5
    assert ((x.T.cov() - covariance).abs() < 4.5 * widths + bias).all()


def test_annealed_langevin_reaches_its_stationary_law():
    """Many small steps at the last level: bias of the covariance is epsilon / 2 there."""
    source = process(SCHEDULE)
    times = torch.cat([uniform_times(source, 20, MEAN), torch.ones(400)])
    mean, covariance = moments(AnnealedLangevin(1, 0.4), source, times)
    true_mean, true_covariance = marginal(SCHEDULE, 1.0)
    size = 0.4 * float(SCHEDULE(torch.tensor(1.0)).sigma) ** 2
    eye = torch.eye(2)
    inverse = torch.linalg.inv(true_covariance)
    stationary = torch.linalg.solve(eye - size / 2 * inverse, true_covariance)
    torch.testing.assert_close(mean, true_mean)
    torch.testing.assert_close(covariance, stationary)


@pytest.mark.parametrize(
    "schedule", [VariancePreservingCosine(-4.0, 3.0), VarianceExploding(0.2, 5.0)], ids=str
)
@pytest.mark.parametrize("sampler", [DPMSolver(2), Ancestral(), ReverseSDE(StochasticHeun())])
def test_other_schedules_and_grids(schedule, sampler):
    source = process(schedule.double())
    coarse, fine = (error_of(sampler, source, n, log_snr_times) for n in (25, 50))
    assert math.log2(coarse / fine) == pytest.approx(sampler.order, abs=0.4)


def test_infinite_signal_to_noise_ratio_is_cut():
    source = process(SubVariancePreserving(), high=0.98)
    assert error_of(DPMSolver(2), source, 80) < 0.01
    times = log_snr_times(source, 10, MEAN)
    assert (times[0], times[-1]) == (0.0, 0.98)
    steps = source.schedule.log_snr(times).diff()
    torch.testing.assert_close(steps, steps.mean().expand(10))


@pytest.mark.parametrize("prediction", list(Prediction), ids=lambda p: p.name)
def test_every_prediction_gives_the_same_states(prediction):
    start = torch.randn(5, 2)
    want = sample(process(SCHEDULE), DPMSolver(2), (5,), 8, start=start)
    got = sample(process(SCHEDULE, prediction), DPMSolver(2), (5,), 8, start=start)
    torch.testing.assert_close(got, want)


def test_ddim_without_noise_is_the_exponential_integrator():
    start = torch.randn(5, 2)
    want = sample(process(SCHEDULE), DDIM(), (5,), 8, start=start)
    for prediction in (Prediction.DATA, Prediction.NOISE):
        got = sample(process(SCHEDULE), ExponentialIntegrator(1, prediction), (5,), 8, start=start)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_ddim_solves_the_ode():
    """And with 200 steps is near the adaptive solution; its error is of the order of 1 / 200."""
    start = torch.randn(5, 2)
    adaptive = ProbabilityFlow(Adaptive(rtol=1e-6, atol=1e-6))
    want = sample(process(SCHEDULE), adaptive, (5,), 1, start=start)
    got = sample(process(SCHEDULE), DDIM(), (5,), 200, start=start)
    torch.testing.assert_close(got, want, rtol=0.0, atol=0.02)


def test_flow_of_a_gaussian_is_its_affine_map():
    """The flow maps each state by the square roots of the covariances, which commute here."""
    start = torch.randn(5, 2)
    got = sample(process(SCHEDULE), ProbabilityFlow(), (5,), 80, start=start)
    (m0, c0), (m1, c1) = marginal(SCHEDULE, 0.0), marginal(SCHEDULE, 1.0)
    values0, vectors = torch.linalg.eigh(c0)
    ratio = (torch.linalg.eigvalsh(c1) / values0).sqrt()
    want = m1 + (start - m0) @ vectors * ratio @ vectors.T
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)


def test_ancestral_steps_are_draws_from_the_posterior():
    """One step from t to s, against the conditional of a joint normal of x_t and x_s given y."""
    t, s, x = torch.tensor([0.3]), torch.tensor([0.5]), torch.tensor([[0.4, -1.0]])
    source = process(SCHEDULE)
    now, then = SCHEDULE(t), SCHEDULE(s)
    data, _ = source.predict(x, t)
    # x_t = (alpha_t / alpha_s) x_s + noise, so the joint is known.
    ratio = now.alpha / then.alpha
    cov, var_t, var_s = ratio * then.sigma**2, now.sigma**2, then.sigma**2
    mean = then.alpha * data + cov / var_t * (x - now.alpha * data)
    sd = (var_s - cov**2 / var_t).sqrt()
    span = Span(t.expand(1, 1), s.expand(1, 1), torch.zeros(1, 1, 2))
    got, _ = Ancestral().step(source, x, span, None)
    torch.testing.assert_close(got, mean)
    moved, _ = Ancestral().step(source, x, span._replace(noise=torch.ones(1, 1, 2)), None)
    torch.testing.assert_close(moved - got, sd.expand(1, 2))


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_noise_of_ddim_is_that_of_the_literature(eta):
    """Equation 16 of the reference with its alpha-bar: square of alpha, in its own words."""
    t, s = torch.tensor([[0.3]]), torch.tensor([[0.5]])
    bar, bar_before = SCHEDULE(t).alpha ** 2, SCHEDULE(s).alpha ** 2
    sd = eta * ((1 - bar_before) / (1 - bar) * (1 - bar / bar_before)).sqrt()
    still, kick = (
        DDIM(eta).step(
            process(SCHEDULE), torch.zeros(1, 2), Span(t, s, torch.full((1, 1, 2), z)), None
        )[0]
        for z in (0.0, 1.0)
    )
    torch.testing.assert_close(kick - still, sd.expand(1, 2))


class CountedNetwork:
    def __init__(self):
        self.mean, self.calls = denoiser(SCHEDULE), 0

    def __call__(self, x, t):
        self.calls += 1
        return self.mean(x, t)


@pytest.mark.parametrize(
    "sampler",
    [DDIM(), Ancestral(), ReverseSDE(), ProbabilityFlow(Euler), PredictorCorrector(DDIM())],
    ids=lambda s: type(s).__name__,
)
def test_parallel_equals_sequential_in_fewer_calls(sampler):
    start = torch.randn(3, 2)
    found = []
    for each in (sampler, Parallel(sampler, window=100, tolerance=1e-7)):
        source = process(SCHEDULE)
        source.network = network = CountedNetwork()
        torch.manual_seed(3)
        path = sample_path(source, each, (3,), 100, start=start)
        assert network.calls == path.num_calls
        found.append(path)
    one, other = found
    torch.testing.assert_close(other.states, one.states, rtol=0.0, atol=1e-5)
    assert other.num_calls < one.num_calls / 2


@pytest.mark.parametrize("sampler", [DDIM(0.5), Parallel(DDIM(0.5), 4), DPMSolver(2)])
def test_one_draw_and_several_dims(sampler):
    assert sample(process(SCHEDULE), sampler, (), 5).shape == (2,)
    assert sample(process(SCHEDULE), sampler, (2, 3), 5).shape == (2, 3, 2)


def test_small_windows_of_parallel_sampling():
    start = torch.randn(3, 2)
    want = sample_path(process(SCHEDULE), DDIM(), (3,), 30, start=start)
    for window, tolerance in ((1, 1e-9), (7, 0.0)):
        got = sample_path(process(SCHEDULE), Parallel(DDIM(), window, tolerance), (3,), 30,
                          start=start)  # fmt: skip
        torch.testing.assert_close(got.states, want.states, rtol=0.0, atol=1e-7)


def test_process_of_a_field_serves_flows_and_noise():
    source = process(SCHEDULE, Prediction.NOISE)
    family = prediction_family(SCHEDULE, source.network, source.prediction, source.diffusion)
    fields = FieldProcess(family, source.start)
    start = torch.randn(4, 2)
    for sampler in (ProbabilityFlow(), ReverseSDE(), ReverseSDE(level=2.0)):
        torch.manual_seed(1)
        want = sample(source, sampler, (4,), 5, start=start)
        torch.manual_seed(1)
        got = sample(fields, sampler, (4,), 5, start=start)
        torch.testing.assert_close(got, want)
    with pytest.raises(NotImplementedError, match="AnnealedLangevin needs predictions"):
        sample(fields, AnnealedLangevin(), (4,), 5)


def test_continuous_flow_scores_the_gaussian():
    """log-density of the last state, by the flow, against the normal law that it has."""
    source = process(SCHEDULE)
    x = torch.randn(6, 2)
    z, ladj = Continuous(FlowField(source), solver=RK4(6)).inverse_and_ladj(x)
    law = torch.distributions.MultivariateNormal(*marginal(SCHEDULE, 1.0))
    torch.testing.assert_close(
        source.start.log_prob(z) + ladj, law.log_prob(x), rtol=1e-3, atol=1e-3
    )


def test_drift_of_a_path_can_be_sampled():
    path = DiffusionPath(2, SCHEDULE)
    drift = PredictedDrift(path, denoiser(SCHEDULE), Prediction.DATA)
    start = torch.randn(4, 2)
    law = Normal(torch.zeros(2), 1.0).to_event(1)
    assert sample(drift, Ancestral(), (4,), 5, start=law).shape == (4, 2)
    with pytest.raises(ValueError, match="`start` must be given with a drift"):
        sample(drift, Ancestral(), (4,), 5, start=start)
    encoded = DiffusionPath(2, SCHEDULE, encoder=lambda y, t: y * t)
    drift = PredictedDrift(encoded, denoiser(SCHEDULE), Prediction.DATA)
    assert sample(drift, Ancestral(), (4,), 5, start=law).shape == (4, 2)
    with pytest.raises(NotImplementedError, match=r"DDIM needs a velocity.*Use Ancestral"):
        sample(drift, DDIM(), (4,), 5, start=law)


NOISY = process(SCHEDULE, abilities=(Ability.NOISING, Ability.SCHEDULE))
FLOWING = process(SCHEDULE, abilities=(Ability.FLOW, Ability.SCHEDULE))


@pytest.mark.parametrize(
    ("source", "sampler", "message"),
    [
        (NOISY, DDIM(), "DDIM needs a velocity"),
        (NOISY, DPMSolver(), "DPMSolver needs a velocity.*Use Ancestral or ReverseSDE"),
        (NOISY, ProbabilityFlow(), "ProbabilityFlow needs a velocity"),
        (NOISY, ReverseSDE(level=0.5), "needs a score.*Use level=1.0"),
        (NOISY, Parallel(DDIM()), "DDIM needs a velocity"),
        (FLOWING, Ancestral(), "Ancestral needs a drift with noise.*Use ProbabilityFlow"),
        (FLOWING, ReverseSDE(), "ReverseSDE needs a drift with noise.*Use ProbabilityFlow"),
        (FLOWING, DDIM(0.5), "DDIM needs a drift with noise"),
        (FLOWING, AnnealedLangevin(), "AnnealedLangevin needs a score"),
        (FLOWING, PredictorCorrector(DDIM()), "PredictorCorrector needs a score"),
    ],
)
def test_what_a_process_cannot_serve_is_refused(source, sampler, message):
    with pytest.raises(NotImplementedError, match=message):
        sample(source, sampler, (2,), 5)


def test_velocity_alone_serves_the_flow_only():
    law = Normal(torch.zeros(2), 1.0).to_event(1)
    flow = DriftProcess(lambda x, t: -x, None, law)
    start = torch.ones(1, 2)
    end = sample(flow, ProbabilityFlow(), (1,), 10, start=start)
    torch.testing.assert_close(end, start * math.exp(-1), rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match="needs predictions of data and noise"):
        sample(flow, DDIM(), (1,), 10)
    with pytest.raises(NotImplementedError, match="log_snr_times needs predictions"):
        sample(flow, ProbabilityFlow(), (1,), 10, grid=log_snr_times)
    noisy = DriftProcess(
        lambda x, t: -x, StateDiffusion(lambda x, t: 0.1 * x, elementwise=True), law
    )
    assert sample(noisy, ReverseSDE(), (3,), 4).shape == (3, 2)
    with pytest.raises(NotImplementedError, match="Stratonovich"):
        sample(noisy, ReverseSDE(StochasticHeun()), (3,), 4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DDIM(1.5), ValueError, r"`eta` must lie in \[0, 1\]; got 1.5"),
        (lambda: DPMSolver(4), ValueError, "`order` must be 1, 2 or 3; got 4"),
        (
            lambda: ExponentialIntegrator(1, Prediction.SCORE),
            ValueError,
            "`prediction` must be DATA or NOISE",
        ),
        (lambda: ReverseSDE(level=0.0), ValueError, "`level` must be positive; got 0.0"),
        (lambda: ReverseSDE(DDIM()), TypeError, "`solver` must be an SDESolver; got DDIM"),
        (lambda: ProbabilityFlow("rk4"), TypeError, "`method` must be a class of fixed steps"),
        (lambda: AnnealedLangevin(0), ValueError, "`num_corrections` must be an integer"),
        (lambda: AnnealedLangevin(1, -1.0), ValueError, "`step_size` must be positive"),
        (lambda: PredictorCorrector(Euler), TypeError, "`predictor` must be a Sampler"),
        (
            lambda: PredictorCorrector(DPMSolver(2)),
            NotImplementedError,
            "DPMSolver remembers earlier states",
        ),
        (lambda: Parallel(DPMSolver(2)), NotImplementedError, "cannot be taken at once"),
        (
            lambda: Parallel(ProbabilityFlow(Adaptive())),
            NotImplementedError,
            "cannot be taken at once",
        ),
        (lambda: Parallel(Euler), TypeError, "`sampler` must be a Sampler"),
        (lambda: Parallel(DDIM(), window=0), ValueError, "`window` must be an integer"),
        (lambda: Parallel(DDIM(), tolerance=-1.0), ValueError, "`tolerance` must not be neg"),
        (lambda: process(SCHEDULE, low=0.5, high=0.5), ValueError, "`high` must be above `low`"),
        (
            lambda: DriftProcess(lambda x, t: x, None, Normal(0.0, 1.0)),
            ValueError,
            "`start` must have an event shape of one dim",
        ),
        (lambda: sample(NOISY, Euler, (2,)), TypeError, "`sampler` must be a Sampler"),
        (lambda: sample(3, DDIM(), (2,)), TypeError, "`source` must be a GenerativeProcess"),
        (lambda: sample(NOISY, Ancestral(), (2,), 0), ValueError, "`num_steps` must be"),
        (
            lambda: sample(NOISY, Ancestral(), (2,), start=torch.zeros(3, 2)),
            ValueError,
            r"`start` must have shape \(2, 2\)",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_no_gradient_and_a_bar(capsys):
    source = process(SCHEDULE)
    weight = torch.ones((), requires_grad=True)
    mean = source.network
    source.network = lambda x, t: weight * mean(x, t)
    x = sample(source, DDIM(), (2,), 3, progress_bar=True)
    assert not x.requires_grad
    assert "DDIM" in capsys.readouterr().err


def test_family_of_a_process_has_its_drift():
    """Level k of a process against the drift of ``ProcessFamily``."""
    source = process(SCHEDULE)
    family = ProcessFamily(
        lambda x, t: (source.velocity(x, t), source.score(x, t)), source.diffusion
    )
    x, t = torch.randn(4, 2), torch.rand(4, 1)
    for level in (0.0, 0.5, 1.0):
        torch.testing.assert_close(source.drift(x, t, level), family.drift(x, t, level))
    torch.testing.assert_close(source.scale(x, t), family.scale(x, t))
    assert COVARIANCE.shape == (source.dim, source.dim)
