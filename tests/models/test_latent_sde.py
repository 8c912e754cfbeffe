"""Latent SDE: both posteriors, irregular series, exact evidences, predictions, errors."""

from __future__ import annotations

import copy
import math

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor, nn

from flowvi.distributions import LogRatio
from flowvi.infer import fit
from flowvi.models import (
    ConvolutionalEncoder,
    DriftMLP,
    FirstFramesEncoder,
    GaussianDecoder,
    LatentSDE,
    MLPMarginals,
    NormalStart,
    RecurrentEncoder,
    RhythmicMarginals,
    SimulatedLatent,
    SimulationFreeLatent,
)
from flowvi.models.latent_posteriors import between
from flowvi.objectives import ELBO, IWAE
from flowvi.paths import SDE, StateDiffusion
from flowvi.samplers import Milstein, StochasticHeun, TorchSDE

DIM, DATA_DIM, B, T = 2, 1, 4, 6
ENCODERS = {
    "recurrent": lambda: RecurrentEncoder(DATA_DIM, 3, 8),
    "convolutional": lambda: ConvolutionalEncoder(DATA_DIM, 3, 8),
    "first frames": lambda: FirstFramesEncoder(DATA_DIM, 3, 2, (8,)),
}
# Name of the case to the encoder's name and options of the posterior; None: simulation-free.
CASES: dict[str, tuple[str, dict | None]] = {
    "recurrent": ("recurrent", {}),
    "convolutional": ("convolutional", {}),
    "first frames": ("first frames", {}),
    "pathwise": ("recurrent", {"log_ratio": LogRatio.PATHWISE}),
    "segments": ("recurrent", {"num_segments": 4}),
    "milstein": ("recurrent", {"solver": Milstein()}),
    "heun": ("recurrent", {"solver": StochasticHeun()}),
    "simulation-free": ("recurrent", None),
    "simulation-free, first frames": ("first frames", None),
    "simulation-free, rhythm": ("first frames", {"marginals": "rhythm"}),
    "simulation-free, rhythm that changes": ("recurrent", {"marginals": "rhythm"}),
    "no noise": ("recurrent", {"drift": None}),
}


def build(name: str) -> LatentSDE:
    encoder_name, options = CASES[name]
    encoder = ENCODERS[encoder_name]()
    noise: object = StateDiffusion(_Noise(), elementwise=True)
    if options is None or "marginals" in options:
        rhythm = RhythmicMarginals(3, DIM, 0.5, (8,), num_harmonics=2) if options else None
        posterior = SimulationFreeLatent(
            encoder, DIM, hidden_dims=(8,), marginals=rhythm, num_times=2, num_steps=9
        )
    else:
        options = {"drift": DriftMLP(DIM, (8,), 3), "steps_per_interval": 3, **options}
        noise = None if options["drift"] is None else noise
        posterior = SimulatedLatent(encoder=encoder, dim=DIM, **options)
    process = SDE(DriftMLP(DIM, (8,)), noise)
    decoder = GaussianDecoder(DIM, DATA_DIM, (4,), scale=0.5, learn_scale=True)
    return LatentSDE(process, decoder, posterior, NormalStart(DIM))


class _Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(DIM))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.3 + torch.sigmoid(self.raw + x)


def series(irregular: bool, masked: bool) -> tuple[Tensor, ...]:
    data = torch.randn(B, T, DATA_DIM)
    times = torch.rand(B, T).sort(-1).values if irregular else torch.linspace(0, 1, T)
    if not masked:
        return data, times
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 4:] = mask[2, 2] = False
    data[~mask] = torch.nan
    if irregular:
        times[1, 4:] = torch.nan
    return data, times, mask


KINDS = {"regular": (False, False), "irregular": (True, False), "masked": (True, True)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_every_parameter_gets_a_gradient(name: str, kind: str):
    latent, args = build(name), series(*KINDS[kind])
    # The start's head and the last layer of networks that begin at zero hide what is below.
    for parameter in latent.parameters():
        nn.init.normal_(parameter, std=0.4)
    loss = ELBO(2).differentiable_loss(latent.model, latent.guide, *args)
    loss.backward()
    assert loss.isfinite()
    lost = [
        n
        for n, p in latent.named_parameters()
        if p.grad is None or not bool(p.grad.abs().sum() > 0)
    ]
    assert lost == []
    assert all(p.grad.isfinite().all() for p in latent.parameters())


@pytest.mark.parametrize("name", CASES)
def test_terms_add_up_to_the_bound_of_stock_pyro(name: str):
    latent, args = build(name), series(True, True)
    with torch.no_grad():
        terms = latent.terms(*args, num_samples=2000)
    loss = Trace_ELBO(2000, max_plate_nesting=1, vectorize_particles=True)
    stock = -loss.loss(latent.model, latent.guide, *args)
    # Two averages of 2000 draws; each varies by less than 0.5 % of the bound.
    assert float(terms.elbo.sum()) == pytest.approx(stock, rel=0.03)
    assert terms.data.shape == terms.start.shape == terms.path.shape == (B,)
    if name == "no noise":
        assert torch.equal(terms.path, torch.zeros(B))


def linear_gaussian(posterior: object, noise: float | None, start: float = 1.0) -> LatentSDE:
    """One dimension, x' = -x + noise, seen with residual 0.5."""

    class Start(nn.Module):
        def forward(self) -> object:
            return dist.Normal(torch.zeros(1), start).to_event(1)

    class Read(nn.Module):
        data_dim = 1

        def forward(self, states: Tensor) -> object:
            return dist.Normal(states, 0.5).to_event(1)

    return LatentSDE(SDE(lambda x, t: -x, noise), Read(), posterior, Start())


def kalman(data: Tensor, times: Tensor, mask: Tensor, noise: float, steps: int) -> Tensor:
    """Log-evidence of each series of the model above with Euler steps between observations."""
    totals = []
    for y, t, seen in zip(data[..., 0], times, mask, strict=True):
        y, t = y[seen], t[seen]
        mean, var, total = 0.0, 1.0, 0.0
        for k in range(len(t)):
            if k:
                dt = float(t[k] - t[k - 1]) / steps
                for _ in range(steps):
                    mean, var = mean * (1 - dt), var * (1 - dt) ** 2 + noise**2 * dt
            spread = var + 0.25
            gap = float(y[k]) - mean
            total -= 0.5 * (gap**2 / spread + math.log(2 * math.pi * spread))
            mean, var = mean + var / spread * gap, var * 0.25 / spread
        totals.append(total)
    return torch.tensor(totals)


def test_importance_weighting_reaches_the_kalman_filter_on_irregular_series():
    data, times, mask = series(True, True)
    data = 0.3 * data
    mask[2, 2] = True  # the filter below steps from one observation to the next
    data[2, 2] = 0.3
    drift = DriftMLP(1, (4,), 3)
    posterior = SimulatedLatent(
        drift, ENCODERS["recurrent"](), 1, steps_per_interval=2, log_ratio=LogRatio.PATHWISE
    )
    latent = linear_gaussian(posterior, 0.7)
    exact = float(kalman(data, times, mask, 0.7, 2).sum())
    bounds = []
    for num_particles, repeats in ((1, 200), (16, 40), (512, 10)):
        loss = IWAE(num_particles, max_plate_nesting=2)
        losses = [loss.loss(latent.model, latent.guide, data, times, mask) for _ in range(repeats)]
        bounds.append(-sum(losses) / len(losses))
    assert bounds == sorted(bounds)
    # The spread of one bound of 512 particles is 0.15 nats, of their mean 0.05.
    assert exact - 0.2 < bounds[-1] < exact + 0.1


def test_latent_ode_against_its_exact_evidence():
    """The start is the only latent: y is jointly normal."""
    data, times = torch.randn(B, T, 1), torch.rand(B, T).sort(-1).values
    posterior = SimulatedLatent(
        None, ENCODERS["recurrent"](), 1, steps_per_interval=20, solver=StochasticHeun()
    )
    latent = linear_gaussian(posterior, None)
    decay = torch.exp(-(times - times[:, :1]))
    cov = decay.unsqueeze(-1) * decay.unsqueeze(-2) + 0.25 * torch.eye(T)
    exact = float(dist.MultivariateNormal(torch.zeros(T), cov).log_prob(data[..., 0]).sum())
    loss = IWAE(4000, max_plate_nesting=2)
    bound = -sum(loss.loss(latent.model, latent.guide, data, times) for _ in range(4)) / 4
    # Effective sample size of some hundreds for each series.
    assert bound == pytest.approx(exact, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("simulated", [True, False])
def test_trained_bound_is_close_to_the_kalman_filter(simulated: bool):
    torch.manual_seed(3)
    times = torch.linspace(0, 1, 6)
    data = 0.8 * torch.randn(16, 6, 1)
    mask = torch.ones(16, 6, dtype=torch.bool)
    if simulated:
        posterior = SimulatedLatent(DriftMLP(1, (16,), 4), RecurrentEncoder(1, 4, 16), 1)
    else:
        posterior = SimulationFreeLatent(RecurrentEncoder(1, 4, 16), 1, num_times=8)
    latent = linear_gaussian(posterior, 0.7)
    exact = float(kalman(data, times.expand(16, -1), mask, 0.7, 200).sum())
    optim = torch.optim.Adam(latent.parameters(), lr=5e-3)
    loss = ELBO(4, max_plate_nesting=2)
    for _ in range(800):
        optim.zero_grad()
        loss.differentiable_loss(latent.model, latent.guide, data, times).backward()
        optim.step()
    with torch.no_grad():
        bound = float(latent.terms(data, times, num_samples=2000).elbo.sum())
    # Of 16 series: a bound, up to the discretisation (simulated) and 3 errors of 0.15.
    assert exact - 4.0 < bound < exact + 0.6


def test_stock_svi_and_fit():
    data, times = series(False, False)
    latent = build("recurrent")
    svi = SVI(latent.model, latent.guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(data, times) for _ in range(40)]
    assert sum(losses[-10:]) < sum(losses[:10])

    class Pair(nn.Module):
        def __init__(self, latent: LatentSDE) -> None:
            super().__init__()
            self.latent = latent

        def forward(self, *args: Tensor) -> object:
            return self.latent.guide(*args)

    guide = Pair(build("simulation-free"))
    result = fit(
        guide.latent.model,
        guide,
        data,
        times,
        objective=ELBO(4),
        num_steps=60,
        lr=0.02,
        seed=0,
        start=False,
        progress_bar=False,
    )
    assert math.isfinite(result.elbo)
    assert result.losses[-20:].mean() < result.losses[:20].mean()


@pytest.mark.parametrize("name", CASES)
def test_predictive_and_predictions(name: str):
    latent, (data, times) = build(name), series(False, False)
    drawn = Predictive(latent.model, num_samples=3)(None, times, num_series=B)
    assert drawn["data"].shape == (3, B, T, DATA_DIM)
    at = torch.tensor([0.0, 0.31, 0.31, 1.0])
    inside = latent.interpolate(data, times, at, num_samples=5)
    assert inside.states.shape == (5, B, 4, DIM)
    assert inside.means.shape == (5, B, 4, DATA_DIM)
    ahead = latent.forecast(data, times, torch.tensor([1.2, 1.5]), num_samples=5)
    assert ahead.means.shape == (5, B, 2, DATA_DIM)


def test_interpolation_hits_each_items_own_times():
    """A path drawn at its own observation times has the law of the guide's states there."""
    latent, (data, times) = build("recurrent"), series(True, False)
    drawn = latent.interpolate(data, times, times, num_samples=4000).states
    law = latent.posterior.law(latent.process, data, times, None)
    states = latent.posterior.observed(law, law.sample((4000,)))
    # The union grid has twice the times, so steps of no length; 4000 draws, 5 errors.
    for moment in (torch.mean, torch.std):
        error = (moment(drawn, 0) - moment(states, 0)).abs()
        assert float((error / states.std(0)).max()) < 5 * (2 / 4000) ** 0.5


def test_forecast_follows_the_prior():
    posterior = SimulatedLatent(DriftMLP(1, (4,), 3), ENCODERS["recurrent"](), 1)
    latent = linear_gaussian(posterior, 0.6)
    data, times = torch.zeros(2, T, 1), torch.linspace(0, 1, T)
    at = torch.linspace(1, 9, 161)[1:]
    states = latent.forecast(data, times, at, num_samples=4000).states[:, :, -1, 0]
    # Stationary after 8 relaxation times: variance 0.36 / 2, up to steps of 0.01; 4 errors.
    assert float(states.mean()) == pytest.approx(0.0, abs=4 * 0.42 / 8000**0.5 + 1e-3)
    assert float(states.var()) == pytest.approx(0.18, rel=4 * (2 / 8000) ** 0.5 + 0.01)


def test_forecast_is_at_the_asked_times():
    posterior = SimulatedLatent(None, ENCODERS["recurrent"](), 1, solver=StochasticHeun())
    latent = linear_gaussian(posterior, None)
    data, times = series(True, False)
    at = times[:, -1:] + torch.tensor([0.0, 0.3, 0.35, 1.0])
    states = latent.forecast(data, times, at, num_samples=3, steps_per_interval=50).states
    decay = torch.exp(-torch.tensor([0.0, 0.3, 0.35, 1.0])).unsqueeze(-1)
    assert torch.allclose(states, states[..., :1, :] * decay, rtol=1e-4)


@pytest.mark.parametrize("per_item", [False, True])
def test_contexts_are_interpolated_linearly(per_item: bool):
    at, rows = torch.tensor([0.1, 0.4, 0.5, 1.0]), torch.randn(2, 4, 1)
    t = torch.linspace(0.003, 1.2, 37)
    spread = at.expand(2, -1) if per_item else at
    found, rate = between(spread, rows, t.reshape(-1, 1, 1))
    for i in range(2):
        expected = numpy.interp(t.numpy(), at.numpy(), rows[i, :, 0].numpy())
        assert torch.allclose(found[:, i, 0], torch.as_tensor(expected))
    later = between(spread, rows, t.reshape(-1, 1, 1) + 1e-7)[0]
    torch.testing.assert_close((later - found) / 1e-7, rate, rtol=1e-6, atol=1e-6)


def test_grid_of_each_series_holds_its_times():
    latent, (data, times, mask) = build("recurrent"), series(True, True)
    law = latent.posterior.law(latent.process, data, latent._settle(data, times, mask), mask)
    grid = law.times[:, :: latent.posterior.steps_per_interval]
    assert torch.equal(grid[mask], times[mask])
    # So does the time of a value that is missing between others.
    assert not mask[2, 2]
    assert torch.equal(grid[2], times[2])
    assert bool((law.times.diff(dim=-1) >= 0).all())
    steps = law.times.diff(dim=-1).unflatten(-1, (T - 1, 3))
    assert torch.allclose(steps, grid.diff(dim=-1).unsqueeze(-1) / 3, atol=1e-12)
    # Padding after the last observation stands still.
    assert torch.equal(law.times[1, 9:], law.times[1, 9].expand(7))


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_do_not_see_padding(name: str):
    encoder, data, times = ENCODERS[name](), torch.randn(2, 5, 1), torch.linspace(0, 1, 5)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[:, 5:] = False
    longer = torch.cat([data, torch.full((2, 3, 1), torch.nan)], 1)
    padded = encoder(longer, torch.cat([times, torch.ones(3)]), mask)
    padded = padded if encoder.is_static else padded[:, :5]
    assert torch.allclose(padded, encoder(data, times), rtol=1e-12)


def test_recurrent_context_sees_its_time_and_the_future_only():
    encoder, data, times = ENCODERS["recurrent"](), torch.randn(1, 5, 1), torch.linspace(0, 1, 5)
    changed = data.clone()
    changed[:, 2] += 1
    gap = (encoder(data, times) - encoder(changed, times)).abs().sum(-1)[0] > 0
    assert gap.tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("per_item", [False, True])
def test_drift_uses_the_context_of_the_next_time(per_item: bool):
    drift = DriftMLP(2, (8,), 3)
    at = torch.tensor([0.0, 0.5, 1.0])
    context = torch.randn(4, 3, 3)
    bound = drift.bind(context, at.expand(4, -1) if per_item else at)
    x = torch.randn(4, 2)
    for t, index in ((0.0, 1), (0.49, 1), (0.5, 2), (0.9, 2), (1.0, 2), (1.5, 2)):
        shift = drift.context_layer(context[:, index])
        until = max(float(at[index]) - t, 0.0)
        features = [t, until, 1 / (1 + 4 * until), 1 / (1 + 32 * until)]
        h = x @ drift.first + drift.bias + drift.time_layer(torch.tensor(features)) + shift
        expected = drift.layers[0](nn.functional.softplus(h))
        assert torch.allclose(bound(x, torch.full((4, 1), t)), expected)
        grid = torch.full((2, 1, 1), t)
        assert torch.allclose(bound(x.expand(2, 4, 2), grid)[1], expected)


def test_marginals_of_the_simulation_free_posterior_are_continuous():
    latent, (data, times) = build("simulation-free"), series(True, False)
    law = latent.posterior.law(latent.process, data, times, None)
    t = times[:, 2:3]
    left, right = (law.path.moments(t + s * 1e-9, law.y) for s in (-1, 1))
    assert torch.allclose(left[0], right[0], atol=1e-6)
    assert torch.allclose(left[1], right[1], atol=1e-6)


def test_minibatch_is_scaled():
    data, times = series(False, False)
    latent = build("simulation-free")
    whole = ELBO(500, max_plate_nesting=2).loss(latent.model, latent.guide, data, times)
    latent.num_total = 10 * B
    part = ELBO(500, max_plate_nesting=2).loss(latent.model, latent.guide, data, times)
    # Averages of 500 draws.
    assert part == pytest.approx(10 * whole, rel=0.05)


def test_torchsde_back_end():
    encoder = ENCODERS["recurrent"]()
    for adjoint in (False, True):
        posterior = SimulatedLatent(
            DriftMLP(DIM, (8,), 3), encoder, DIM, solver=TorchSDE(adjoint=adjoint)
        )
        process = SDE(DriftMLP(DIM, (8,)), 0.5)
        latent = LatentSDE(process, GaussianDecoder(DIM, DATA_DIM), posterior, NormalStart(DIM))
        latent.terms(*series(False, False)).elbo.sum().backward()
        assert all(p.grad.isfinite().all() for p in posterior.drift.parameters())
        assert bool(encoder.output.weight.grad.abs().sum() > 0)


def test_copies_and_saved_state():
    latent, args = build("recurrent"), series(True, True)
    other = build("recurrent")
    other.load_state_dict(latent.state_dict())
    values = []
    for which in (latent, other, copy.deepcopy(latent)):
        torch.manual_seed(5)
        values.append(which.terms(*args).elbo)
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_meta_device(name: str, kind: str):
    irregular, masked = KINDS[kind]
    with torch.device("meta"), pyro.validation_enabled(False):
        latent = build(name)
        times = torch.empty(B, T) if irregular else torch.empty(T)
        mask = (torch.empty(B, T, dtype=torch.bool),) if masked else ()
        loss = ELBO(2, max_plate_nesting=2).differentiable_loss(
            latent.model, latent.guide, torch.empty(B, T, DATA_DIM), times, *mask
        )
        loss.backward()
    assert loss.is_meta


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_gpu(name: str):
    latent = build(name).to("cuda")
    args = [a.to("cuda") for a in series(True, True)]
    loss = ELBO(2, max_plate_nesting=2).differentiable_loss(latent.model, latent.guide, *args)
    loss.backward()
    assert bool(loss.isfinite())


# Errors.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, t, m: (d, t.flip(-1), m), "`times` must be finite and sorted"),
        (lambda d, t, m: (d, t[:, :-1], m), r"`data` must have shape \(B, 5, 1\)"),
        (lambda d, t, m: (d, t[0, :1], m), r"`times` must have shape \(T,\) or \(B, T\)"),
        (lambda d, t, m: (d, t, m[:, 1:]), "`mask` must end with 6"),
        (lambda d, t, m: (d, t, m.double()), "`mask` must be boolean"),
        (lambda d, t, m: (d, t[:2], m), "must have one batch size; got"),
        (lambda d, t, m: (d, t * torch.nan, m), "`times` must be finite and sorted"),
        (lambda d, t, m: (d, t, m & False), "at least one observation in each series; got none"),
        (lambda d, t, m: (d * torch.nan, t, m), "`data` must be finite where it is observed"),
        (lambda d, t, m: (d[..., 0], t, m), "`data` must have shape"),
    ],
)
def test_series_at_fault(change: object, message: str):
    latent, (data, times) = build("recurrent"), series(True, False)
    args = change(data, times, torch.ones(B, T, dtype=torch.bool))
    for program in (latent.model, latent.guide, latent.terms):
        with pytest.raises(ValueError, match=message):
            program(*args)


def test_other_errors():
    latent, (data, times) = build("recurrent"), series(False, False)
    with pytest.raises(ValueError, match="`data` must be given to the guide"):
        latent.guide(None, times)
    with pytest.raises(ValueError, match="`at` must hold sorted times"):
        latent.forecast(data, times, torch.tensor([0.5]))
    with pytest.raises(ValueError, match="`at` must hold sorted times"):
        latent.interpolate(data, times, torch.tensor([0.5, 0.2]))
    with pytest.raises(ValueError, match="`steps_per_interval` must be an integer of at least 1"):
        SimulatedLatent(None, ENCODERS["recurrent"](), 1, steps_per_interval=0)
    with pytest.raises(ValueError, match="`drift` must have the encoder's context_dim 3; got 2"):
        SimulatedLatent(DriftMLP(1, (4,), 2), ENCODERS["recurrent"](), 1)
    with pytest.raises(ValueError, match=r"`context` must end with size 3 \(context_dim\)"):
        DriftMLP(1, (4,), 3).bind(torch.zeros(2))
    with pytest.raises(ValueError, match="`context` must be given to this drift"):
        DriftMLP(1, (4,), 3)(torch.zeros(2, 1), torch.zeros(1))
    with pytest.raises(ValueError, match="`hidden_dims` must hold at least one width"):
        DriftMLP(1, ())
    with pytest.raises(ValueError, match="`scale` must be positive; got 0"):
        GaussianDecoder(1, 1, scale=0)
    with pytest.raises(ValueError, match="`kernel_size` must be odd and positive; got 2"):
        ConvolutionalEncoder(1, 1, kernel_size=2)
    with pytest.raises(ValueError, match="`data` must hold at least 2 observations"):
        ENCODERS["first frames"]()(data[:, :1], times[:1])
    free = build("simulation-free")
    free.process = SDE(DriftMLP(DIM, (4,)), None)
    with pytest.raises(ValueError, match="`process` must have a diffusion for a simulation-free"):
        free.guide(data, times)


def test_drift_that_is_not_finite_is_named():
    latent, args = build("recurrent"), series(False, False)
    nn.init.constant_(latent.posterior.drift.bias, torch.nan)
    with pytest.raises(ValueError, match="`drift` must give finite states"):
        latent.guide(*args)
    with pyro.validation_enabled(False):
        loss = ELBO().loss(latent.model, latent.guide, *args)
        assert math.isnan(loss)
        assert latent.terms(*args).elbo.isnan().all()


def test_two_side_by_side_train_their_own_parameters():
    pair, args = [build("first frames"), build("simulation-free")], series(False, False)
    before = [[p.detach().clone() for p in latent.parameters()] for latent in pair]
    optimizer = pyro.optim.Adam({"lr": 0.01})
    for latent in pair:
        SVI(latent.model, latent.guide, optimizer, Trace_ELBO()).step(*args)
    for latent, old in zip(pair, before, strict=True):
        assert any(not torch.equal(p, o) for p, o in zip(latent.parameters(), old, strict=True))
        held = pyro.get_param_store()._params.values()
        assert {id(p) for p in latent.parameters()} <= {id(p) for p in held}


def test_marginals_must_fit_the_encoder():
    with pytest.raises(ValueError, match="`marginals` must have the encoder's context_dim"):
        SimulationFreeLatent(ENCODERS["recurrent"](), DIM, marginals=MLPMarginals(4, DIM))
