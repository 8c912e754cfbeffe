"""Flows with extra dimensions: bounds on known marginals, and maps that plain ones cannot make."""

from __future__ import annotations

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from flowvi.distributions import AugmentedFlow, AugmentedFlowDistribution, Flow
from flowvi.flows import realnvp
from flowvi.nn import FunctionField, MLPField
from flowvi.objectives import ELBO, STL
from flowvi.transforms import RK4, Continuous, TriangularAffine

COVARIANCE = torch.tensor(
    [[2.0, 0.6, -0.5], [0.6, 1.0, 0.3], [-0.5, 0.3, 1.5]], dtype=torch.float64
)
LOC = torch.tensor([0.5, -1.0, 0.3], dtype=torch.float64)


def gaussian(exact: bool) -> AugmentedFlow:
    """N(LOC, COVARIANCE) over (x, a), with a in one dimension; r is q(a | x) or N(0, 1)."""
    joint = TriangularAffine(3)
    _set(joint, LOC, torch.linalg.cholesky(COVARIANCE))
    auxiliary = Flow(TriangularAffine(1, 2))
    flow = AugmentedFlow(Flow(joint), 1, auxiliary)
    if exact:
        gain = torch.linalg.solve(COVARIANCE[:2, :2], COVARIANCE[:2, 2])
        scale = (COVARIANCE[2, 2] - COVARIANCE[2, :2] @ gain).sqrt()
        flow.auxiliary.transform = _Regression(gain, LOC[2] - gain @ LOC[:2], scale)
    return flow


def _set(affine: TriangularAffine, loc: Tensor, scale_tril: Tensor) -> None:
    """Fit the parameters of an affine map to a location and a factor, by their own inverse."""
    optimizer = torch.optim.LBFGS(affine.parameters(), max_iter=200, tolerance_grad=1e-14)
    points = torch.cat([torch.zeros(1, 3), torch.eye(3)])
    target = loc + points @ scale_tril.T

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (affine(points) - target).square().sum()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    assert (affine(points) - target).abs().max() < 1e-5


class _Regression(TriangularAffine):
    """a = gain . x + offset + scale * noise."""

    def __init__(self, gain: Tensor, offset: Tensor, scale: Tensor) -> None:
        super().__init__(1, 2)
        self.gain, self.offset, self.log_scale = gain, offset, scale.log()

    def _call_and_ladj(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        shift = (context @ self.gain + self.offset).unsqueeze(-1)
        return shift + self.log_scale.exp() * x, self.log_scale.expand(x.shape[:-1])

    def _inverse_and_ladj(self, y: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        shift = (context @ self.gain + self.offset).unsqueeze(-1)
        return (y - shift) / self.log_scale.exp(), -self.log_scale.expand(y.shape[:-1])


def marginal() -> dist.MultivariateNormal:
    return dist.MultivariateNormal(LOC[:2], COVARIANCE[:2, :2])


def test_exact_auxiliary_law_makes_the_bound_tight():
    law = gaussian(exact=True)()
    values = torch.randn(50, 2)
    torch.testing.assert_close(
        law.log_prob(values), marginal().log_prob(values), atol=1e-4, rtol=0
    )
    draws, log_q = law.rsample_and_log_prob((50,))
    torch.testing.assert_close(log_q, marginal().log_prob(draws), atol=1e-4, rtol=0)


def test_bounds_of_another_auxiliary_law():
    law = gaussian(exact=False)()
    value = torch.tensor([0.3, -0.4])
    truth = marginal().log_prob(value)
    single = law.log_prob_bound(value.expand(20_000, 2), 1)
    # 20000 draws; four standard errors.
    assert single.mean() < truth - 4 * single.std() / math.sqrt(20_000)
    weights = (single - truth).exp()
    assert (weights.mean() - 1).abs() < 4 * weights.std() / math.sqrt(20_000)
    many = law.log_prob_bound(value.expand(200, 2), 2000)
    assert single.mean() < many.mean()
    torch.testing.assert_close(many.mean(), truth, atol=5e-3, rtol=0)
    draws, log_q = law.rsample_and_log_prob((20_000,))
    excess = log_q - marginal().log_prob(draws)
    assert excess.mean() > 4 * excess.std() / math.sqrt(20_000)
    inverse = (-excess).exp()
    assert (inverse.mean() - 1).abs() < 4 * inverse.std() / math.sqrt(20_000)


def test_draws_follow_the_marginal():
    draws = gaussian(exact=False)().sample((40_000,))
    # 40000 draws: standard errors of means up to 0.007, of covariances up to 0.015.
    torch.testing.assert_close(draws.mean(0), LOC[:2], atol=0.03, rtol=0)
    torch.testing.assert_close(draws.T.cov(), COVARIANCE[:2, :2], atol=0.06, rtol=0)


def test_a_draw_is_scored_with_its_own_extra_dimensions():
    flow = AugmentedFlow(realnvp(3), 1)
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.3)
    law = flow()
    value, log_q = law.rsample_and_log_prob((4,))
    assert law.log_prob(value) is log_q
    assert not torch.equal(law.log_prob(value.clone()), log_q)


def test_shapes_context_and_expand():
    flow = AugmentedFlow(realnvp(5, 3), 2, num_draws=4)
    assert (flow.input_dim, flow.context_dim) == (3, 3)
    law = flow(torch.randn(6, 3))
    assert isinstance(law, AugmentedFlowDistribution)
    assert (law.batch_shape, law.event_shape) == ((6,), (3,))
    assert law.rsample((2,)).shape == (2, 6, 3)
    assert law.log_prob(torch.randn(2, 6, 3)).shape == (2, 6)
    wide = law.expand((5, 6))
    assert wide.rsample().shape == (5, 6, 3)
    assert wide.log_prob(torch.randn(3)).shape == (5, 6)
    plain = AugmentedFlow(realnvp(3), 1)()
    assert plain.expand((7,)).log_prob(torch.zeros(2)).shape == (7,)
    with pytest.raises(ValueError, match="`batch_shape` must be one that"):
        wide.expand((6,))


def test_path_gradient_equals_the_whole_gradient_in_the_mean():
    flow = AugmentedFlow(realnvp(3), 1)
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.3)
    target = dist.Normal(torch.tensor([1.0, -1.0]), 0.7).to_event(1)

    def gradient(path: bool) -> Tensor:
        law = flow().path_derivative() if path else flow()
        value, log_q = law.rsample_and_log_prob((4000,))
        loss = (log_q - target.log_prob(value)).mean()
        parts = torch.autograd.grad(loss, list(flow.parameters()), allow_unused=True)
        return torch.cat([g.flatten() for g in parts if g is not None])

    draws = {path: torch.stack([gradient(path) for _ in range(20)]) for path in (True, False)}
    error = ((draws[True].var(0) + draws[False].var(0)) / 20).sqrt()
    difference = (draws[True].mean(0) - draws[False].mean(0)).abs()
    # Hundreds of coordinates; five standard errors of 20 means of 4000 draws.
    assert (difference < 5 * error + 1e-9).all()
    assert draws[False].mean(0).abs().max() > 0.1


def test_maximum_likelihood_through_stock_svi():
    flow = AugmentedFlow(realnvp(2, num_layers=2), 1)
    data = 3 + 0.5 * torch.randn(256, 1)

    def model(x: Tensor) -> None:
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            pyro.sample("x", flow(), obs=x)

    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 3e-2}), Trace_ELBO())
    losses = [svi.step(data) / 256 for _ in range(200)]
    entropy = 0.5 * math.log(2 * math.pi * math.e) + math.log(0.5)
    # The bound cannot pass the negative entropy by more than the data's own noise.
    assert entropy - 0.2 < sum(losses[-20:]) / 20 < entropy + 0.2 < losses[0]


@pytest.mark.parametrize("objective", [ELBO(64), STL(64)])
def test_hand_written_guide(objective: object):
    flow = AugmentedFlow(realnvp(2, num_layers=2), 1)

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.tensor([2.0]), 0.5).to_event(1))

    def guide() -> None:
        pyro.module("flow", flow)
        pyro.sample("z", flow())

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 3e-2}), objective)
    losses = [svi.step() for _ in range(150)]
    # The evidence is 1; a bound never falls below its logarithm but by noise.
    assert -0.05 < sum(losses[-20:]) / 20 < 0.1


def test_augmented_dimensions_turn_a_line_round():
    """x -> -x needs paths to cross; in the plane they go round each other."""
    x = torch.linspace(-2, 2, 41).unsqueeze(-1)
    errors = []
    for extra in (0, 1):
        torch.manual_seed(0)
        flow = Continuous(MLPField(1 + extra, (32,)), solver=RK4(8))
        optimizer = torch.optim.Adam(flow.parameters(), 3e-2)
        for _ in range(150):
            optimizer.zero_grad()
            padded = nn.functional.pad(x, (0, extra))
            loss = (flow(padded)[:, :1] + x).square().mean()
            loss.backward()
            optimizer.step()
        errors.append(loss.item())
    # Increasing maps come no nearer to -x than a constant does, whose error is the variance.
    assert errors[0] > x.var(correction=0).item() - 1e-3
    assert errors[1] < 1e-2


def test_half_a_turn_has_an_exact_density():
    turn = math.pi * torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    flow = Flow(Continuous(FunctionField(2, lambda t, x: x @ turn.T), solver=RK4(200)))
    x = torch.randn(9, 1)
    torch.testing.assert_close(
        flow.transform(nn.functional.pad(x, (0, 1)))[:, :1], -x, atol=1e-6, rtol=0
    )
    standard = Flow(TriangularAffine(1, 1))
    law = AugmentedFlow(flow, 1, standard)()
    torch.testing.assert_close(
        law.log_prob(x), dist.Normal(0.0, 1.0).log_prob(x.squeeze(-1)), atol=1e-6, rtol=0
    )


def test_meta_device_and_copies():
    flow = AugmentedFlow(realnvp(3), 1, num_draws=3)
    for twin in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        torch.manual_seed(1)
        other = twin().log_prob(torch.zeros(4, 2))
        torch.manual_seed(1)
        torch.testing.assert_close(flow().log_prob(torch.zeros(4, 2)), other)
    with torch.device("meta"):
        flow = AugmentedFlow(realnvp(3), 1, num_draws=3)
        value, log_q = flow().rsample_and_log_prob((4,))
        (log_q.sum() + flow().log_prob(value.detach()).sum()).backward()
    assert all(p.grad.is_meta for p in flow.parameters())


def test_wrong_arguments():
    with pytest.raises(TypeError, match="`flow` must be a Flow; got TriangularAffine"):
        AugmentedFlow(TriangularAffine(2), 1)
    for number in (0, 3, 1.0):
        with pytest.raises(ValueError, match="`num_extra` must be an integer from 1 to 2"):
            AugmentedFlow(realnvp(3), number)
    with pytest.raises(ValueError, match="`num_draws` must be an integer of at least 1; got 0"):
        AugmentedFlow(realnvp(3), 1, num_draws=0)
    with pytest.raises(TypeError, match="`auxiliary` must be a Flow; got Linear"):
        AugmentedFlow(realnvp(3), 1, nn.Linear(2, 1))
    with pytest.raises(ValueError, match="`auxiliary` must have input_dim 1; got 2"):
        AugmentedFlow(realnvp(3), 1, realnvp(2, 2))
    with pytest.raises(ValueError, match="`auxiliary` must have context_dim 2; got 1"):
        AugmentedFlow(realnvp(3), 1, realnvp(1, 1))
