from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from flowvi.objectives import ELBO, item_log_weights, log_weights


def runs_of(model, guide, num_particles=3, *, vectorize_particles=True, nesting=float("inf")):
    objective = ELBO(
        num_particles, vectorize_particles=vectorize_particles, max_plate_nesting=nesting
    )
    objective._joins_runs = True
    traces, batch = objective._runs(model, guide, (), {})
    runs = [log_weights(m, g, max_dim=objective._max_dim) for m, g in traces]
    return traces, runs, batch, objective._particle_dim


def items_of(model, guide, *args, **kwargs):
    _, runs, batch, dim = runs_of(model, guide, *args, **kwargs)
    return item_log_weights(runs, batch, dim, "IWAE")


def local_model(size=20, batch=5, scale=1.0, mask=None):
    x = torch.linspace(-1, 1, size)

    def model():
        with pyro.poutine.scale(scale=scale), pyro.plate("data", size, batch) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(True if mask is None else mask[index]))
            with pyro.plate("pixels", 2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[index].expand(2, -1))

    def guide():
        with pyro.poutine.scale(scale=scale), pyro.plate("data", size, batch) as index:
            law = dist.Normal(torch.full((len(index),), 0.3), 0.8)
            pyro.sample("z", law.mask(True if mask is None else mask[index]))

    return model, guide, x


def expected_items(trace, x):
    index = trace.nodes["data"]["value"]
    z = trace.nodes["z"]["value"].reshape(-1, len(index))
    normal = dist.Normal
    likelihood = 2 * normal(z, 1.0).log_prob(x[index])
    return likelihood + normal(0.0, 1.0).log_prob(z) - normal(0.3, 0.8).log_prob(z)


@pytest.mark.parametrize("vectorize_particles", [True, False])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_items_are_the_common_plates(vectorize_particles, scale):
    model, guide, x = local_model(scale=scale)
    traces, runs, batch, dim = runs_of(model, guide, vectorize_particles=vectorize_particles)
    items = item_log_weights(runs, batch, dim, "IWAE")
    assert items.scale == 4 * scale
    assert [f.name for f in items.plates] == ["data"]
    assert items.value.shape == (3, 5)
    expected = torch.cat([expected_items(g, x) for _, g in traces])
    torch.testing.assert_close(items.value, expected)
    indices = [g.nodes["data"]["value"] for _, g in traces]
    assert all(torch.equal(indices[0], i) for i in indices)
    torch.testing.assert_close(items.total(torch.ones(5)), torch.tensor(20.0 * scale))


def test_masked_items_have_no_latent_terms():
    mask = torch.arange(20) % 2 == 0
    model, guide, x = local_model(mask=mask)
    ((_, trace),), runs, batch, dim = runs_of(model, guide)
    items = item_log_weights(runs, batch, dim, "IWAE")
    index, z = trace.nodes["data"]["value"], trace.nodes["z"]["value"].reshape(3, -1)
    likelihood = 2 * dist.Normal(z, 1.0).log_prob(x[index])
    expected = torch.where(mask[index], expected_items(trace, x), likelihood)
    torch.testing.assert_close(items.value, expected)


def two_plates():
    def model():
        with pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(4, 3))

    def guide():
        with pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 3, dim=-1):
            pyro.sample("z", dist.Normal(0.1, 1.0))

    return model, guide


def test_items_of_two_plates():
    items = items_of(*two_plates())
    assert items.value.shape == (3, 4, 3)
    assert [f.name for f in items.plates] == ["rows", "columns"]
    assert items_of(*two_plates(), 1).value.shape == (1, 4, 3)


def global_model(size=6, batch=None):
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size, batch) as index:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(len(index)))

    def guide():
        pyro.sample("mu", dist.Normal(0.2, 0.9))
        with pyro.plate("data", size, batch):
            pyro.sample("z", dist.Normal(0.1, 0.7))

    return model, guide


@pytest.mark.parametrize("vectorize_particles", [True, False])
def test_a_global_latent_makes_one_item(vectorize_particles):
    traces, runs, batch, dim = runs_of(*global_model(), vectorize_particles=vectorize_particles)
    items = item_log_weights(runs, batch, dim, "IWAE")
    assert (items.plates, items.scale) == ((), 1.0)
    expected = []
    for model_trace, guide_trace in traces:
        for trace in (model_trace, guide_trace):
            trace.compute_log_prob()
        sums = [
            sum(
                site["log_prob"].reshape(batch, -1).sum(-1)
                for name, site in trace.nodes.items()
                if name in ("mu", "z", "x")
            )
            for trace in (model_trace, guide_trace)
        ]
        expected.append(sums[0] - sums[1])
    torch.testing.assert_close(items.value, torch.cat(expected))


def test_an_observation_outside_the_plate_makes_one_item_or_is_refused():
    def model(batch):
        with pyro.plate("data", 6, batch):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("sum", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(1.0))

    def guide(batch):
        with pyro.plate("data", 6, batch):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    items = items_of(lambda: model(None), lambda: guide(None), 1)
    assert items.value.shape == (1,)
    with pytest.raises(NotImplementedError, match="site `z` has 3 and site `sum` has 1.*`data`"):
        items_of(lambda: model(2), lambda: guide(2), 1)


def test_different_scales_are_refused_by_name():
    message = (
        r"IWAE exponentiates log-weights, so all sites must have one scale; site `mu` has 1 and "
        r"site `z` has 3 \(plate `data`\)\. Use ELBO or STL, or the full batch\."
    )
    with pytest.raises(NotImplementedError, match=message):
        items_of(*global_model(6, 2))


def test_poutine_scale_on_one_site_is_refused():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.poutine.scale(scale=0.1):
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(NotImplementedError, match=r"site `x` has 0\.1 \(poutine\.scale\)"):
        items_of(model, guide)


def weighted(model_weights, guide_weights):
    def model():
        with pyro.plate("data", 4), pyro.poutine.scale(scale=model_weights):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(4))

    def guide():
        with pyro.plate("data", 4), pyro.poutine.scale(scale=guide_weights):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    return model, guide


def test_one_weight_per_item():
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0])
    items = items_of(*weighted(weights, weights.clone()))
    assert items.value.shape == (3, 4)
    torch.testing.assert_close(items.scale, weights)
    with pytest.raises(NotImplementedError, match="site `z` has a tensor.*poutine.scale"):
        items_of(*weighted(weights, weights + 1))


def test_sequential_subsampled_plate_is_refused():
    def program(observe):
        def run():
            for i in pyro.plate("steps", 6, 2):
                z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
                if observe:
                    pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

        return run

    with pytest.raises(NotImplementedError, match="in the sequential subsampled plate `steps`"):
        items_of(program(True), program(False), 1, nesting=0)


class Estimate(dist.Normal):
    is_log_ratio_estimate = True


def test_an_estimate_of_the_log_ratio_is_refused():
    def model():
        pyro.sample("path", Estimate(torch.zeros(2), 1.0).to_event(1))

    def guide():
        pyro.sample("path", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    message = "site `path` draws from Estimate, whose .* Use the grid path SDEPath, or ELBO"
    with pytest.raises(NotImplementedError, match=message):
        items_of(model, guide)


def test_no_site():
    with pytest.raises(ValueError, match="`model` must have at least one sample site; got none"):
        item_log_weights([[]], 1, -1, "IWAE")
