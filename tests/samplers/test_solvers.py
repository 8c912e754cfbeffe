"""Solvers: orders of convergence, noise, segments, the torchsde back end, errors."""

from __future__ import annotations

import math

import pytest
import torch
from registry import SAMPLERS
from torch import Tensor, nn

from flowvi.paths import SDE, Drift, StateDiffusion, TimeDiffusion
from flowvi.samplers import (
    EulerMaruyama,
    Milstein,
    StochasticHeun,
    TorchSDE,
    TorchSDEMethod,
    draw_increments,
    simulate,
)

DRIFT, NOISE = 0.5, 0.6


def geometric() -> SDE:
    """Geometric Brownian motion, whose paths are known as functions of the noise."""
    return SDE(lambda x, t: DRIFT * x, StateDiffusion(lambda x, t: NOISE * x, elementwise=True))


def rate(errors: list[float]) -> float:
    """Slope of the logarithm of the error against that of the step, halved each time."""
    x = -torch.arange(len(errors)) * math.log(2.0)
    y = torch.tensor(errors).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def coarser(increments: Tensor) -> Tensor:
    return increments.unflatten(0, (-1, 2)).sum(1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_strong_order(name: str):
    solver = SAMPLERS[name].make()
    finest, start = torch.linspace(0, 1, 257), torch.ones(2000, 1)
    noise = draw_increments(finest, start)
    correction = 0.0 if solver.is_stratonovich else NOISE**2 / 2
    exact = torch.exp(DRIFT - correction + NOISE * noise.sum(0))
    errors, times = [], finest
    for _ in range(5):
        path = simulate(geometric(), start, times, solver=solver, increments=noise)
        errors.insert(0, float((path.states[-1] - exact).abs().mean()))
        noise, times = coarser(noise), times[::2]
    # 2000 paths with common noise; the error itself is estimated to 4 %.
    assert rate(errors) == pytest.approx(solver.strong_order, abs=0.4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_weak_order(name: str):
    """Second moment, exact over the noise: three-point quadrature for every step."""
    solver = SAMPLERS[name].make()
    ito_drift = DRIFT + (NOISE**2 / 2 if solver.is_stratonovich else 0.0)
    exact = math.exp(2 * ito_drift + NOISE**2)
    nodes = torch.tensor([-math.sqrt(3), 0.0, math.sqrt(3)])
    weights = torch.tensor([1 / 6, 2 / 3, 1 / 6])
    errors = []
    for steps in (1, 2, 4, 8):
        grid = torch.cartesian_prod(*[nodes] * steps).reshape(-1, steps)
        weight = torch.cartesian_prod(*[weights] * steps).reshape(-1, steps).prod(-1)
        noise = grid.t().unsqueeze(-1) / math.sqrt(steps)
        start = torch.ones(len(grid), 1)
        path = simulate(
            geometric(), start, torch.linspace(0, 1, steps + 1), solver=solver, increments=noise
        )
        errors.append(abs(float((weight * path.states[-1, :, 0].square()).sum()) - exact))
    assert rate(errors) == pytest.approx(solver.order, abs=0.4)


def test_second_order_of_heun_without_noise():
    sde, start = SDE(lambda x, t: x * torch.cos(t), None), torch.ones(1, 1)
    errors = []
    for steps in (8, 16, 32, 64):
        path = simulate(sde, start, torch.linspace(0, 1, steps + 1), solver=StochasticHeun())
        errors.append(float((path.states[-1] - math.exp(math.sin(1.0))).abs()))
    assert rate(errors) == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_without_a_kick_a_step_is_that_of_the_ode(name: str):
    """Orders do not tell a first-order drift from a second-order one under noise."""
    solver, start = SAMPLERS[name].make(), torch.ones(3, 1)
    times, still = torch.linspace(0, 1, 6), torch.zeros(5, 3, 1)
    paths = [
        simulate(SDE(lambda x, t: x * t.cos(), b), start, times, solver=solver, increments=dw)
        for b, dw in ((0.5, still), (None, None))
    ]
    assert torch.allclose(paths[0].states, paths[1].states, rtol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_moments_with_the_exact_score_of_a_gaussian(name: str):
    """Langevin dynamics of N(1, 0.5^2) from that law stay there; 20,000 draws, 4 errors."""
    sde = SDE(lambda x, t: -2.0 * (x - 1.0), 1.0)  # b^2 / 2 times the score
    start = 1.0 + 0.5 * torch.randn(20_000, 1)
    path = simulate(sde, start, torch.linspace(0, 1, 101), solver=SAMPLERS[name].make())
    end = path.states[-1, :, 0]
    assert float(end.mean()) == pytest.approx(1.0, abs=4 * 0.5 / 20_000**0.5)
    # Steps of 0.01 at rate 2 leave 1 % more variance with Euler's step.
    assert float(end.var()) == pytest.approx(0.25, rel=4 * (2 / 20_000) ** 0.5 + 0.011)


def test_increments_have_the_variance_of_their_steps():
    times = torch.tensor([[0.0, 0.0], [0.1, 0.5], [0.1, 2.0]])
    noise = draw_increments(times, torch.zeros(40_000, 2, 3))
    expected = times.diff(dim=0).unsqueeze(-1).expand(2, 2, 3)
    # 120,000 draws for each step: a relative error of the variance of 0.4 %, 5 of them.
    assert torch.allclose(noise.var(1), expected, rtol=0.025, atol=0.0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_segments_give_the_same_path_to_the_bit_and_its_gradient(name: str):
    def run(num_segments: int) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Linear(2, 2)
        diffusion = StateDiffusion(lambda x, t: 0.5 + torch.sigmoid(x), elementwise=True)
        sde = SDE(lambda x, t: net(x) * t, diffusion)
        start = torch.ones(5, 2, requires_grad=True)
        path = simulate(
            sde,
            start,
            torch.linspace(0, 1, 12),
            solver=SAMPLERS[name].make(),
            num_segments=num_segments,
        )
        (path.states.square().sum() + path.drift.sum()).backward()
        grads = [start.grad, net.weight.grad]
        return [path.states.detach(), path.drift.detach(), path.diffusion.detach(), *grads]

    whole = run(1)
    for num_segments in (3, 11, 40):
        again = run(num_segments)
        assert all(torch.equal(*pair) for pair in zip(again[:3], whole[:3], strict=True))
        # Sums over steps are formed in another order.
        for pair in zip(again[3:], whole[3:], strict=True):
            assert torch.allclose(*pair, rtol=1e-12)


def test_segments_save_memory():
    """Tensors kept for the backward pass, counted in elements."""

    def kept(num_segments: int) -> int:
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 2))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            simulate(
                SDE(lambda x, t: net(x), 0.5),
                torch.zeros(50, 2),
                torch.linspace(0, 1, 101),
                num_segments=num_segments,
            )
        return total

    assert kept(10) < kept(1) / 10


def test_increments_can_be_shared():
    start, times = torch.zeros(4, 1), torch.linspace(0, 1, 11)
    noise = draw_increments(times, start)
    one, two = (
        simulate(SDE(lambda x, t, a=a: a - x, 0.3), start, times, increments=noise)
        for a in (0.0, 1e-3)
    )
    assert torch.equal(one.increments, noise)
    assert float((one.states - two.states).abs().max()) < 1e-3


def test_every_item_has_its_own_grid():
    times = torch.rand(9, 3).cumsum(0)
    noise = draw_increments(times, torch.zeros(3, 2))
    sde = SDE(lambda x, t: torch.sin(t) - x, TimeDiffusion(lambda t: 1 + t))
    together = simulate(sde, torch.ones(3, 2), times, increments=noise)
    for i in range(3):
        alone = simulate(sde, torch.ones(2), times[:, i], increments=noise[:, i])
        assert torch.allclose(together.states[:, i], alone.states, rtol=1e-12)


def test_time_is_embedded_once_per_solve():
    class Counting(Drift):
        calls = 0

        def embed(self, t: Tensor) -> Tensor:
            type(self).calls += 1
            return t

        def given(self, x: Tensor, time: Tensor) -> Tensor:
            return x * time

    simulate(SDE(Counting(), 1.0), torch.ones(3, 2), torch.linspace(0, 1, 50))
    assert Counting.calls == 1


# The back end.


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize(
    "method", [TorchSDEMethod.EULER, TorchSDEMethod.MILSTEIN, TorchSDEMethod.HEUN]
)
def test_torchsde_takes_the_same_steps(method: TorchSDEMethod, adjoint: bool):
    solvers = {
        TorchSDEMethod.EULER: EulerMaruyama(),
        TorchSDEMethod.MILSTEIN: Milstein(),
        TorchSDEMethod.HEUN: StochasticHeun(),
    }
    times, start = torch.linspace(0, 1, 9), torch.ones(3, 2)
    sde = SDE(lambda x, t: t - x, StateDiffusion(lambda x, t: 0.3 * x, elementwise=True))
    theirs = simulate(sde, start, times, solver=TorchSDE(method, adjoint=adjoint))
    ours = simulate(sde, start, times, solver=solvers[method], increments=theirs.increments)
    assert TorchSDE(method).is_stratonovich is solvers[method].is_stratonovich
    assert torch.allclose(theirs.states, ours.states, rtol=1e-6)
    assert torch.allclose(theirs.drift, ours.drift, rtol=1e-6)
    assert torch.allclose(theirs.diffusion, ours.diffusion, rtol=1e-6)


def test_adjoint_gradient():
    rate_ = nn.Parameter(torch.tensor(1.0))

    class Decay(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = rate_

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return -self.rate * x

    sde, start = SDE(Decay(), 1e-3), torch.ones(2, 1)
    solver = TorchSDE(TorchSDEMethod.HEUN, max_step=0.01, adjoint=True)
    path = simulate(sde, start, torch.tensor([0.0, 1.0]), solver=solver)
    path.states[-1].sum().backward()
    assert float(rate_.grad) == pytest.approx(-2 * math.exp(-1), rel=0.02)


def test_what_torchsde_cannot_do():
    sde, start, times = SDE(lambda x, t: -x, 0.5), torch.ones(3, 2), torch.linspace(0, 1, 5)
    with pytest.raises(NotImplementedError, match="one grid for all items"):
        simulate(sde, start, times.unsqueeze(-1).expand(-1, 3), solver=TorchSDE())
    with pytest.raises(NotImplementedError, match="draws its own noise"):
        simulate(sde, start, times, solver=TorchSDE(), num_segments=2)
    with pytest.raises(NotImplementedError, match="needs a diffusion"):
        simulate(SDE(lambda x, t: -x, None), start, times, solver=TorchSDE())
    with pytest.raises(TypeError, match="`method` must be a TorchSDEMethod; got 'euler'"):
        TorchSDE("euler")
    with pytest.raises(ValueError, match="`max_step` must be positive; got 0"):
        TorchSDE(max_step=0)


def test_errors():
    sde, start = SDE(lambda x, t: -x, 0.5), torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"`times` must have shape .* got \(5, 4\)"):
        simulate(sde, start, torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"at least two times .* got \(1,\)"):
        simulate(sde, start, torch.zeros(1))
    with pytest.raises(ValueError, match=r"`increments` must have shape \(4, 3, 2\)"):
        simulate(sde, start, torch.linspace(0, 1, 5), increments=torch.zeros(5, 3, 2))
    with pytest.raises(ValueError, match="`num_segments` must be an integer of at least 1; got 0"):
        simulate(sde, start, torch.linspace(0, 1, 5), num_segments=0)
    with pytest.raises(TypeError, match="`drift` must be callable; got float"):
        SDE(1.0, 0.5)
    with pytest.raises(NotImplementedError, match="has no drift"):
        Drift()(start, torch.zeros(1))


@pytest.mark.parametrize("name", SAMPLERS)
def test_meta_device(name: str):
    with torch.device("meta"):
        net = nn.Linear(2, 2)
        sde = SDE(lambda x, t: net(x) + t, StateDiffusion(lambda x, t: 1 + x.square()))
        path = simulate(
            sde,
            torch.zeros(3, 2),
            torch.zeros(5, 3),
            solver=SAMPLERS[name].make(),
            num_segments=2,
        )
        path.states.sum().backward()
    assert net.weight.grad.is_meta
