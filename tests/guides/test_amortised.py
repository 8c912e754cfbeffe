from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_models import DATA, hierarchy, shake, subsampled
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor, nn

from flowvi.flows import realnvp
from flowvi.guides import AmortizedFlow
from flowvi.objectives import STL

small = partial(realnvp, num_layers=2, hidden_dims=(8,))
PAIRS = torch.tensor([[0.5, -1.0], [2.0, 0.3], [-0.7, 0.1]], dtype=torch.float64)


def pairs(x: Tensor) -> None:
    """Two correlated latents per pair of observations; the posterior is linear in the data."""
    mix = torch.tensor([[1.0, 0.6], [0.0, 0.8]])
    with pyro.plate("items", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ mix.T, 0.6).to_event(1), obs=x)


def encoder(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, width))


def test_the_posterior_of_new_data_is_recovered_without_training() -> None:
    guide = AmortizedFlow(pairs, nn.Linear(2, 4), small, init_scale=0.5).initialize(PAIRS)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.99})
    svi = SVI(pairs, guide, optimizer, STL(2, max_plate_nesting=1))
    for _ in range(350):
        svi.step(torch.randn(32, 2) * 1.4)
    mix = torch.tensor([[1.0, 0.6], [0.0, 0.8]])
    covariance = torch.linalg.inv(torch.eye(2) + mix.T @ mix / 0.36)
    mean = PAIRS @ mix @ covariance / 0.36
    with pyro.plate("draws", 20_000, dim=-2), torch.no_grad():
        z = guide(PAIRS)["z"]
    sd = covariance.diagonal().sqrt()
    assert ((z.mean(0) - mean) / sd).abs().max() < 0.15
    for i in range(3):
        assert ((z[:, i].T.cov() - covariance) / sd / sd[:, None]).abs().max() < 0.15


def test_other_numbers_of_items() -> None:
    guide = AmortizedFlow(hierarchy, encoder(), small, small).initialize(DATA)
    shake(guide)
    for size in (6, 2, 1, 9):
        x = torch.randn(size)
        trace = poutine.trace(guide).get_trace(x)
        assert trace.nodes["z"]["value"].shape == (size,)
        values = {n: trace.nodes[n]["value"] for n in ("mu", "z")}
        torch.testing.assert_close(guide.log_q(values, x), trace.log_prob_sum())
        assert guide.median(x)["z"].shape == (size,)
        assert Predictive(hierarchy, guide=guide, num_samples=3)(x)["z"].shape == (3, size)


@pytest.mark.parametrize("whole", [True, False])
def test_subsampling_with_the_whole_data_or_with_a_batch(whole: bool) -> None:
    def batch_model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 6, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    model, x = (subsampled(2), DATA) if whole else (batch_model, DATA[:2])
    guide = AmortizedFlow(model, encoder(), small, small).initialize(x)
    shake(guide)
    trace = poutine.trace(guide).get_trace(x)
    trace.compute_log_prob()
    site = trace.nodes["_AmortizedFlow_items_latent"]
    assert site["scale"] == 3.0
    index = trace.nodes["items"]["value"]
    context = guide.encoder(x)
    rows = context[index] if whole else context
    standard = guide.whitening.inverse_and_ladj(trace.nodes[guide.latent_name]["value"])[0]
    law = guide.local_flows[0](torch.cat([standard.expand(2, 1), rows], -1))
    torch.testing.assert_close(law.log_prob(site["value"]), site["fn"].log_prob(site["value"]))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert torch.tensor(svi.step(x)).isfinite()


def test_refusals() -> None:
    def no_plate(x: Tensor) -> None:
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    def two_plates(x: Tensor) -> None:
        for name in ("a", "b"):
            with pyro.plate(name, len(x)):
                pyro.sample(f"z_{name}", dist.Normal(0.0, 1.0))

    with pytest.raises(NotImplementedError, match=r"exactly one plate; got plates \[\]"):
        AmortizedFlow(no_plate, encoder(), small).initialize(DATA)
    with pytest.raises(NotImplementedError, match=r"exactly one plate; got plates \['a', 'b'\]"):
        AmortizedFlow(two_plates, encoder(), small).initialize(DATA)
    with pytest.raises(ValueError, match=r"`encoder` must give shape \(6, 4\).*got \(3, 4\)"):
        AmortizedFlow(hierarchy, lambda x: torch.zeros(3, 4), small).initialize(DATA)
    with pytest.raises(
        ValueError, match=r"`encoder` must give shape \(items, context_dim\).*\(6,\)"
    ):
        AmortizedFlow(hierarchy, lambda x: x, small).initialize(DATA)
    with pytest.raises(ValueError, match="make a flow with context_dim 5; got 0"):
        AmortizedFlow(hierarchy, encoder(), lambda d, c: small(d), small).initialize(DATA)
    with pytest.raises(TypeError, match="`encoder` must be callable; got int"):
        AmortizedFlow(hierarchy, 3)
    guide = AmortizedFlow(hierarchy, lambda x: x[:, None].expand(-1, len(x)), small).initialize(
        DATA
    )
    with pytest.raises(ValueError, match=r"`encoder` must give shape \(2, 6\).*got \(2, 2\)"):
        guide(DATA[:2])
