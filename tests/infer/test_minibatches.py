from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.utils.data import DataLoader, TensorDataset

from flowvi.infer import StratifiedMinibatches, fit, stratified_indices


@pytest.mark.parametrize(("size", "number"), [(7, 3), (12, 4), (5, 5), (9, 1), (10, 7)])
def test_every_index_is_equally_likely_and_drawn_once(size, number):
    # 4000 draws; four standard errors of a count.
    draws = torch.stack([stratified_indices(size, number) for _ in range(4000)])
    assert all(len(row.unique()) == number for row in draws[:500])
    counts = draws.flatten().bincount(minlength=size).double()
    share = number / size
    error = (4000 * share * (1 - share)) ** 0.5
    assert ((counts - 4000 * share).abs() <= 4 * error).all()


def test_large_sizes_stay_in_range():
    index = stratified_indices(2**40, 1000)
    assert index.min() >= 0
    assert index.max() < 2**40
    assert len(index.unique()) == 1000
    jumps = (index.diff() < 0).sum()
    assert jumps <= 1


def test_bad_number():
    with pytest.raises(ValueError, match=r"`num_indices` must be from 1 to 5 \(size\); got 6"):
        stratified_indices(5, 6)


def test_minibatch_elbo_is_unbiased_for_the_full_one():
    x = torch.randn(10).cumsum(0)

    def model(size):
        with pyro.plate("data", 10, subsample_size=size) as index:
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[index])

    def guide(size):
        """Nothing is latent."""

    full = Trace_ELBO().loss(model, guide, 10)
    with StratifiedMinibatches():
        losses = torch.tensor([Trace_ELBO().loss(model, guide, 3) for _ in range(1000)])
    assert abs(losses.mean() - full) < 4 * losses.std() / 1000**0.5


def test_model_and_guide_share_the_minibatch_and_given_ones_stay():
    seen = []

    def model(index=None):
        with pyro.plate("data", 50, subsample_size=5, subsample=index) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=index.double())
        seen.append(index)

    def guide(index=None):
        with pyro.plate("data", 50, subsample_size=5, subsample=index) as index:
            pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
        seen.append(index)

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    with StratifiedMinibatches():
        svi.step()
        svi.step(torch.arange(5))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], torch.arange(5))


def regression(num_rows):
    """Rows whose linear regression has one sharp answer."""
    w = torch.tensor([1.0, -2.0, 0.5])
    x = torch.randn(num_rows, 3)
    return x, x @ w + 0.1 * torch.randn(num_rows), w


def test_fit_on_a_memory_mapped_file(tmp_path):
    x, y, w = regression(20_000)
    rows = torch.cat([x, y[:, None]], 1).numpy()
    path = tmp_path / "rows.f8"
    rows.tofile(path)
    mapped = torch.from_numpy(np.memmap(path, dtype=np.float64, mode="r+", shape=rows.shape))

    def model(data):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(data), subsample_size=100) as index:
            batch = data[index]
            pyro.sample("y", dist.Normal((batch[:, :3] * w).sum(-1), 0.1), obs=batch[:, 3])

    with StratifiedMinibatches():
        result = fit(
            model, AutoNormal(model), mapped, seed=0, lr=0.1, num_steps=150, progress_bar=False
        )
    assert (result.sample(200)["w"].mean(0) - w).abs().max() < 0.05


def test_plate_over_a_data_loader():
    x, y, w = regression(2000)

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", 2000, subsample_size=len(x)):
            pyro.sample("y", dist.Normal((x * w).sum(-1), 0.1), obs=y)

    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    loader = DataLoader(TensorDataset(x, y), batch_size=100, shuffle=True)
    with StratifiedMinibatches():
        for _ in range(8):
            for batch in loader:
                svi.step(*batch)
    loc = pyro.param("AutoNormal.locs.w")
    assert (loc.detach() - w).abs().max() < 0.05
