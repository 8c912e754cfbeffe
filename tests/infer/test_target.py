from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormalizingFlow
from scipy import stats
from torch import nn
from torch.distributions import constraints

from flowvi.infer.target import Evaluation, Target


def two_level(y: torch.Tensor) -> None:
    """Supports: real, positive, interval, simplex, Cholesky factor; a plate and a factor."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 3.0))
    fraction = pyro.sample("fraction", dist.Uniform(-1.0, 3.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    corr = pyro.sample("corr", dist.LKJCholesky(2, 1.5))
    with pyro.plate("items", len(y)):
        local = pyro.sample("local", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Normal(local * weights[..., 0] + fraction, rate), obs=y)
    pyro.deterministic("total", rate + fraction)
    pyro.factor("tilt", -corr[..., 1, 0])


def two_level_by_hand(z: np.ndarray, y: np.ndarray) -> float:
    """The same density with scipy, one point, the Jacobians written out."""
    sigmoid = lambda u: 1 / (1 + math.exp(-u))  # noqa: E731
    rate = math.exp(z[0])
    fraction = -1 + 4 * sigmoid(z[1])
    # Stick breaking, two sticks, with torch's offsets log(2) and log(1).
    first, second = sigmoid(z[2] - math.log(2)), sigmoid(z[3])
    weights = np.array([first, (1 - first) * second, (1 - first) * (1 - second)])
    tanh = math.tanh(z[4])
    local = z[5 : 5 + len(y)]
    log_p = stats.gamma(2.0, scale=1 / 3).logpdf(rate) + z[0]
    log_p += math.log(1 / 4) + math.log(4 * sigmoid(z[1]) * sigmoid(-z[1]))
    log_p += stats.dirichlet([1.0, 2.0, 3.0]).logpdf(weights)
    log_p += math.log(first * (1 - first)) + math.log(second * (1 - second)) + math.log(1 - first)
    # LKJ over 2 x 2 correlations: r with density proportional to (1 - r^2)^(eta - 1).
    log_p += 0.5 * math.log(1 - tanh**2) - (math.log(2) * 2 + _log_beta(1.5, 1.5))
    log_p += math.log(1 - tanh**2)
    log_p += stats.norm(0, 2).logpdf(local).sum()
    log_p += stats.norm(local * weights[0] + fraction, rate).logpdf(y).sum()
    return log_p - tanh


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def test_log_prob_equals_a_hand_written_density() -> None:
    y = torch.tensor([0.3, -1.0, 2.0, 0.7])
    target = Target(two_level, (y,))
    z = torch.randn(6, target.dim)
    expected = torch.tensor([two_level_by_hand(row.numpy(), y.numpy()) for row in z])
    assert target.evaluation is Evaluation.BROADCAST
    torch.testing.assert_close(target.log_prob(z), expected)
    for evaluation in Evaluation:
        torch.testing.assert_close(target._log_prob(z, evaluation), expected)


def test_labels_and_order_are_those_of_the_autoguides() -> None:
    y = torch.tensor([0.3, -1.0])
    target = Target(two_level, (y,))
    assert target.labels[:4] == ["rate", "fraction", "weights[0]", "weights[1]"]
    assert target.labels[-2:] == ["local[0]", "local[1]"]
    guide = AutoNormalizingFlow(two_level, lambda dim: dist.transforms.planar(dim))
    guide._setup_prototype(y)
    assert target.dim == guide.latent_dim
    z = torch.randn(1, target.dim)
    unpacked = {site["name"]: u for site, u in guide._unpack_latent(z[0])}
    constrained = target.constrain(z)
    for name, site in target.sites.items():
        torch.testing.assert_close(site.transform(unpacked[name]), constrained[name][0])


def test_round_trip_and_log_determinant() -> None:
    target = Target(two_level, (torch.zeros(3),))
    z = torch.randn(5, target.dim)
    values = target.constrain(z)
    assert values["local"].shape == (5, 3)
    assert values["weights"].shape == (5, 3)
    assert values["corr"].shape == (5, 2, 2)
    torch.testing.assert_close(target.unconstrain(values), z)

    def free_coordinates(row: torch.Tensor) -> torch.Tensor:
        x = target.constrain(row[None])
        free = [x["rate"], x["fraction"], x["weights"][:, 0], x["weights"][:, 1]]
        return torch.cat([*free, x["corr"][:, 1, 0], x["local"][0]])

    for row in z:
        jacobian = torch.autograd.functional.jacobian(free_coordinates, row)
        expected = torch.linalg.slogdet(jacobian)[1]
        torch.testing.assert_close(target.log_abs_det(row[None])[0], expected)


def test_log_likelihood_is_pointwise_and_leaves_factors_out() -> None:
    y = torch.tensor([0.3, -1.0, 2.0])
    target = Target(two_level, (y,))
    z = torch.randn(4, target.dim)
    values = target.constrain(z)
    loc = values["local"] * values["weights"][:, :1] + values["fraction"][:, None]
    expected = dist.Normal(loc, values["rate"][:, None]).log_prob(y)
    for evaluation in Evaluation:
        target.evaluation = evaluation
        found = target.log_likelihood(z)
        assert list(found) == ["y"]
        torch.testing.assert_close(found["y"], expected)


def test_improper_prior_and_kwargs() -> None:
    def model(*, y: torch.Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0).mask(False))
        scale = pyro.sample("scale", dist.ImproperUniform(constraints.positive, (), ()))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(loc, scale), obs=y)

    y = torch.tensor([1.0, 2.0])
    target = Target(model, kwargs={"y": y})
    z = torch.tensor([[0.4, 0.2]])
    expected = dist.Normal(0.4, math.exp(0.2)).log_prob(y).sum() + 0.2
    torch.testing.assert_close(target.log_prob(z)[0], expected)


def test_a_model_that_does_not_broadcast_goes_through_vmap() -> None:
    features = torch.randn(20, 3)

    def model(y: torch.Tensor) -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("n", 20):
            pyro.sample("y", dist.Bernoulli(logits=features @ beta), obs=y)

    y = (torch.rand(20) < 0.5).to(features)
    target = Target(model, (y,))
    assert target.evaluation is Evaluation.VMAP
    assert target.vectorized
    z = torch.randn(7, 3)
    logits = z @ features.T
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    expected = expected + dist.Bernoulli(logits=logits).log_prob(y).sum(-1)
    torch.testing.assert_close(target.log_prob(z), expected)
    grad = torch.autograd.functional.jacobian(lambda u: target.log_prob(u).sum(), z)
    torch.testing.assert_close(target.log_prob_and_grad(z)[1], grad)


def test_a_value_dependent_branch_falls_back_to_a_loop_with_one_warning() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", x if float(x) > 0 else -2 * x)

    with pytest.warns(UserWarning, match="one by one") as caught:
        target = Target(model)
    assert len(caught) == 1
    assert not target.vectorized
    z = torch.tensor([[1.0], [-1.0]])
    expected = dist.Normal(0.0, 1.0).log_prob(z[:, 0]) + torch.tensor([1.0, 2.0])
    torch.testing.assert_close(target.log_prob(z), expected)
    assert target.log_prob(z[:0]).shape == (0,)


def test_a_model_wrong_under_broadcasting_is_not_broadcast() -> None:
    """The mean runs over the draws as well: no error, but another number."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", -((x - x.mean() + 1) ** 2))

    assert Target(model).evaluation is Evaluation.VMAP


def test_guard_bisects_a_raising_batch() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        eye = torch.eye(2).expand(*x.shape[:-1], 2, 2)
        factor = torch.linalg.cholesky(eye * (4.0 - x[..., :1, None]))  # raises beyond 4
        pyro.factor("f", -factor[..., 0, 0])

    target = Target(model)
    z = torch.randn(9, 2).clamp(max=3.0)
    z[3, 0], z[7, 1], z[8, 0] = 5.0, torch.nan, 9.0
    log_p, grad = target.log_prob_and_grad(z)
    bad = torch.tensor([3, 7, 8])
    assert torch.isinf(log_p[bad]).all()
    assert (grad[bad] == 0).all()
    good = torch.tensor([0, 1, 2, 4, 5, 6])
    torch.testing.assert_close(log_p[good], target.log_prob(z[good]))
    assert torch.isfinite(grad).all()
    assert "LinAlgError" in target.last_error


def test_validation_is_off_inside_and_restored() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, torch.relu(x)), obs=torch.tensor(1.0))

    with pyro.validation_enabled(True):
        log_p, grad = Target(model).log_prob_and_grad(torch.tensor([[-1.0], [2.0]]))
        assert pyro.distributions.is_validation_enabled()
    assert torch.isinf(log_p[0])
    assert torch.isfinite(log_p[1])
    assert torch.isfinite(grad).all()


def test_modules_and_parameters_are_constants() -> None:
    layer = nn.Linear(1, 1)

    def model() -> None:
        pyro.module("layer", layer)
        shift = pyro.param("shift", torch.tensor(2.0))
        x = pyro.sample("x", dist.Normal(shift, 1.0).expand([1]).to_event(1))
        pyro.sample("y", dist.Normal(layer(x), 1.0).to_event(1), obs=torch.ones(1))

    target = Target(model)
    z = torch.randn(3, 1)
    expected = dist.Normal(2.0, 1.0).log_prob(z) + dist.Normal(layer(z), 1.0).log_prob(
        torch.ones(1)
    )
    torch.testing.assert_close(target.log_prob(z), expected[:, 0])
    assert not target.log_prob_and_grad(z)[0].requires_grad
    assert layer.weight.grad is None


def test_masked_out_data_may_be_missing() -> None:
    y = torch.tensor([1.0, torch.nan, 0.0])
    seen = torch.isfinite(y)

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 3), pyro.poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    log_p = Target(model).log_prob(torch.zeros(2, 1))
    expected = dist.Normal(0.0, 1.0).log_prob(torch.tensor([0.0, 1.0, 0.0])).sum()
    torch.testing.assert_close(log_p, expected.expand(2))


def test_global_random_state_and_parameter_store_are_left_alone() -> None:
    state = torch.random.get_rng_state()
    Target(two_level, (torch.zeros(2),))
    assert torch.equal(state, torch.random.get_rng_state())
    assert len(pyro.get_param_store()) == 0


def test_float32_model() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Gamma(torch.tensor(2.0, dtype=torch.float32), 1.0))
        pyro.factor("f", -x)

    target = Target(model)
    assert target.dtype == torch.float32
    assert target.log_prob(torch.zeros(2, 1, dtype=torch.float32)).dtype == torch.float32


def _sample(name: str, fn: dist.Distribution, **kwargs: object) -> object:
    return lambda: pyro.sample(name, fn, **kwargs)


def _plate(size: int, subsample_size: int | None) -> object:
    def model() -> None:
        with pyro.plate("people", size, subsample_size=subsample_size):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    return model


def _dependent() -> None:
    upper = pyro.sample("upper", dist.Gamma(2.0, 1.0))
    pyro.sample("below", dist.Uniform(torch.zeros_like(upper), upper))


def _growing() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample(f"site {float(x):.6f}", dist.Normal(0.0, 1.0))


def _random() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("f", x * torch.randn(()))


def _observed(value: torch.Tensor, fn: dist.Distribution) -> object:
    def model() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(value)):
            pyro.sample("y", fn, obs=value)

    return model


BAD_MODELS = {
    "discrete": (_sample("k", dist.Categorical(torch.ones(3))), "`k` is discrete"),
    "no latents": (
        _sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0)),
        "at least one latent sample site; got none",
    ),
    "subsampled": (_plate(10, 3), "Plate `people` must not be subsampled; got 3 of 10"),
    "empty plate": (_plate(0, None), "Plate `people` must have at least one item; got size 0"),
    "dependent support": (_dependent, "latent site `below` depends on other latent sites"),
    "changing sites": (_growing, "same latent sites in every run"),
    "random": (_random, "without randomness of its own"),
    "non-finite data": (
        _observed(torch.tensor([1.0, torch.nan, torch.inf]), dist.Normal(0.0, 1.0)),
        "`y` must have finite data; got 2 non-finite of 3",
    ),
    "data outside support": (
        _observed(torch.tensor([1.0, -1.0]), dist.Poisson(2.0)),
        "`y` must lie in its support .* got 1 of 2",
    ),
    "no elements": (
        _sample("x", dist.Normal(torch.zeros(0), 1.0).to_event(1)),
        "`x` must have at least one element",
    ),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_refusals_name_the_culprit(name: str) -> None:
    model, message = BAD_MODELS[name]
    with pytest.raises((ValueError, NotImplementedError), match=message):
        Target(model)


def test_bad_arguments() -> None:
    target = Target(two_level, (torch.zeros(2),))
    with pytest.raises(ValueError, match=r"`z` must have shape \(num_draws, 7\); got \(3,\)"):
        target.log_prob(torch.zeros(3))
    with pytest.raises(ValueError, match="got no `rate`"):
        target.unconstrain({})
    values = target.constrain(torch.zeros(2, 7))
    values["local"] = values["local"][:, :1]
    with pytest.raises(ValueError, match=r"`values\['local'\]` must have shape"):
        target.unconstrain(values)
    with pytest.raises(ValueError, match="`max_plate_nesting` must be at least 1"):
        Target(two_level, (torch.zeros(2),), max_plate_nesting=0)


def test_deeper_plate_nesting_changes_nothing() -> None:
    y = torch.tensor([0.5, 1.0])
    z = torch.randn(3, 7)
    wide = Target(two_level, (y,), max_plate_nesting=3)
    torch.testing.assert_close(wide.log_prob(z), Target(two_level, (y,)).log_prob(z))
