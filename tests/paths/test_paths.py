"""Paths: moments, velocity at fixed noise, score and drift against independent derivatives."""

from __future__ import annotations

import copy

import pytest
import torch
from registry import PATHS

from flowvi.flows import nsf, planar
from flowvi.paths import (
    AlphaSigma,
    BridgeNoise,
    BrownianBridge,
    DiffusionPath,
    FlowPath,
    GaussianPath,
    Linear,
    LinearLogSNR,
    MixturePath,
    ScheduleDiffusion,
    StateDiffusion,
    StochasticInterpolant,
    TimeDiffusion,
    with_time,
)

NAMES = sorted(PATHS)
# Their velocity averages over components, so it is not that of one draw.
DETERMINISTIC = [n for n in NAMES if n != "mixture"]


def made(name: str):
    """A path away from its start, with one context for each of three rows."""
    case = PATHS[name]
    path = case.make()
    with torch.no_grad():
        for p in path.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return path, torch.randn(3, case.context_dim)


def times() -> torch.Tensor:
    return torch.tensor([[0.15], [0.5], [0.85]])


def score_by_quadratic(path, x, t, y):
    """Central differences of the log-density, one coordinate at a time."""
    h = 1e-5
    out = []
    for i in range(path.dim):
        step = torch.zeros(path.dim)
        step[i] = h
        out.append((path.log_prob(x + step, t, y) - path.log_prob(x - step, t, y)) / (2 * h))
    return torch.stack(out, -1)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_with_leading_times_and_particles(name):
    path, y = made(name)
    t = times().expand(4, 5, 3, 1)
    eps = path.draw_noise(t.shape[:-1])
    point = path.point(eps, t, y)
    for part in (point.state, point.velocity, point.score, point.drift):
        assert part.shape == (4, 5, 3, path.dim)
        assert part.isfinite().all()
    assert (point.data is not None) == path.has_target
    torch.testing.assert_close(path.transform(eps, t, y), point.state)
    torch.testing.assert_close(path.family(y).drift(point.state, t), point.drift)
    b = path.diffusion(point.state, t)
    torch.testing.assert_close(b.expand_as(point.state), point.diffusion)
    assert path.log_prob(point.state, t, y).shape == (4, 5, 3)
    assert path.sample(t, y).shape == (4, 5, 3, path.dim)
    # Rows know nothing of each other.
    row = path.point(eps[1, 2, 1], t[1, 2, 1], y[1])
    torch.testing.assert_close(row.drift, point.drift[1, 2, 1])


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_velocity_is_the_derivative_at_fixed_noise(name):
    path, y = made(name)
    t, h = times(), 1e-5
    eps = path.draw_noise((3,))
    difference = path.transform(eps, t + h, y) - path.transform(eps, t - h, y)
    point = path.point(eps, t, y)
    torch.testing.assert_close(point.velocity, difference / (2 * h), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(path.noise_of(point.state, t, y), eps)
    torch.testing.assert_close(path.velocity(point.state, t, y), point.velocity)


@pytest.mark.parametrize("name", NAMES)
def test_score_is_the_derivative_of_the_log_density(name):
    path, y = made(name)
    t = times()
    point = path.point(path.draw_noise((3,)), t, y)
    want = score_by_quadratic(path, point.state, t, y)
    torch.testing.assert_close(point.score, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(path.score(point.state, t, y), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_density_integrates_to_one_and_has_the_moments_of_draws(name):
    path, y = made(name)
    y, t = y[0], torch.tensor([0.4])
    with torch.no_grad():
        draws = path.sample(t.expand(40_000, 1), y)
        mean, sd = draws.mean(0), draws.std(0)
        axis = torch.linspace(-9, 9, 301)
        grid = mean + torch.cartesian_prod(axis, axis) * sd
        p = path.log_prob(grid, t.expand(len(grid), 1), y).exp() * (axis[1] - axis[0]) ** 2
        p = p * sd.prod()
    assert abs(p.sum() - 1) < 2e-3
    moment = (p[:, None] * grid).sum(0)
    # 4.5 standard errors of 40,000 draws.
    assert ((moment - mean).abs() < 4.5 * sd / 200 + 1e-3).all()
    second = (p[:, None] * (grid - moment) ** 2).sum(0)
    error = ((draws - mean) ** 2).std(0) / 200
    assert ((second - sd**2).abs() < 4.5 * error + 2e-3).all()


@pytest.mark.parametrize("name", NAMES)
def test_marginals_obey_the_fokker_planck_equation(name):
    """d q / dt = - div(g q) + 1/2 sum d_i^2 (b_i^2 q), by finite differences of the log-density.

    Ties velocity, score, diffusion and its divergence together for all paths.
    """
    path, y = made(name)
    y = y[0].expand(8, -1)
    t = torch.rand(8, 1) * 0.5 + 0.25
    x = path.sample(t, y).detach()
    h = 1e-3

    def q(x, t):
        return path.log_prob(x, t, y).exp()

    def flux(x):
        return path.family(y).drift(x, t) * q(x, t).unsqueeze(-1)

    def spread(x):
        return path.diffusion(x, t).expand_as(x) ** 2 / 2 * q(x, t).unsqueeze(-1)

    rate = (q(x, t + h) - q(x, t - h)) / (2 * h)
    total = torch.zeros(8)
    for i in range(path.dim):
        step = torch.zeros(path.dim)
        step[i] = h
        total -= (flux(x + step) - flux(x - step))[:, i] / (2 * h)
        total += (spread(x + step) - 2 * spread(x) + spread(x - step))[:, i] / h**2
    scale = q(x, t) + rate.abs()
    torch.testing.assert_close(total / scale, rate / scale, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", [n for n in NAMES if PATHS[n].make().has_target])
def test_targets_reproduce_the_drift(name):
    path, y = made(name)
    t = times()
    values = path.schedule(t)
    point = path.point(path.draw_noise((3,)), t, y)
    torch.testing.assert_close(values.alpha * point.data + values.sigma * point.noise, point.state)
    b = path.diffusion(point.state, t)
    rate = values.d_sigma - b**2 / (2 * values.sigma)
    torch.testing.assert_close(values.d_alpha * point.data + rate * point.noise, point.drift)
    data, noise = path.target_of_drift(point.state, point.drift, t)
    torch.testing.assert_close(data, point.data)
    torch.testing.assert_close(noise, point.noise)


def test_target_of_an_encoder_with_the_best_noise_is_that_of_the_literature():
    path, y = made("diffusion, encoder")
    t, h = times(), 1e-5
    code = path.encoder(y, t)
    rate = (path.encoder(y, t + h) - path.encoder(y, t - h)) / (2 * h)
    slope = (path.schedule.log_snr(t + h) - path.schedule.log_snr(t - h)) / (2 * h)
    point = path.point(path.draw_noise((3,)), t, y)
    torch.testing.assert_close(point.data, code + rate / slope, rtol=1e-6, atol=1e-7)


def test_identity_encoder_equals_no_encoder():
    schedule, y, t = LinearLogSNR(-4.0, 4.0), torch.randn(3, 2), times()
    plain = DiffusionPath(2, schedule)
    encoded = DiffusionPath(2, schedule, lambda y, t: y + 0 * t)
    eps = plain.draw_noise((3,))
    for a, b in zip(
        vars(plain.point(eps, t, y)).values(), vars(encoded.point(eps, t, y)).values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_bridge_has_the_drift_of_conditioned_brownian_motion():
    bridge, y = made("bridge")
    t = torch.tensor([[1e-9], [0.3], [0.95]])
    point = bridge.point(bridge.draw_noise((3,)), t, y)
    torch.testing.assert_close(point.drift, (y[:, 2:] - point.state) / (1 - t))
    # The general formula gives the same away from the ends.
    general = StochasticInterpolant(2, BridgeNoise(0.7), 0.7)
    eps = bridge.draw_noise((3,))
    torch.testing.assert_close(
        general.point(eps, times(), y).drift, bridge.point(eps, times(), y).drift
    )
    closed = torch.distributions.MultivariateNormal(y[:, :2], 0.49 * torch.eye(2))
    torch.testing.assert_close(
        bridge.reference_log_prob(y[:, :2], y[:, 2:]), closed.log_prob(y[:, 2:])
    )


def test_bridge_ends_at_the_data():
    bridge, y = made("bridge")
    for t, want in ((0.0, y[:, :2]), (1.0, y[:, 2:])):
        got = bridge.transform(bridge.draw_noise((3,)), torch.full((3, 1), t), y)
        torch.testing.assert_close(got, want)


def test_interpolant_without_noise_moves_at_its_velocity():
    path = StochasticInterpolant(2, None, 0.3)
    y = torch.randn(3, 4)
    noise = path.draw_noise((3,))
    assert noise.shape == (3, 0)
    point = path.point(noise, times(), y)
    assert point.score is None
    torch.testing.assert_close(point.drift, y[:, 2:] - y[:, :2])
    with pytest.raises(NotImplementedError, match="without gamma has no density"):
        path.log_prob(point.state, times(), y)


@pytest.mark.parametrize("elementwise", [True, False])
def test_divergence_of_a_state_diffusion(elementwise):
    weight = torch.eye(3) if elementwise else torch.randn(3, 3)
    b = StateDiffusion(lambda x, t: (x @ weight + t).sin() + 2, elementwise=elementwise)
    x, t = torch.randn(4, 5, 3), torch.rand(4, 5, 1)
    rows = [
        torch.autograd.functional.jacobian(lambda x, u=u: b(x, u) ** 2 / 2, v).diagonal()
        for v, u in zip(x.reshape(-1, 3), t.reshape(-1, 1), strict=True)
    ]
    torch.testing.assert_close(b.divergence(x, t), torch.stack(rows).reshape(4, 5, 3))


def test_diffusions_of_all_kinds():
    t, x = times(), torch.zeros(3, 2)
    learned = torch.nn.Parameter(torch.tensor([0.5, 2.0]))
    assert [p is learned for p in TimeDiffusion(learned).parameters()] == [True]
    torch.testing.assert_close(TimeDiffusion(learned)(x, t), learned.expand(3, 2))
    torch.testing.assert_close(TimeDiffusion(torch.tensor(0.5))(x, t), torch.full((3, 1), 0.5))
    torch.testing.assert_close(TimeDiffusion(0.5)(x, t), torch.full((3, 1), 0.5))
    torch.testing.assert_close(TimeDiffusion(lambda t: t**2)(x, t), t**2)
    schedule = LinearLogSNR(-4.0, 4.0)
    values = schedule(t)
    got = ScheduleDiffusion(schedule, 0.5)(x, t) ** 2
    want = values.sigma**2 * (values.d_alpha / values.alpha - values.d_sigma / values.sigma)
    torch.testing.assert_close(got, want)


def test_one_path_of_a_mixture_is_itself():
    part = GaussianPath(2, lambda y, t: t * y, lambda y, t: 1.2 - t, 0.5)
    mixture, y, t = MixturePath([part]), torch.randn(3, 2), times()
    eps = mixture.draw_noise((3,))
    for name in ("state", "velocity", "score", "drift"):
        torch.testing.assert_close(
            getattr(mixture.point(eps, t, y), name), getattr(part.point(eps[:, :2], t, y), name)
        )


def test_components_of_a_mixture_are_drawn_with_their_weights():
    parts = [
        GaussianPath(1, lambda y, t, m=m: m + 0 * t, lambda y, t: 0.01 + 0 * t, 1.0)
        for m in range(3)
    ]
    draws = MixturePath(parts, (1.0, 2.0, 1.0)).sample(torch.full((40_000, 1), 0.5)).round()
    shares = torch.stack([(draws == k).double().mean() for k in range(3)])
    # 4.5 standard errors of 40,000 draws.
    assert ((shares - torch.tensor([0.25, 0.5, 0.25])).abs() < 4.5 * 0.5 / 200).all()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter_and_meta_device(name):
    path, y = made(name)
    point = path.point(path.draw_noise((3,)), times(), y)
    loss = point.drift.square().sum() + path.log_prob(point.state.detach(), times(), y).sum()
    assert loss.requires_grad == bool(list(path.parameters()))
    if loss.requires_grad:
        loss.backward()
    for key, p in path.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key
        assert p.grad.abs().sum() > 0, key
    meta = path.to("meta")
    t, y = times().to("meta"), y.to("meta")
    point = meta.point(meta.draw_noise((3,)), t, y)
    loss = point.drift.sum() + meta.log_prob(point.state, t, y).sum()
    if loss.requires_grad:
        loss.backward()


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_the_drift_is_exact(name):
    """Second derivatives: the drift is trained through velocity and score."""
    path, y = made(name)
    parameters = list(path.parameters())
    if not parameters:
        return
    eps, t = path.draw_noise((3,)), times()
    loss = path.point(eps, t, y).drift.sin().sum()
    grads = torch.autograd.grad(loss, parameters, materialize_grads=True)
    direction = [torch.randn_like(p) for p in parameters]
    got = sum((g * d).sum() for g, d in zip(grads, direction, strict=True))
    losses = []
    for step in (1e-5, -1e-5):
        other = copy.deepcopy(path)
        with torch.no_grad():
            for p, d in zip(other.parameters(), direction, strict=True):
                p.add_(step * d)
        losses.append(other.point(eps, t, y).drift.sin().sum().detach())
    torch.testing.assert_close(got, (losses[0] - losses[1]) / 2e-5, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_float32_and_no_grad(name):
    path, y = made(name)
    path, y, t = path.float(), y.float(), times().float()
    eps = path.draw_noise((3,))
    with torch.no_grad():
        point = path.point(eps, t, y)
    assert point.drift.dtype == torch.float32
    assert not point.drift.requires_grad
    torch.testing.assert_close(path.point(eps, t, y).drift.detach(), point.drift)


def test_spline_flow_as_path():
    path = FlowPath(nsf(2, 1, num_layers=2, hidden_dims=(8,)).transform, 0.5)
    t = times()
    point = path.point(path.draw_noise((3,)), t)
    want = score_by_quadratic(path, point.state, t, None)
    torch.testing.assert_close(point.score, want, rtol=1e-4, atol=1e-5)


def test_with_time():
    y, t = torch.randn(3, 2), torch.rand(5, 3, 1)
    out = with_time(y, t)
    torch.testing.assert_close(out[..., :2], y.expand(5, 3, 2))
    torch.testing.assert_close(out[..., 2:], t)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: GaussianPath(0, None, None, 1.0), ValueError, "`dim` must be an integer.*got 0"),
        (
            lambda: GaussianPath(1, None, None, 0.0),
            ValueError,
            "`diffusion` must be positive.*0.0",
        ),
        (lambda: GaussianPath(1, None, None, "a"), TypeError, "`diffusion` must be.*got str"),
        (lambda: DiffusionPath(1, lambda t: t), TypeError, "`schedule` must be a Schedule"),
        (
            lambda: DiffusionPath(1, Linear(), diffusion=StateDiffusion(lambda x, t: x)),
            NotImplementedError,
            "leaves no target for predictions. Use a GaussianPath",
        ),
        (lambda: ScheduleDiffusion(Linear(), -1.0), ValueError, "`ratio` must be positive.*-1.0"),
        (
            lambda: FlowPath(nsf(2).transform, 1.0),
            ValueError,
            "`transform` must take a context.*context_dim 0",
        ),
        (
            lambda: FlowPath(_without_inverse(), 1.0),
            NotImplementedError,
            "has no inverse.*NumericalInverse",
        ),
        (lambda: MixturePath([]), ValueError, "`paths` must hold at least one path"),
        (
            lambda: MixturePath([BrownianBridge(1)]),
            ValueError,
            "`paths` must not need a start of their own",
        ),
        (
            lambda: MixturePath([_gaussian(1), _gaussian(2)]),
            ValueError,
            r"`paths` must agree in dim; got \[1, 2\]",
        ),
        (
            lambda: MixturePath([_gaussian(1)], (0.0,)),
            ValueError,
            "`weights` must be 1 positive numbers",
        ),
        (
            lambda: MixturePath([_gaussian(1)], torch.ones(1, requires_grad=True)),
            NotImplementedError,
            "weights of a MixturePath are constants",
        ),
        (
            lambda: BrownianBridge(2).sample(torch.rand(3, 1), torch.zeros(3, 2)),
            ValueError,
            r"`y` must end with size 4 .*got shape \(3, 2\)",
        ),
        (
            lambda: MixturePath([_gaussian(1)]).noise_of(torch.zeros(1), torch.zeros(1)),
            NotImplementedError,
            "MixturePath cannot turn a state back into noise",
        ),
    ],
)
def test_bad_arguments_are_named(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_a_decreasing_schedule_is_refused_by_the_path():
    schedule = AlphaSigma(lambda t: t, lambda t: 1 - t)
    schedule.alpha, schedule.sigma = schedule.sigma, schedule.alpha
    with pytest.raises(ValueError, match="`schedule` must have an increasing"):
        DiffusionPath(1, schedule)


def _gaussian(dim: int) -> GaussianPath:
    return GaussianPath(dim, lambda y, t: t, lambda y, t: t, 1.0)


def _without_inverse():
    transform = planar(2, 1).transform
    while hasattr(transform, "parts"):
        transform = transform.parts[0]
    transform.has_inverse = False
    return transform
