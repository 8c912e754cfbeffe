"""Path posterior and path prior: closed-form divergences, Pyro's protocols, errors."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from path_cases import OrnsteinUhlenbeck, divergence, marginal_path
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO

from flowvi.distributions import PathLayout, PathPosterior, PathPrior
from flowvi.flows import iaf
from flowvi.objectives import ELBO, IWAE, STL
from flowvi.paths import (
    BrownianBridge,
    DensityTimes,
    DiffusionPath,
    GaussianPath,
    LinearLogSNR,
    PredictedDrift,
    StochasticInterpolant,
    UniformTimes,
    with_time,
)

P = OrnsteinUhlenbeck(rate=0.5, shift=0.0, noise=0.7, mean=0.0, sd=1.0)
Q = OrnsteinUhlenbeck(rate=2.0, shift=1.5, noise=0.7, mean=0.6, sd=0.4)
TIMES = {
    "uniform": UniformTimes,
    "independent": lambda: UniformTimes(stratified=False),
    "importance": lambda: DensityTimes(lambda t: 0.5 + t**2),
}


def laws(num_times: int = 1, times=None, at=None, dim: int = 1):
    path = marginal_path(Q, dim)
    shared = {"times": times, "num_times": num_times, "at": at}
    return PathPosterior(path, **shared), PathPrior(path, P.drift, P.start(dim), **shared)


def test_drift_of_the_posterior_is_that_of_its_process():
    q, _ = laws(num_times=3)
    draw = q.unpack(q.sample((100,)))
    torch.testing.assert_close(draw.drift, Q.drift(draw.state, draw.time))
    torch.testing.assert_close(draw.diffusion, torch.full_like(draw.state, 0.7))


@pytest.mark.parametrize("num_times", [1, 4])
@pytest.mark.parametrize("name", TIMES)
def test_divergence_of_two_ornstein_uhlenbeck_processes(name, num_times):
    q, p = laws(num_times, TIMES[name]())
    z = q.sample((100_000,))
    ratio = q.log_prob(z) - p.log_prob(z)
    # 3 standard errors of 100,000 draws.
    assert abs(ratio.mean() - divergence(Q, P)) < 3 * ratio.std() / 100_000**0.5
    terms = p.log_prob_terms(z)
    torch.testing.assert_close(terms.start + terms.path, p.log_prob(z))
    torch.testing.assert_close(terms.start, P.start().log_prob(q.unpack(z).start))


def test_more_times_lower_the_variance():
    spreads = []
    for num_times in (1, 16):
        q, p = laws(num_times)
        spreads.append(p.log_prob_terms(q.sample((4000,))).path.std())
    assert spreads[1] < 0.35 * spreads[0]


def test_low_discrepancy_times_lower_the_variance_over_a_plate():
    path = GaussianPath(1, lambda y, t: 5 * t**3, lambda y, t: 1 + 0 * t, 1.0)
    spreads = []
    for stratified in (True, False):
        times = UniformTimes(stratified=stratified)
        q = PathPosterior(path, times=times)
        p = PathPrior(path, lambda x, t: 0 * x, P.start(), times=times)
        sums = [p.log_prob_terms(q.expand((50,)).sample()).path.sum() for _ in range(200)]
        spreads.append(torch.stack(sums).std())
    assert spreads[0] < 0.3 * spreads[1]


def test_same_process_has_ratio_zero():
    path = marginal_path(P)
    q, p = PathPosterior(path), PathPrior(path, P.drift, P.start())
    z = q.sample((50,))
    torch.testing.assert_close(q.log_prob(z), p.log_prob(z))


def guide_of(q):
    def guide(n):
        with pyro.plate("items", n):
            return pyro.sample("z", q)

    return guide


def model_of(p):
    def model(n):
        with pyro.plate("items", n):
            return pyro.sample("z", p)

    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: Trace_ELBO(20, vectorize_particles=True, max_plate_nesting=1),
        lambda: Trace_ELBO(2),
        lambda: ELBO(20),
        lambda: STL(20),
    ],
    ids=["Trace_ELBO, vectorised", "Trace_ELBO, loop", "ELBO", "STL"],
)
def test_elbo_is_minus_the_divergence_per_item(make):
    q, p = laws()
    loss = make()
    got = torch.tensor([loss.loss(model_of(p), guide_of(q), 100) / 100 for _ in range(30)])
    assert abs(got.mean() - divergence(Q, P)) < 3.5 * got.std() / 30**0.5


def test_subsampled_plate_is_unbiased():
    q, p = laws()

    def guide():
        with pyro.plate("items", 100, subsample_size=20):
            pyro.sample("z", q)

    def model():
        with pyro.plate("items", 100, subsample_size=20):
            pyro.sample("z", p)

    got = torch.tensor([Trace_ELBO(20, vectorize_particles=True, max_plate_nesting=1).loss(
        model, guide) / 100 for _ in range(30)])  # fmt: skip
    assert abs(got.mean() - divergence(Q, P)) < 3.5 * got.std() / 30**0.5


def test_replay_scores_the_same_value():
    q, p = laws(num_times=2)
    guide = poutine.trace(guide_of(q)).get_trace(4)
    model = poutine.trace(poutine.replay(model_of(p), trace=guide)).get_trace(4)
    assert model.nodes["z"]["value"] is guide.nodes["z"]["value"]
    assert model.nodes["z"]["value"].shape == (4, p.layout.size)
    model.compute_log_prob()
    assert model.nodes["z"]["log_prob"].shape == (4,)


def test_prior_site_simulates_the_process():
    """Predictive(model) generates: moments of every part of the draw, 4 standard errors."""
    at = torch.tensor([0.3, 1.0])
    _, p = laws(num_times=2, at=at)

    def model():
        draw = p.unpack(pyro.sample("z", p))
        pyro.deterministic("observed", draw.observed)
        pyro.deterministic("state", draw.state)
        pyro.deterministic("time", draw.time)

    num = 5000
    out = Predictive(model, num_samples=num, parallel=True)()
    for k, t in enumerate(at):
        x = out["observed"][:, k, 0]
        assert abs(x.mean() - P.mean_at(t)) < 4 * x.std() / num**0.5
        assert abs(x.std() - P.sd_at(t)) < 4 * x.std() / (2 * num) ** 0.5 + 3e-3
    x, t = out["state"].flatten(), out["time"].flatten()
    z = (x - P.mean_at(t)) / P.sd_at(t)
    assert abs(z.mean()) < 4 / (2 * num) ** 0.5
    assert abs(z.std() - 1) < 4 / (4 * num) ** 0.5 + 3e-3


def test_draws_of_the_prior_are_scored_by_their_start_alone():
    """The drift in such a draw is the prior's own."""
    _, p = laws(num_times=2)
    z = p.sample((6,))
    draw = p.unpack(z)
    torch.testing.assert_close(p.log_prob(z), P.start().log_prob(draw.start))
    torch.testing.assert_close(draw.drift, P.drift(draw.state, draw.time))


def test_prior_of_a_diffusion_fills_in_the_targets():
    path = DiffusionPath(1, LinearLogSNR(-3.0, 3.0))
    p = PathPrior(path, PredictedDrift(path, lambda x, t: x.tanh()), P.start(), num_steps=20)
    draw = p.unpack(p.sample((5,)))
    torch.testing.assert_close(draw.data, draw.state.tanh())
    torch.testing.assert_close(p.log_prob(p.layout.pack(draw)), P.start().log_prob(draw.start))


def test_a_solver_of_the_user_simulates():
    seen = []

    def solver(drift, diffusion, start, times):
        seen.append((start.shape, times.shape, bool((times.diff(dim=0) >= 0).all())))
        x = torch.ones(len(times), *start.shape)
        return x * times

    p = PathPrior(marginal_path(Q, 2), P.drift, P.start(2), solver=solver, at=(0.25, 1.0))
    draw = p.unpack(p.expand((4,)).sample((3,)))
    assert seen == [(torch.Size([3, 4, 2]), torch.Size([101 + 2 + 1, 3, 4, 1]), True)]
    torch.testing.assert_close(draw.observed[..., 0, :], torch.full((3, 4, 2), 0.25))
    torch.testing.assert_close(draw.state, draw.time.expand_as(draw.state))


def test_observation_times_of_each_item():
    at = torch.tensor([[0.2, 0.4], [0.5, 0.9], [0.1, 1.0]])
    path = GaussianPath(1, lambda y, t: t, lambda y, t: 1e-9 + 0 * t, 0.3)
    q = PathPosterior(path, at=at)
    assert q.batch_shape == (3,)
    draw = q.unpack(q.expand((5, 3)).sample())
    torch.testing.assert_close(draw.observed[..., 0], at.expand(5, 3, 2), atol=1e-7, rtol=0)
    torch.testing.assert_close(draw.end, draw.observed[..., -1, :])


def test_data_with_more_than_one_event_dim():
    path = GaussianPath(1, lambda y, t: y.sum((-2, -1)).unsqueeze(-1) * t, lambda y, t: 1.5 - t, 1)
    y = torch.randn(4, 3, 2)
    q = PathPosterior(path, y, y_event_dim=2)
    assert q.batch_shape == (4,)
    assert q.expand((5, 4)).rsample((2,)).shape == (2, 5, 4, q.layout.size)


def test_several_times_lead_so_that_closures_broadcast():
    labels = torch.arange(4.0).unsqueeze(-1)
    path = marginal_path(Q)
    p = PathPrior(path, lambda x, t: labels - x, P.start(), num_times=3)
    q = PathPosterior(path, num_times=3).expand((4,))
    z = q.sample()
    rows = [
        PathPrior(path, lambda x, t, k=k: labels[k] - x, P.start(), num_times=3).log_prob(z[k])
        for k in range(4)
    ]
    torch.testing.assert_close(p.log_prob(z), torch.stack(rows))


def test_pack_and_unpack_are_inverse():
    layout = PathLayout(dim=2, num_times=3, num_observed=4, has_target=True)
    value = torch.randn(5, 6, layout.size)
    draw = layout.unpack(value)
    assert draw.start.shape == (5, 6, 2)
    assert draw.time.shape == draw.weight.shape == (5, 6, 3, 1)
    assert draw.state.shape == draw.data.shape == (5, 6, 3, 2)
    assert draw.observed.shape == (5, 6, 4, 2)
    torch.testing.assert_close(layout.pack(draw), value)


def test_flow_as_law_of_the_start_is_scored_in_one_pass():
    flow = iaf(2, 2, num_layers=1, hidden_dims=(8,))
    y = torch.randn(3, 2)
    start = flow(y)
    q = PathPosterior(BrownianBridge(2, 0.5), y, start=start)
    calls = []
    original = flow.transform._inverse_and_ladj
    flow.transform._inverse_and_ladj = lambda *a: calls.append(1) or original(*a)
    z = q.rsample()
    log_q = q.log_prob(z)
    assert not calls
    torch.testing.assert_close(q.log_prob(z.clone()), log_q)
    assert calls
    torch.testing.assert_close(log_q, start.log_prob(q.unpack(z).start))


class Quadratic(torch.nn.Module):
    """Mean linear in the data, log-scale quadratic in time."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.zeros(2))
        self.scale = torch.nn.Parameter(torch.zeros(3))

    def mean(self, y, t):
        return y * (self.slope[0] + self.slope[1] * t)

    def sd(self, y, t):
        return (self.scale[0] + self.scale[1] * t + self.scale[2] * t**2).exp()


def test_learns_a_posterior_process_with_stock_svi():
    """A conjugate case: x_1 of Brownian motion from N(0, 1), observed with noise."""
    y = torch.tensor([[1.0], [-0.5], [2.0]])
    family = Quadratic()
    path = GaussianPath(1, family.mean, family.sd, diffusion=1.0)
    start = dist.Normal(torch.zeros(1), 1.0).to_event(1)

    def model(y):
        law = PathPrior(path, lambda x, t: 0 * x, start, num_times=4)
        with pyro.plate("items", len(y)):
            z = law.unpack(pyro.sample("z", law))
            pyro.sample("y", dist.Normal(z.end, 0.5).to_event(1), obs=y)

    def guide(y):
        pyro.module("family", family)
        with pyro.plate("items", len(y)):
            pyro.sample("z", PathPosterior(path, y, num_times=4))

    loss = Trace_ELBO(8, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.985}), loss)
    for _ in range(200):
        svi.step(y)
    exact = dist.Normal(0.0, (1.0 + 1.0 + 0.25) ** 0.5).log_prob(y).sum()
    many = Trace_ELBO(20_000, vectorize_particles=True, max_plate_nesting=1)
    got = -many.loss(model, guide, y)
    # The sum of three items has a standard deviation of 2; 3 standard errors and a gap of 0.06.
    assert exact - 0.1 < got < exact + 3 * 2 / 20_000**0.5
    # Posterior of x_1: precision 1/2 + 4, mean 4 y / 4.5; of x_0: mean y / 2.25.
    for t, mean, sd in ((1.0, 4 * y / 4.5, 4.5**-0.5), (0.0, y / 2.25, (1.25 / 2.25) ** 0.5)):
        moments = path.moments(torch.full((3, 1), t), y)
        torch.testing.assert_close(moments[0].detach(), mean, atol=0.08, rtol=0)
        torch.testing.assert_close(moments[1].detach(), torch.full((3, 1), sd), atol=0.08, rtol=0)


def test_copies_and_pickles():
    y = torch.randn(3, 2)
    path = DiffusionPath(2, LinearLogSNR(-3.0, 3.0))
    q = PathPosterior(path, y)
    z = q.rsample()
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        torch.testing.assert_close(other.log_prob(z), q.log_prob(z))


def test_float32_stays_float32():
    path = DiffusionPath(2, LinearLogSNR(-3.0, 3.0)).float()
    y = torch.randn(3, 2, dtype=torch.float32)
    start = dist.Normal(torch.zeros(2, dtype=torch.float32), 1.0).to_event(1)
    q = PathPosterior(path, y, at=(0.5, 1.0))
    p = PathPrior(path, PredictedDrift(path, lambda x, t: x), start, at=(0.5, 1.0), num_steps=5)
    z = q.rsample()
    assert z.dtype == q.log_prob(z).dtype == p.log_prob(z).dtype == torch.float32
    assert p.sample((2,)).dtype == torch.float32


@pytest.mark.parametrize("objective", [ELBO, STL])
@pytest.mark.parametrize("kind", ["gaussian", "diffusion", "bridge"])
def test_meta_device(kind, objective):
    with pyro.validation_enabled(False), torch.device("meta"):
        net = torch.nn.Linear(3, 2)
        start = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        own, drift = None, partial(_network, net)
        if kind == "gaussian":
            path = GaussianPath(2, partial(_network, net), lambda y, t: 1.5 - t, 0.5)
        elif kind == "diffusion":
            path = DiffusionPath(2, LinearLogSNR(-3.0, 3.0), partial(_network, net))
            drift = PredictedDrift(path, drift)
        else:
            path = BrownianBridge(2, torch.nn.Parameter(torch.tensor(0.5)))
            own = dist.Normal(torch.nn.Parameter(torch.zeros(2)), torch.ones(2)).to_event(1)

        def model(y):
            with pyro.plate("items", 4):
                law = PathPrior(path, drift, start, num_times=2)
                z = law.unpack(pyro.sample("z", law))
                if kind != "bridge":
                    pyro.sample("y", dist.Normal(z.end, 1.0).to_event(1), obs=y)

        def guide(y):
            with pyro.plate("items", 4):
                pyro.sample("z", PathPosterior(path, y, start=own, num_times=2))

        estimate = objective(4, max_plate_nesting=1)
        estimate.differentiable_loss(model, guide, torch.empty(4, 2)).backward()
        assert net.weight.grad.is_meta
        assert PathPrior(path, drift, start, num_steps=3).sample((2,)).is_meta


def _network(net, x, t):
    return net(with_time(x, t))


def test_bounds_that_exponentiate_weights_refuse_it_by_name():
    q, p = laws()
    assert q.expand((3,)).is_log_ratio_estimate
    assert p.is_log_ratio_estimate
    with pytest.raises(NotImplementedError, match="IWAE exponentiates.*`z`.*SDEPath"):
        IWAE(4).loss(model_of(p), guide_of(q), 3)


def prior(**changes):
    arguments = {"path": marginal_path(Q), "drift": P.drift, "start": P.start(), **changes}
    return PathPrior(**arguments)


BAD = {
    "no path": (lambda: PathPosterior(3), TypeError, "`path` must be a Path; got int"),
    "num_times": (
        lambda: PathPosterior(marginal_path(Q), num_times=0),
        ValueError,
        "`num_times` must be an integer of at least 1; got 0",
    ),
    "at unsorted": (
        lambda: PathPosterior(marginal_path(Q), at=(0.5, 0.2)),
        ValueError,
        r"`at` must hold times in increasing order between 0 and 1.*\[0.5, 0.2\]",
    ),
    "at outside": (lambda: prior(at=(0.5, 1.2)), ValueError, "`at` must hold times in increasing"),
    "at empty": (lambda: prior(at=()), ValueError, "`at` must hold at least one observation time"),
    "start missing": (
        lambda: PathPosterior(BrownianBridge(1), torch.zeros(1)),
        ValueError,
        "`start` must be given for BrownianBridge",
    ),
    "start superfluous": (
        lambda: PathPosterior(marginal_path(Q), start=P.start()),
        ValueError,
        "`start` must not be given for GaussianPath",
    ),
    "start size": (
        lambda: PathPosterior(BrownianBridge(1), torch.zeros(1), start=P.start(2)),
        ValueError,
        r"`start` must have event shape \(1,\); got \(2,\)",
    ),
    "end size": (
        lambda: PathPosterior(BrownianBridge(1), torch.zeros(2), start=P.start()),
        ValueError,
        r"`y` must end with size 1 .*got shape \(2,\)",
    ),
    "prior start size": (
        lambda: prior(start=P.start(2)),
        ValueError,
        r"`start` must have event shape \(1,\); got \(2,\)",
    ),
    "num_steps": (lambda: prior(num_steps=0), ValueError, "`num_steps` must be an integer"),
    "other path": (
        lambda: prior(
            path=DiffusionPath(1, LinearLogSNR()),
            drift=PredictedDrift(DiffusionPath(1, LinearLogSNR()), lambda x, t: x),
        ),
        ValueError,
        "`drift` must be made for this `path`",
    ),
    "other layout": (
        lambda: prior(num_times=2).log_prob(PathPosterior(marginal_path(Q)).sample()),
        ValueError,
        r"`value` must end with size 12, .*num_times = 2.*got shape \(7,\).*same path",
    ),
    "other diffusion": (
        lambda: prior().log_prob(
            PathPosterior(
                GaussianPath(1, lambda y, t: t, lambda y, t: 1 + t, diffusion=0.71)
            ).sample()
        ),
        ValueError,
        "`path` must be the path of the posterior, with the same diffusion.*0.7 here and 0.71",
    ),
    "drift not finite": (
        lambda: prior(drift=lambda x, t: x / 0).log_prob(
            PathPosterior(marginal_path(Q)).sample((3,))
        ),
        ValueError,
        "`drift` must give finite values; got 3 of 3 not finite",
    ),
    "posterior not finite": (
        lambda: PathPosterior(
            GaussianPath(1, lambda y, t: (t - 2).log(), lambda y, t: 1 + t, 1.0)
        ).sample(),
        ValueError,
        "`path` must give finite states and drifts",
    ),
    "simulation explodes": (
        lambda: prior(drift=lambda x, t: x**9 * 1e9).sample((3,)),
        ValueError,
        "`drift` must give finite states along the simulated path.*step size",
    ),
    "expand": (
        lambda: PathPosterior(marginal_path(Q)).expand((3,)).expand((2,)),
        ValueError,
        "`batch_shape` must be one that",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    make, error, match = BAD[name]
    with pytest.raises(error, match=match):
        make()


def test_without_validation_a_nan_still_reaches_the_average():
    path = marginal_path(Q)
    q = PathPosterior(path, validate_args=False)
    p = PathPrior(path, lambda x, t: x * torch.nan, P.start(), validate_args=False)
    assert p.log_prob(q.sample((3,))).isnan().all()


def test_a_start_without_reparameterised_draws():
    class Fixed(dist.Normal):
        has_rsample = False

    start = Fixed(torch.zeros(1), torch.ones(1)).to_event(1)
    q = PathPosterior(StochasticInterpolant(1, None, 1.0), torch.zeros(3, 1), start=start)
    assert not q.has_rsample
    assert q.sample().shape == (3, q.layout.size)
    with pytest.raises(NotImplementedError, match="`start` has no reparameterised draw"):
        q.rsample()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_loss_and_backward_on_a_gpu():
    net = torch.nn.Linear(3, 2).cuda()
    path = DiffusionPath(2, LinearLogSNR(-3.0, 3.0), partial(_network, net)).cuda()
    start = dist.Normal(torch.zeros(2).cuda(), 1.0).to_event(1)
    shared = {"times": DensityTimes(lambda t: 1 + t).cuda(), "at": (0.5, 1.0), "num_times": 2}
    q = PathPosterior(path, torch.randn(4, 2).cuda(), **shared)
    p = PathPrior(path, PredictedDrift(path, partial(_network, net)), start, **shared)
    z = q.rsample()
    (q.log_prob(z) - p.log_prob(z)).sum().backward()
    assert net.weight.grad.is_cuda
    assert p.sample((3,)).is_cuda
