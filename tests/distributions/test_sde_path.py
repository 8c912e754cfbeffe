"""Grid paths: transition densities, order of convergence, irregular times, errors."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from path_cases import OrnsteinUhlenbeck, divergence
from pyro.infer import Predictive, Trace_ELBO

from flowvi.distributions import SDEPath
from flowvi.objectives import ELBO, IWAE, STL
from flowvi.paths import StateDiffusion

P = OrnsteinUhlenbeck(rate=0.5, shift=0.0, noise=0.7, mean=0.0, sd=1.0)
Q = OrnsteinUhlenbeck(rate=2.0, shift=1.5, noise=0.7, mean=0.6, sd=0.4)


# Wider than P at the start, so that the weights p / q have a variance.
WIDE = OrnsteinUhlenbeck(rate=0.7, shift=0.25, noise=0.7, mean=0.3, sd=1.2)


def grid_laws(num_steps: int, q: OrnsteinUhlenbeck = Q) -> tuple[SDEPath, SDEPath]:
    prior = SDEPath(torch.linspace(0, 1, num_steps + 1), P.drift, P.noise, P.start())
    return prior, prior.with_drift(q.drift, q.start())


def grid_divergence(num_steps: int, q: OrnsteinUhlenbeck = Q) -> float:
    """KL of the two discretised processes, carrying mean and variance along by hand."""
    mean, var, dt = q.mean, q.sd**2, 1 / num_steps
    total = math.log(P.sd / q.sd) + (var + (mean - P.mean) ** 2) / (2 * P.sd**2) - 0.5
    for _ in range(num_steps):
        gap = (P.shift - q.shift) - (P.rate - q.rate) * mean
        total += dt * (gap**2 + (P.rate - q.rate) ** 2 * var) / (2 * q.noise**2)
        mean = mean + (q.shift - q.rate * mean) * dt
        var = (1 - q.rate * dt) ** 2 * var + q.noise**2 * dt
    return total


@pytest.mark.parametrize("num_steps", [4, 32])
def test_divergence_and_mean_one(num_steps):
    prior, posterior = grid_laws(num_steps, WIDE)
    x = posterior.sample((100_000,))
    ratio = posterior.log_prob(x) - prior.log_prob(x)
    # 3 standard errors of 100,000 draws, both for the mean and for E exp(-ratio) = 1.
    error = ratio.std() / 100_000**0.5
    assert abs(ratio.mean() - grid_divergence(num_steps, WIDE)) < 3 * error
    weight = (-ratio).exp()
    error = weight.std() / 100_000**0.5
    assert error < 0.01
    assert abs(weight.mean() - 1) < 3 * error


def test_divergence_converges_at_order_one():
    exact = divergence(Q, P)
    errors = [abs(grid_divergence(n) - exact) for n in (16, 32, 64, 128)]
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert all(abs(order - 1) < 0.1 for order in orders), orders
    # What is drawn follows the same line: the error of 8 steps is 20 standard errors.
    prior, posterior = grid_laws(8)
    x = posterior.sample((200_000,))
    got = posterior.log_prob(x) - prior.log_prob(x)
    error = abs(got.mean() - exact)
    assert error > 10 * got.std() / 200_000**0.5
    assert 1.6 < error / errors[0] < 2.4


def test_log_prob_is_the_joint_gaussian_of_a_linear_process():
    """One multivariate normal with the covariance of the recursion, two dimensions."""
    times = torch.tensor([0.0, 0.2, 0.5, 1.1])
    matrix = torch.tensor([[-0.5, 0.3], [0.1, -1.0]])
    start = dist.Normal(torch.tensor([0.3, -0.2]), torch.tensor([0.5, 1.5])).to_event(1)
    b = torch.tensor([0.4, 0.9])
    path = SDEPath(times, lambda x, t: x @ matrix.T + t, b, start)
    blocks, mean, means = [start.variance.sqrt().diag()], start.mean, [start.mean]
    for t, dt in zip(times, times.diff(), strict=False):
        step = torch.eye(2) + matrix * dt
        mean = step @ mean + t * dt
        means.append(mean)
        # Each state as a linear map of all noises.
        blocks.append(torch.cat([step @ blocks[-1], (b * dt.sqrt()).diag()], 1))
    maps = torch.cat([torch.nn.functional.pad(m, (0, 8 - m.shape[1])) for m in blocks])
    law = torch.distributions.MultivariateNormal(torch.cat(means), maps @ maps.T)
    x = torch.randn(7, 4, 2)
    torch.testing.assert_close(path.log_prob(x), law.log_prob(x.flatten(1)))
    terms = path.log_prob_terms(x)
    torch.testing.assert_close(terms.start, start.log_prob(x[:, 0]))
    torch.testing.assert_close(terms.start + terms.path, path.log_prob(x))
    draws = path.sample((50_000,)).flatten(1)
    assert ((draws.mean(0) - law.mean).abs() < 4.5 * law.stddev / 50_000**0.5).all()
    torch.testing.assert_close(draws.T.cov(), law.covariance_matrix, atol=0.06, rtol=0.05)


def test_diffusion_of_the_state():
    times = torch.tensor([0.0, 0.5])
    b = StateDiffusion(lambda x, t: 0.3 * x + t + 1)
    path = SDEPath(times, lambda x, t: -x, b, dist.Normal(torch.zeros(1), 1.0).to_event(1))
    x = torch.tensor([[0.7], [0.1]])
    want = dist.Normal(0.0, 1.0).log_prob(x[0, 0])
    want = want + dist.Normal(0.35, 1.21 * 0.5**0.5).log_prob(x[1, 0])
    torch.testing.assert_close(path.log_prob(x), want)


def irregular():
    times = torch.tensor([[0.0, 0.3, 0.4, 1.0], [0.1, 0.6, -9.0, -9.0], [0.0, 0.5, 0.9, 0.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    return times, mask


def test_irregular_times_of_each_item_with_padding():
    times, mask = irregular()
    path = SDEPath(times, P.drift, P.noise, P.start(), mask=mask)
    assert path.batch_shape == (3,)
    assert path.event_shape == (4, 1)
    x = path.expand((5, 3)).sample()
    assert x.shape == (5, 3, 4, 1)
    for i, n in enumerate(mask.sum(-1).tolist()):
        alone = SDEPath(times[i, :n], P.drift, P.noise, P.start())
        torch.testing.assert_close(path.log_prob(x)[:, i], alone.log_prob(x[:, i, :n]))
        torch.testing.assert_close(x[:, i, n:], x[:, i, n - 1 : n].expand(5, 4 - n, 1))
    # What stands in the padding does not matter, and gets no gradient.
    y = torch.where(mask[..., None], x, torch.full_like(x, 77.0)).requires_grad_()
    torch.testing.assert_close(path.log_prob(y), path.log_prob(x))
    (grad,) = torch.autograd.grad(path.log_prob(y).sum(), y)
    assert (grad[~mask.expand(5, 3, 4)] == 0).all()
    assert grad.isfinite().all()


def test_padded_draws_have_finite_gradients():
    times, mask = irregular()
    rate = torch.nn.Parameter(torch.tensor(0.5))
    b = torch.nn.Parameter(torch.tensor(0.7))
    path = SDEPath(times, lambda x, t: -rate * x, b, P.start(), mask=mask)
    x = path.rsample()
    grads = torch.autograd.grad((path.log_prob(x.detach()) + x.square().sum()).sum(), [rate, b])
    assert all(g.isfinite() and g != 0 for g in grads)


RATE, NOISE, ERROR = 1.3, 0.9, 0.4
TIMES = torch.tensor([0.0, 0.05, 0.2, 0.3, 0.37, 0.55, 0.8, 1.0], dtype=torch.float64)
SEEN = [1, 3, 4, 6]
Y = [0.9, -0.4, 0.2, 1.1]


def joint() -> tuple[torch.Tensor, torch.Tensor, float]:
    """Posterior mean and precision of the discretised chain, and its exact log-evidence.

    Dense linear algebra: the precision of a chain, conditioned on the data.
    """
    n = len(TIMES)
    dt = TIMES.diff()
    maps = torch.eye(n)
    scale = torch.cat([torch.tensor([0.8]), NOISE * dt.sqrt()])
    for k in range(n - 1):
        maps[k + 1, k] = -(1 - RATE * dt[k])
    prior = torch.linalg.inv(maps)
    covariance = prior @ scale.square().diag() @ prior.T
    select = torch.zeros(len(SEEN), n)
    for row, column in enumerate(SEEN):
        select[row, column] = 1.0
    y = torch.tensor(Y)
    gram = select @ covariance @ select.T + ERROR**2 * torch.eye(len(SEEN))
    evidence = torch.distributions.MultivariateNormal(torch.zeros(len(SEEN)), gram).log_prob(y)
    gain = torch.linalg.solve(gram, select @ covariance).T
    return gain @ y, covariance - gain @ select @ covariance, float(evidence)


def kalman() -> float:
    """Evidence once more, by the filter on the grid."""
    mean, var, total = 0.0, 0.64, 0.0
    for k in range(len(TIMES)):
        if k:
            dt = float(TIMES[k] - TIMES[k - 1])
            mean, var = (1 - RATE * dt) * mean, (1 - RATE * dt) ** 2 * var + NOISE**2 * dt
        if k in SEEN:
            residual = Y[SEEN.index(k)] - mean
            s = var + ERROR**2
            total += -0.5 * (math.log(2 * math.pi * s) + residual**2 / s)
            mean, var = mean + var / s * residual, var * (1 - var / s)
    return total


def log_weights(posterior: SDEPath, num: int) -> torch.Tensor:
    prior = SDEPath(TIMES, lambda x, t: -RATE * x, NOISE, _normal(0.0, 0.8))
    x = posterior.sample((num,))
    data = dist.Normal(x[..., SEEN, 0], ERROR).log_prob(torch.tensor(Y)).sum(-1)
    return data + prior.log_prob(x) - posterior.log_prob(x)


def _normal(mean: float, sd: float):
    return dist.Normal(torch.tensor([mean]), torch.tensor([sd])).to_event(1)


def test_exact_smoother_on_the_grid_gives_the_kalman_likelihood_at_every_draw():
    """The smoother is a chain: each state given the last is normal, linear in it."""
    mean, covariance, evidence = joint()
    assert abs(evidence - kalman()) < 1e-9
    slope = covariance.diagonal(1) / covariance.diagonal()[:-1]
    var = covariance.diagonal()[1:] - slope * covariance.diagonal(1)
    dt = TIMES.diff()

    def index(t):
        return torch.searchsorted(TIMES, t.contiguous() - 1e-9).clamp(max=len(TIMES) - 2)

    def drift(x, t):
        k = index(t)
        return (mean[k + 1] + slope[k] * (x - mean[k]) - x) / dt[k]

    def diffusion(t):
        k = index(t)
        return (var[k] / dt[k]).sqrt()

    start = _normal(float(mean[0]), float(covariance[0, 0]) ** 0.5)
    weights = log_weights(SDEPath(TIMES, drift, diffusion, start), 50)
    torch.testing.assert_close(weights, torch.full((50,), kalman()), rtol=0, atol=1e-9)


def test_more_particles_close_the_gap_of_a_wrong_posterior():
    """IWAE over grid paths, K = 1, 5, 50, 1000: increasing, below the truth, nearly closed."""
    posterior = SDEPath(TIMES, lambda x, t: 0.5 - x, NOISE, _normal(0.2, 0.6))
    log_w = log_weights(posterior, 400_000)
    bounds, errors = [], []
    for k in (1, 5, 50, 1000):
        each = log_w.reshape(-1, k).logsumexp(-1) - math.log(k)
        bounds.append(float(each.mean()))
        errors.append(float(each.std() / len(each) ** 0.5))
    assert all(b > a + 3 * e for a, b, e in zip(bounds, bounds[1:], errors[1:], strict=False))
    assert bounds[-1] < kalman() + 3 * errors[-1]
    assert kalman() - bounds[0] > 0.5
    assert kalman() - bounds[-1] < 0.02


def test_objectives_that_exponentiate_weights_take_grid_paths():
    """IWAE of K = 2 and 32 between the ELBO and the exact evidence, as sites of a model."""
    prior = SDEPath(TIMES, lambda x, t: -RATE * x, NOISE, _normal(0.0, 0.8))
    posterior = prior.with_drift(lambda x, t: 0.5 - x, _normal(0.2, 0.6))

    def model():
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x[..., SEEN, 0], ERROR).to_event(1), obs=torch.tensor(Y))

    def guide():
        pyro.sample("x", posterior)

    values = []
    for bound in (ELBO(32), IWAE(2), IWAE(32)):
        draws = -torch.tensor([bound.loss(model, guide) for _ in range(150)])
        values.append((float(draws.mean()), float(draws.std() / 150**0.5)))
    assert values[0][0] + 3 * values[1][1] < values[1][0]
    assert values[1][0] + 3 * values[2][1] < values[2][0]
    assert values[2][0] < kalman() + 3 * values[2][1]


@pytest.mark.parametrize(
    "loss",
    [
        Trace_ELBO(10, vectorize_particles=True, max_plate_nesting=1),
        Trace_ELBO(),
        ELBO(10),
        STL(10),
    ],
    ids=["Trace_ELBO, vectorised", "Trace_ELBO", "ELBO", "STL"],
)
def test_as_a_site_in_a_subsampled_plate(loss):
    def model():
        prior, _ = grid_laws(8)
        with pyro.plate("items", 50, subsample_size=10):
            pyro.sample("x", prior)

    def guide():
        _, posterior = grid_laws(8)
        with pyro.plate("items", 50, subsample_size=10):
            pyro.sample("x", posterior)

    got = torch.tensor([loss.loss(model, guide) / 50 for _ in range(40)])
    assert abs(got.mean() - grid_divergence(8)) < 3.5 * got.std() / 40**0.5


def test_predictive_simulates_the_prior():
    def model():
        with pyro.plate("items", 3):
            pyro.sample("x", grid_laws(16)[0])

    x = Predictive(model, num_samples=2000, parallel=True)()["x"]
    assert x.shape == (2000, 3, 17, 1)
    last = x[:, :, -1]
    want = P.sd_at(torch.tensor(1.0))
    assert abs(last.std() - want) < 4 * want / (2 * 6000) ** 0.5 + 0.01


@pytest.mark.parametrize("objective", [ELBO, STL])
def test_meta_device(objective):
    with pyro.validation_enabled(False), torch.device("meta"):
        net = torch.nn.Linear(2, 2)
        times = torch.empty(3, 5)
        mask = torch.empty(3, 5).bool()
        start = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        prior = SDEPath(times, lambda x, t: -x, 0.5, start, mask=mask)

        def model():
            with pyro.plate("items", 3):
                pyro.sample("x", prior)

        def guide():
            with pyro.plate("items", 3):
                pyro.sample("x", prior.with_drift(lambda x, t: net(x)))

        objective(4, max_plate_nesting=1).differentiable_loss(model, guide).backward()
        assert net.weight.grad.is_meta


def test_float32():
    start = dist.Normal(torch.zeros(1, dtype=torch.float32), 1.0).to_event(1)
    path = SDEPath(torch.linspace(0, 1, 5), P.drift, 0.5, start)
    assert path.rsample().dtype == torch.float32
    assert path.log_prob(path.sample((3,))).dtype == torch.float32


def make(**changes):
    arguments = {
        "times": torch.linspace(0, 1, 5),
        "drift": P.drift,
        "diffusion": 0.5,
        "start": P.start(),
        **changes,
    }
    return SDEPath(**arguments)


BAD = {
    "one time": (
        lambda: make(times=torch.zeros(1)),
        r"`times` must end with at least 2 times; got \(1,\)",
    ),
    "unsorted": (
        lambda: make(times=torch.tensor([0.0, 0.5, 0.4])),
        "`times` must be finite and increase along the last dim; got a step of -0.1",
    ),
    "repeated": (lambda: make(times=torch.tensor([0.0, 0.5, 0.5])), "got a step of 0"),
    "not finite": (lambda: make(times=torch.tensor([0.0, torch.nan])), "`times` must be finite"),
    "batch": (
        lambda: make(times=torch.rand(3, 4).sort().values, start=P.start().expand((2,))),
        r"`times` must have a batch shape.*\(2,\); got \(3,\)",
    ),
    "mask shape": (
        lambda: make(mask=torch.ones(4).bool()),
        r"`mask` must be boolean and shaped like `times`, \(5,\); got torch.bool, \(4,\)",
    ),
    "mask kind": (lambda: make(mask=torch.ones(5)), "`mask` must be boolean"),
    "mask order": (
        lambda: make(mask=torch.tensor([True, False, True, True, True])),
        "`mask` must be true first and then false",
    ),
    "mask empty": (lambda: make(mask=torch.zeros(5).bool()), "with the first time counted"),
    "start": (
        lambda: make(start=dist.Normal(0.0, 1.0)),
        r"`start` must have an event shape of one dim; got \(\)",
    ),
    "diffusion": (lambda: make(diffusion=-1.0), "`diffusion` must be positive and finite; got -1"),
    "drift not finite": (
        lambda: make(drift=lambda x, t: x / 0).log_prob(torch.ones(5, 1)),
        "`drift` must give finite values; got 4 of 4 not finite",
    ),
    "explodes": (
        lambda: make(drift=lambda x, t: 1e99 * x**9).sample((2,)),
        "`drift` must give finite states along the simulated path",
    ),
    "value": (
        lambda: make().log_prob(torch.full((5, 1), torch.nan)),
        "to be within the support",
    ),
    "expand": (lambda: make().expand((3,)).expand((2,)), "`batch_shape` must be one that"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    call, match = BAD[name]
    with pytest.raises(ValueError, match=match):
        call()


def test_without_validation_a_nan_still_reaches_the_average():
    path = make(drift=lambda x, t: torch.nan * x, validate_args=False)
    assert path.log_prob(torch.ones(5, 1)).isnan()
    assert path.sample().isnan().any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_loss_and_backward_on_a_gpu():
    times, mask = (a.cuda() for a in irregular())
    rate = torch.nn.Parameter(torch.tensor(0.5).cuda())
    start = dist.Normal(torch.zeros(1).cuda(), 1.0).to_event(1)
    prior = SDEPath(times, lambda x, t: -rate * x, 0.5, start, mask=mask)
    x = prior.with_drift(lambda x, t: rate - x).rsample()
    prior.log_prob(x).sum().backward()
    assert rate.grad.is_cuda
