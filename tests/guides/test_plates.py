from __future__ import annotations

import itertools
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_models import DATA, affine, hierarchy, hierarchy_posterior, shake, subsampled
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from flowvi.flows import realnvp
from flowvi.guides import AutoFlow, AutoPlateFlow
from flowvi.guides._local import ItemMap
from flowvi.objectives import STL
from flowvi.transforms import TriangularAffine

small = partial(realnvp, num_layers=2, hidden_dims=(8,))


def plate_flow(model: object, **options: object) -> AutoPlateFlow:
    return AutoPlateFlow(model, small, small, **options)


def nested(x: Tensor) -> None:
    """Latents at three levels: global, per school, per pupil in a school."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("schools", 2, dim=-1):
        school = pyro.sample("school", dist.Normal(mu.sum(-1), 0.7))
        with pyro.plate("pupils", 3, dim=-2):
            pupil = pyro.sample("pupil", dist.Normal(school, 0.5))
            pyro.sample("x", dist.Normal(pupil, 0.4), obs=x)


def gaussian_of(log_joint: object, dim: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a quadratic log-density, by differentiating it twice."""
    zero = torch.zeros(dim)
    hessian = torch.autograd.functional.hessian(log_joint, zero)
    gradient = torch.autograd.functional.jacobian(log_joint, zero)
    covariance = torch.linalg.inv(-hessian)
    return covariance @ gradient, covariance


def shown(index: Tensor, x: Tensor) -> pyro.plate:
    return pyro.plate("items", 6, subsample=index, dim=-1)


def test_a_gaussian_hierarchical_posterior_is_represented_exactly() -> None:
    mean, covariance = hierarchy_posterior(DATA)
    guide = plate_flow(hierarchy).initialize(DATA)
    guide.whiten(mean, torch.linalg.cholesky(covariance))
    z = torch.randn(4, 7)
    exact = dist.MultivariateNormal(mean, covariance).log_prob(z)
    torch.testing.assert_close(guide.log_q({"mu": z[:, 0], "z": z[:, 1:]}), exact)
    # At the posterior the log-weight is the log-evidence, whatever the draw.
    losses = [Trace_ELBO().loss(hierarchy, guide, DATA) for _ in range(3)]
    evidence = dist.MultivariateNormal(
        torch.zeros(6), 1.25 * torch.eye(6) + torch.ones(6, 6)
    ).log_prob(DATA)
    torch.testing.assert_close(-torch.tensor(losses), evidence.expand(3))


def test_nested_plates_are_exact_too() -> None:
    x = torch.randn(3, 2)

    def split(z: Tensor) -> dict[str, Tensor]:
        return {"mu": z[..., :2], "school": z[..., 2:4], "pupil": z[..., 4:].unflatten(-1, (3, 2))}

    def log_joint(z: Tensor) -> Tensor:
        return poutine.trace(poutine.condition(nested, split(z))).get_trace(x).log_prob_sum()

    mean, covariance = gaussian_of(log_joint, 10)
    guide = plate_flow(nested).initialize(x)
    guide.whiten(mean, torch.linalg.cholesky(covariance))
    z = torch.randn(5, 10)
    exact = dist.MultivariateNormal(mean, covariance).log_prob(z)
    torch.testing.assert_close(guide.log_q(split(z)), exact)
    shake(guide)
    trace = poutine.trace(guide).get_trace(x)
    values = {n: trace.nodes[n]["value"] for n in ("mu", "school", "pupil")}
    torch.testing.assert_close(guide.log_q(values), trace.log_prob_sum())
    loss = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=2)
    assert torch.tensor(loss.loss(nested, guide, x)).isfinite()
    assert guide.median(x)["pupil"].shape == (3, 2)


def test_minibatches_give_the_full_loss_on_average() -> None:
    mean, covariance = hierarchy_posterior(DATA)
    full = plate_flow(hierarchy).initialize(DATA)
    full.whiten(mean, torch.linalg.cholesky(covariance))
    shake(full, 0.1)
    part = plate_flow(subsampled(2)).initialize(DATA)
    part.load_state_dict(full.state_dict())
    noise = Trace_ELBO(num_particles=600, vectorize_particles=True, max_plate_nesting=1)
    whole = torch.tensor([noise.loss(hierarchy, full, DATA) for _ in range(10)])
    # All 15 batches, each as likely, so only the noise of the draws is left.
    losses = []
    for batch in itertools.combinations(range(6), 2):
        part.create_plates = partial(shown, torch.tensor(batch))
        losses.append([noise.loss(subsampled(2), part, DATA) for _ in range(4)])
    losses = torch.tensor(losses)
    error = (losses.var(1).mean() / losses.numel() + whole.var() / len(whole)).sqrt()
    assert losses.mean(1).std() > 0.5
    assert abs(losses.mean() - whole.mean()) < 4 * error


def test_a_minibatch_uses_and_moves_the_rows_of_its_items() -> None:
    guide = plate_flow(subsampled(2)).initialize(DATA)
    shake(guide)
    fixed = poutine.condition(guide, data={"items": torch.tensor([4, 1])})
    trace = poutine.trace(fixed).get_trace(DATA)
    trace.compute_log_prob()
    sum(site["log_prob_sum"] for site in trace.nodes.values() if "log_prob_sum" in site)
    site = trace.nodes["_AutoPlateFlow_items_latent"]
    site["fn"].log_prob(site["value"].detach() + 0.1).sum().backward()
    touched = guide.local_flows[0].items.grad.abs().sum(-1) > 0
    assert touched.nonzero().flatten().tolist() == [1, 4]
    assert site["scale"] == 3.0
    assert trace.nodes["z"]["scale"] == 3.0


def test_item_map_against_autograd() -> None:
    body = TriangularAffine(2, context_dim=3)
    shake(body)
    item = ItemMap(body)
    x, context = torch.randn(4, 2), torch.randn(4, item.context_dim)
    y, ladj = item.call_and_ladj(x, context)
    back, inverse_ladj = item.inverse_and_ladj(y, context)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_ladj, -ladj)
    for i in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda v, i=i: item(v, context[i]), x[i])
        torch.testing.assert_close(jacobian.slogdet()[1], ladj[i])
        score = torch.randn(2)
        pushed = item.call_ladj_and_score(x[i], score, context[i])[2]
        torch.testing.assert_close(pushed, torch.linalg.solve(jacobian.T, score))


def test_globals_only_and_locals_only() -> None:
    def only_global() -> None:
        pyro.sample("mu", dist.Gamma(2.0, 1.0))

    def only_local() -> None:
        with pyro.plate("items", 5, subsample_size=2):
            pyro.sample("z", dist.Dirichlet(torch.ones(3)))

    for model, name, shape in ((only_global, "mu", (3,)), (only_local, "z", (3, 5, 3))):
        guide = plate_flow(model, init_scale=0.5).initialize()
        shake(guide)
        values = dist.Gamma(2.0, 1.0).sample(shape)
        values = values / values.sum(-1, keepdim=True) if name == "z" else values
        assert guide.log_q({name: values}).shape == (3,)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        assert torch.tensor(svi.step()).isfinite()
    joint = AutoFlow(only_global, small).initialize()
    single = plate_flow(only_global).initialize()
    single.load_state_dict(joint.state_dict())
    value = {"mu": torch.tensor([0.5, 2.0])}
    torch.testing.assert_close(single.log_q(value), joint.log_q(value))


def test_two_crossed_plates_with_particles() -> None:
    def model() -> None:
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        rows, columns = pyro.plate("rows", 4, 2, dim=-2), pyro.plate("columns", 3, dim=-1)
        with rows:
            r = pyro.sample("r", dist.Normal(g, 1.0))
        with columns:
            c = pyro.sample("c", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with rows, columns:
            pyro.sample("rc", dist.LogNormal(r + c.sum(-1), 1.0))

    guide = plate_flow(model).initialize()
    shake(guide)
    for vectorize in (False, True):
        loss = Trace_ELBO(num_particles=4, vectorize_particles=vectorize, max_plate_nesting=2)
        assert torch.tensor(loss.loss(model, guide)).isfinite()
    medians = {n: tuple(v.shape) for n, v in guide.median().items()}
    assert medians == {"g": (), "r": (4, 1), "c": (3, 2), "rc": (4, 3)}


def test_a_subsample_chosen_by_the_model() -> None:
    def model(x: Tensor, index: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 6, subsample=index):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    index = torch.tensor([5, 0])
    with pytest.raises(NotImplementedError, match="Plate `items`.*`z`.*Pass create_plates"):
        plate_flow(model).initialize(DATA[index], index)
    guide = plate_flow(
        model, create_plates=lambda x, index: pyro.plate("items", 6, subsample=index, dim=-1)
    ).initialize(DATA[index], index)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    before = guide.local_flows[0].items.detach().clone()
    for batch in (index, torch.tensor([3, 0, 5])):
        svi.step(DATA[batch], batch)
    moved = (guide.local_flows[0].items != before).any(-1)
    assert moved.nonzero().flatten().tolist() == [0, 3, 5]
    wrong = plate_flow(model, create_plates=lambda x, index: pyro.plate("items", 7, dim=-1))
    with pytest.raises(ValueError, match="Plate `items` must have 6 items.*got 7"):
        wrong(DATA[index], index)


def test_refusals() -> None:
    def outside() -> None:
        with pyro.validation_enabled(False):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))

    with pytest.raises(
        NotImplementedError, match="`z` has batch dimension -1 outside every plate"
    ):
        plate_flow(outside).initialize()
    guide = plate_flow(subsampled(2)).initialize(DATA)
    with pytest.raises(NotImplementedError, match="Plate `items` of site `z` is subsampled"):
        guide.whiten(torch.zeros(7), torch.eye(7))
    with pytest.raises(ValueError, match=r"`loc` must have shape \(7,\); got \(2,\)"):
        plate_flow(hierarchy).initialize(DATA).whiten(torch.zeros(2), torch.eye(7))
    with pytest.raises(
        ValueError, match="`embedding_dim` must be an integer of at least 1; got 0"
    ):
        plate_flow(hierarchy, embedding_dim=0)
    with pytest.raises(TypeError, match="`local_recipe` must be a function that makes a Flow"):
        AutoPlateFlow(hierarchy, local_recipe=3)
    with pytest.raises(ValueError, match="Plate `items` must hold at least one item; got size 0"):
        plate_flow(hierarchy).initialize(DATA[:0])


def train(model: object, guide: AutoPlateFlow, x: Tensor, steps: int, lr: float) -> None:
    optimizer = pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.01 ** (1 / steps)})
    svi = SVI(model, guide, optimizer, STL(num_particles=8, max_plate_nesting=1))
    for _ in range(steps):
        svi.step(x)


def moments(guide: AutoPlateFlow, num_draws: int) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        draws = guide._constrained_draws(num_draws)
    z = torch.cat([draws["mu"][:, None], draws["z"]], -1)
    return z.mean(0), z.std(0)


def test_subsampled_local_posteriors_are_recovered() -> None:
    mean, covariance = hierarchy_posterior(DATA)
    guide = AutoPlateFlow(subsampled(3), affine, affine, init_scale=0.5).initialize(DATA)
    train(subsampled(3), guide, DATA, 600, 0.06)
    got_mean, got_sd = moments(guide, 20_000)
    sd = covariance.diagonal().sqrt()
    assert (got_sd[1:] / sd[1:] - 1).abs().max() < 0.05
    assert abs(got_sd[0] / sd[0] - 1) < 0.15
    assert ((got_mean - mean) / sd).abs().max() < 0.2


@pytest.mark.slow
def test_fifty_items_in_batches_of_five() -> None:
    x = 0.7 + 2**0.5 * torch.randn(50)

    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 50, subsample_size=5) as index:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    mean, covariance = hierarchy_posterior(x, noise=1.0)
    guide = AutoPlateFlow(model, init_scale=0.5).initialize(x)
    train(model, guide, x, 2500, 0.03)
    got_mean, got_sd = moments(guide, 50_000)
    sd = covariance.diagonal().sqrt()
    assert (got_sd[1:] / sd[1:] - 1).abs().max() < 0.03
    assert ((got_mean - mean) / sd).abs().max() < 0.2
